// Numbers in global memory, one or four at a time.
#pragma once

#include <cstdint>

#include "../host_device.h"
#include "launch.h"

namespace pera_fast {

// How a stored number becomes a float32 and back; Four is moved by one instruction.
struct Float32 {
  typedef float Type;
  struct alignas(16) Four {
    Type x[4];
  };
  static PERA_FAST_HOST_DEVICE float to(Type x) { return x; }
  static PERA_FAST_HOST_DEVICE Type from(float x) { return x; }
};

struct Bfloat16 {
  typedef uint16_t Type;
  struct alignas(8) Four {
    Type x[4];
  };
  static PERA_FAST_HOST_DEVICE float to(Type bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static PERA_FAST_HOST_DEVICE Type from(float x) { return bfloat16_of(x); }
};

// `Width` numbers from an address that is aligned for them.
template <class Format, int Width>
PERA_FAST_HOST_DEVICE void load(const void* base, int64_t i, float* x) {
  const typename Format::Type* const at = static_cast<const typename Format::Type*>(base) + i;
  if (Width == 4) {
    const typename Format::Four four = *reinterpret_cast<const typename Format::Four*>(at);
    for (int k = 0; k < Width; ++k) x[k] = Format::to(four.x[k]);
  } else {
    x[0] = Format::to(*at);
  }
}

template <class Format, int Width>
PERA_FAST_HOST_DEVICE void store(void* base, int64_t i, const float* x) {
  typename Format::Type* const at = static_cast<typename Format::Type*>(base) + i;
  if (Width == 4) {
    typename Format::Four four;
    for (int k = 0; k < Width; ++k) four.x[k] = Format::from(x[k]);
    *reinterpret_cast<typename Format::Four*>(at) = four;
  } else {
    *at = Format::from(x[0]);
  }
}

// Nonzero where four numbers from here cannot be moved at once.
template <class Format>
PERA_FAST_HOST_DEVICE uintptr_t misaligned(const void* base) {
  return reinterpret_cast<uintptr_t>(base) & (sizeof(typename Format::Four) - 1);
}

// Calls function(Width{}, i) for the numbers begin … end - 1, shared out to the block's threads: four at a time
// where `aligned`, and the rest one by one.
template <int width>
struct Width {
  static constexpr int value = width;
};
template <class Function>
__device__ __forceinline__ void for_each_vector(bool aligned, int64_t begin, int64_t end, const Function& function) {
  const int64_t whole_end = aligned ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + 4 * static_cast<int64_t>(threadIdx.x); i < whole_end; i += 4 * blockDim.x) {
    function(Width<4>{}, i);
  }
  for (int64_t i = whole_end + threadIdx.x; i < end; i += blockDim.x) function(Width<1>{}, i);
}

}  // namespace pera_fast
