#include "../adamw_ema.h"
#include "../tensor_table.h"
#include "launch.h"
#include "parameters.h"
#include "vectors.h"

namespace pera_fast {
namespace {

constexpr unsigned kThreads = 256;

using EmaTable = TensorTable<EmaTensor>;

template <class Teacher, class Param>
__device__ __forceinline__ void ema_chunk(const EmaTensor& t, float rate, int64_t begin, int64_t end) {
  const uintptr_t odd = misaligned<Teacher>(t.teacher) | misaligned<Param>(t.param) | misaligned<Bfloat16>(t.shadow);
  for_each_vector(odd == 0, begin, end, [&](auto width, int64_t i) {
    constexpr int kWidth = decltype(width)::value;
    float taught[kWidth], p[kWidth];
    load<Teacher, kWidth>(t.teacher, i, taught);
    load<Param, kWidth>(t.param, i, p);
    for (int k = 0; k < kWidth; ++k) taught[k] = moved_towards(taught[k], p[k], rate);
    store<Teacher, kWidth>(t.teacher, i, taught);
    if (t.shadow != nullptr) store<Bfloat16, kWidth>(t.shadow, i, taught);
  });
}

__global__ void __launch_bounds__(kThreads) ema_update_kernel(
    const EmaTable table, const double* __restrict__ momentum) {
  const int i = tensor_of_chunk(table.first_chunk, table.count, blockIdx.x);
  const EmaTensor t = table.entries[i];
  const float rate = static_cast<float>(1.0 - *momentum);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_chunk[i]) * kChunk;
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  if (t.teacher_is_bfloat16) {
    if (t.param_is_bfloat16) ema_chunk<Bfloat16, Bfloat16>(t, rate, begin, end);
    else ema_chunk<Bfloat16, Float32>(t, rate, begin, end);
  } else {
    if (t.param_is_bfloat16) ema_chunk<Float32, Bfloat16>(t, rate, begin, end);
    else ema_chunk<Float32, Float32>(t, rate, begin, end);
  }
}

}  // namespace

int launch_ema_update(const std::vector<EmaTensor>& tensors, const double* momentum, void* stream) {
  for (size_t done = 0; done < tensors.size();) {
    EmaTable table;
    for (; done < tensors.size() && table.count < EmaTable::kMost; ++done) table.add(tensors[done]);
    PERA_FAST_LAUNCH(ema_update_kernel, table.chunks(), kThreads, 0, static_cast<cudaStream_t>(stream))
    (table, momentum);
  }
  return cudaGetLastError();
}

}  // namespace pera_fast
