#include "../crop_patches.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "../crop_patches_op.h"
#include "isa.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "crop_patches_kernel.h"
#include "for_each_isa.h"

void crop_patches(
    const Tensor& buffer, const Tensor& offsets, const Tensor& shapes, const Tensor& dtypes, const Tensor& low,
    const Tensor& high, const Tensor& image, const Tensor& box, const Tensor& flip, const Tensor& factor,
    const Tensor& order, const Tensor& grey, const Tensor& student_patches, const Tensor& target_patches,
    const Tensor& teacher_patches, const Tensor& mean, const Tensor& std, int64_t crop_px, int64_t patch_px,
    bool exact, Tensor student_rows, Tensor target_pixels, Tensor teacher_rows) {
  static const auto kernel = PERA_FAST_CHOOSE(crop_patches);
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
