// Launcher of the CUDA kernels, for bindings.cpp and the tests. No torch and no CUDA headers here.
#pragma once

#include <cstdint>

#include "../crop_patches.h"

namespace pera_fast {

// How many int64 of device memory launch_crop_patches needs for the sums that contrast blends towards.
int64_t crop_patches_sums(const CropPatches& a);

// All pointers are to device memory. sums: room for crop_patches_sums(a), not initialised.
// Returns a cudaError_t, 0 when launched.
int launch_crop_patches(const CropPatches& a, int64_t* sums, void* stream);

}  // namespace pera_fast
