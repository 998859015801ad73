// Matrix products out of tiles that stay in registers, for operands in cache. Part of a kernel file, compiled
// once per instruction set (for_each_isa.h); the including .cpp includes <immintrin.h>.
//
// c [rows, columns] = a [rows, depth] · b [depth, columns], added to c where `add` says so: the sum over depth is
// taken first, so that many additions to c lose little.
// b and c have contiguous rows; a has any two strides, so that it may lie transposed. A long b, or one whose rows lie
// far apart, is read quicker where `pack` has put it in the order of reading. With `pairs` an element of a and b is
// two bfloat16 side by side, along depth, and depth counts pairs.

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

constexpr int64_t kPacked = 0;

struct Strides {
  int64_t a_row, a_depth, b_row, c_row;  // in elements; b_row may be kPacked
};

// Columns of a tile, of those that are left: as many vectors as registers hold with their sums, or what a vector is
// too wide for.
inline int64_t panel_of(int64_t columns) {
  const int64_t left = columns / kLanes;
  if (kHas32Registers && left >= 4 && left % 3 == 1) return 4 * kLanes;
  return left == 0 ? columns : (left < 3 ? left : 3) * kLanes;
}

// b [depth, columns] with contiguous rows, panel by panel: [depth, columns of the panel] of each.
template <class As>
inline void pack(const typename As::Type* b, int64_t b_row, int64_t depth, int64_t columns, float* to) {
  for (int64_t j = 0, width; j < columns; j += width) {
    width = panel_of(columns - j);
    for (int64_t k = 0; k < depth; ++k, to += width) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = As::to(b[k * b_row + j + i]);
    }
  }
}

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

// Depth of which a panel's rows, that every tile reads, stay in the first level of the cache: 24 KB of it.
constexpr int64_t depth_of(int64_t width) { return 6144 / width; }

template <bool pairs, int vectors>
inline void product_columns(
    const float* a, const float* b, float* c, const Strides& stride, int64_t rows, int64_t depth, bool add) {
  // Sums, one row of b and one number of a fill the registers: 8 x 3 + 3 + 1 or 6 x 4 + 4 + 1 of 32, 4 x 3 + 3 + 1.
  constexpr int kRows = kHas32Registers ? (vectors == 4 ? 6 : 8) : 4;
  constexpr int64_t kDepth = depth_of(vectors * kLanes);
  const int64_t pieces = (depth + kDepth - 1) / kDepth, piece = pieces > 1 ? (depth + pieces - 1) / pieces : depth;
  int64_t k = 0;
  do {
    const int64_t n = depth - k < piece ? depth - k : piece;
    const float *const left = a + k * stride.a_depth, *const right = b + k * stride.b_row;
    const bool adds = add || k > 0;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      product_tile<pairs, kRows, vectors>(left + i * stride.a_row, right, c + i * stride.c_row, stride, n, adds);
    }
    for (; i + 2 <= rows; i += 2) {
      product_tile<pairs, 2, vectors>(left + i * stride.a_row, right, c + i * stride.c_row, stride, n, adds);
    }
    if (i < rows) product_tile<pairs, 1, vectors>(left + i * stride.a_row, right, c + i * stride.c_row, stride, n, adds);
    k += piece;
  } while (k < depth);
}

template <bool pairs>
inline void product(
    const float* a, const float* b, float* c, Strides stride, int64_t rows, int64_t columns, int64_t depth, bool add) {
  const bool is_packed = stride.b_row == kPacked;
  for (int64_t j = 0, width; j < columns; j += width, c += width) {
    width = panel_of(columns - j);
    if (is_packed) stride.b_row = width;
    switch (width / kLanes) {
      case 4:
        if constexpr (kHas32Registers) product_columns<pairs, 4>(a, b, c, stride, rows, depth, add);
        break;
      case 3:
        product_columns<pairs, 3>(a, b, c, stride, rows, depth, add);
        break;
      case 2:
        product_columns<pairs, 2>(a, b, c, stride, rows, depth, add);
        break;
      case 1:
        product_columns<pairs, 1>(a, b, c, stride, rows, depth, add);
        break;
      default:  // narrower than a vector, of float32 alone: callers pad pairs
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t n = 0; n < width; ++n) {
            float sum = 0.0f, *const out = c + i * stride.c_row + n;
            for (int64_t k = 0; k < depth; ++k) sum += a[i * stride.a_row + k * stride.a_depth] * b[k * stride.b_row + n];
            *out = add ? *out + sum : sum;
          }
        }
    }
    b += is_packed ? depth * width : width;
  }
}

// c [rows, columns] += aᵀ · b for a [depth, ...] and b [depth, ...] with many rows each. Strides of a and b in
// elements; depth of pairs counts pairs. Each panel of b is packed for all rows of c, where there are enough of them.
template <bool pairs>
inline void add_transposed_product(
    const float* a, int64_t a_depth, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
    int64_t columns, int64_t depth) {
  // That of the widest panel: a share of the columns has other panels, and must not add up in another order.
  constexpr int64_t kWidest = (kHas32Registers ? 4 : 3) * kLanes, kPiece = depth_of(kWidest);
  constexpr int64_t kEnough = 64;
  float packed[kPiece * kWidest];
  for (int64_t k = 0; k < depth; k += kPiece) {
    const int64_t n = depth - k < kPiece ? depth - k : kPiece;
    for (int64_t j = 0, width; j < columns; j += width) {
      width = panel_of(columns - j);
      const bool packs = rows >= kEnough;
      if (packs) pack<Float32>(b + k * b_row + j, b_row, n, width, packed);
      const float* const panel = packs ? packed : b + k * b_row + j;
      product<pairs>(a + k * a_depth, panel, c + j, {1, a_depth, packs ? kPacked : b_row, c_row}, rows, width, n, true);
    }
  }
}

// pack of float32 or pairs, for choosing by instruction set.
inline void pack_floats(const float* b, int64_t depth, int64_t columns, float* to) {
  pack<Float32>(b, columns, depth, columns, to);
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
