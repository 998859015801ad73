// Numbers of the CPU kernels: how a stored one becomes a float32 and back, exponentials. Part of a kernel file
// (for_each_isa.h); the including .cpp includes <immintrin.h>.

struct Float32 {
  typedef float Type;
  static inline float to(float x) { return x; }
  static inline float from(float x) { return x; }
};

struct Bfloat16 {
  typedef uint16_t Type;
  static inline float to(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static inline uint16_t from(float x) { return bfloat16_of(x); }
};

// n numbers in bfloat16.
inline void narrow(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#if PERA_FAST_ISA == 3
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) to[j] = bfloat16_of(from[j]);
}

// a · b + c, in one rounding where the instruction set has it.
inline __attribute__((always_inline)) float multiply_add(float a, float b, float c) {
#if PERA_FAST_ISA >= 1
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Exponential of x <= 0, relative error below 2e-7; below -87 the result is 0 for every purpose here. NaN
// stays NaN (the comparison is false), so that a loss shows that something was not finite.
inline __attribute__((always_inline)) float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  // x = n ln 2 + r with |r| up to about ln 2 / 2. The large number's unit in the last place is 1: adding it rounds to
  // a whole number, and leaves 127 + n, the exponent of 2^n, in the last bits.
  const float large = 12582912.0f + 127.0f;
  const float shifted = multiply_add(x, 1.44269504f, large);
  const float n = shifted - large;
  // ln 2 in two parts, of which the first times n is exact.
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 8.314715265e-3f;  // minimax polynomial with exp(0) = exp'(0) = 1
  p = multiply_add(p, r, 4.189025205e-2f);
  p = multiply_add(p, r, 1.666708980e-1f);
  p = multiply_add(p, r, 4.999923194e-1f);
  p = multiply_add(multiply_add(p, r, 1.0f), r, 1.0f);
  return p * float_of(bits_of(shifted) << 23);
}
