// The CPU kernels of packed_attention, compiled once per instruction set (for_each_isa.h). One sequence and head
// at a time, a block of queries against all keys: [keys, queries], so that a query's sums run down a lane and none
// across a vector. The block stays in cache, so no running softmax is needed. Sums and products are float32
// whatever the rows' dtype.

#include "numbers.h"
#include "product.h"

constexpr int64_t kQueries = 48;  // of a block: three vectors of 16, as product.h likes them

// Lanes of a block; those beyond its queries hold what they will.
inline int64_t lanes_of(int64_t queries) { return (queries + 15) / 16 * 16; }

// Floats that a pass over a sequence of this length needs.
inline int64_t attention_room(const AttentionProblem& p, int64_t length, bool backward) {
  const int64_t scores = length * kQueries, columns = p.dim * kQueries, rows = length * p.dim;
  if (!backward) return scores + columns + rows + (p.is_bfloat16 ? rows + columns + scores : 0);
  return 2 * scores + 4 * columns + rows + (p.is_bfloat16 ? 4 * rows + columns + 2 * scores : 0);
}

// Hands out parts of a thread's room.
struct Room {
  float* next;
  float* take(int64_t count) {
    float* const part = next;
    next += count;
    return part;
  }
};

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef __clang__
#define PERA_FAST_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PERA_FAST_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourIndices{i, j, k, l})
typedef int32_t FourIndices __attribute__((vector_size(16)));
#endif

template <class As>
inline Four load_four(const typename As::Type* from) {
  return Four{As::to(from[0]), As::to(from[1]), As::to(from[2]), As::to(from[3])};
}

// rows [n, dim] of a larger matrix -> columns [dim, stride]; up to three more of each are written, n <= stride.
template <class As>
inline void transpose(
    const typename As::Type* from, int64_t from_stride, int64_t n, int64_t dim, float* to, int64_t stride) {
  for (int64_t j = 0; j < n; j += 4) {
    const typename As::Type *const a = from + j * from_stride, *const b = j + 1 < n ? a + from_stride : a;
    const typename As::Type *const c = j + 2 < n ? b + from_stride : a, *const e = j + 3 < n ? c + from_stride : a;
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) {
      const Four four_a = load_four<As>(a + d), four_b = load_four<As>(b + d);
      const Four four_c = load_four<As>(c + d), four_e = load_four<As>(e + d);
      const Four low_ab = PERA_FAST_SHUFFLE(four_a, four_b, 0, 4, 1, 5);
      const Four high_ab = PERA_FAST_SHUFFLE(four_a, four_b, 2, 6, 3, 7);
      const Four low_ce = PERA_FAST_SHUFFLE(four_c, four_e, 0, 4, 1, 5);
      const Four high_ce = PERA_FAST_SHUFFLE(four_c, four_e, 2, 6, 3, 7);
      float* const out = to + d * stride + j;
      *reinterpret_cast<Four*>(out) = PERA_FAST_SHUFFLE(low_ab, low_ce, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(out + stride) = PERA_FAST_SHUFFLE(low_ab, low_ce, 2, 3, 6, 7);
      *reinterpret_cast<Four*>(out + 2 * stride) = PERA_FAST_SHUFFLE(high_ab, high_ce, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(out + 3 * stride) = PERA_FAST_SHUFFLE(high_ab, high_ce, 2, 3, 6, 7);
    }
    for (; d < dim; ++d) {
      float* const out = to + d * stride + j;
      out[0] = As::to(a[d]);
      out[1] = As::to(b[d]);
      out[2] = As::to(c[d]);
      out[3] = As::to(e[d]);
    }
  }
}

#undef PERA_FAST_SHUFFLE

// A matrix of float32 rows.
struct Rows {
  const float* base;
  int64_t stride;
};

// The rows themselves where they are float32, else as float32 in `room`.
inline Rows as_floats(const float* from, int64_t stride, int64_t, int64_t, Room&) { return {from, stride}; }

inline Rows as_floats(const uint16_t* from, int64_t stride, int64_t n, int64_t dim, Room& room) {
  float* const to = room.take(n * dim);
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) to[i * dim + d] = Bfloat16::to(from[i * stride + d]);
  }
  return {to, dim};
}

// Rows as the right-hand side of a product over all of them: as they lie where they are few.
template <class As>
inline Rows summed_over(const typename As::Type* from, int64_t stride, int64_t n, int64_t dim, Room& room) {
  if (n <= 16) return as_floats(from, stride, n, dim, room);
  float* const to = room.take(n * dim);
  pack<As>(from, stride, n, dim, to);
  return {to, kPacked};
}

// Where a product goes: straight into float32 rows, else into `room`, from where `store` takes it.
struct Target {
  float* base;
  int64_t stride;
};

inline Target target_of(float* to, int64_t stride, int64_t, int64_t, Room&) { return {to, stride}; }
inline Target target_of(uint16_t*, int64_t, int64_t n, int64_t dim, Room& room) { return {room.take(n * dim), dim}; }

inline void store(const Target&, float*, int64_t, int64_t, int64_t) {}
inline void store(const Target& from, uint16_t* to, int64_t stride, int64_t n, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) narrow(from.base + i * from.stride, dim, to + i * stride);
}

// Calls for the next sequence's rows ahead of their use, for one head: short sequences are too short for the
// processor to see them coming. from: this sequence's rows, of `parts` times `width` numbers each.
template <class T>
inline void prefetch_next(const AttentionItem& item, const T* from, int64_t parts, int64_t width, int64_t dim) {
  if (item.next_row < 0) return;
  from += (item.next_row - item.row) * parts * width;
  for (int64_t part = 0; part < parts * item.length; ++part) {
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(from + part * width + d, 0, 2);
    }
  }
}

// largest [lanes]: scale times the largest of each lane's n scores, rounded as each of their products is: none is
// above it.
inline void largest_scores(const float* scores, int64_t n, int64_t lanes, float scale, float* __restrict largest) {
  for (int64_t i = 0; i < lanes; ++i) largest[i] = scores[i];
  for (int64_t j = 1; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const float x = scores[j * lanes + i];
      largest[i] = x > largest[i] ? x : largest[i];
    }
  }
  for (int64_t i = 0; i < lanes; ++i) largest[i] *= scale;
}

// Where the softmax's numbers of a head's row lie; 1 / its sum comes p.rows later.
inline float* saved_at(const AttentionProblem& p, int64_t head, int64_t row) {
  return p.softmax + 2 * head * p.rows + row;
}

// Divides m rows by their sums, and saves what the backward pass needs of the softmax.
inline void divide_and_save(
    const Target& out, int64_t m, int64_t dim, const float* largest, const float* sum, float* saved, int64_t rows) {
  for (int64_t i = 0; i < m; ++i) {
    const float inverse = 1.0f / sum[i];
    saved[i] = largest[i];
    saved[rows + i] = inverse;
    float* const row = out.base + i * out.stride;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) row[d] *= inverse;
  }
}

template <class As>
inline void forward(const AttentionProblem& p, const AttentionItem& item, float* base) {
  typedef typename As::Type T;
  const int64_t n = item.length, dim = p.dim, width = p.heads * dim;
  const float scale = p.scale;
  for (int64_t head = item.head; head < item.end_head; ++head) {
    Room room{base};
    const T* const query = static_cast<const T*>(p.qkv) + item.row * 3 * width + head * dim;
    prefetch_next(item, query, 3, width, dim);
    float *const weights = room.take(n * kQueries), *const query_columns = room.take(dim * kQueries);
    const Rows key = as_floats(query + width, 3 * width, n, dim, room);
    const Rows value = summed_over<As>(query + 2 * width, 3 * width, n, dim, room);
    for (int64_t first = 0; first < n; first += kQueries) {
      Room block = room;
      const int64_t m = n - first < kQueries ? n - first : kQueries, lanes = lanes_of(m);
      T* const to = static_cast<T*>(p.out) + (item.row + first) * width + head * dim;
      const Target out = target_of(to, width, m, dim, block);
      transpose<As>(query + first * 3 * width, 3 * width, m, dim, query_columns, lanes);
      product<false>(key.base, query_columns, weights, {key.stride, 1, lanes, lanes}, n, lanes, dim, false);
      float largest[kQueries], sum[kQueries] = {};
      largest_scores(weights, n, lanes, scale, largest);
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          const float e = exp_of_negative(weights[j * lanes + i] * scale - largest[i]);
          sum[i] += e;
          weights[j * lanes + i] = e;
        }
      }
      product<false>(weights, value.base, out.base, {1, lanes, value.stride, out.stride}, m, dim, n, false);
      divide_and_save(out, m, dim, largest, sum, saved_at(p, head, item.row + first), p.rows);
      store(out, to, width, m, dim);
    }
  }
}

template <class As>
inline void backward(const AttentionProblem& p, const AttentionItem& item, float* base) {
  typedef typename As::Type T;
  const int64_t n = item.length, dim = p.dim, width = p.heads * dim;
  const float scale = p.scale;
  for (int64_t head = item.head; head < item.end_head; ++head) {
    Room room{base};
    const int64_t at = item.row * 3 * width + head * dim;
    const T* const query = static_cast<const T*>(p.qkv) + at;
    const T* const gradient = static_cast<const T*>(p.gradient) + item.row * width + head * dim;
    T* const to = static_cast<T*>(p.qkv_gradient) + at;
    prefetch_next(item, query, 3, width, dim);
    prefetch_next(item, to, 3, width, dim);
    prefetch_next(item, gradient, 1, width, dim);
    float *const weights = room.take(n * kQueries), *const slopes = room.take(n * kQueries);
    float *const query_columns = room.take(dim * kQueries), *const gradient_columns = room.take(dim * kQueries);
    const Rows key = as_floats(query + width, 3 * width, n, dim, room);
    const Rows value = as_floats(query + 2 * width, 3 * width, n, dim, room);
    const Rows key_summed = summed_over<As>(query + width, 3 * width, n, dim, room);
    const Target key_to = target_of(to + width, 3 * width, n, dim, room);
    const Target value_to = target_of(to + 2 * width, 3 * width, n, dim, room);
    for (int64_t first = 0; first < n; first += kQueries) {
      Room block = room;
      const int64_t m = n - first < kQueries ? n - first : kQueries, lanes = lanes_of(m);
      const T *const query_rows = query + first * 3 * width, *const gradient_rows = gradient + first * width;
      const Rows q = summed_over<As>(query_rows, 3 * width, m, dim, block);
      const Rows g = summed_over<As>(gradient_rows, width, m, dim, block);
      const Target query_to = target_of(to + first * 3 * width, 3 * width, m, dim, block);
      transpose<As>(query_rows, 3 * width, m, dim, query_columns, lanes);
      transpose<As>(gradient_rows, width, m, dim, gradient_columns, lanes);
      product<false>(key.base, query_columns, weights, {key.stride, 1, lanes, lanes}, n, lanes, dim, false);
      product<false>(value.base, gradient_columns, slopes, {value.stride, 1, lanes, lanes}, n, lanes, dim, false);
      float largest[kQueries] = {}, inverse[kQueries] = {}, along[kQueries] = {};
      const float* const saved = saved_at(p, head, item.row + first);
      for (int64_t i = 0; i < m; ++i) {
        largest[i] = saved[i];
        inverse[i] = saved[p.rows + i];
      }
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          const float weight = exp_of_negative(weights[j * lanes + i] * scale - largest[i]) * inverse[i];
          weights[j * lanes + i] = weight;
          along[i] += weight * slopes[j * lanes + i];
        }
      }
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          slopes[j * lanes + i] = weights[j * lanes + i] * (slopes[j * lanes + i] - along[i]) * scale;
        }
      }
      const bool add = first > 0;
      product<false>(weights, g.base, value_to.base, {lanes, 1, g.stride, value_to.stride}, n, dim, m, add);
      product<false>(slopes, q.base, key_to.base, {lanes, 1, q.stride, key_to.stride}, n, dim, m, add);
      product<false>(
          slopes, key_summed.base, query_to.base, {1, lanes, key_summed.stride, query_to.stride}, m, dim, n, false);
      store(query_to, to + first * 3 * width, 3 * width, m, dim);
    }
    store(key_to, to + width, 3 * width, n, dim);
    store(value_to, to + 2 * width, 3 * width, n, dim);
  }
}

#if PERA_FAST_ISA == 3

// --- bfloat16 where the processor multiplies pairs of it (product.h): twice as fast ---

// Rows [n, dim] two by two, [(n + 1) / 2, dim] of pairs; a row of zeros makes the last one up.
inline const float* paired(const uint16_t* from, int64_t stride, int64_t n, int64_t dim, Room& room) {
  static const uint16_t zeros[256] = {};
  float* const to = room.take((n + 1) / 2 * dim);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i < n; i += 2) {
    const uint16_t *const low = from + i * stride, *const high = i + 1 < n ? low + stride : zeros;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) bits[i / 2 * dim + d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
  }
  return to;
}

// low and high [n] as pairs [n], rounded; n is a multiple of 16.
inline void pair_up(const float* low, const float* high, int64_t n, uint32_t* to) {
  const __m512i low_first = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
      16, 0);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(high + i), _mm512_loadu_ps(low + i));
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(low_first, (__m512i)both));
  }
}

inline const float* as_pairs(const uint16_t* rows) { return reinterpret_cast<const float*>(rows); }

inline void forward_pairs(const AttentionProblem& p, const AttentionItem& item, float* base) {
  const int64_t n = item.length, dim = p.dim, width = p.heads * dim, pair_stride = 3 * width / 2;
  const float scale = p.scale;
  for (int64_t head = item.head; head < item.end_head; ++head) {
    Room room{base};
    const uint16_t* const query = static_cast<const uint16_t*>(p.qkv) + item.row * 3 * width + head * dim;
    const uint16_t *const key = query + width, *const value = key + width;
    prefetch_next(item, query, 3, width, dim);
    float *const scores = room.take(n * kQueries), *const query_columns = room.take(dim / 2 * kQueries);
    uint32_t* const weights = reinterpret_cast<uint32_t*>(room.take((n + 1) / 2 * kQueries));
    const float* const value_pairs = paired(value, 3 * width, n, dim, room);
    for (int64_t first = 0; first < n; first += kQueries) {
      Room block = room;
      const int64_t m = n - first < kQueries ? n - first : kQueries, lanes = lanes_of(m);
      uint16_t* const to = static_cast<uint16_t*>(p.out) + (item.row + first) * width + head * dim;
      const Target out = target_of(to, width, m, dim, block);
      transpose<Float32>(as_pairs(query + first * 3 * width), pair_stride, m, dim / 2, query_columns, lanes);
      product<true>(as_pairs(key), query_columns, scores, {pair_stride, 1, lanes, lanes}, n, lanes, dim / 2, false);
      float largest[kQueries], sum[kQueries] = {};
      largest_scores(scores, n, lanes, scale, largest);
      for (int64_t j = 0; j < n; j += 2) {
        const float *const low = scores + j * lanes, *const high = j + 1 < n ? low + lanes : low;
        const float counts = j + 1 < n ? 1.0f : 0.0f;
        float a[kQueries], b[kQueries];
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          a[i] = exp_of_negative(low[i] * scale - largest[i]);
          b[i] = counts * exp_of_negative(high[i] * scale - largest[i]);
          sum[i] += a[i] + b[i];
        }
        pair_up(a, b, lanes, weights + j / 2 * lanes);
      }
      product<true>(
          reinterpret_cast<const float*>(weights), value_pairs, out.base, {1, lanes, dim, out.stride}, m, dim,
          (n + 1) / 2, false);
      divide_and_save(out, m, dim, largest, sum, saved_at(p, head, item.row + first), p.rows);
      store(out, to, width, m, dim);
    }
  }
}

inline void backward_pairs(const AttentionProblem& p, const AttentionItem& item, float* base) {
  const int64_t n = item.length, dim = p.dim, width = p.heads * dim, pair_stride = 3 * width / 2;
  const float scale = p.scale;
  for (int64_t head = item.head; head < item.end_head; ++head) {
    Room room{base};
    const int64_t at = item.row * 3 * width + head * dim;
    const uint16_t* const query = static_cast<const uint16_t*>(p.qkv) + at;
    const uint16_t *const key = query + width, *const value = key + width;
    const uint16_t* const gradient = static_cast<const uint16_t*>(p.gradient) + item.row * width + head * dim;
    uint16_t* const to = static_cast<uint16_t*>(p.qkv_gradient) + at;
    prefetch_next(item, query, 3, width, dim);
    prefetch_next(item, to, 3, width, dim);
    prefetch_next(item, gradient, 1, width, dim);
    float *const weights = room.take(n * kQueries), *const slopes = room.take(n * kQueries);
    float *const query_columns = room.take(dim / 2 * kQueries), *const gradient_columns = room.take(dim / 2 * kQueries);
    uint16_t* const weight_rows = reinterpret_cast<uint16_t*>(room.take(n * kQueries / 2));
    uint16_t* const slope_rows = reinterpret_cast<uint16_t*>(room.take(n * kQueries / 2));
    const float* const key_pairs = paired(key, 3 * width, n, dim, room);
    const Target key_to = target_of(to + width, 3 * width, n, dim, room);
    const Target value_to = target_of(to + 2 * width, 3 * width, n, dim, room);
    for (int64_t first = 0; first < n; first += kQueries) {
      Room block = room;
      const int64_t m = n - first < kQueries ? n - first : kQueries, lanes = lanes_of(m);
      const uint16_t *const q_block = query + first * 3 * width, *const g_block = gradient + first * width;
      const Target query_to = target_of(to + first * 3 * width, 3 * width, m, dim, block);
      const float* const query_pairs = paired(q_block, 3 * width, m, dim, block);
      const float* const gradient_pairs = paired(g_block, width, m, dim, block);
      transpose<Float32>(as_pairs(q_block), pair_stride, m, dim / 2, query_columns, lanes);
      transpose<Float32>(as_pairs(g_block), width / 2, m, dim / 2, gradient_columns, lanes);
      const Strides by_key{pair_stride, 1, lanes, lanes};
      product<true>(as_pairs(key), query_columns, weights, by_key, n, lanes, dim / 2, false);
      product<true>(as_pairs(value), gradient_columns, slopes, by_key, n, lanes, dim / 2, false);
      float largest[kQueries] = {}, inverse[kQueries] = {}, along[kQueries] = {};
      const float* const saved = saved_at(p, head, item.row + first);
      for (int64_t i = 0; i < m; ++i) {
        largest[i] = saved[i];
        inverse[i] = saved[p.rows + i];
      }
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          const float weight = exp_of_negative(weights[j * lanes + i] * scale - largest[i]) * inverse[i];
          weights[j * lanes + i] = weight;
          along[i] += weight * slopes[j * lanes + i];
        }
        narrow(weights + j * lanes, lanes, weight_rows + j * lanes);
      }
      for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
          slopes[j * lanes + i] = weights[j * lanes + i] * (slopes[j * lanes + i] - along[i]) * scale;
        }
        narrow(slopes + j * lanes, lanes, slope_rows + j * lanes);
      }
      for (int64_t j = 0; m % 2 == 1 && j < n; ++j) weight_rows[j * lanes + m] = slope_rows[j * lanes + m] = 0;
      const float* const slope_pairs = paired(slope_rows, lanes, n, lanes, block);
      const bool add = first > 0;
      const int64_t pairs = (m + 1) / 2;
      product<true>(
          as_pairs(weight_rows), gradient_pairs, value_to.base, {lanes / 2, 1, dim, value_to.stride}, n, dim, pairs,
          add);
      product<true>(
          as_pairs(slope_rows), query_pairs, key_to.base, {lanes / 2, 1, dim, key_to.stride}, n, dim, pairs, add);
      product<true>(
          slope_pairs, key_pairs, query_to.base, {1, lanes, dim, query_to.stride}, m, dim, (n + 1) / 2, false);
      store(query_to, to + first * 3 * width, 3 * width, m, dim);
    }
    store(key_to, to + width, 3 * width, n, dim);
    store(value_to, to + 2 * width, 3 * width, n, dim);
  }
}

#endif

void attention_forward(const AttentionProblem& p, const AttentionItem& item, float* room) {
#if PERA_FAST_ISA == 3
  if (p.is_bfloat16 && p.dim % 16 == 0) return forward_pairs(p, item, room);
#endif
  if (p.is_bfloat16) forward<Bfloat16>(p, item, room);
  else forward<Float32>(p, item, room);
}

void attention_backward(const AttentionProblem& p, const AttentionItem& item, float* room) {
#if PERA_FAST_ISA == 3
  if (p.is_bfloat16 && p.dim % 16 == 0) return backward_pairs(p, item, room);
#endif
  if (p.is_bfloat16) backward<Bfloat16>(p, item, room);
  else backward<Float32>(p, item, room);
}
