// KoLeo through the prototypes' Gram matrix: WᵀW z and its gradients, W = g v / |v|. No torch here.
#pragma once

#include <cstdint>

namespace pera_fast {

constexpr int64_t kGramBlock = 64;  // prototypes that stay in cache

struct GramProblem {
  int64_t prototypes, dim, rows, stride;  // stride: rows rounded up to 16
  const float *v, *g;                     // [prototypes, dim], [prototypes]
  // As `pack` of cpu/product.h leaves them:
  const float* columns;  // [dim, stride], the rows transposed
  // For the gradient of v: v/|v| · g times `right` is that of W. By rows [rows, dim], else [dim, dim].
  const float* right;
  bool by_rows;
  float *dv, *dg;  // [prototypes, dim], [prototypes]; null in the forward pass
  bool adds;       // to dv and dg, rather than writing them
};

}  // namespace pera_fast
