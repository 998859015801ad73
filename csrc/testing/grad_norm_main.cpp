// Runs the CUDA kernels' source on the CPU (cuda_host.h):
//   grad_norm_main < arguments > norm
// Arguments: int64 tensors; then of each as int64 its numel, how many numbers behind an aligned address it starts
// and the bytes of a number, and the tensor. Result: the norm, float32.
#include "../cuda/parameters.h"
#include "arrays.h"

using pera_fast::GradTensor;
using namespace pera_fast::testing;

int main() {
  const int64_t count = *read<int64_t>(1);
  std::vector<GradTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const facts = read<int64_t>(3);
    const size_t numel = static_cast<size_t>(facts[0]), shift = static_cast<size_t>(facts[1]);
    const size_t bytes = static_cast<size_t>(facts[2]);
    tensors.push_back({read_bytes(numel * bytes, shift * bytes), facts[0], bytes == 2});
  }
  const size_t partials = static_cast<size_t>(pera_fast::grad_norm_partials(tensors));
  float* const partial = reinterpret_cast<float*>(new_array(partials * sizeof(float)));
  float norm = 0.0f;
  if (pera_fast::launch_grad_norm(tensors, partial, &norm, nullptr) != 0) return 3;
  write(&norm, sizeof norm);
  return 0;
}
