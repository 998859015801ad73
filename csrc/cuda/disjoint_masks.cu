#include "disjoint_masks.h"

#include "../disjoint_masks.h"
#include "launch.h"

namespace pera_fast {
namespace {

// One crop is sorted in one block's shared memory: 8 bytes per patch, 64 KiB of the 99 KiB that every
// supported GPU offers.
constexpr int kMaxSorted = 8192;

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

constexpr int kThreads = 1024;

// Sum of every thread's value. Begins and ends synchronised.
__device__ __forceinline__ uint64_t sum_of_block(uint64_t value, uint64_t* shared) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  const uint64_t sum = shared[0];
  __syncthreads();
  return sum;
}

// Sum of the values of the threads before this one.
__device__ __forceinline__ uint64_t sum_before(uint64_t value, uint64_t* shared) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const uint64_t before = thread < distance ? 0 : shared[thread - distance];
    __syncthreads();
    shared[thread] += before;
    __syncthreads();
  }
  return shared[thread] - value;
}

// The same sets of crops that do not fit into shared memory, one block per crop. With the words of the first
// patches of target and teacher, every patch knows its set by its own word: both are found bit by bit, by
// counting the words below. Words are drawn again each time; two counts lie in one number.
__global__ void __launch_bounds__(kThreads) large_disjoint_masks_kernel(
    const int64_t* __restrict__ crop_index, int64_t crop_stride, uint64_t seed, uint32_t step,
    uint32_t num_patches, uint32_t num_student, uint32_t num_target, int64_t* __restrict__ student,
    int64_t* __restrict__ target, int64_t* __restrict__ teacher) {
  __shared__ uint64_t shared[kThreads];
  const int64_t row = blockIdx.x;
  const int64_t crop = crop_index[row * crop_stride];
  const uint32_t groups = (num_patches + 3) / 4;
  uint64_t first_target = 0;
  uint64_t first_teacher = 0;
  for (uint64_t bit = uint64_t{1} << 63; bit > 0; bit /= 2) {
    // The low half of a word is a patch: no bit above its highest is set.
    if (bit <= UINT32_MAX && bit >= num_patches) continue;
    uint64_t below = 0;
    for (uint32_t group = threadIdx.x; group < groups; group += kThreads) {
      uint64_t words[4];
      sort_words(seed, step, crop, group, words);
      for (uint32_t i = 0; i < 4 && 4 * group + i < num_patches; ++i) {
        below += (words[i] < (first_target | bit)) + (uint64_t{words[i] < (first_teacher | bit)} << 32);
      }
    }
    below = sum_of_block(below, shared);
    if (static_cast<uint32_t>(below) <= num_student) first_target |= bit;
    if (below >> 32 <= num_student + num_target) first_teacher |= bit;
  }

  // Each thread writes the patches of a run of groups, behind those of the threads before it.
  const uint32_t run = (groups + kThreads - 1) / kThreads;
  const uint32_t start = threadIdx.x * run;
  const uint32_t stop = start + run < groups ? start + run : groups;
  uint64_t before = 0;
  for (int writes = 0; writes < 2; ++writes) {
    uint64_t own = 0;  // students, and targets in the upper half
    for (uint32_t group = start; group < stop; ++group) {
      uint64_t words[4];
      sort_words(seed, step, crop, group, words);
      for (uint32_t i = 0; i < 4 && 4 * group + i < num_patches; ++i) {
        const uint32_t patch = 4 * group + i;
        const uint32_t students = static_cast<uint32_t>(before + own);
        const uint32_t targets = static_cast<uint32_t>((before + own) >> 32);
        const bool is_student = words[i] < first_target;
        const bool is_target = !is_student && words[i] < first_teacher;
        own += is_student + (uint64_t{is_target} << 32);
        if (writes == 0) continue;
        if (is_student) {
          student[row * num_student + students] = patch;
        } else if (is_target) {
          target[row * num_target + targets] = patch;
        } else {
          teacher[row * (num_patches - num_student - num_target) + patch - students - targets] = patch;
        }
      }
    }
    if (writes == 0) before = sum_before(own, shared);
  }
}

}  // namespace

int launch_disjoint_masks(
    const int64_t* crop_index, int64_t crop_stride, int64_t crops, uint64_t seed, uint32_t step,
    int num_patches, int num_student, int num_target, int64_t* student, int64_t* target, int64_t* teacher,
    void* stream) {
  if (num_patches > kMaxSorted) {
    PERA_FAST_LAUNCH(
        large_disjoint_masks_kernel, static_cast<unsigned>(crops), kThreads, 0, static_cast<cudaStream_t>(stream))
    (crop_index, crop_stride, seed, step, static_cast<uint32_t>(num_patches), static_cast<uint32_t>(num_student),
     static_cast<uint32_t>(num_target), student, target, teacher);
    return cudaGetLastError();
  }
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
