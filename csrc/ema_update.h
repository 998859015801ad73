// teacher += (1 - momentum)(param - teacher): what its kernels are given. The formula is adamw_ema.h's. No torch here.
#pragma once

#include <cstdint>

namespace pera_fast {

struct EmaTensor {
  void* teacher;
  const void* param;
  uint16_t* shadow;  // bfloat16 copy of teacher, null for none
  int64_t numel;
  bool teacher_is_bfloat16, param_is_bfloat16;
};

}  // namespace pera_fast
