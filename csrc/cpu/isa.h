// Which instruction set the kernels of this process use.
#pragma once

#include <cstdlib>
#include <cstring>

namespace pera_fast {

// 0 baseline, 1 AVX2, 2 AVX-512, 3 with bfloat16. PERA_FAST_CPU_CAPABILITY=baseline, avx2 or avx512 lowers it,
// for tests.
inline int isa() {
#ifdef __x86_64__
  const char* const limit = std::getenv("PERA_FAST_CPU_CAPABILITY");
  const auto is_limit = [limit](const char* name) { return limit != nullptr && std::strcmp(limit, name) == 0; };
  if (is_limit("baseline") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (is_limit("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 1;
  }
  return is_limit("avx512") || !__builtin_cpu_supports("avx512bf16") ? 2 : 3;
#else
  return 0;
#endif
}

template <class Function>
Function choose_by_isa(Function baseline, Function avx2, Function avx512, Function avx512bf16) {
  const Function choice[] = {baseline, avx2, avx512, avx512bf16};
  return choice[isa()];
}

}  // namespace pera_fast
