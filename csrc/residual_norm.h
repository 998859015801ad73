// Scatter-add of one branch's residual, then gather and LayerNorm for the next: what its kernels are given. No
// torch here. Row i of the stream belongs to row branch_row[i] of the branch and next_row[i] of the normalised
// rows, -1 for none, a null table for i itself.
#pragma once

#include <cstdint>

namespace pera_fast {

struct ResidualNorm {
  int64_t rows, dim;
  const float* source;  // [rows, dim], the stream before the addition; may be x
  float* x;             // [rows, dim], and after it
  const void* branch;  // [r, dim], null for none
  bool branch_is_bfloat16;
  const int32_t* branch_row;
  const float* scale;  // [r], null for 1
  // Null where nothing is normalised.
  void* y;  // [s, dim]
  bool y_is_bfloat16;
  const int32_t* next_row;
  const float *weight, *bias;  // [dim]
  float eps;
  void* normalised;          // [s, dim] in y's dtype, before weight and bias; null where it is y or not wanted
  float* inverse_deviation;  // [s], null where no gradient is wanted
  // For the backward pass; weight, scale, normalised and inverse_deviation as above.
  const float* x_gradient;  // of x after the addition, null for 0
  const void* y_gradient;   // null for 0
  float* out;               // gradient of x before it; may be x_gradient
  void* branch_gradient;    // [r, dim] in the branch's dtype
};

}  // namespace pera_fast
