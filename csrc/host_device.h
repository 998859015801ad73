// Functions that the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PERA_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PERA_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pera_fast {

// One rounding per operation: nvcc would otherwise contract a product and a sum into one rounding, and the
// results of CPU and GPU would differ. (The CPU library is compiled with -ffp-contract=off.)
PERA_FAST_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PERA_FAST_HOST_DEVICE double multiply(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PERA_FAST_HOST_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PERA_FAST_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// To the nearest, ties to even. NaN stays NaN, whose low bits might else carry over into its exponent.
PERA_FAST_HOST_DEVICE uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace pera_fast
