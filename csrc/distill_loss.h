// Distillation over prototypes, chunk by chunk: the element-wise maths. No torch here.
//
// A chunk holds raw logits transposed, [prototypes, rows]: logit of row i for prototype k is
// raw[k, i] * scale[k] with scale = g / |v|. With x = (teacher - centre) / tau_teacher and
// y = student / tau_student, a row needs, over all prototypes,
//   max x, sum exp(x - max x), sum exp(x - max x) * y, max y, sum exp(y - max y)
// for its cross-entropy and for both softmaxes; chunks add to them one after the other.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pera_fast {

// What a row needs, each [rows].
struct DistillSums {
  float *max_x, *sum_x, *sum_xy, *max_y, *sum_y;
};

// One chunk of prototypes; arrays over prototypes begin at the chunk.
struct DistillChunk {
  const void* teacher;  // [prototypes, stride] raw logits, float32 or bfloat16
  const void* student;  // likewise
  bool is_bfloat16;
  int64_t prototypes, rows, stride;  // rows <= stride
  const float* scale_teacher;  // [prototypes] g / |v|
  const float* scale_student;
  const float* centre;  // [prototypes]
  float inverse_tau_teacher, inverse_tau_student;
  // For the gradient: both logarithms of the sums over all prototypes, and each row's weight in the loss.
  const float* log_sum_x;  // [rows]
  const float* log_sum_y;
  const float* weight;
  void* gradient;  // [prototypes, stride], bfloat16 where gradient_is_bfloat16
  bool gradient_is_bfloat16;
  float* dot;  // [prototypes]
};

// Both passes on a CPU, products included. Pairs are two bfloat16 side by side (cpu/product.h).
struct DistillProblem {
  int64_t prototypes, rows, stride, dim;
  bool pairs;
  const float *v_student, *g_student, *v_teacher, *g_teacher;  // [prototypes, dim], [prototypes]
  // As `pack` of cpu/product.h leaves them:
  const float *z_student_columns, *z_teacher_columns;          // [dim, stride]; pairs [dim / 2, stride]
  const float* z_student_rows;                                 // [rows, dim]; pairs [rows / 2 rounded up, dim]
  const float* centre;
  float inverse_tau_teacher, inverse_tau_student;
  float *scale_student, *scale_teacher, *norm_student;  // [prototypes], made by the forward pass
  void *kept_teacher, *kept_student;                    // [kept, stride] raw logits of the first prototypes
  int64_t kept;
  const float *log_sum_x, *log_sum_y, *weight;  // as in DistillChunk
  float *dot, *dv;                              // [prototypes], [prototypes, dim]
};

}  // namespace pera_fast
