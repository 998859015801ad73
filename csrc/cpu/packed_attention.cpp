#include "../packed_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../host_device.h"
#include "checked.h"
#include "isa.h"

namespace pera_fast {
namespace {

#define PERA_FAST_KERNEL "packed_attention_kernel.h"
#include "for_each_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shorter sequences are worth a thread's while with all their heads only, and this many at once.
constexpr int64_t kEnoughRows = 64, kSequences = 8;

AttentionProblem problem_of(const Tensor& qkv, double scale, const Tensor& out, const Tensor& softmax) {
  STD_TORCH_CHECK(
      qkv.dim() == 4 && qkv.size(1) == 3 && qkv.is_contiguous(), "qkv: expected contiguous [rows, 3, heads, dim]");
  AttentionProblem p{};
  p.is_bfloat16 = qkv.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(p.is_bfloat16 || qkv.scalar_type() == ScalarType::Float, "qkv: expected float32 or bfloat16");
  STD_TORCH_CHECK(
      out.scalar_type() == qkv.scalar_type() && out.is_contiguous() && 3 * out.numel() == qkv.numel(),
      "out: expected contiguous [rows, heads, dim] in qkv's dtype");
  p.rows = qkv.size(0);
  p.heads = qkv.size(2);
  p.dim = qkv.size(3);
  STD_TORCH_CHECK(p.dim <= 256, "qkv: expected a head dim of 256 at most, got ", p.dim);
  p.scale = static_cast<float>(scale);
  p.qkv = qkv.const_data_ptr();
  p.out = const_cast<void*>(out.const_data_ptr());
  p.softmax = const_cast<float*>(floats(softmax, "softmax", p.heads * 2 * p.rows));
  return p;
}

// Runs `kernel` on every sequence and head. Threads take the next piece of work when they are done with one, as
// sequences differ in length; each piece's results are its own, so the order does not matter.
template <class Kernel>
void for_each_item(const AttentionProblem& p, const Tensor& starts, bool backward, Kernel kernel) {
  STD_TORCH_CHECK(
      starts.scalar_type() == ScalarType::Long && starts.is_contiguous() && starts.numel() >= 1,
      "starts: expected contiguous int64 [sequences + 1]");
  const int64_t* const start = starts.const_data_ptr<int64_t>();
  const int64_t sequences = starts.numel() - 1;
  STD_TORCH_CHECK(start[0] == 0 && start[sequences] == p.rows, "starts: expected 0 first and ", p.rows, " last");
  std::vector<AttentionItem> items;
  std::vector<int64_t> pieces;  // where each piece of work starts in items
  int64_t longest = 0;
  for (int64_t i = 0, open = 0; i < sequences; ++i) {
    const int64_t length = start[i + 1] - start[i];
    STD_TORCH_CHECK(length >= 0, "starts: expected no decrease");
    if (length == 0) continue;
    longest = std::max(longest, length);
    const bool is_short = length < kEnoughRows;
    for (int64_t head = 0; head < p.heads; head += is_short ? p.heads : 1) {
      if (!is_short || open == 0 || open == kSequences) {
        pieces.push_back(static_cast<int64_t>(items.size()));
        open = 0;
      }
      items.push_back({start[i], length, head, is_short ? p.heads : head + 1, -1});
      if (open > 0) items[items.size() - 2].next_row = start[i];
      open = is_short ? open + 1 : 0;
    }
  }
  pieces.push_back(static_cast<int64_t>(items.size()));
  const int64_t count = static_cast<int64_t>(pieces.size()) - 1;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<float[]> room(
        new float[static_cast<size_t>(baseline::attention_room(p, longest, backward))]());
    for (int64_t piece = next++; piece < count; piece = next++) {
      for (int64_t i = pieces[piece]; i < pieces[piece + 1]; ++i) kernel(p, items[i], room.get());
    }
  });
}

void attention_forward(const Tensor& qkv, const Tensor& starts, double scale, Tensor out, Tensor softmax) {
  static const auto kernel = PERA_FAST_CHOOSE(attention_forward);
  for_each_item(problem_of(qkv, scale, out, softmax), starts, false, kernel);
}

void attention_backward(
    const Tensor& gradient, const Tensor& qkv, const Tensor& starts, double scale, const Tensor& out,
    const Tensor& softmax, Tensor qkv_gradient) {
  static const auto kernel = PERA_FAST_CHOOSE(attention_backward);
  AttentionProblem p = problem_of(qkv, scale, out, softmax);
  for (const auto& [tensor, like] : {std::pair{&gradient, &out}, std::pair<const Tensor*, const Tensor*>{&qkv_gradient, &qkv}}) {
    STD_TORCH_CHECK(
        tensor->scalar_type() == qkv.scalar_type() && tensor->is_contiguous() && tensor->numel() == like->numel(),
        "gradient, qkv_gradient: expected contiguous tensors like out and qkv");
  }
  p.gradient = gradient.const_data_ptr();
  p.qkv_gradient = qkv_gradient.mutable_data_ptr();
  for_each_item(p, starts, true, kernel);
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&pera_fast::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&pera_fast::attention_backward));
}
