// Matrix products out of tiles that stay in registers, for operands in cache. Part of a kernel file, compiled
// once per instruction set (for_each_isa.h); the including .cpp includes <immintrin.h>.
//
// c [rows, columns] = a [rows, depth] · b [depth, columns], added to c where `add` says so: the sum over depth is
// taken first, so that many additions to c lose little.
// b and c have contiguous rows; a has any two strides, so that it may lie transposed. With `pairs` an element
// of a and b is two bfloat16 side by side, along depth, and depth counts pairs.

#if PERA_FAST_ISA >= 2
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
inline Lanes broadcast(float x) { return (Lanes)_mm512_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
constexpr bool kHas32Registers = true;
#elif PERA_FAST_ISA == 1
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
inline Lanes broadcast(float x) { return (Lanes)_mm256_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
constexpr bool kHas32Registers = false;
#else
typedef float Lanes __attribute__((vector_size(16), aligned(4), may_alias));
inline Lanes broadcast(float x) { return Lanes{x, x, x, x}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
constexpr bool kHas32Registers = false;
#endif
constexpr int kLanes = sizeof(Lanes) / sizeof(float);

// c + a · b where each lane of a and b is a pair of bfloat16.
inline Lanes multiply_add_pairs(Lanes a, Lanes b, Lanes c) {
#if PERA_FAST_ISA == 3
  return (Lanes)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#else  // only to be complete: slower than float32
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes))));
  const Bits bits_a = (Bits)a, bits_b = (Bits)b, high = Bits{} + 0xffff0000u;
  c = multiply_add((Lanes)(bits_a << 16), (Lanes)(bits_b << 16), c);
  return multiply_add((Lanes)(bits_a & high), (Lanes)(bits_b & high), c);
#endif
}

struct Strides {
  int64_t a_row, a_depth, b_row, c_row;  // in elements
};

template <bool pairs, int rows, int vectors>
inline void product_tile(
    const float* a, const float* b, float* c, const Strides stride, int64_t depth, bool add) {
  Lanes sum[rows][vectors] = {};
  // In bytes, and hidden from GCC: it would else make a second loop for strides of one element and then, in
  // both, copy every sum once per step: half the speed.
  int64_t a_row = 4 * stride.a_row, a_depth = 4 * stride.a_depth, b_row = 4 * stride.b_row;
  asm("" : "+r"(a_row), "+r"(a_depth), "+r"(b_row));
  const char *left_at = reinterpret_cast<const char*>(a), *right_at = reinterpret_cast<const char*>(b);
  for (int64_t k = 0; k < depth; ++k, left_at += a_depth, right_at += b_row) {
    Lanes right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = reinterpret_cast<const Lanes*>(right_at)[j];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Lanes left = broadcast(*reinterpret_cast<const float*>(left_at + i * a_row));
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] = pairs ? multiply_add_pairs(left, right[j], sum[i][j]) : multiply_add(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      Lanes* const out = reinterpret_cast<Lanes*>(c + i * stride.c_row + j * kLanes);
      *out = add ? *out + sum[i][j] : sum[i][j];
    }
  }
}

template <bool pairs, int vectors>
inline void product_columns(
    const float* a, const float* b, float* c, const Strides& stride, int64_t rows, int64_t depth, bool add) {
  // Sums, one row of b and one number of a fill the registers: 8 x 3 + 3 + 1 or 6 x 4 + 4 + 1 of 32, 4 x 3 + 3 + 1.
  constexpr int kRows = kHas32Registers ? (vectors == 4 ? 6 : 8) : 4;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    product_tile<pairs, kRows, vectors>(a + i * stride.a_row, b, c + i * stride.c_row, stride, depth, add);
  }
  for (; i + 2 <= rows; i += 2) {
    product_tile<pairs, 2, vectors>(a + i * stride.a_row, b, c + i * stride.c_row, stride, depth, add);
  }
  if (i < rows) product_tile<pairs, 1, vectors>(a + i * stride.a_row, b, c + i * stride.c_row, stride, depth, add);
}

template <bool pairs>
inline void product(
    const float* a, const float* b, float* c, const Strides& stride, int64_t rows, int64_t columns,
    int64_t depth, bool add) {
  int64_t j = 0;
  for (int64_t left = columns / kLanes; left > 0; left = (columns - j) / kLanes) {
    if (kHas32Registers && left >= 4 && left % 3 == 1) {
      product_columns<pairs, 4>(a, b + j, c + j, stride, rows, depth, add);
      j += 4 * kLanes;
    } else if (left >= 3) {
      product_columns<pairs, 3>(a, b + j, c + j, stride, rows, depth, add);
      j += 3 * kLanes;
    } else if (left == 2) {
      product_columns<pairs, 2>(a, b + j, c + j, stride, rows, depth, add);
      j += 2 * kLanes;
    } else {
      product_columns<pairs, 1>(a, b + j, c + j, stride, rows, depth, add);
      j += kLanes;
    }
  }
  // A last piece narrower than a vector, of float32 alone: callers pad pairs.
  for (; !pairs && j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      float sum = 0.0f, *const out = c + i * stride.c_row + j;
      for (int64_t k = 0; k < depth; ++k) sum += a[i * stride.a_row + k * stride.a_depth] * b[k * stride.b_row + j];
      *out = add ? *out + sum : sum;
    }
  }
}

// c [rows, columns] += aᵀ · b for a [depth, ...] and b [depth, ...] with many rows each, in pieces of depth that
// stay in cache. Strides of a and b in elements; depth of pairs counts pairs.
template <bool pairs>
inline void add_transposed_product(
    const float* a, int64_t a_depth, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
    int64_t columns, int64_t depth) {
  constexpr int64_t kPiece = 256;
  for (int64_t k = 0; k < depth; k += kPiece) {
    const int64_t n = depth - k < kPiece ? depth - k : kPiece;
    product<pairs>(a + k * a_depth, b + k * b_row, c, {1, a_depth, b_row, c_row}, rows, columns, n, true);
  }
}

// Euclidean norms of the rows of v [n, dim]; sixteen sums side by side, in equal order on every instruction set.
inline void row_norms(const float* v, int64_t n, int64_t dim, float* norm) {
  for (int64_t k = 0; k < n; ++k, v += dim) {
    float partial[16] = {};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
#pragma omp simd
      for (int lane = 0; lane < 16; ++lane) partial[lane] += v[i + lane] * v[i + lane];
    }
    for (int lane = 0; i < dim; ++i, ++lane) partial[lane] += v[i] * v[i];
    float sum = 0.0f;
    for (int lane = 0; lane < 16; ++lane) sum += partial[lane];
    norm[k] = __builtin_sqrtf(sum);
  }
}
