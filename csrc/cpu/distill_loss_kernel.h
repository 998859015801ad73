// The CPU kernels of distill_loss, compiled once per instruction set (for_each_isa.h). Rows lie together in
// memory, so the loops run over rows and need no sum across a vector.

#include "numbers.h"
#include "product.h"

// x = raw teacher * scale_x - shift_x and y = raw student * scale_y for one prototype.
struct Scales {
  float scale_x, shift_x, scale_y;
};

inline Scales scales_of(const DistillChunk& a, int64_t k) {
  return {
      a.scale_teacher[k] * a.inverse_tau_teacher, a.centre[k] * a.inverse_tau_teacher,
      a.scale_student[k] * a.inverse_tau_student};
}

template <class As>
inline const typename As::Type* logits_of(const DistillChunk& a, const void* base, int64_t k) {
  return static_cast<const typename As::Type*>(base) + k * a.stride;
}

// Adds prototypes begin … end - 1 of a chunk to `sums`: first among themselves, so that long sums lose little.
// room: 5 * rows floats.
template <class As>
inline void sum_block(
    const DistillChunk& a, int64_t begin, int64_t end, const DistillSums& sums, float* room) {
  const int64_t rows = a.rows;
  float *__restrict max_x = room, *__restrict sum_x = room + rows, *__restrict sum_xy = room + 2 * rows;
  float *__restrict max_y = room + 3 * rows, *__restrict sum_y = room + 4 * rows;
  for (int64_t i = 0; i < rows; ++i) {
    max_x[i] = sums.max_x[i];
    max_y[i] = sums.max_y[i];
    sum_x[i] = sum_xy[i] = sum_y[i] = 0.0f;
  }
  for (int64_t k = begin; k < end; ++k) {
    const auto *t = logits_of<As>(a, a.teacher, k), *s = logits_of<As>(a, a.student, k);
    const auto [scale_x, shift_x, scale_y] = scales_of(a, k);
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i) {
      const float x = As::to(t[i]) * scale_x - shift_x, y = As::to(s[i]) * scale_y;
      max_x[i] = x > max_x[i] ? x : max_x[i];
      max_y[i] = y > max_y[i] ? y : max_y[i];
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    const auto *t = logits_of<As>(a, a.teacher, k), *s = logits_of<As>(a, a.student, k);
    const auto [scale_x, shift_x, scale_y] = scales_of(a, k);
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i) {
      const float x = As::to(t[i]) * scale_x - shift_x, y = As::to(s[i]) * scale_y;
      const float e = exp_of_negative(x - max_x[i]);
      sum_x[i] += e;
      sum_xy[i] += e * y;
      sum_y[i] += exp_of_negative(y - max_y[i]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = exp_of_negative(sums.max_x[i] - max_x[i]);
    sums.sum_x[i] = sums.sum_x[i] * factor + sum_x[i];
    sums.sum_xy[i] = sums.sum_xy[i] * factor + sum_xy[i];
    sums.sum_y[i] = sums.sum_y[i] * exp_of_negative(sums.max_y[i] - max_y[i]) + sum_y[i];
    sums.max_x[i] = max_x[i];
    sums.max_y[i] = max_y[i];
  }
}

// gradient[k, i] = weight[i] * (softmax(y) - softmax(x)) * scale_student[k], of row i's raw logit; dot[k] = sum
// over i of the gradient before the last factor times the raw logit.
template <class As, class Out>
inline void gradient_block(const DistillChunk& a, int64_t begin, int64_t end) {
  const int64_t rows = a.rows;
  const float *log_x = a.log_sum_x, *log_y = a.log_sum_y, *weight = a.weight;
  for (int64_t k = begin; k < end; ++k) {
    const auto *t = logits_of<As>(a, a.teacher, k), *raw = logits_of<As>(a, a.student, k);
    typename Out::Type* __restrict out = static_cast<typename Out::Type*>(a.gradient) + k * a.stride;
    const auto [scale_x, shift_x, scale_y] = scales_of(a, k);
    const float scale = a.scale_student[k];
    // Sixteen sums side by side: the same order of additions on every instruction set.
    float partial[16] = {};
    int64_t i = 0;
    for (; i + 16 <= rows; i += 16) {
#pragma omp simd
      for (int lane = 0; lane < 16; ++lane) {
        const float r = As::to(raw[i + lane]);
        const float q = exp_of_negative(As::to(t[i + lane]) * scale_x - shift_x - log_x[i + lane]);
        const float p = exp_of_negative(r * scale_y - log_y[i + lane]);
        const float gradient = weight[i + lane] * (p - q);
        partial[lane] += gradient * r;
        out[i + lane] = Out::from(gradient * scale);
      }
    }
    for (int lane = 0; i < rows; ++i, ++lane) {
      const float r = As::to(raw[i]);
      const float q = exp_of_negative(As::to(t[i]) * scale_x - shift_x - log_x[i]);
      const float p = exp_of_negative(r * scale_y - log_y[i]);
      const float gradient = weight[i] * (p - q);
      partial[lane] += gradient * r;
      out[i] = Out::from(gradient * scale);
    }
    float dot = 0.0f;
    for (int lane = 0; lane < 16; ++lane) dot += partial[lane];
    a.dot[k] = dot;
  }
}

void distill_sums(
    const DistillChunk& a, int64_t begin, int64_t end, const DistillSums& sums, float* room) {
  if (a.is_bfloat16) sum_block<Bfloat16>(a, begin, end, sums, room);
  else sum_block<Float32>(a, begin, end, sums, room);
}

void distill_gradient(const DistillChunk& a, int64_t begin, int64_t end) {
  if (a.is_bfloat16) gradient_block<Bfloat16, Bfloat16>(a, begin, end);
  else if (a.gradient_is_bfloat16) gradient_block<Float32, Bfloat16>(a, begin, end);
  else gradient_block<Float32, Float32>(a, begin, end);
}

// Rows of v [n, dim] in bfloat16, and their norms while they are in cache.
void distill_operand(const float* v, int64_t n, int64_t dim, uint16_t* operand, float* norm) {
  for (int64_t k = 0; k < n; ++k) {
    row_norms(v + k * dim, 1, dim, norm + k);
    narrow(v + k * dim, dim, operand + k * dim);
  }
}

// gradient = product - along * v, row by row.
void distill_finish(
    const uint16_t* product, const float* v, const float* along, int64_t n, int64_t dim, float* gradient) {
  for (int64_t k = 0; k < n; ++k, product += dim, v += dim, gradient += dim) {
    float* __restrict out = gradient;
    const float share = along[k];
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) out[i] = Bfloat16::to(product[i]) - share * v[i];
  }
}

// --- with the products: prototypes in blocks whose logits stay in cache ---

// Room that a block of `block` prototypes needs, in floats.
inline int64_t room_for_block(const DistillProblem& p, int64_t block) {
  return block * (3 * p.stride + p.dim) + 5 * p.stride;
}

struct Room {
  float *teacher, *student;  // [block, stride] raw logits
  uint16_t* gradient;        // [block, stride], of pairs alone
  uint16_t* operand;         // [block, dim] prototypes in bfloat16, of pairs alone
  float* rows;               // [5 * rows]
  Room(const DistillProblem& p, int64_t block, float* base)
      : teacher(base),
        student(teacher + block * p.stride),
        gradient(reinterpret_cast<uint16_t*>(student + block * p.stride)),
        operand(reinterpret_cast<uint16_t*>(student + 2 * block * p.stride)),
        rows(student + 2 * block * p.stride + block * p.dim) {}
};

// The chunk of prototypes k … k + n - 1: its raw logits lie with the kept ones, or in `room`.
inline DistillChunk chunk_at(const DistillProblem& p, int64_t k, int64_t n, const Room& room) {
  const bool is_kept = k < p.kept;
  const int64_t bytes = k * p.stride * (p.pairs ? 2 : 4);
  DistillChunk a{};
  a.teacher = is_kept ? static_cast<char*>(p.kept_teacher) + bytes : reinterpret_cast<char*>(room.teacher);
  a.student = is_kept ? static_cast<char*>(p.kept_student) + bytes : reinterpret_cast<char*>(room.student);
  a.is_bfloat16 = is_kept && p.pairs;
  a.prototypes = n;
  a.rows = p.rows;
  a.stride = p.stride;
  a.scale_teacher = p.scale_teacher + k;
  a.scale_student = p.scale_student + k;
  a.centre = p.centre + k;
  a.inverse_tau_teacher = p.inverse_tau_teacher;
  a.inverse_tau_student = p.inverse_tau_student;
  return a;
}

// Raw logits [n, stride] of n prototypes; operand: those in bfloat16, of pairs alone.
inline void raw_logits(
    const DistillProblem& p, const float* v, const uint16_t* operand, const float* z_columns, int64_t n,
    float* logits) {
  if (p.pairs) {
    const Strides strides{p.dim / 2, 1, kPacked, p.stride};
    product<true>(
        reinterpret_cast<const float*>(operand), z_columns, logits, strides, n, p.stride, p.dim / 2, false);
  } else {
    product<false>(v, z_columns, logits, {p.dim, 1, kPacked, p.stride}, n, p.stride, p.dim, false);
  }
}

// Adds prototypes begin … end - 1 to `sums`; fills their scales, norms and kept logits.
void distill_forward(
    const DistillProblem& p, int64_t begin, int64_t end, int64_t block, const DistillSums& sums, float* base) {
  const Room room(p, block, base);
  for (int64_t k = begin; k < end; k += block) {
    const int64_t n = end - k < block ? end - k : block;
    const DistillChunk a = chunk_at(p, k, n, room);
    for (const bool teacher : {true, false}) {
      const float *v = (teacher ? p.v_teacher : p.v_student) + k * p.dim, *g = teacher ? p.g_teacher : p.g_student;
      float *const norm = p.norm_student + k, *const scale = teacher ? p.scale_teacher : p.scale_student;
      if (p.pairs) distill_operand(v, n, p.dim, room.operand, norm);
      else row_norms(v, n, p.dim, norm);
      for (int64_t i = 0; i < n; ++i) scale[k + i] = g[k + i] / norm[i];
      const void* kept = teacher ? a.teacher : a.student;
      float* const in_room = teacher ? room.teacher : room.student;
      float* const logits = a.is_bfloat16 ? in_room : static_cast<float*>(const_cast<void*>(kept));
      raw_logits(p, v, room.operand, teacher ? p.z_teacher_columns : p.z_student_columns, n, logits);
      if (a.is_bfloat16) narrow(logits, n * p.stride, static_cast<uint16_t*>(const_cast<void*>(kept)));
    }
    distill_sums(a, 0, n, sums, room.rows);
  }
}

// Two rows as one of pairs: out[i] holds low[i] and high[i].
inline void pair_rows(const uint16_t* low, const uint16_t* high, int64_t n, float* out) {
  uint32_t* const bits = reinterpret_cast<uint32_t*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
}

// dv and dot of prototypes begin … end - 1 of the chunk that starts at `start`, and what distill_rows needs of
// the chunk: h [chunk, stride], the gradients of the raw logits; of pairs [chunk / 2, stride], and the
// prototypes [chunk / 2, dim] too.
void distill_backward(
    const DistillProblem& p, int64_t start, int64_t begin, int64_t end, int64_t block, float* h,
    float* v_pairs, float* base) {
  const Room room(p, block, base);
  for (int64_t k = begin; k < end; k += block) {
    const int64_t n = end - k < block ? end - k : block;
    const float *const v = p.v_student + k * p.dim, *const norm = p.norm_student + k;
    DistillChunk a = chunk_at(p, k, n, room);
    float ignored[64];
    if (k >= p.kept) {
      if (p.pairs) distill_operand(p.v_teacher + k * p.dim, n, p.dim, room.operand, ignored);
      raw_logits(p, p.v_teacher + k * p.dim, room.operand, p.z_teacher_columns, n, room.teacher);
    }
    if (p.pairs) distill_operand(v, n, p.dim, room.operand, ignored);
    if (k >= p.kept) raw_logits(p, v, room.operand, p.z_student_columns, n, room.student);
    a.log_sum_x = p.log_sum_x;
    a.log_sum_y = p.log_sum_y;
    a.weight = p.weight;
    a.dot = p.dot + k;
    a.gradient_is_bfloat16 = p.pairs;
    a.gradient = p.pairs ? static_cast<void*>(room.gradient) : h + (k - start) * p.stride;
    distill_gradient(a, 0, n);

    float* const dv = p.dv + k * p.dim;
    if (p.pairs) {
      for (int64_t i = 0; i < n; ++i) {  // the last pair's second row may be beyond the batch
        for (int64_t j = p.rows; j < p.stride; ++j) room.gradient[i * p.stride + j] = 0;
      }
      const Strides strides{p.stride / 2, 1, kPacked, p.dim};
      const float* const left = reinterpret_cast<const float*>(room.gradient);
      product<true>(left, p.z_student_rows, dv, strides, n, p.dim, (p.rows + 1) / 2, false);
      if (n % 2 == 1) {  // likewise the last prototype
        for (int64_t j = 0; j < p.stride; ++j) room.gradient[n * p.stride + j] = 0;
        for (int64_t j = 0; j < p.dim; ++j) room.operand[n * p.dim + j] = 0;
      }
      for (int64_t i = 0; i < n; i += 2) {
        const uint16_t *const g = room.gradient + i * p.stride, *const row = room.operand + i * p.dim;
        pair_rows(g, g + p.stride, p.stride, h + (k - start + i) / 2 * p.stride);
        pair_rows(row, row + p.dim, p.dim, v_pairs + (k - start + i) / 2 * p.dim);
      }
    } else {
      const float* const left = static_cast<const float*>(a.gradient);
      product<false>(left, p.z_student_rows, dv, {p.stride, 1, kPacked, p.dim}, n, p.dim, p.rows, false);
    }
    // The weight norm's derivative takes out what is along v.
    for (int64_t i = 0; i < n; ++i) {
      const float along = a.dot[i] * a.scale_student[i] / (norm[i] * norm[i]);
      const float* const from = v + i * p.dim;
      float* const to = dv + i * p.dim;
#pragma omp simd
      for (int64_t j = 0; j < p.dim; ++j) to[j] -= along * from[j];
    }
  }
}

// Adds a chunk of `depth` prototypes (or pairs) to some rows and columns of dz [rows, dim]: hᵀ · v.
void distill_rows(
    const DistillProblem& p, const float* h, const float* v, int64_t rows, int64_t columns, int64_t depth,
    float* dz) {
  if (p.pairs) add_transposed_product<true>(h, p.stride, v, p.dim, dz, p.dim, rows, columns, depth);
  else add_transposed_product<false>(h, p.stride, v, p.dim, dz, p.dim, rows, columns, depth);
}
