#include "../crop_patches.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../crop_patches_op.h"

namespace pera_fast {
namespace {

namespace baseline {
#include "crop_patches_kernel.h"
}

// The same source for newer instruction sets; which one runs is decided when the library is first used.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define PERA_FAST_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
namespace avx2 {
#include "crop_patches_kernel.h"
}
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "crop_patches_kernel.h"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64

using Kernel = int64_t (*)(const CropPatches&, int64_t, uint8_t*);

// PERA_FAST_CPU_CAPABILITY=avx2 or =baseline lowers the instruction set, for tests.
Kernel choose_kernel() {
#ifdef PERA_FAST_X86
  const char* limit = std::getenv("PERA_FAST_CPU_CAPABILITY");
  const bool at_most_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  const bool at_most_baseline = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  if (at_most_baseline) return baseline::crop_patches;
  if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::crop_patches;
  }
  if (__builtin_cpu_supports("avx2")) return avx2::crop_patches;
#endif
  return baseline::crop_patches;
}

void crop_patches(
    const torch::stable::Tensor& buffer, const torch::stable::Tensor& offsets,
    const torch::stable::Tensor& shapes, const torch::stable::Tensor& dtypes, const torch::stable::Tensor& low,
    const torch::stable::Tensor& high, const torch::stable::Tensor& image, const torch::stable::Tensor& box,
    const torch::stable::Tensor& flip, const torch::stable::Tensor& factor, const torch::stable::Tensor& order,
    const torch::stable::Tensor& grey, const torch::stable::Tensor& student_patches,
    const torch::stable::Tensor& target_patches, const torch::stable::Tensor& teacher_patches,
    const torch::stable::Tensor& mean, const torch::stable::Tensor& std, int64_t crop_px, int64_t patch_px,
    bool exact, torch::stable::Tensor student_rows, torch::stable::Tensor target_pixels,
    torch::stable::Tensor teacher_rows) {
  static const Kernel kernel = choose_kernel();
  const CropPatches a = crop_patches_arguments(
      buffer, offsets, shapes, dtypes, low, high, image, box, flip, factor, order, grey, student_patches,
      target_patches, teacher_patches, mean, std, crop_px, patch_px, exact, student_rows, target_pixels,
      teacher_rows);
  torch::stable::parallel_for(0, a.crops, 1, [&](int64_t begin, int64_t end) {
    int64_t bytes = 0;
    for (int64_t crop = begin; crop < end; ++crop) {
      const int64_t needed = kernel(a, crop, nullptr);
      bytes = needed > bytes ? needed : bytes;
    }
    const std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(bytes) + 63]);
    uint8_t* const scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
    for (int64_t crop = begin; crop < end; ++crop) kernel(a, crop, scratch);
  });
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("crop_patches", TORCH_BOX(&pera_fast::crop_patches));
}
