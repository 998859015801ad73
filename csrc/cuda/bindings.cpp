// Registers the CUDA kernels. Needs no CUDA header: the launchers take the stream as void*.
// USE_CUDA only uncovers the declarations of the CUDA functions in the C shim, which a CPU build of torch
// ships too; the symbols are found when the library is loaded under a CUDA build.
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "../crop_patches_op.h"
#include "../disjoint_masks_op.h"
#include "../parameters_op.h"
#include "crop_patches.h"
#include "disjoint_masks.h"
#include "parameters.h"

namespace pera_fast {
namespace {

void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

void check_launch(const char* op, int error) {
  if (error == 0) return;
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, op, __LINE__, true, &message);
  std::string text = std::string(op) + ": launch failed with CUDA error " + std::to_string(error);
  if (message != nullptr) {
    text += std::string(": ") + message;
    torch_c10_cuda_free_error_msg(message);
  }
  STD_TORCH_CHECK(false, text);
}

Masks disjoint_masks(
    const torch::stable::Tensor& crop_index, int64_t seed, int64_t step, int64_t num_patches,
    int64_t num_student, int64_t num_target) {
  STD_TORCH_CHECK(num_patches <= INT32_MAX, "num_patches: expected fewer than 2**31, got ", num_patches);
  torch::stable::accelerator::DeviceGuard guard(crop_index.get_device_index());
  Masks masks = new_masks(crop_index, step, num_patches, num_student, num_target);
  const int64_t crops = crop_index.sizes()[0];
  if (crops == 0 || num_patches == 0) return masks;
  STD_TORCH_CHECK(crops <= INT32_MAX, "crop_index: expected fewer than 2**31 crops, got ", crops);
  check_launch(
      "disjoint_masks",
      launch_disjoint_masks(
          crop_index.const_data_ptr<int64_t>(), crop_index.stride(0), crops, static_cast<uint64_t>(seed),
          static_cast<uint32_t>(step), static_cast<int>(num_patches), static_cast<int>(num_student),
          static_cast<int>(num_target), std::get<0>(masks).mutable_data_ptr<int64_t>(),
          std::get<1>(masks).mutable_data_ptr<int64_t>(), std::get<2>(masks).mutable_data_ptr<int64_t>(),
          current_stream(crop_index.get_device_index())));
  return masks;
}

void crop_patches(
    const Tensor& buffer, const Tensor& offsets, const Tensor& shapes, const Tensor& dtypes, const Tensor& low,
    const Tensor& high, const Tensor& image, const Tensor& box, const Tensor& flip, const Tensor& factor,
    const Tensor& order, const Tensor& grey, const Tensor& student_patches, const Tensor& target_patches,
    const Tensor& teacher_patches, const Tensor& mean, const Tensor& std, int64_t crop_px, int64_t patch_px,
    bool exact, Tensor student_rows, Tensor target_pixels, Tensor teacher_rows) {
  const CropPatches a = crop_patches_arguments(
      buffer, offsets, shapes, dtypes, low, high, image, box, flip, factor, order, grey, student_patches,
      target_patches, teacher_patches, mean, std, crop_px, patch_px, exact, student_rows, target_pixels,
      teacher_rows);
  torch::stable::accelerator::DeviceGuard guard(buffer.get_device_index());
  Tensor sums = torch::stable::new_empty(image, {crop_patches_sums(a)});
  check_launch(
      "crop_patches",
      launch_crop_patches(
          a, sums.mutable_data_ptr<int64_t>(), current_stream(buffer.get_device_index())));
}

void adamw_ema(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors teachers,
    Tensors shadows, Tensors teacher_shadows, const Tensor& hyper, const Tensor& grad_norm, double beta1,
    double beta2, double eps, double clip_norm, Tensor skipped) {
  const std::vector<AdamWEMATensor> tensors = adamw_ema_tensors(
      params, grads, exp_avgs, exp_avg_sqs, steps, teachers, shadows, teacher_shadows, grad_norm);
  torch::stable::accelerator::DeviceGuard guard(grad_norm.get_device_index());
  static_assert(sizeof(AdamWEMACoefficients) % sizeof(float) == 0);
  const int64_t room = static_cast<int64_t>(std::max<size_t>(1, tensors.size()) * sizeof(AdamWEMACoefficients) / sizeof(float));
  Tensor coefficients = torch::stable::new_empty(grad_norm, {room});
  check_launch(
      "adamw_ema",
      launch_adamw_ema(
          tensors, {beta1, beta2, eps, clip_norm}, hyper_of(hyper, 3, grad_norm), float_of(grad_norm, "grad_norm"),
          static_cast<AdamWEMACoefficients*>(coefficients.mutable_data_ptr()), flag_of(skipped, grad_norm),
          current_stream(grad_norm.get_device_index())));
}

void ema_update(Tensors teachers, Tensors params, Tensors shadows, const Tensor& momentum) {
  const std::vector<EmaTensor> tensors = ema_tensors(teachers, params, shadows, momentum);
  torch::stable::accelerator::DeviceGuard guard(momentum.get_device_index());
  check_launch(
      "ema_update", launch_ema_update(
                        tensors, hyper_of(momentum, 1, momentum), current_stream(momentum.get_device_index())));
}

void grad_norm(Tensors grads, Tensor norm) {
  const std::vector<GradTensor> tensors = grad_tensors(grads, norm);
  torch::stable::accelerator::DeviceGuard guard(norm.get_device_index());
  Tensor partial = torch::stable::new_empty(norm, {std::max<int64_t>(1, grad_norm_partials(tensors))});
  check_launch(
      "grad_norm", launch_grad_norm(
                       tensors, partial.mutable_data_ptr<float>(), const_cast<float*>(float_of(norm, "norm")),
                       current_stream(norm.get_device_index())));
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CUDA, m) {
  m.impl("disjoint_masks", TORCH_BOX(&pera_fast::disjoint_masks));
  m.impl("crop_patches", TORCH_BOX(&pera_fast::crop_patches));
  m.impl("adamw_ema", TORCH_BOX(&pera_fast::adamw_ema));
  m.impl("ema_update", TORCH_BOX(&pera_fast::ema_update));
  m.impl("grad_norm", TORCH_BOX(&pera_fast::grad_norm));
}
