// Launcher of the CUDA kernel, for bindings.cpp and the tests. No torch and no CUDA headers here.
#pragma once

#include <cstdint>

namespace pera_fast {

// crop_index [crops] with the given stride; student, target, teacher contiguous [crops, count].
// Needs crops >= 1 and num_patches >= 1. Returns a cudaError_t, 0 when launched.
int launch_disjoint_masks(
    const int64_t* crop_index, int64_t crop_stride, int64_t crops, uint64_t seed, uint32_t step,
    int num_patches, int num_student, int num_target, int64_t* student, int64_t* target, int64_t* teacher,
    void* stream);

}  // namespace pera_fast
