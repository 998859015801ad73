#include "disjoint_masks.h"

#include "../disjoint_masks.h"
#include "launch.h"

namespace pera_fast {
namespace {

// Bitonic sort of `size` (a power of two) words in shared memory, ascending. Ends synchronised.
__device__ __forceinline__ void sort_shared(uint64_t* words, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        // The pair-th index whose `distance` bit is clear.
        const int low = 2 * pair - (pair & (distance - 1));
        const int high = low + distance;
        const uint64_t a = words[low];
        const uint64_t b = words[high];
        if ((a > b) == ((low & run) == 0)) {
          words[low] = b;
          words[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// One block per crop. The first sort ranks the patches by key; the second, by (set, patch), puts each set's
// patches together in raster order, so that the sorted row is student | target | teacher.
__global__ void disjoint_masks_kernel(
    const int64_t* __restrict__ crop_index, int64_t crop_stride, uint64_t seed, uint32_t step,
    int num_patches, int num_student, int num_target, int sort_size, int64_t* __restrict__ student,
    int64_t* __restrict__ target, int64_t* __restrict__ teacher) {
  PERA_FAST_DYNAMIC_SHARED(uint64_t, words);
  const int64_t row = blockIdx.x;
  const int64_t crop = crop_index[row * crop_stride];
  for (int group = threadIdx.x; 4 * group < sort_size; group += blockDim.x) {
    uint64_t drawn[4];
    sort_words(seed, step, crop, group, drawn);
    for (int i = 0; i < 4; ++i) {
      // Padding sorts behind every patch: no patch has the low word 2^32 - 1.
      words[4 * group + i] = 4 * group + i < num_patches ? drawn[i] : ~uint64_t{0};
    }
  }
  sort_shared(words, sort_size);
  for (int rank = threadIdx.x; rank < num_patches; rank += blockDim.x) {
    const uint64_t set = set_of_rank(rank, num_student, num_target);
    words[rank] = (set << 32) | static_cast<uint32_t>(words[rank]);
  }
  sort_shared(words, sort_size);
  const int num_teacher = num_patches - num_student - num_target;
  for (int i = threadIdx.x; i < num_patches; i += blockDim.x) {
    const int64_t patch = static_cast<uint32_t>(words[i]);
    if (i < num_student) {
      student[row * num_student + i] = patch;
    } else if (i < num_student + num_target) {
      target[row * num_target + i - num_student] = patch;
    } else {
      teacher[row * num_teacher + i - num_student - num_target] = patch;
    }
  }
}

}  // namespace

int launch_disjoint_masks(
    const int64_t* crop_index, int64_t crop_stride, int64_t crops, uint64_t seed, uint32_t step,
    int num_patches, int num_student, int num_target, int64_t* student, int64_t* target, int64_t* teacher,
    void* stream) {
  int sort_size = 4;  // words are drawn four at a time
  while (sort_size < num_patches) sort_size *= 2;
  int threads = sort_size / 2;
  threads = threads < 32 ? 32 : threads > 512 ? 512 : threads;
  const int shared_bytes = sort_size * static_cast<int>(sizeof(uint64_t));
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        disjoint_masks_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  PERA_FAST_LAUNCH(
      disjoint_masks_kernel, static_cast<unsigned>(crops), static_cast<unsigned>(threads), shared_bytes,
      static_cast<cudaStream_t>(stream))
  (crop_index, crop_stride, seed, step, num_patches, num_student, num_target, sort_size, student, target,
   teacher);
  return cudaGetLastError();
}

}  // namespace pera_fast
