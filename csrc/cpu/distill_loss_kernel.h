// The CPU kernels of distill_loss, compiled once per instruction set (for_each_isa.h). Rows lie together in
// memory, so the loops run over rows and need no sum across a vector.

struct Float32 {
  typedef float Type;
  static inline float to(float x) { return x; }
  static inline float from(float x) { return x; }
};

struct Bfloat16 {
  typedef uint16_t Type;
  static inline float to(uint16_t bits) {
    return float_of(static_cast<uint32_t>(bits) << 16);
  }
  static inline uint16_t from(float x) { return bfloat16_of(x); }
};

// x = raw teacher * scale_x - shift_x and y = raw student * scale_y for one prototype.
struct Scales {
  float scale_x, shift_x, scale_y;
};

inline Scales scales_of(const DistillChunk& a, int64_t k) {
  return {
      a.scale_teacher[k] * a.inverse_tau_teacher, a.centre[k] * a.inverse_tau_teacher,
      a.scale_student[k] * a.inverse_tau_student};
}

// The sums of prototypes begin … end - 1 of a chunk.
template <class As>
inline void sum_block(const DistillChunk& a, int64_t begin, int64_t end, const DistillSums& sums) {
  const int64_t rows = a.rows;
  float *__restrict max_x = sums.max_x, *__restrict max_y = sums.max_y;
  float *__restrict sum_x = sums.sum_x, *__restrict sum_y = sums.sum_y, *__restrict sum_xy = sums.sum_xy;
  for (int64_t i = 0; i < rows; ++i) {
    max_x[i] = max_y[i] = -__builtin_inff();
    sum_x[i] = sum_y[i] = sum_xy[i] = 0.0f;
  }
  for (int64_t k = begin; k < end; ++k) {
    const typename As::Type* t = static_cast<const typename As::Type*>(a.teacher) + k * rows;
    const typename As::Type* s = static_cast<const typename As::Type*>(a.student) + k * rows;
    const auto [scale_x, shift_x, scale_y] = scales_of(a, k);
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i) {
      const float x = As::to(t[i]) * scale_x - shift_x, y = As::to(s[i]) * scale_y;
      max_x[i] = x > max_x[i] ? x : max_x[i];
      max_y[i] = y > max_y[i] ? y : max_y[i];
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    const typename As::Type* t = static_cast<const typename As::Type*>(a.teacher) + k * rows;
    const typename As::Type* s = static_cast<const typename As::Type*>(a.student) + k * rows;
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
}

// student[k, i] becomes weight[i] * (softmax(y) - softmax(x)) * scale_student[k], the gradient of row i's raw
// logit; dot[k] = sum over i of the gradient before the last factor times the raw logit.
template <class As>
inline void gradient_block(const DistillChunk& a, int64_t begin, int64_t end) {
  const int64_t rows = a.rows;
  const float *log_x = a.log_sum_x, *log_y = a.log_sum_y, *weight = a.weight;
  for (int64_t k = begin; k < end; ++k) {
    const typename As::Type* t = static_cast<const typename As::Type*>(a.teacher) + k * rows;
    typename As::Type* __restrict s = static_cast<typename As::Type*>(a.gradient) + k * rows;
    const typename As::Type* raw = static_cast<const typename As::Type*>(a.student) + k * rows;
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
        s[i + lane] = As::from(gradient * scale);
      }
    }
    for (int lane = 0; i < rows; ++i, ++lane) {
      const float r = As::to(raw[i]);
      const float q = exp_of_negative(As::to(t[i]) * scale_x - shift_x - log_x[i]);
      const float p = exp_of_negative(r * scale_y - log_y[i]);
      const float gradient = weight[i] * (p - q);
      partial[lane] += gradient * r;
      s[i] = As::from(gradient * scale);
    }
    float dot = 0.0f;
    for (int lane = 0; lane < 16; ++lane) dot += partial[lane];
    a.dot[k] = dot;
  }
}

void distill_sums(const DistillChunk& a, int64_t begin, int64_t end, const DistillSums& sums) {
  if (a.is_bfloat16) sum_block<Bfloat16>(a, begin, end, sums);
  else sum_block<Float32>(a, begin, end, sums);
}

void distill_gradient(const DistillChunk& a, int64_t begin, int64_t end) {
  if (a.is_bfloat16) gradient_block<Bfloat16>(a, begin, end);
  else gradient_block<Float32>(a, begin, end);
}

// Rows of v [n, dim] in bfloat16, and their Euclidean norms.
void distill_operand(const float* v, int64_t n, int64_t dim, uint16_t* operand, float* norm) {
  for (int64_t k = 0; k < n; ++k, v += dim, operand += dim) {
    float partial[16] = {};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
#pragma omp simd
      for (int lane = 0; lane < 16; ++lane) {
        partial[lane] += v[i + lane] * v[i + lane];
        operand[i + lane] = bfloat16_of(v[i + lane]);
      }
    }
    for (int lane = 0; i < dim; ++i, ++lane) {
      partial[lane] += v[i] * v[i];
      operand[i] = bfloat16_of(v[i]);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < 16; ++lane) sum += partial[lane];
    norm[k] = __builtin_sqrtf(sum);
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
