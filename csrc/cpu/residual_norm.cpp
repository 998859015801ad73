#include "../residual_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../host_device.h"
#include "checked.h"
#include "isa.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "residual_norm_kernel.h"
#include "for_each_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;

// Rows that are worth a thread.
constexpr int64_t kRows = 32;

// Where each row of the stream lies among `chosen`, -1 for nowhere; empty without `chosen`.
std::vector<int32_t> places(const Maybe& chosen, const char* name, int64_t rows) {
  if (!chosen) return {};
  STD_TORCH_CHECK(
      chosen->scalar_type() == ScalarType::Long && chosen->is_contiguous(), name, ": expected contiguous int64");
  std::vector<int32_t> table(static_cast<size_t>(rows), -1);
  const int64_t* const values = chosen->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < chosen->numel(); ++i) {
    STD_TORCH_CHECK(
        values[i] >= 0 && values[i] < rows, name, ": expected rows from 0 to ", rows - 1, ", got ", values[i]);
    int32_t& place = table[static_cast<size_t>(values[i])];
    STD_TORCH_CHECK(place < 0, name, ": expected each row once, got row ", values[i], " twice");
    place = static_cast<int32_t>(i);
  }
  return table;
}

// [n, dim] float32 or bfloat16 rows.
void check_rows(const Tensor& tensor, const char* name, int64_t n, int64_t dim) {
  STD_TORCH_CHECK(
      (tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16) &&
          tensor.is_contiguous() && tensor.dim() == 2 && tensor.size(0) == n && tensor.size(1) == dim,
      name, ": expected contiguous float32 or bfloat16 [", n, ", ", dim, "]");
}

void* data(const Maybe& tensor) { return tensor ? const_cast<void*>(tensor->const_data_ptr()) : nullptr; }
float* values(const Maybe& tensor, const char* name, int64_t numel) {
  return tensor ? const_cast<float*>(floats(*tensor, name, numel)) : nullptr;
}
int64_t count(const Maybe& chosen, int64_t rows) { return chosen ? chosen->numel() : rows; }
const int32_t* table_of(const Maybe& chosen, const std::vector<int32_t>& places) {
  return chosen ? places.data() : nullptr;
}

void residual_norm_forward(
    const Tensor& source, Tensor x, const Maybe& branch, const Maybe& rows, const Maybe& scale, const Maybe& next_rows,
    const Maybe& weight, const Maybe& bias, double eps, const Maybe& y, const Maybe& normalised,
    const Maybe& inverse_deviation) {
  static const auto kernel = PERA_FAST_CHOOSE(residual_norm_forward);
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [rows, dim]");
  ResidualNorm p{};
  p.rows = x.size(0);
  p.dim = x.size(1);
  p.x = const_cast<float*>(floats(x, "x", p.rows * p.dim));
  p.source = floats(source, "source", p.rows * p.dim);
  const std::vector<int32_t> branch_row = places(rows, "rows", p.rows);
  const std::vector<int32_t> next_row = places(next_rows, "next_rows", p.rows);
  const std::vector<float> ones(static_cast<size_t>(p.dim), 1.0f), zeros(static_cast<size_t>(p.dim));
  p.branch_row = table_of(rows, branch_row);
  p.next_row = table_of(next_rows, next_row);
  if (branch) {
    check_rows(*branch, "branch", count(rows, p.rows), p.dim);
    p.branch_is_bfloat16 = branch->scalar_type() == ScalarType::BFloat16;
    p.scale = values(scale, "scale", branch->size(0));
  }
  p.branch = data(branch);
  if (y) {
    const int64_t n = count(next_rows, p.rows);
    check_rows(*y, "y", n, p.dim);
    p.y_is_bfloat16 = y->scalar_type() == ScalarType::BFloat16;
    p.weight = weight ? values(weight, "weight", p.dim) : ones.data();
    p.bias = bias ? values(bias, "bias", p.dim) : zeros.data();
    p.eps = static_cast<float>(eps);
    if (normalised) {
      check_rows(*normalised, "normalised", n, p.dim);
      STD_TORCH_CHECK(
          normalised->scalar_type() == y->scalar_type() && inverse_deviation,
          "normalised: expected y's dtype, and inverse_deviation");
      p.inverse_deviation = values(inverse_deviation, "inverse_deviation", n);
    }
    // Without weight and bias both are one tensor, to be written once.
    p.normalised = data(normalised) == data(y) ? nullptr : data(normalised);
  }
  p.y = data(y);
  torch::stable::parallel_for(
      0, p.rows, kRows, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void residual_norm_backward(
    const Maybe& x_gradient, const Maybe& y_gradient, const Maybe& rows, const Maybe& scale,
    const Maybe& next_rows, const Maybe& weight, const Maybe& normalised, const Maybe& inverse_deviation,
    Tensor out, const Maybe& branch_gradient, const Maybe& weight_gradient, const Maybe& bias_gradient) {
  static const auto kernel = PERA_FAST_CHOOSE(residual_norm_backward);
  STD_TORCH_CHECK(out.dim() == 2, "out: expected [rows, dim]");
  ResidualNorm p{};
  p.rows = out.size(0);
  p.dim = out.size(1);
  p.out = const_cast<float*>(floats(out, "out", p.rows * p.dim));
  p.x_gradient = values(x_gradient, "x_gradient", p.rows * p.dim);
  const std::vector<int32_t> branch_row = places(rows, "rows", p.rows);
  const std::vector<int32_t> next_row = places(next_rows, "next_rows", p.rows);
  const std::vector<float> ones(static_cast<size_t>(p.dim), 1.0f);
  p.branch_row = table_of(rows, branch_row);
  p.next_row = table_of(next_rows, next_row);
  if (branch_gradient) {
    check_rows(*branch_gradient, "branch_gradient", count(rows, p.rows), p.dim);
    p.branch_is_bfloat16 = branch_gradient->scalar_type() == ScalarType::BFloat16;
    p.scale = values(scale, "scale", branch_gradient->size(0));
  }
  p.branch_gradient = data(branch_gradient);
  if (y_gradient) {
    const int64_t n = count(next_rows, p.rows);
    STD_TORCH_CHECK(
        normalised && inverse_deviation, "y_gradient: expected normalised and inverse_deviation with it");
    check_rows(*y_gradient, "y_gradient", n, p.dim);
    check_rows(*normalised, "normalised", n, p.dim);
    STD_TORCH_CHECK(
        normalised->scalar_type() == y_gradient->scalar_type(), "normalised: expected y_gradient's dtype");
    p.y_is_bfloat16 = y_gradient->scalar_type() == ScalarType::BFloat16;
    p.weight = weight ? values(weight, "weight", p.dim) : ones.data();
    p.inverse_deviation = values(inverse_deviation, "inverse_deviation", n);
  }
  p.y_gradient = data(y_gradient);
  p.normalised = data(normalised);
  // At most 64 slices of rows whatever the number of threads: equal bits.
  const int64_t slice = std::max<int64_t>(kRows, (p.rows + 63) / 64), slices = (p.rows + slice - 1) / slice;
  std::vector<float> partial(static_cast<size_t>(slices * 2 * p.dim));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const sums = partial.data() + i * 2 * p.dim;
      kernel(p, i * slice, std::min(p.rows, (i + 1) * slice), sums, sums + p.dim);
    }
  });
  if (!y_gradient) return;
  float* const sums[] = {
      values(weight_gradient, "weight_gradient", p.dim), values(bias_gradient, "bias_gradient", p.dim)};
  for (int which = 0; which < 2; ++which) {
    if (sums[which] == nullptr) continue;
    std::fill_n(sums[which], p.dim, 0.0f);
    for (int64_t i = 0; i < slices; ++i) {
      for (int64_t k = 0; k < p.dim; ++k) sums[which][k] += partial[static_cast<size_t>((2 * i + which) * p.dim + k)];
    }
  }
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("residual_norm_forward", TORCH_BOX(&pera_fast::residual_norm_forward));
  m.impl("residual_norm_backward", TORCH_BOX(&pera_fast::residual_norm_backward));
}
