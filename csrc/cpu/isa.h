// Which instruction set the kernels of this process use.
#pragma once

#include <cstdlib>
#include <cstring>

namespace pera_fast {

// PERA_FAST_CPU_CAPABILITY=avx2 or =baseline lowers it, for tests.
template <class Function>
Function choose_by_isa(Function baseline, Function avx2, Function avx512) {
#ifdef __x86_64__
  const char* limit = std::getenv("PERA_FAST_CPU_CAPABILITY");
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return baseline;
  const bool at_most_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  if (__builtin_cpu_supports("avx2")) return avx2;
#endif
  return baseline;
}

}  // namespace pera_fast
