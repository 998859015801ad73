#include "../tensor_table.h"
#include "launch.h"
#include "parameters.h"
#include "vectors.h"

namespace pera_fast {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kNormThreads = 1024;  // of the one block that adds what the others have found

using GradTable = TensorTable<GradTensor>;

// Sum over the block's threads in a fixed order; the whole of it in thread 0.
template <class Number>
__device__ __forceinline__ Number block_sum(Number sum, Number* room) {
  room[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  return room[0];
}

template <class Grad>
__device__ __forceinline__ float squares(const GradTensor& t, int64_t begin, int64_t end) {
  float sum = 0.0f;
  for_each_vector(misaligned<Grad>(t.grad) == 0, begin, end, [&](auto width, int64_t i) {
    constexpr int kWidth = decltype(width)::value;
    float g[kWidth];
    load<Grad, kWidth>(t.grad, i, g);
    for (int k = 0; k < kWidth; ++k) sum += multiply(g[k], g[k]);
  });
  return sum;
}

// One block per chunk: its sum of squares.
__global__ void __launch_bounds__(kThreads) squares_kernel(const GradTable table, float* __restrict__ partial) {
  PERA_FAST_DYNAMIC_SHARED(float, room);
  const int i = tensor_of_chunk(table.first_chunk, table.count, blockIdx.x);
  const GradTensor t = table.entries[i];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_chunk[i]) * kChunk;
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  const float own = t.is_bfloat16 ? squares<Bfloat16>(t, begin, end) : squares<Float32>(t, begin, end);
  const float sum = block_sum(own, room);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kNormThreads) norm_kernel(
    const float* __restrict__ partial, int64_t count, float* __restrict__ norm) {
  PERA_FAST_DYNAMIC_SHARED(double, room);
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kNormThreads) own += static_cast<double>(partial[i]);
  const double sum = block_sum(own, room);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

}  // namespace

int64_t grad_norm_partials(const std::vector<GradTensor>& tensors) {
  int64_t chunks = 0;
  for (const GradTensor& t : tensors) chunks += chunks_of(t.numel);
  return chunks;
}

int launch_grad_norm(const std::vector<GradTensor>& tensors, float* partial, float* norm, void* stream) {
  int64_t chunks = 0;
  for (size_t done = 0; done < tensors.size();) {
    GradTable table;
    for (; done < tensors.size() && table.count < GradTable::kMost; ++done) table.add(tensors[done]);
    PERA_FAST_LAUNCH(squares_kernel, table.chunks(), kThreads, kThreads * sizeof(float), static_cast<cudaStream_t>(stream))
    (table, partial + chunks);
    chunks += table.chunks();
  }
  PERA_FAST_LAUNCH(norm_kernel, 1, kNormThreads, kNormThreads * sizeof(double), static_cast<cudaStream_t>(stream))
  (partial, chunks, norm);
  return cudaGetLastError();
}

}  // namespace pera_fast
