// Argument checks and outputs of disjoint_masks, shared by the CPU and the CUDA registration.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace pera_fast {

using Masks = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// What a kernel relies on to stay inside its buffers. The public function has already said the same in
// more helpful words; these lines guard direct calls of torch.ops.pera_fast.disjoint_masks.
inline Masks new_masks(
    const torch::stable::Tensor& crop_index,
    int64_t step,
    int64_t num_patches,
    int64_t num_student,
    int64_t num_target) {
  STD_TORCH_CHECK(
      crop_index.scalar_type() == torch::headeronly::ScalarType::Long && crop_index.dim() == 1,
      "crop_index: expected int64 [n]");
  STD_TORCH_CHECK(
      step >= 0 && step <= INT64_C(0xffffffff), "step: expected 0 <= step < 2**32, got ", step);
  STD_TORCH_CHECK(
      num_patches >= 0 && num_patches <= INT32_MAX, "num_patches: expected 0 <= num_patches < 2**31, got ",
      num_patches);
  STD_TORCH_CHECK(
      num_student >= 0 && num_target >= 0 && num_student <= num_patches &&
          num_target <= num_patches - num_student,
      "num_student, num_target: expected two counts that fit in num_patches = ", num_patches, ", got ",
      num_student, " and ", num_target);
  const int64_t crops = crop_index.sizes()[0];
  return {
      torch::stable::new_empty(crop_index, {crops, num_student}),
      torch::stable::new_empty(crop_index, {crops, num_target}),
      torch::stable::new_empty(crop_index, {crops, num_patches - num_student - num_target})};
}

}  // namespace pera_fast
