#include "../adamw_ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../parameters_op.h"
#include "../tensor_table.h"
#include "isa.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "adamw_ema_kernel.h"
#include "for_each_isa.h"

using torch::stable::Tensor;

// Chunks that are worth a thread's while.
constexpr int64_t kGrain = 4;

// Calls function(tensor, chunk, begin, end) for every chunk of every tensor, in parallel.
template <class Entry, class Function>
void for_each_chunk(const std::vector<Entry>& tensors, const Function& function) {
  std::vector<uint32_t> first{0};
  for (const Entry& t : tensors) first.push_back(first.back() + static_cast<uint32_t>(chunks_of(t.numel)));
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t chunk, int64_t last) {
    if (chunk == last) return;
    size_t i = static_cast<size_t>(
        tensor_of_chunk(first.data(), static_cast<int>(tensors.size()), static_cast<uint32_t>(chunk)));
    for (; chunk < last; ++chunk) {
      while (chunk == first[i + 1]) ++i;  // tensors may be empty
      const int64_t begin = (chunk - first[i]) * kChunk;
      function(i, chunk, begin, std::min(begin + kChunk, tensors[i].numel));
    }
  });
}

void adamw_ema(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors teachers,
    Tensors shadows, Tensors teacher_shadows, const Tensor& hyper, const Tensor& grad_norm, double beta1,
    double beta2, double eps, double clip_norm, Tensor skipped) {
  static const auto kernel = PERA_FAST_CHOOSE(adamw_ema);
  const float norm = *float_of(grad_norm, "grad_norm");
  const double* const scalars = hyper_of(hyper, 3, grad_norm);
  const std::vector<AdamWEMATensor> tensors = adamw_ema_tensors(
      params, grads, exp_avgs, exp_avg_sqs, steps, teachers, shadows, teacher_shadows, grad_norm);
  std::vector<AdamWEMACoefficients> coefficients;
  for (const AdamWEMATensor& t : tensors) {
    coefficients.push_back(adamw_ema_prepare({beta1, beta2, eps, clip_norm}, scalars, norm, t.step));
  }
  *flag_of(skipped, grad_norm) = !is_finite(norm);
  if (!is_finite(norm)) return;
  for_each_chunk(tensors, [&](size_t i, int64_t, int64_t begin, int64_t end) {
    kernel(tensors[i], coefficients[i], begin, end);
  });
}

void ema_update(Tensors teachers, Tensors params, Tensors shadows, const Tensor& momentum) {
  static const auto kernel = PERA_FAST_CHOOSE(ema_update);
  const std::vector<EmaTensor> tensors = ema_tensors(teachers, params, shadows, momentum);
  const float rate = static_cast<float>(1.0 - *hyper_of(momentum, 1, momentum));
  for_each_chunk(tensors, [&](size_t i, int64_t, int64_t begin, int64_t end) {
    kernel(tensors[i], rate, begin, end);
  });
}

void grad_norm(Tensors grads, Tensor norm) {
  static const auto kernel = PERA_FAST_CHOOSE(sum_of_squares);
  float* const result = const_cast<float*>(float_of(norm, "norm"));
  const std::vector<GradTensor> tensors = grad_tensors(grads, norm);
  size_t chunks = 0;
  for (const GradTensor& t : tensors) chunks += static_cast<size_t>(chunks_of(t.numel));
  std::vector<double> partial(chunks);
  for_each_chunk(tensors, [&](size_t i, int64_t chunk, int64_t begin, int64_t end) {
    partial[static_cast<size_t>(chunk)] = kernel(tensors[i], begin, end);
  });
  // One after the other, whatever the number of threads: equal bits.
  double total = 0.0;
  for (const double sum : partial) total += sum;
  *result = static_cast<float>(std::sqrt(total));
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("adamw_ema", TORCH_BOX(&pera_fast::adamw_ema));
  m.impl("ema_update", TORCH_BOX(&pera_fast::ema_update));
  m.impl("grad_norm", TORCH_BOX(&pera_fast::grad_norm));
}
