// at::parallel_for by threads of its own, for the thread sanitizer, which does not see into torch's OpenMP. Linked
// into the library under test, with -Bsymbolic, in the place of libtorch's (tests/test_sanitizers.py).
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, ParallelFunc function, void* context) {
  if (begin >= end) return 0;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  // As ATen shares a range out.
  const int64_t even = (end - begin + threads - 1) / threads;
  const int64_t chunk = std::max<int64_t>({even, grain_size, 1});
  std::vector<std::thread> running;
  for (int64_t start = begin; start < end; start += chunk) {
    running.emplace_back(function, start, std::min(start + chunk, end), context);
  }
  for (std::thread& thread : running) thread.join();
  return 0;
}
