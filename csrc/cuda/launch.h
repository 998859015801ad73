// What a torch-free .cu file needs to be compiled both by nvcc and, through testing/cuda_host.h, by g++.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

// kernel<<<...>>>(arguments) in a form that g++ can parse: PERA_FAST_LAUNCH(kernel, ...)(arguments).
#define PERA_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>
// A pointer to the block's dynamic shared memory.
#define PERA_FAST_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char pera_fast_shared[]; \
  type* const name = reinterpret_cast<type*>(pera_fast_shared)
#else
#include "../testing/cuda_host.h"
#endif
