#include "../disjoint_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../disjoint_masks_op.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PERA_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PERA_FAST_CLONES
#endif

namespace pera_fast {

// words[p] for all patches of one crop; `words` has room for a multiple of four.
PERA_FAST_CLONES void fill_sort_words(
    uint64_t* __restrict words, int64_t groups, uint64_t seed, uint32_t step, int64_t crop) {
#pragma omp simd
  for (int64_t group = 0; group < groups; ++group) {
    sort_words(seed, step, crop, static_cast<uint32_t>(group), words + 4 * group);
  }
}

namespace {

// One crop. Only the two set boundaries matter, not the full order: two selections, then one pass over the
// patches in raster order, which makes every row ascending.
void select_patches(
    uint64_t* words, uint8_t* sets, int64_t num_patches, int64_t num_student, int64_t num_target,
    int64_t* student, int64_t* target, int64_t* teacher) {
  uint64_t* const target_begin = words + num_student;
  uint64_t* const teacher_begin = target_begin + num_target;
  uint64_t* const end = words + num_patches;
  if (teacher_begin < end) std::nth_element(words, teacher_begin, end);
  if (target_begin < teacher_begin) std::nth_element(words, target_begin, teacher_begin);
  for (int64_t rank = 0; rank < num_patches; ++rank) {
    sets[static_cast<uint32_t>(words[rank])] =
        static_cast<uint8_t>(set_of_rank(rank, num_student, num_target));
  }
  int64_t* next[3] = {student, target, teacher};
  for (int64_t patch = 0; patch < num_patches; ++patch) {
    *next[sets[patch]]++ = patch;
  }
}

Masks disjoint_masks(
    const torch::stable::Tensor& crop_index, int64_t seed, int64_t step, int64_t num_patches,
    int64_t num_student, int64_t num_target) {
  Masks masks = new_masks(crop_index, step, num_patches, num_student, num_target);
  const int64_t crops = crop_index.sizes()[0];
  if (crops == 0 || num_patches == 0) return masks;
  const int64_t crop_stride = crop_index.stride(0);
  const int64_t num_teacher = num_patches - num_student - num_target;
  const int64_t* const crop = crop_index.const_data_ptr<int64_t>();
  int64_t* const student = std::get<0>(masks).mutable_data_ptr<int64_t>();
  int64_t* const target = std::get<1>(masks).mutable_data_ptr<int64_t>();
  int64_t* const teacher = std::get<2>(masks).mutable_data_ptr<int64_t>();

  const int64_t groups = (num_patches + 3) / 4;
  // A thread costs more to wake than a few crops cost to draw.
  const int64_t crops_per_thread = std::max<int64_t>(1, 4096 / num_patches);
  // torch's own thread pool: a second OpenMP runtime would fight it for the cores.
  torch::stable::parallel_for(0, crops, crops_per_thread, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> words(4 * groups);
    std::vector<uint8_t> sets(num_patches);
    for (int64_t row = begin; row < end; ++row) {
      fill_sort_words(
          words.data(), groups, static_cast<uint64_t>(seed), static_cast<uint32_t>(step),
          crop[row * crop_stride]);
      select_patches(
          words.data(), sets.data(), num_patches, num_student, num_target, student + row * num_student,
          target + row * num_target, teacher + row * num_teacher);
    }
  });
  return masks;
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("disjoint_masks", TORCH_BOX(&pera_fast::disjoint_masks));
}
