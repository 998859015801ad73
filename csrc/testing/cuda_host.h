// Runs CUDA kernels on the CPU, for tests: the unchanged .cu file is compiled by g++ (-x c++), where the
// address sanitizer sees every access, shared memory included.
//
// Blocks run one after another. The threads of a block are fibers that run until they end or reach
// __syncthreads(); then the next one runs. With PERA_FAST_HOST_ORDER=reverse they run from the last to the
// first: a kernel that lacks a barrier gives another result in one of the two orders.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

namespace pera_fast::host {

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  bool done = false;
};

struct Block {
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::unique_ptr<unsigned char[]> shared;
};
inline Block block;

// Control passes between the scheduler and one fiber; the sanitizer has to be told of each change of stack.
inline void to_fiber(Fiber& fiber) {
  block.current = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void to_scheduler(bool done) {
  Fiber& fiber = *block.current;
  fiber.done = done;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(
      done ? nullptr : &fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  block.body();
  to_scheduler(true);
}

inline void run_block(std::vector<Fiber>& fibers, bool reverse) {
  unsigned number = 0;
  for (Fiber& fiber : fibers) {
    fiber.index = dim3(
        number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y));
    ++number;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (size_t done = 0; done < fibers.size();) {
    done = 0;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[reverse ? fibers.size() - 1 - i : i];
      to_fiber(fiber);
      done += fiber.done;
    }
    if (done != 0 && done != fibers.size()) {
      std::fprintf(stderr, "cuda_host: %zu of %zu threads ended while the others wait at a barrier\n", done,
                   fibers.size());
      std::abort();
    }
  }
}

template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  dim3 grid, threads;
  size_t shared_bytes;

  void operator()(Parameters... arguments) const {
    const char* order = std::getenv("PERA_FAST_HOST_ORDER");
    const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
    gridDim = grid;
    blockDim = threads;
    block.body = [&] { kernel(arguments...); };
    std::vector<Fiber> fibers(size_t{threads.x} * threads.y * threads.z);
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          // Fresh and of the exact size, so that the sanitizer sees what lies outside; filled with ones bits,
          // so that nothing is zero by luck.
          block.shared.reset(new unsigned char[shared_bytes]);
          std::memset(block.shared.get(), 0xff, shared_bytes);
          run_block(fibers, reverse);
        }
    block.shared.reset();
  }
};

template <class... Parameters>
Launch<Parameters...> launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t) {
  return {kernel, grid, threads, shared_bytes};
}

}  // namespace pera_fast::host

inline void __syncthreads() { pera_fast::host::to_scheduler(false); }

#define PERA_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  pera_fast::host::launch((kernel), (grid), (block), (shared_bytes), (stream))
#define PERA_FAST_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(pera_fast::host::block.shared.get())
