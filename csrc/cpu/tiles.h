// A sum over prototypes in chunks, its tiles shared out to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>

namespace pera_fast {

// Prototypes whose [chunk, stride] numbers, 4 MB, lie in the last level of the cache between two steps.
inline int64_t chunk_of_stride(int64_t stride) {
  return std::clamp<int64_t>((1 << 20) / stride / 64 * 64, 256, 4096);
}

// b [depth, columns] as `pack`, a pack_floats of product.h, puts it.
template <class Pack>
std::unique_ptr<float[]> packed_by(Pack pack, const float* b, int64_t depth, int64_t columns) {
  std::unique_ptr<float[]> to(new float[static_cast<size_t>(depth * columns)]);
  pack(b, depth, columns, to.get());
  return to;
}

// Calls function(row, column, rows, columns) for each tile of a [rows, columns] matrix, in parallel.
template <class Function>
void for_each_tile(int64_t rows, int64_t columns, const Function& function) {
  constexpr int64_t kMostRows = 96, kLeastColumns = 48;
  const int64_t down = (rows + kMostRows - 1) / kMostRows, threads = torch::stable::get_num_threads();
  const int64_t height = ((rows + down - 1) / down + 7) / 8 * 8;
  // As many tiles for each thread, where that leaves enough columns.
  const int64_t most = std::max<int64_t>(1, columns / kLeastColumns);
  const int64_t shares = std::min(threads / std::gcd(down, threads), most);
  const int64_t width = std::max<int64_t>(16, ((columns + shares - 1) / shares + 15) / 16 * 16);
  const int64_t across = (columns + width - 1) / width;
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / across * height, column = task % across * width;
      function(row, column, std::min(height, rows - row), std::min(width, columns - column));
    }
  });
}

}  // namespace pera_fast
