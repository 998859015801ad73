// Launches of the kernels over whole lists of parameters. Each returns a CUDA error code, 0 for none.
#pragma once

#include <cstdint>
#include <vector>

#include "../adamw_ema.h"
#include "../ema_update.h"
#include "../grad_norm.h"

namespace pera_fast {

// hyper: lr, weight decay, momentum. coefficients: room for one per tensor. All pointers are to device memory.
int launch_adamw_ema(
    const std::vector<AdamWEMATensor>& tensors, const AdamWEMAOptions& options, const double* hyper,
    const float* grad_norm, AdamWEMACoefficients* coefficients, bool* skipped, void* stream);

int launch_ema_update(const std::vector<EmaTensor>& tensors, const double* momentum, void* stream);

// Floats that launch_grad_norm wants for its partial sums.
int64_t grad_norm_partials(const std::vector<GradTensor>& tensors);
int launch_grad_norm(const std::vector<GradTensor>& tensors, float* partial, float* norm, void* stream);

}  // namespace pera_fast
