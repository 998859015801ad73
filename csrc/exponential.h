// exp() that every compiler vectorises.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pera_fast {

// Exponential of x <= 0, relative error below 2e-7; below -87 the result is 0 for every purpose here. NaN
// stays NaN (the comparison is false), so that a loss shows that something was not finite.
PERA_FAST_HOST_DEVICE float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, of which the first times n is exact.
  const int32_t n = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float whole = static_cast<float>(n);
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  // Minimax polynomial of degree 6 (Cephes expf).
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of(static_cast<uint32_t>(n + 127) << 23);
}

}  // namespace pera_fast
