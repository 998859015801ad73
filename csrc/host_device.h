// Functions that the CPU and the CUDA kernels share.
#pragma once

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

}  // namespace pera_fast
