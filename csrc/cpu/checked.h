// A tensor's data, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace pera_fast {

inline const float* floats(const torch::stable::Tensor& tensor, const char* name, int64_t numel) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous() &&
          tensor.numel() == numel,
      name, ": expected ", numel, " contiguous float32 values");
  return tensor.const_data_ptr<float>();
}

}  // namespace pera_fast
