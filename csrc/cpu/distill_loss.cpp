#include "../distill_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "isa.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "distill_loss_kernel.h"
#include "for_each_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Prototypes that are summed together; fixed, so that the result does not depend on the number of threads.
constexpr int64_t kBlock = 256;

const float* floats(const Tensor& tensor, const char* name, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == numel, name,
      ": expected ", numel, " contiguous float32 values");
  return tensor.const_data_ptr<float>();
}

DistillChunk chunk_of(
    const Tensor& teacher, const Tensor& student, const Tensor& scale_teacher, const Tensor& scale_student,
    const Tensor& centre, double inverse_tau_teacher, double inverse_tau_student) {
  const ScalarType dtype = student.scalar_type();
  STD_TORCH_CHECK(
      student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
          student.size(1) == teacher.size(1) && student.is_contiguous() && teacher.is_contiguous(),
      "teacher, student: expected contiguous [prototypes, rows], both alike");
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && teacher.scalar_type() == dtype,
      "teacher, student: expected float32 or bfloat16, both alike");
  const int64_t prototypes = student.size(0);
  DistillChunk a{};
  a.teacher = teacher.const_data_ptr();
  a.student = student.const_data_ptr();
  a.is_bfloat16 = dtype == ScalarType::BFloat16;
  a.prototypes = prototypes;
  a.rows = student.size(1);
  a.scale_teacher = floats(scale_teacher, "scale_teacher", prototypes);
  a.scale_student = floats(scale_student, "scale_student", prototypes);
  a.centre = floats(centre, "centre", prototypes);
  a.inverse_tau_teacher = static_cast<float>(inverse_tau_teacher);
  a.inverse_tau_student = static_cast<float>(inverse_tau_student);
  return a;
}

DistillSums sums_at(float* base, int64_t rows) {
  return {base, base + rows, base + 2 * rows, base + 3 * rows, base + 4 * rows};
}

// Adds `more` to `sums`: each scales to the larger of the two maxima.
void merge(const DistillSums& sums, const DistillSums& more, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    const float max_x = std::max(sums.max_x[i], more.max_x[i]);
    const float old_x = exp_of_negative(sums.max_x[i] - max_x), new_x = exp_of_negative(more.max_x[i] - max_x);
    sums.sum_x[i] = sums.sum_x[i] * old_x + more.sum_x[i] * new_x;
    sums.sum_xy[i] = sums.sum_xy[i] * old_x + more.sum_xy[i] * new_x;
    sums.max_x[i] = max_x;
    const float max_y = std::max(sums.max_y[i], more.max_y[i]);
    sums.sum_y[i] = sums.sum_y[i] * exp_of_negative(sums.max_y[i] - max_y) +
                    more.sum_y[i] * exp_of_negative(more.max_y[i] - max_y);
    sums.max_y[i] = max_y;
  }
}

void distill_sums(
    const Tensor& teacher, const Tensor& student, const Tensor& scale_teacher, const Tensor& scale_student,
    const Tensor& centre, double inverse_tau_teacher, double inverse_tau_student, Tensor state) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_sums);
  const DistillChunk a = chunk_of(
      teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student);
  floats(state, "state", 5 * a.rows);
  const int64_t blocks = (a.prototypes + kBlock - 1) / kBlock;
  std::vector<float> partial(static_cast<size_t>(blocks * 5 * a.rows));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      kernel(
          a, block * kBlock, std::min(a.prototypes, (block + 1) * kBlock),
          sums_at(partial.data() + block * 5 * a.rows, a.rows));
    }
  });
  const DistillSums sums = sums_at(state.mutable_data_ptr<float>(), a.rows);
  for (int64_t block = 0; block < blocks; ++block) {
    merge(sums, sums_at(partial.data() + block * 5 * a.rows, a.rows), a.rows);
  }
}

void distill_gradient(
    const Tensor& teacher, const Tensor& student, const Tensor& scale_teacher, const Tensor& scale_student,
    const Tensor& centre, double inverse_tau_teacher, double inverse_tau_student, const Tensor& log_sum_x,
    const Tensor& log_sum_y, const Tensor& weight, Tensor gradient, Tensor dot) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_gradient);
  DistillChunk a = chunk_of(
      teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student);
  STD_TORCH_CHECK(
      gradient.scalar_type() == student.scalar_type() && gradient.is_contiguous() &&
          gradient.numel() == student.numel() && gradient.const_data_ptr() != student.const_data_ptr(),
      "gradient: expected another contiguous tensor like student");
  a.log_sum_x = floats(log_sum_x, "log_sum_x", a.rows);
  a.log_sum_y = floats(log_sum_y, "log_sum_y", a.rows);
  a.weight = floats(weight, "weight", a.rows);
  floats(dot, "dot", a.prototypes);
  a.gradient = gradient.mutable_data_ptr();
  a.dot = dot.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, a.prototypes, kBlock, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Both work on [prototypes, dim]; a row is enough work for no thread alone.
constexpr int64_t kRowsPerThread = 128;

void distill_operand(const Tensor& v, Tensor operand, Tensor norm) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_operand);
  STD_TORCH_CHECK(v.dim() == 2 && operand.numel() == v.numel(), "v, operand: expected [prototypes, dim] each");
  STD_TORCH_CHECK(
      operand.scalar_type() == ScalarType::BFloat16 && operand.is_contiguous(),
      "operand: expected contiguous bfloat16");
  const int64_t n = v.size(0), dim = v.size(1);
  const float* const in = floats(v, "v", v.numel());
  floats(norm, "norm", n);
  uint16_t* const out = static_cast<uint16_t*>(operand.mutable_data_ptr());
  float* const norms = norm.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    kernel(in + begin * dim, end - begin, dim, out + begin * dim, norms + begin);
  });
}

void distill_finish(const Tensor& product, const Tensor& v, const Tensor& along, Tensor gradient) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_finish);
  STD_TORCH_CHECK(
      v.dim() == 2 && product.numel() == v.numel() && product.is_contiguous() &&
          product.scalar_type() == ScalarType::BFloat16,
      "product: expected contiguous bfloat16 like v [prototypes, dim]");
  const int64_t n = v.size(0), dim = v.size(1);
  const float *const in = floats(v, "v", v.numel()), *const share = floats(along, "along", n);
  floats(gradient, "gradient", v.numel());
  const uint16_t* const from = static_cast<const uint16_t*>(product.const_data_ptr());
  float* const out = gradient.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, n, kRowsPerThread, [&](int64_t begin, int64_t end) {
    kernel(from + begin * dim, in + begin * dim, share + begin, end - begin, dim, out + begin * dim);
  });
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("distill_sums", TORCH_BOX(&pera_fast::distill_sums));
  m.impl("distill_gradient", TORCH_BOX(&pera_fast::distill_gradient));
  m.impl("distill_operand", TORCH_BOX(&pera_fast::distill_operand));
  m.impl("distill_finish", TORCH_BOX(&pera_fast::distill_finish));
}
