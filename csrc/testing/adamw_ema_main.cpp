// Runs the CUDA kernels' source on the CPU (cuda_host.h):
//   adamw_ema_main < arguments > results
// Arguments: int64 tensors; float64 lr, weight decay, momentum, beta1, beta2, eps, clip norm; float32 norm. Then of
// each tensor as int64 its numel, how many numbers behind an aligned address its arrays start, the bytes of a number
// of param, grad and teacher (0: no teacher), whether there are shadows; and param, grad, exp_avg, exp_avg_sq, step
// and teacher. Results: the flag; of each tensor param, exp_avg, exp_avg_sq, step, teacher, shadows.
#include "../cuda/parameters.h"
#include "arrays.h"

using pera_fast::AdamWEMACoefficients;
using pera_fast::AdamWEMATensor;
using namespace pera_fast::testing;

int main() {
  const int64_t count = *read<int64_t>(1);
  const double* const options = read<double>(7);
  const float* const norm = read<float>(1);
  std::vector<AdamWEMATensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const facts = read<int64_t>(6);
    const size_t numel = static_cast<size_t>(facts[0]), shift = static_cast<size_t>(facts[1]);
    const size_t param = static_cast<size_t>(facts[2]), grad = static_cast<size_t>(facts[3]);
    const size_t teacher = static_cast<size_t>(facts[4]);
    AdamWEMATensor t{};
    t.numel = facts[0];
    t.param_is_bfloat16 = param == 2;
    t.grad_is_bfloat16 = grad == 2;
    t.teacher_is_bfloat16 = teacher == 2;
    t.param = read_bytes(numel * param, shift * param);
    t.grad = read_bytes(numel * grad, shift * grad);
    t.exp_avg = read_bytes(numel * param, shift * param);
    t.exp_avg_sq = read_bytes(numel * param, shift * param);
    t.step = reinterpret_cast<float*>(read_bytes(sizeof(float)));
    if (teacher != 0) t.teacher = read_bytes(numel * teacher, shift * teacher);
    if (facts[5] != 0) {
      t.shadow = reinterpret_cast<uint16_t*>(new_array((numel + shift) * 2)) + shift;
      if (teacher != 0) t.teacher_shadow = reinterpret_cast<uint16_t*>(new_array((numel + shift) * 2)) + shift;
    }
    tensors.push_back(t);
  }
  std::vector<AdamWEMACoefficients> coefficients(tensors.size() + 1);
  bool skipped = false;
  const int error = pera_fast::launch_adamw_ema(
      tensors, {options[3], options[4], options[5], options[6]}, options, norm, coefficients.data(), &skipped, nullptr);
  if (error != 0) return 3;
  write(&skipped, 1);
  for (const AdamWEMATensor& t : tensors) {
    const size_t numel = static_cast<size_t>(t.numel), param = t.param_is_bfloat16 ? 2 : 4;
    write(t.param, numel * param);
    write(t.exp_avg, numel * param);
    write(t.exp_avg_sq, numel * param);
    write(t.step, sizeof(float));
    if (t.teacher != nullptr) write(t.teacher, numel * (t.teacher_is_bfloat16 ? 2 : 4));
    if (t.shadow != nullptr) write(t.shadow, numel * 2);
    if (t.teacher_shadow != nullptr) write(t.teacher_shadow, numel * 2);
  }
  return 0;
}
