// Argument checks of the ops over parameters, shared by the CPU and the CUDA registration. The public functions
// have said the same in more helpful words; these lines guard direct calls of torch.ops.pera_fast.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "adamw_ema.h"
#include "ema_update.h"
#include "grad_norm.h"

namespace pera_fast {

using Tensors = std::vector<torch::stable::Tensor>;

// [numel] contiguous float32 or bfloat16 on the device of `on`.
inline void* numbers(
    const torch::stable::Tensor& tensor, const char* name, int64_t numel, const torch::stable::Tensor& on) {
  const auto dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      (dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::BFloat16) &&
          tensor.is_contiguous() && tensor.numel() == numel && tensor.is_cuda() == on.is_cuda() &&
          tensor.get_device_index() == on.get_device_index(),
      name, ": expected ", numel, " contiguous float32 or bfloat16 values on the device of the scalars");
  return const_cast<void*>(tensor.const_data_ptr());
}

// One float32 value; hyper: `count` float64 values; a flag: one boolean. On the device of `on`.
inline const float* float_of(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.numel() == 1, name,
      ": expected one float32 value");
  return tensor.const_data_ptr<float>();
}

inline const double* hyper_of(const torch::stable::Tensor& hyper, int64_t count, const torch::stable::Tensor& on) {
  STD_TORCH_CHECK(
      hyper.scalar_type() == torch::headeronly::ScalarType::Double && hyper.is_contiguous() &&
          hyper.numel() == count && hyper.is_cuda() == on.is_cuda(),
      "hyper: expected ", count, " float64 values on the device of the scalars");
  return static_cast<const double*>(hyper.const_data_ptr());
}

inline bool* flag_of(const torch::stable::Tensor& flag, const torch::stable::Tensor& on) {
  STD_TORCH_CHECK(
      flag.scalar_type() == torch::headeronly::ScalarType::Bool && flag.numel() == 1 && flag.is_cuda() == on.is_cuda(),
      "skipped: expected one boolean on the device of the scalars");
  return static_cast<bool*>(const_cast<void*>(flag.const_data_ptr()));
}

inline bool is_low(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16;
}

// Entry i of a list whose place may be empty: in an empty list, or an empty tensor.
inline const torch::stable::Tensor* maybe(const Tensors& list, size_t i) {
  return i < list.size() && list[i].numel() > 0 ? &list[i] : nullptr;
}

inline uint16_t* shadow_of(
    const Tensors& list, size_t i, const char* name, int64_t numel, const torch::stable::Tensor& on) {
  const torch::stable::Tensor* tensor = maybe(list, i);
  if (tensor == nullptr) return nullptr;
  STD_TORCH_CHECK(is_low(*tensor), name, ": expected bfloat16");
  return static_cast<uint16_t*>(numbers(*tensor, name, numel, on));
}

inline void check_list(const Tensors& list, const char* name, size_t count, bool may_be_absent) {
  STD_TORCH_CHECK(
      list.size() == count || (may_be_absent && list.empty()), name, ": expected ", count, " tensors, got ",
      list.size());
}

inline std::vector<AdamWEMATensor> adamw_ema_tensors(
    const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
    const Tensors& steps, const Tensors& teachers, const Tensors& shadows, const Tensors& teacher_shadows,
    const torch::stable::Tensor& on) {
  check_list(grads, "grads", params.size(), false);
  check_list(exp_avgs, "exp_avgs", params.size(), false);
  check_list(exp_avg_sqs, "exp_avg_sqs", params.size(), false);
  check_list(steps, "steps", params.size(), false);
  check_list(teachers, "teachers", params.size(), true);
  check_list(shadows, "shadows", params.size(), true);
  check_list(teacher_shadows, "teacher_shadows", params.size(), true);
  std::vector<AdamWEMATensor> tensors;
  tensors.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const torch::stable::Tensor& param = params[i];
    AdamWEMATensor t{};
    t.numel = param.numel();
    t.param = numbers(param, "params", t.numel, on);
    t.param_is_bfloat16 = is_low(param);
    t.grad = numbers(grads[i], "grads", t.numel, on);
    t.grad_is_bfloat16 = is_low(grads[i]);
    t.exp_avg = numbers(exp_avgs[i], "exp_avgs", t.numel, on);
    t.exp_avg_sq = numbers(exp_avg_sqs[i], "exp_avg_sqs", t.numel, on);
    STD_TORCH_CHECK(
        is_low(exp_avgs[i]) == is_low(param) && is_low(exp_avg_sqs[i]) == is_low(param),
        "exp_avgs, exp_avg_sqs: expected the parameter's dtype");
    STD_TORCH_CHECK(steps[i].is_cuda() == on.is_cuda(), "steps: expected them on the device of the scalars");
    t.step = const_cast<float*>(float_of(steps[i], "steps"));
    if (const torch::stable::Tensor* teacher = maybe(teachers, i)) {
      t.teacher = numbers(*teacher, "teachers", t.numel, on);
      t.teacher_is_bfloat16 = is_low(*teacher);
      t.teacher_shadow = shadow_of(teacher_shadows, i, "teacher_shadows", t.numel, on);
    }
    t.shadow = shadow_of(shadows, i, "shadows", t.numel, on);
    tensors.push_back(t);  // empty or not, its step counts
  }
  return tensors;
}

inline std::vector<EmaTensor> ema_tensors(
    const Tensors& teachers, const Tensors& params, const Tensors& shadows, const torch::stable::Tensor& on) {
  check_list(params, "params", teachers.size(), false);
  check_list(shadows, "shadows", teachers.size(), true);
  std::vector<EmaTensor> tensors;
  for (size_t i = 0; i < teachers.size(); ++i) {
    EmaTensor t{};
    t.numel = teachers[i].numel();
    t.teacher = numbers(teachers[i], "teachers", t.numel, on);
    t.teacher_is_bfloat16 = is_low(teachers[i]);
    t.param = numbers(params[i], "params", t.numel, on);
    t.param_is_bfloat16 = is_low(params[i]);
    t.shadow = shadow_of(shadows, i, "shadows", t.numel, on);
    if (t.numel > 0) tensors.push_back(t);
  }
  return tensors;
}

inline std::vector<GradTensor> grad_tensors(const Tensors& grads, const torch::stable::Tensor& on) {
  std::vector<GradTensor> tensors;
  for (const torch::stable::Tensor& grad : grads) {
    const int64_t numel = grad.numel();
    if (numel > 0) tensors.push_back({numbers(grad, "grads", numel, on), numel, is_low(grad)});
  }
  return tensors;
}

}  // namespace pera_fast
