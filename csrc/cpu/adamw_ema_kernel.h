// The CPU kernels over parameters: adamw_ema, ema_update, grad_norm; compiled once per instruction set
// (for_each_isa.h). Each takes a part of one tensor.

#include "numbers.h"

// Numbers that pass through the level-1 cache at a time: what one loop leaves, the next finds there.
constexpr int64_t kBlock = 1024;

// A bfloat16 copy of x [count]. Where it can it goes around the cache: the copy is as large as the parameters, is
// not read before the next forward pass, and its old contents need not be loaded to be overwritten.
inline void copy_low(const float* x, uint16_t* __restrict low, int64_t count) {
#if PERA_FAST_ISA >= 1
  if (count % 16 == 0 && reinterpret_cast<uintptr_t>(low) % 32 == 0) {
    alignas(32) uint16_t staged[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) staged[i] = Bfloat16::from(x[i]);
    for (int64_t i = 0; i < count; i += 16) {
      _mm256_stream_si256(
          reinterpret_cast<__m256i*>(low + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(staged + i)));
    }
    return;
  }
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) low[i] = Bfloat16::from(x[i]);
}

// Before another thread may read what copy_low wrote.
inline void publish() {
#if PERA_FAST_ISA >= 1
  _mm_sfence();
#endif
}

// teacher += rate (param - teacher), and its copy where there is one.
template <class Teacher, class Param>
inline void ema_block(
    const typename Param::Type* __restrict param, typename Teacher::Type* __restrict teacher, uint16_t* shadow,
    float rate, int64_t count) {
  if (shadow == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      teacher[i] = Teacher::from(moved_towards(Teacher::to(teacher[i]), Param::to(param[i]), rate));
    }
    return;
  }
  float moved[kBlock];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    moved[i] = moved_towards(Teacher::to(teacher[i]), Param::to(param[i]), rate);
    teacher[i] = Teacher::from(moved[i]);
  }
  copy_low(moved, shadow, count);
}

template <class Param, class Grad, class Teacher>
inline void update(const AdamWEMATensor& t, const AdamWEMACoefficients& coefficients, int64_t begin, int64_t end) {
  const AdamWEMACoefficients c = coefficients;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = end - start < kBlock ? end - start : kBlock;
    typename Param::Type* __restrict param = static_cast<typename Param::Type*>(t.param) + start;
    typename Param::Type* __restrict exp_avg = static_cast<typename Param::Type*>(t.exp_avg) + start;
    typename Param::Type* __restrict exp_avg_sq = static_cast<typename Param::Type*>(t.exp_avg_sq) + start;
    const typename Grad::Type* __restrict grad = static_cast<const typename Grad::Type*>(t.grad) + start;
    float updated[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float p = Param::to(param[i]), m = Param::to(exp_avg[i]), v = Param::to(exp_avg_sq[i]);
      adamw_update(c, Grad::to(grad[i]), p, m, v);
      param[i] = Param::from(p);
      exp_avg[i] = Param::from(m);
      exp_avg_sq[i] = Param::from(v);
      updated[i] = Param::to(param[i]);
    }
    if (t.shadow != nullptr) copy_low(updated, t.shadow + start, count);
    if (t.teacher != nullptr) {
      ema_block<Teacher, Float32>(
          updated, static_cast<typename Teacher::Type*>(t.teacher) + start,
          t.teacher_shadow == nullptr ? nullptr : t.teacher_shadow + start, c.rate, count);
    }
  }
  publish();
}

template <class Param, class Grad>
inline void update(const AdamWEMATensor& t, const AdamWEMACoefficients& c, int64_t begin, int64_t end) {
  if (t.teacher_is_bfloat16) update<Param, Grad, Bfloat16>(t, c, begin, end);
  else update<Param, Grad, Float32>(t, c, begin, end);
}

void adamw_ema(const AdamWEMATensor& t, const AdamWEMACoefficients& c, int64_t begin, int64_t end) {
  if (t.param_is_bfloat16 && t.grad_is_bfloat16) update<Bfloat16, Bfloat16>(t, c, begin, end);
  else if (t.param_is_bfloat16) update<Bfloat16, Float32>(t, c, begin, end);
  else if (t.grad_is_bfloat16) update<Float32, Bfloat16>(t, c, begin, end);
  else update<Float32, Float32>(t, c, begin, end);
}

template <class Teacher, class Param>
inline void ema(const EmaTensor& t, float rate, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = end - start < kBlock ? end - start : kBlock;
    ema_block<Teacher, Param>(
        static_cast<const typename Param::Type*>(t.param) + start,
        static_cast<typename Teacher::Type*>(t.teacher) + start,
        t.shadow == nullptr ? nullptr : t.shadow + start, rate, count);
  }
  publish();
}

void ema_update(const EmaTensor& t, float rate, int64_t begin, int64_t end) {
  if (t.teacher_is_bfloat16 && t.param_is_bfloat16) ema<Bfloat16, Bfloat16>(t, rate, begin, end);
  else if (t.teacher_is_bfloat16) ema<Bfloat16, Float32>(t, rate, begin, end);
  else if (t.param_is_bfloat16) ema<Float32, Bfloat16>(t, rate, begin, end);
  else ema<Float32, Float32>(t, rate, begin, end);
}

// Sum of squares of a chunk; 32 sums side by side, in equal order on every instruction set.
template <class Number, class Grad>
inline double squares(const typename Grad::Type* grad, int64_t count) {
  constexpr int kLanes = 32;
  Number lanes[kLanes] = {};
  double total = 0.0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const Number g = static_cast<Number>(Grad::to(grad[i + lane]));
      lanes[lane] += g * g;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const Number g = static_cast<Number>(Grad::to(grad[i]));
    lanes[lane] += g * g;
  }
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
  return total;
}

template <class Grad>
inline double squares(const GradTensor& t, int64_t begin, int64_t end) {
  const typename Grad::Type* const grad = static_cast<const typename Grad::Type*>(t.grad) + begin;
  const double total = squares<float, Grad>(grad, end - begin);
  // Squares of more than 1e19 are too large for float32, their sum's root is not.
  return total - total == 0.0 ? total : squares<double, Grad>(grad, end - begin);
}

double sum_of_squares(const GradTensor& t, int64_t begin, int64_t end) {
  return t.is_bfloat16 ? squares<Bfloat16>(t, begin, end) : squares<Float32>(t, begin, end);
}
