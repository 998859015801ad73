// The L2 norm over many tensors: what its kernels are given. No torch here.
#pragma once

#include <cstdint>

namespace pera_fast {

struct GradTensor {
  const void* grad;
  int64_t numel;
  bool is_bfloat16;
};

}  // namespace pera_fast
