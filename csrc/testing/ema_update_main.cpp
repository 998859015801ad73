// Runs the CUDA kernel's source on the CPU (cuda_host.h):
//   ema_update_main < arguments > results
// Arguments: int64 tensors; float64 momentum. Then of each tensor as int64 its numel, how many numbers behind an
// aligned address its arrays start, the bytes of a number of teacher and of param, whether there is a shadow; and
// teacher and param. Results: of each tensor teacher and shadow.
#include "../cuda/parameters.h"
#include "arrays.h"

using pera_fast::EmaTensor;
using namespace pera_fast::testing;

int main() {
  const int64_t count = *read<int64_t>(1);
  const double* const momentum = read<double>(1);
  std::vector<EmaTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const facts = read<int64_t>(5);
    const size_t numel = static_cast<size_t>(facts[0]), shift = static_cast<size_t>(facts[1]);
    const size_t teacher = static_cast<size_t>(facts[2]), param = static_cast<size_t>(facts[3]);
    EmaTensor t{};
    t.numel = facts[0];
    t.teacher_is_bfloat16 = teacher == 2;
    t.param_is_bfloat16 = param == 2;
    t.teacher = read_bytes(numel * teacher, shift * teacher);
    t.param = read_bytes(numel * param, shift * param);
    if (facts[4] != 0) t.shadow = reinterpret_cast<uint16_t*>(new_array((numel + shift) * 2)) + shift;
    tensors.push_back(t);
  }
  if (pera_fast::launch_ema_update(tensors, momentum, nullptr) != 0) return 3;
  for (const EmaTensor& t : tensors) {
    const size_t numel = static_cast<size_t>(t.numel);
    write(t.teacher, numel * (t.teacher_is_bfloat16 ? 2 : 4));
    if (t.shadow != nullptr) write(t.shadow, numel * 2);
  }
  return 0;
}
