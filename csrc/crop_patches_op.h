// Argument checks of crop_patches, shared by the CPU and the CUDA registration.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "crop_patches.h"

namespace pera_fast {

using torch::stable::Tensor;

// The kernel's arguments from the op's tensors. The public function has checked values and shapes in more
// helpful words; these lines check shapes and dtypes again for direct calls of torch.ops.pera_fast.crop_patches.
// Values (boxes, indices, offsets) are the caller's responsibility.
inline CropPatches crop_patches_arguments(
    const Tensor& buffer, const Tensor& offsets, const Tensor& shapes, const Tensor& dtypes, const Tensor& low,
    const Tensor& high, const Tensor& image, const Tensor& box, const Tensor& flip, const Tensor& factor,
    const Tensor& order, const Tensor& grey, const Tensor& student_patches, const Tensor& target_patches,
    const Tensor& teacher_patches, const Tensor& mean, const Tensor& std, int64_t crop_px, int64_t patch_px,
    bool exact, Tensor& student_rows, Tensor& target_pixels, Tensor& teacher_rows) {
  using torch::headeronly::ScalarType;
  const auto check = [&](const Tensor& tensor, const char* name, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
    bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                tensor.dim() == static_cast<int64_t>(sizes.size()) &&
                tensor.get_device_index() == buffer.get_device_index() && tensor.is_cuda() == buffer.is_cuda();
    int64_t axis = 0;
    for (int64_t size : sizes) {
      if (fits && size >= 0) fits = tensor.size(axis) == size;
      ++axis;
    }
    STD_TORCH_CHECK(fits, name, ": wrong dtype, shape or device, or not contiguous");
  };
  STD_TORCH_CHECK(low.dim() == 2 && image.dim() == 1, "low: expected [images, bands], image: expected [crops]");
  const int64_t images = low.size(0), bands = low.size(1), crops = image.size(0);
  check(buffer, "buffer", ScalarType::Byte, {-1});
  check(offsets, "offsets", ScalarType::Long, {images});
  check(shapes, "shapes", ScalarType::Long, {images, 3});
  check(dtypes, "dtypes", ScalarType::Long, {images});
  check(low, "low", ScalarType::Float, {images, bands});
  check(high, "high", ScalarType::Float, {images, bands});
  check(image, "image", ScalarType::Long, {crops});
  check(box, "box", ScalarType::Long, {crops, 4});
  check(flip, "flip", ScalarType::Bool, {crops, 2});
  check(factor, "factor", ScalarType::Float, {crops, 2, 4});
  check(order, "order", ScalarType::Long, {crops, 2, 4});
  check(grey, "grey", ScalarType::Bool, {crops, 2});
  check(mean, "mean", ScalarType::Float, {bands});
  check(std, "std", ScalarType::Float, {bands});
  STD_TORCH_CHECK(
      bands >= 1 && patch_px >= 1 && crop_px >= patch_px && crop_px % patch_px == 0 && crop_px <= 16384,
      "crop_px: expected a multiple of patch_px, at most 16384");
  CropPatches a{};
  a.buffer = buffer.const_data_ptr<uint8_t>();
  a.offsets = offsets.const_data_ptr<int64_t>();
  a.shapes = shapes.const_data_ptr<int64_t>();
  a.dtypes = dtypes.const_data_ptr<int64_t>();
  a.low = low.const_data_ptr<float>();
  a.high = high.const_data_ptr<float>();
  a.images = images;
  a.bands = bands;
  a.image = image.const_data_ptr<int64_t>();
  a.box = box.const_data_ptr<int64_t>();
  a.flip = flip.const_data_ptr<bool>();
  a.factor = factor.const_data_ptr<float>();
  a.order = order.const_data_ptr<int64_t>();
  a.grey = grey.const_data_ptr<bool>();
  a.crops = crops;
  a.crop_px = crop_px;
  a.patch_px = patch_px;
  a.mean = mean.const_data_ptr<float>();
  a.std = std.const_data_ptr<float>();
  a.exact = exact;
  const Tensor* patches[3] = {&student_patches, &target_patches, &teacher_patches};
  Tensor* rows[3] = {&student_rows, &target_pixels, &teacher_rows};
  for (int set = 0; set < 3; ++set) {
    check(*patches[set], "patches", ScalarType::Long, {crops, -1});
    const int64_t count = patches[set]->size(1);
    const ScalarType dtype = rows[set]->scalar_type();
    check(*rows[set], "rows", dtype, {crops, -1, bands * patch_px * patch_px});
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "rows: expected float32, bfloat16 or float16");
    STD_TORCH_CHECK(rows[set]->size(1) >= count, "rows: expected at least as many as patches");
    a.sets[set] = {
        patches[set]->const_data_ptr<int64_t>(),
        count,
        rows[set]->mutable_data_ptr(),
        rows[set]->size(1) - count,
        dtype == ScalarType::Float      ? kRowFloat32
        : dtype == ScalarType::BFloat16 ? kRowBfloat16
                                        : kRowFloat16,
        set == kTarget};
  }
  return a;
}

}  // namespace pera_fast
