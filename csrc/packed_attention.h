// Attention within packed sequences: what its kernels are given. No torch here.
#pragma once

#include <cstdint>

namespace pera_fast {

struct AttentionProblem {
  bool is_bfloat16;  // of qkv, out and their gradients; else float32
  int64_t rows, heads, dim;
  float scale;
  const void* qkv;  // [rows, 3, heads, dim]
  void* out;        // [rows, heads, dim]
  float* softmax;   // [heads, 2, rows]: the largest scaled score of a row, and 1 / its sum of exponentials
  // For the backward pass.
  const void* gradient;  // of out
  void* qkv_gradient;
};

// One sequence's rows and the heads to work on.
struct AttentionItem {
  int64_t row, length, head, end_head;
  int64_t next_row;  // where the sequence begins that follows on this thread, or -1
};

}  // namespace pera_fast
