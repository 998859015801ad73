// The update of student and teacher, for CPU and CUDA: clip, AdamW (Loshchilov & Hutter 2019), moving average. No
// torch here.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pera_fast {

// One parameter. The moments have its dtype.
struct AdamWEMATensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float* step;                // updates so far
  void* teacher;              // null for none
  uint16_t* shadow;           // bfloat16 copy of param, null for none
  uint16_t* teacher_shadow;
  int64_t numel;
  bool param_is_bfloat16, grad_is_bfloat16, teacher_is_bfloat16;
};

struct AdamWEMAOptions {
  double beta1, beta2, eps, clip_norm;
};

// What one parameter's numbers have in common.
struct AdamWEMACoefficients {
  float clip, decay, beta1_rest, beta2, beta2_rest, step_size, inverse_root, eps, rate;
  bool skip;  // the gradient's norm is not finite: nothing may change
};

PERA_FAST_HOST_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// hyper: lr, weight decay, momentum. Advances the step. All in double precision and rounded once.
PERA_FAST_HOST_DEVICE AdamWEMACoefficients adamw_ema_prepare(
    const AdamWEMAOptions& options, const double* hyper, float grad_norm, float* step) {
  AdamWEMACoefficients c{};
  c.skip = !is_finite(grad_norm);
  if (c.skip) return c;
  *step += 1.0f;
  const double clip = options.clip_norm / (static_cast<double>(grad_norm) + 1e-6);
  const double correction1 = 1.0 - pow(options.beta1, static_cast<double>(*step));
  const double correction2 = 1.0 - pow(options.beta2, static_cast<double>(*step));
  c.clip = static_cast<float>(clip < 1.0 ? clip : 1.0);
  c.decay = static_cast<float>(1.0 - multiply(hyper[0], hyper[1]));
  c.beta1_rest = static_cast<float>(1.0 - options.beta1);
  c.beta2 = static_cast<float>(options.beta2);
  c.beta2_rest = static_cast<float>(1.0 - options.beta2);
  c.step_size = static_cast<float>(hyper[0] / correction1);
  c.inverse_root = static_cast<float>(1.0 / sqrt(correction2));
  c.eps = static_cast<float>(options.eps);
  c.rate = static_cast<float>(1.0 - hyper[2]);
  return c;
}

// One number of a parameter and its moments.
PERA_FAST_HOST_DEVICE void adamw_update(
    const AdamWEMACoefficients& c, float grad, float& param, float& exp_avg, float& exp_avg_sq) {
  const float g = multiply(grad, c.clip);
  exp_avg += multiply(c.beta1_rest, g - exp_avg);
  exp_avg_sq = multiply(c.beta2, exp_avg_sq) + multiply(multiply(c.beta2_rest, g), g);
#ifdef __CUDA_ARCH__
  const float root = __fsqrt_rn(exp_avg_sq);
#else
  const float root = __builtin_sqrtf(exp_avg_sq);
#endif
  const float denominator = multiply(root, c.inverse_root) + c.eps;
  param = multiply(param, c.decay) - multiply(c.step_size, exp_avg) / denominator;
}

PERA_FAST_HOST_DEVICE float moved_towards(float from, float to, float rate) {
  return from + multiply(rate, to - from);
}

}  // namespace pera_fast
