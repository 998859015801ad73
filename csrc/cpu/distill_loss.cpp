#include "../distill_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "checked.h"
#include "isa.h"
#include "tiles.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "distill_loss_kernel.h"
#include "for_each_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Prototypes that are summed together; fixed, so that the result does not depend on the number of threads.
constexpr int64_t kBlock = 256;

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
  a.rows = a.stride = student.size(1);
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

void clear(const DistillSums& sums, int64_t rows) {
  for (float* from : {sums.max_x, sums.max_y}) std::fill_n(from, rows, -std::numeric_limits<float>::infinity());
  for (float* from : {sums.sum_x, sums.sum_xy, sums.sum_y}) std::fill_n(from, rows, 0.0f);
}

// Adds `more` to `sums`: each scales to the larger of the two maxima.
void merge(const DistillSums& sums, const DistillSums& more, int64_t rows) {
  using baseline::exp_of_negative;
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
    std::vector<float> room(static_cast<size_t>(5 * a.rows));
    for (int64_t block = begin; block < end; ++block) {
      const DistillSums part = sums_at(partial.data() + block * 5 * a.rows, a.rows);
      clear(part, a.rows);
      kernel(a, block * kBlock, std::min(a.prototypes, (block + 1) * kBlock), part, room.data());
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
  a.gradient_is_bfloat16 = a.is_bfloat16;
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

// --- with the products ---

// What both passes share. z_*: operands as in DistillProblem, float32 or bfloat16 pairs.
DistillProblem problem_of(
    const Tensor& v_student, const Tensor& v_teacher, const Tensor& z_student_columns,
    const Tensor& z_teacher_columns, const Tensor& centre, double inverse_tau_teacher,
    double inverse_tau_student, const Tensor& scale_student, const Tensor& scale_teacher,
    const Tensor& norm_student, const Tensor& kept_teacher, const Tensor& kept_student, int64_t rows) {
  STD_TORCH_CHECK(v_student.dim() == 2 && kept_student.dim() == 2, "v_student, kept_student: expected two axes");
  DistillProblem p{};
  p.prototypes = v_student.size(0);
  p.dim = v_student.size(1);
  p.kept = kept_student.size(0);
  p.stride = kept_student.size(1);
  p.rows = rows;
  const ScalarType dtype = kept_student.scalar_type();
  p.pairs = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (p.pairs ? p.dim % 32 == 0 : dtype == ScalarType::Float) && p.stride % 16 == 0 && rows <= p.stride,
      "kept_student: expected float32, or bfloat16 with dim a multiple of 32, and a stride of whole vectors");
  for (const Tensor& z : {z_student_columns, z_teacher_columns}) {
    STD_TORCH_CHECK(
        z.scalar_type() == dtype && z.is_contiguous() && z.numel() == p.dim * p.stride,
        "z columns: expected contiguous [dim, stride] like kept_student");
  }
  STD_TORCH_CHECK(
      kept_teacher.scalar_type() == dtype && kept_teacher.is_contiguous() && kept_student.is_contiguous() &&
          kept_teacher.numel() == kept_student.numel() && p.kept % 64 * (p.prototypes - p.kept) == 0,
      "kept_teacher, kept_student: expected contiguous and alike, in blocks of 64 prototypes or all");
  p.v_student = floats(v_student, "v_student", p.prototypes * p.dim);
  p.v_teacher = floats(v_teacher, "v_teacher", p.prototypes * p.dim);
  p.z_student_columns = static_cast<const float*>(z_student_columns.const_data_ptr());
  p.z_teacher_columns = static_cast<const float*>(z_teacher_columns.const_data_ptr());
  p.centre = floats(centre, "centre", p.prototypes);
  p.inverse_tau_teacher = static_cast<float>(inverse_tau_teacher);
  p.inverse_tau_student = static_cast<float>(inverse_tau_student);
  p.scale_student = const_cast<float*>(floats(scale_student, "scale_student", p.prototypes));
  p.scale_teacher = const_cast<float*>(floats(scale_teacher, "scale_teacher", p.prototypes));
  p.norm_student = const_cast<float*>(floats(norm_student, "norm_student", p.prototypes));
  p.kept_teacher = const_cast<void*>(kept_teacher.const_data_ptr());
  p.kept_student = const_cast<void*>(kept_student.const_data_ptr());
  return p;
}

// The columns of z in `p`, packed; keeps what it gives them.
std::array<std::unique_ptr<float[]>, 2> pack_columns(DistillProblem& p) {
  static const auto pack = PERA_FAST_CHOOSE(pack_floats);
  const int64_t depth = p.pairs ? p.dim / 2 : p.dim;
  std::array<std::unique_ptr<float[]>, 2> kept{
      packed_by(pack, p.z_student_columns, depth, p.stride), packed_by(pack, p.z_teacher_columns, depth, p.stride)};
  p.z_student_columns = kept[0].get();
  p.z_teacher_columns = kept[1].get();
  return kept;
}

// Prototypes whose logits are in cache together: a power of two that divides 64.
int64_t block_of(const DistillProblem& p) {
  int64_t block = 64;
  while (block > 8 && block * p.stride > 65536) block /= 2;
  return block;
}

std::unique_ptr<float[]> room_for(const DistillProblem& p) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(baseline::room_for_block(p, block_of(p)))]);
}

void distill_forward(
    const Tensor& v_student, const Tensor& g_student, const Tensor& v_teacher, const Tensor& g_teacher,
    const Tensor& z_student_columns, const Tensor& z_teacher_columns, const Tensor& centre,
    double inverse_tau_teacher, double inverse_tau_student, Tensor scale_student, Tensor scale_teacher,
    Tensor norm_student, Tensor kept_teacher, Tensor kept_student, Tensor state) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_forward);
  DistillProblem p = problem_of(
      v_student, v_teacher, z_student_columns, z_teacher_columns, centre, inverse_tau_teacher,
      inverse_tau_student, scale_student, scale_teacher, norm_student, kept_teacher, kept_student,
      state.numel() / 5);
  p.g_student = floats(g_student, "g_student", p.prototypes);
  p.g_teacher = floats(g_teacher, "g_teacher", p.prototypes);
  floats(state, "state", 5 * p.rows);
  const auto columns = pack_columns(p);
  // Sums of slices are merged in order: at most 64 whatever the number of threads, so equal bits.
  const int64_t slice = std::max<int64_t>(256, ((p.prototypes + 63) / 64 + 63) / 64 * 64);
  const int64_t slices = (p.prototypes + slice - 1) / slice;
  std::vector<float> partial(static_cast<size_t>(slices * 5 * p.rows));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    const auto room = room_for(p);
    for (int64_t i = begin; i < end; ++i) {
      const DistillSums part = sums_at(partial.data() + i * 5 * p.rows, p.rows);
      clear(part, p.rows);
      kernel(p, i * slice, std::min(p.prototypes, (i + 1) * slice), block_of(p), part, room.get());
    }
  });
  const DistillSums sums = sums_at(state.mutable_data_ptr<float>(), p.rows);
  clear(sums, p.rows);
  for (int64_t i = 0; i < slices; ++i) merge(sums, sums_at(partial.data() + i * 5 * p.rows, p.rows), p.rows);
}

void distill_backward(
    const Tensor& v_student, const Tensor& v_teacher, const Tensor& z_student_columns,
    const Tensor& z_teacher_columns, const Tensor& z_student_rows, const Tensor& centre,
    double inverse_tau_teacher, double inverse_tau_student, const Tensor& scale_student,
    const Tensor& scale_teacher, const Tensor& norm_student, const Tensor& kept_teacher,
    const Tensor& kept_student, const Tensor& log_sum_x, const Tensor& log_sum_y, const Tensor& weight,
    Tensor dz, Tensor dv, Tensor dot) {
  static const auto kernel = PERA_FAST_CHOOSE(distill_backward);
  static const auto rows_kernel = PERA_FAST_CHOOSE(distill_rows);
  DistillProblem p = problem_of(
      v_student, v_teacher, z_student_columns, z_teacher_columns, centre, inverse_tau_teacher,
      inverse_tau_student, scale_student, scale_teacher, norm_student, kept_teacher, kept_student,
      weight.numel());
  STD_TORCH_CHECK(
      z_student_rows.scalar_type() == kept_student.scalar_type() && z_student_rows.is_contiguous() &&
          z_student_rows.numel() == (p.pairs ? p.stride : p.rows) * p.dim,
      "z_student_rows: expected contiguous [rows, dim], of pairs [stride / 2, dim, 2]");
  p.log_sum_x = floats(log_sum_x, "log_sum_x", p.rows);
  p.log_sum_y = floats(log_sum_y, "log_sum_y", p.rows);
  p.weight = floats(weight, "weight", p.rows);
  floats(dz, "dz", p.rows * p.dim);
  p.dv = const_cast<float*>(floats(dv, "dv", p.prototypes * p.dim));
  p.dot = const_cast<float*>(floats(dot, "dot", p.prototypes));
  float* const out = dz.mutable_data_ptr<float>();
  std::fill_n(out, p.rows * p.dim, 0.0f);

  static const auto pack = PERA_FAST_CHOOSE(pack_floats);
  const auto columns = pack_columns(p);
  const auto z_rows = packed_by(
      pack, static_cast<const float*>(z_student_rows.const_data_ptr()), p.pairs ? (p.rows + 1) / 2 : p.rows, p.dim);
  p.z_student_rows = z_rows.get();
  const int64_t chunk = chunk_of_stride(p.stride);
  const int64_t block = block_of(p);
  const std::unique_ptr<float[]> h(new float[static_cast<size_t>(chunk * p.stride / (p.pairs ? 2 : 1))]);
  const std::unique_ptr<float[]> v_pairs(new float[static_cast<size_t>(p.pairs ? chunk / 2 * p.dim : 0)]);
  for (int64_t start = 0; start < p.prototypes; start += chunk) {
    const int64_t stop = std::min(p.prototypes, start + chunk);
    torch::stable::parallel_for(0, (stop - start + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      const auto room = room_for(p);
      kernel(
          p, start, start + begin * block, std::min(stop, start + end * block), block, h.get(), v_pairs.get(),
          room.get());
    });
    const float* const v = p.pairs ? v_pairs.get() : p.v_student + start * p.dim;
    const int64_t depth = p.pairs ? (stop - start + 1) / 2 : stop - start;
    for_each_tile(p.rows, p.dim, [&](int64_t row, int64_t column, int64_t height, int64_t width) {
      rows_kernel(p, h.get() + row, v + column, height, width, depth, out + row * p.dim + column);
    });
  }
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("distill_forward", TORCH_BOX(&pera_fast::distill_forward));
  m.impl("distill_backward", TORCH_BOX(&pera_fast::distill_backward));
  m.impl("distill_sums", TORCH_BOX(&pera_fast::distill_sums));
  m.impl("distill_gradient", TORCH_BOX(&pera_fast::distill_gradient));
  m.impl("distill_operand", TORCH_BOX(&pera_fast::distill_operand));
  m.impl("distill_finish", TORCH_BOX(&pera_fast::distill_finish));
}
