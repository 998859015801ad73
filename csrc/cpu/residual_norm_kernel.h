// The CPU kernels of residual_norm, compiled once per instruction set (for_each_isa.h). Each row passes once.

#include "numbers.h"

// Sum over a row; sixteen sums side by side, in equal order on every instruction set.
#define PERA_FAST_SUM(total, count, expression)                  \
  float total = 0.0f;                                            \
  {                                                              \
    float lanes[16] = {};                                        \
    int64_t d = 0;                                               \
    for (; d + 16 <= count; d += 16) {                           \
      _Pragma("omp simd") for (int lane = 0; lane < 16; ++lane) { \
        const int64_t k = d + lane;                              \
        lanes[lane] += expression;                               \
      }                                                          \
    }                                                            \
    for (int lane = 0; d < count; ++d, ++lane) {                 \
      const int64_t k = d;                                       \
      lanes[lane] += expression;                                 \
    }                                                            \
    for (int lane = 0; lane < 16; ++lane) total += lanes[lane];  \
  }

inline int64_t place(const int32_t* table, int64_t row) { return table == nullptr ? row : table[row]; }

template <class Branch, class Out>
inline void forward_rows(const ResidualNorm& p, int64_t begin, int64_t end) {
  const int64_t dim = p.dim;
  const float *__restrict weight = p.weight, *__restrict bias = p.bias;
  for (int64_t row = begin; row < end; ++row) {
    const float* const source = p.source + row * dim;
    float* const x = p.x + row * dim;
    const int64_t from = p.branch == nullptr ? -1 : place(p.branch_row, row);
    if (from >= 0) {
      const typename Branch::Type* branch = static_cast<const typename Branch::Type*>(p.branch) + from * dim;
      const float scale = p.scale == nullptr ? 1.0f : p.scale[from];
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) x[k] = source[k] + scale * Branch::to(branch[k]);
    } else if (source != x) {
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) x[k] = source[k];
    }
    const int64_t to = p.y == nullptr ? -1 : place(p.next_row, row);
    if (to < 0) continue;
    PERA_FAST_SUM(sum, dim, x[k]);
    const float mean = sum / static_cast<float>(dim);
    PERA_FAST_SUM(squares, dim, (x[k] - mean) * (x[k] - mean));
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(dim) + p.eps);
    typename Out::Type* __restrict y = static_cast<typename Out::Type*>(p.y) + to * dim;
    if (p.normalised == nullptr) {
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) y[k] = Out::from((x[k] - mean) * inverse * weight[k] + bias[k]);
    } else {
      typename Out::Type* __restrict normalised = static_cast<typename Out::Type*>(p.normalised) + to * dim;
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) {
        const float value = (x[k] - mean) * inverse;
        normalised[k] = Out::from(value);
        y[k] = Out::from(value * weight[k] + bias[k]);
      }
    }
    if (p.inverse_deviation != nullptr) p.inverse_deviation[to] = inverse;
  }
}

template <class Branch, class Out>
inline void backward_rows(
    const ResidualNorm& p, int64_t begin, int64_t end, float* __restrict weight_gradient,
    float* __restrict bias_gradient) {
  const int64_t dim = p.dim;
  const float* __restrict weight = p.weight;
  for (int64_t row = begin; row < end; ++row) {
    float* out = p.out + row * dim;
    if (p.x_gradient == nullptr) {
      for (int64_t k = 0; k < dim; ++k) out[k] = 0.0f;
    } else if (p.x_gradient != p.out) {
      for (int64_t k = 0; k < dim; ++k) out[k] = p.x_gradient[row * dim + k];
    }
    const int64_t to = p.y_gradient == nullptr ? -1 : place(p.next_row, row);
    if (to >= 0) {
      const typename Out::Type* g = static_cast<const typename Out::Type*>(p.y_gradient) + to * dim;
      const typename Out::Type* normalised = static_cast<const typename Out::Type*>(p.normalised) + to * dim;
      PERA_FAST_SUM(sum, dim, Out::to(g[k]) * weight[k]);
      PERA_FAST_SUM(along, dim, Out::to(g[k]) * weight[k] * Out::to(normalised[k]));
      const float mean = sum / static_cast<float>(dim), slope = along / static_cast<float>(dim);
      const float inverse = p.inverse_deviation[to];
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) {
        const float gradient = Out::to(g[k]), value = Out::to(normalised[k]);
        out[k] += inverse * (gradient * weight[k] - mean - value * slope);
        weight_gradient[k] += gradient * value;
        bias_gradient[k] += gradient;
      }
    }
    const int64_t from = p.branch_gradient == nullptr ? -1 : place(p.branch_row, row);
    if (from >= 0) {
      typename Branch::Type* branch = static_cast<typename Branch::Type*>(p.branch_gradient) + from * dim;
      const float scale = p.scale == nullptr ? 1.0f : p.scale[from];
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) branch[k] = Branch::from(scale * out[k]);
    }
  }
}

#undef PERA_FAST_SUM

void residual_norm_forward(const ResidualNorm& p, int64_t begin, int64_t end) {
  if (p.branch_is_bfloat16 && p.y_is_bfloat16) forward_rows<Bfloat16, Bfloat16>(p, begin, end);
  else if (p.branch_is_bfloat16) forward_rows<Bfloat16, Float32>(p, begin, end);
  else if (p.y_is_bfloat16) forward_rows<Float32, Bfloat16>(p, begin, end);
  else forward_rows<Float32, Float32>(p, begin, end);
}

// Adds to weight_gradient and bias_gradient [dim].
void residual_norm_backward(
    const ResidualNorm& p, int64_t begin, int64_t end, float* weight_gradient, float* bias_gradient) {
  if (p.branch_is_bfloat16 && p.y_is_bfloat16) {
    backward_rows<Bfloat16, Bfloat16>(p, begin, end, weight_gradient, bias_gradient);
  } else if (p.branch_is_bfloat16) {
    backward_rows<Bfloat16, Float32>(p, begin, end, weight_gradient, bias_gradient);
  } else if (p.y_is_bfloat16) {
    backward_rows<Float32, Bfloat16>(p, begin, end, weight_gradient, bias_gradient);
  } else {
    backward_rows<Float32, Float32>(p, begin, end, weight_gradient, bias_gradient);
  }
}
