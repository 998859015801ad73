#include "../koleo.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../host_device.h"
#include "checked.h"
#include "isa.h"
#include "tiles.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "koleo_kernel.h"
#include "for_each_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

GramProblem problem_of(const Tensor& v, const Tensor& g, const Tensor& columns) {
  STD_TORCH_CHECK(v.dim() == 2 && columns.dim() == 2, "v, columns: expected two axes");
  GramProblem p{};
  p.prototypes = v.size(0);
  p.dim = v.size(1);
  p.stride = columns.size(1);
  STD_TORCH_CHECK(p.stride % 16 == 0, "columns: expected whole vectors of 16 in a row");
  p.v = floats(v, "v", p.prototypes * p.dim);
  p.g = floats(g, "g", p.prototypes);
  p.columns = floats(columns, "columns", p.dim * p.stride);
  return p;
}

// sum [rows, dim] = hᵀ · v of rows first … first + rows - 1, and what gram_block makes besides. The chunks follow
// one another, so the result does not depend on the number of threads.
void run(GramProblem p, int64_t first, int64_t rows, float* sum) {
  static const auto block_kernel = PERA_FAST_CHOOSE(gram_block);
  static const auto rows_kernel = PERA_FAST_CHOOSE(gram_rows);
  static const auto pack = PERA_FAST_CHOOSE(pack_floats);
  const auto columns = packed_by(pack, p.columns, p.dim, p.stride);
  const auto right = packed_by(pack, p.right, p.right == nullptr ? 0 : (p.by_rows ? p.rows : p.dim), p.dim);
  p.columns = columns.get();
  p.right = right.get();
  std::fill_n(sum, rows * p.dim, 0.0f);
  const int64_t chunk = chunk_of_stride(p.stride);
  const std::unique_ptr<float[]> h(new float[static_cast<size_t>(chunk * p.stride)]);
  for (int64_t start = 0; start < p.prototypes; start += chunk) {
    const int64_t stop = std::min(p.prototypes, start + chunk);
    torch::stable::parallel_for(start, stop, 256, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> room(p.adds ? new float[static_cast<size_t>(kGramBlock * p.dim)] : nullptr);
      block_kernel(p, start, begin, end, h.get(), room.get());
    });
    for_each_tile(rows, p.dim, [&](int64_t row, int64_t column, int64_t height, int64_t width) {
      rows_kernel(
          p, h.get() + first + row, p.v + start * p.dim + column, height, width, stop - start,
          sum + row * p.dim + column);
    });
  }
}

void gram_forward(const Tensor& v, const Tensor& g, const Tensor& columns, Tensor product) {
  GramProblem p = problem_of(v, g, columns);
  p.rows = product.size(0);
  STD_TORCH_CHECK(p.rows <= p.stride, "product: expected no more rows than columns has");
  floats(product, "product", p.rows * p.dim);
  run(p, 0, p.rows, product.mutable_data_ptr<float>());
}

void gram_backward(
    const Tensor& v, const Tensor& g, const Tensor& columns, const Tensor& right, bool by_rows, bool adds, Tensor dz,
    Tensor dv, Tensor dg) {
  GramProblem p = problem_of(v, g, columns);
  const int64_t half = dz.size(0);
  p.rows = 2 * half;
  STD_TORCH_CHECK(p.rows <= p.stride, "dz: expected no more than half of the rows that columns has");
  p.by_rows = by_rows;
  p.adds = adds;
  p.right = floats(right, "right", (by_rows ? p.rows : p.dim) * p.dim);
  floats(dz, "dz", half * p.dim);
  floats(dv, "dv", p.prototypes * p.dim);
  floats(dg, "dg", p.prototypes);
  p.dv = dv.mutable_data_ptr<float>();
  p.dg = dg.mutable_data_ptr<float>();
  run(p, half, half, dz.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("gram_forward", TORCH_BOX(&pera_fast::gram_forward));
  m.impl("gram_backward", TORCH_BOX(&pera_fast::gram_backward));
}
