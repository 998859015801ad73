#include "../tensor_table.h"
#include "launch.h"
#include "parameters.h"
#include "vectors.h"

namespace pera_fast {
namespace {

constexpr unsigned kThreads = 256;

using AdamWEMATable = TensorTable<AdamWEMATensor>;

// One thread per tensor: its coefficients, and its step goes on.
__global__ void adamw_ema_prepare_kernel(
    const AdamWEMATable table, const AdamWEMAOptions options, const double* __restrict__ hyper,
    const float* __restrict__ grad_norm, AdamWEMACoefficients* __restrict__ coefficients, bool* skipped) {
  const int i = static_cast<int>(threadIdx.x);
  const float norm = *grad_norm;
  if (i < table.count) coefficients[i] = adamw_ema_prepare(options, hyper, norm, table.entries[i].step);
  if (i == 0) *skipped = !is_finite(norm);
}

template <class Param, class Grad, class Teacher>
__device__ __forceinline__ void update_chunk(
    const AdamWEMATensor& t, const AdamWEMACoefficients& c, int64_t begin, int64_t end) {
  const uintptr_t odd =
      misaligned<Param>(t.param) | misaligned<Param>(t.exp_avg) | misaligned<Param>(t.exp_avg_sq) |
      misaligned<Grad>(t.grad) | misaligned<Teacher>(t.teacher) | misaligned<Bfloat16>(t.shadow) |
      misaligned<Bfloat16>(t.teacher_shadow);
  for_each_vector(odd == 0, begin, end, [&](auto width, int64_t i) {
    constexpr int kWidth = decltype(width)::value;
    float g[kWidth], p[kWidth], m[kWidth], v[kWidth], taught[kWidth];
    load<Grad, kWidth>(t.grad, i, g);
    load<Param, kWidth>(t.param, i, p);
    load<Param, kWidth>(t.exp_avg, i, m);
    load<Param, kWidth>(t.exp_avg_sq, i, v);
    if (t.teacher != nullptr) load<Teacher, kWidth>(t.teacher, i, taught);
    for (int k = 0; k < kWidth; ++k) {
      adamw_update(c, g[k], p[k], m[k], v[k]);
      p[k] = Param::to(Param::from(p[k]));
    }
    store<Param, kWidth>(t.param, i, p);
    store<Param, kWidth>(t.exp_avg, i, m);
    store<Param, kWidth>(t.exp_avg_sq, i, v);
    if (t.shadow != nullptr) store<Bfloat16, kWidth>(t.shadow, i, p);
    if (t.teacher == nullptr) return;
    for (int k = 0; k < kWidth; ++k) taught[k] = moved_towards(taught[k], p[k], c.rate);
    store<Teacher, kWidth>(t.teacher, i, taught);
    if (t.teacher_shadow != nullptr) store<Bfloat16, kWidth>(t.teacher_shadow, i, taught);
  });
}

// One block per chunk.
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(
    const AdamWEMATable table, const AdamWEMACoefficients* __restrict__ coefficients) {
  const int i = tensor_of_chunk(table.first_chunk, table.count, blockIdx.x);
  const AdamWEMACoefficients c = coefficients[i];
  if (c.skip) return;
  const AdamWEMATensor t = table.entries[i];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_chunk[i]) * kChunk;
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  if (t.param_is_bfloat16) {
    if (t.grad_is_bfloat16) {
      if (t.teacher_is_bfloat16) update_chunk<Bfloat16, Bfloat16, Bfloat16>(t, c, begin, end);
      else update_chunk<Bfloat16, Bfloat16, Float32>(t, c, begin, end);
    } else {
      if (t.teacher_is_bfloat16) update_chunk<Bfloat16, Float32, Bfloat16>(t, c, begin, end);
      else update_chunk<Bfloat16, Float32, Float32>(t, c, begin, end);
    }
  } else if (t.grad_is_bfloat16) {
    if (t.teacher_is_bfloat16) update_chunk<Float32, Bfloat16, Bfloat16>(t, c, begin, end);
    else update_chunk<Float32, Bfloat16, Float32>(t, c, begin, end);
  } else {
    if (t.teacher_is_bfloat16) update_chunk<Float32, Float32, Bfloat16>(t, c, begin, end);
    else update_chunk<Float32, Float32, Float32>(t, c, begin, end);
  }
}

}  // namespace

int launch_adamw_ema(
    const std::vector<AdamWEMATensor>& tensors, const AdamWEMAOptions& options, const double* hyper,
    const float* grad_norm, AdamWEMACoefficients* coefficients, bool* skipped, void* stream) {
  static_assert(AdamWEMATable::kMost <= 64, "one small block prepares a table");
  size_t done = 0;
  do {  // at least once: without tensors the flag is still owed
    AdamWEMATable table;
    for (size_t i = done; i < tensors.size() && table.count < AdamWEMATable::kMost; ++i) table.add(tensors[i]);
    PERA_FAST_LAUNCH(adamw_ema_prepare_kernel, 1, 64, 0, static_cast<cudaStream_t>(stream))
    (table, options, hyper, grad_norm, coefficients + done, skipped);
    if (table.chunks() > 0) {
      PERA_FAST_LAUNCH(adamw_ema_kernel, table.chunks(), kThreads, 0, static_cast<cudaStream_t>(stream))
      (table, coefficients + done);
    }
    done += static_cast<size_t>(table.count);
  } while (done < tensors.size());
  return cudaGetLastError();
}

}  // namespace pera_fast
