// Many tensors as one row of chunks: what a kernel over all parameters is given. No torch here.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pera_fast {

// Numbers of a chunk, a whole number of vectors; the last chunk of a tensor may have fewer.
constexpr int64_t kChunk = 4096;

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Which tensor chunk `chunk` belongs to: the last with first_chunk[i] <= chunk. first_chunk ascends from 0.
PERA_FAST_HOST_DEVICE int tensor_of_chunk(const uint32_t* first_chunk, int count, uint32_t chunk) {
  int low = 0, high = count;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// As many tensors as fit a launch's arguments of 4 KB, so that no table has to be copied to the device: a launch
// can be captured in a graph and needs no memory that has to outlive it.
template <class Entry>
struct TensorTable {
  static constexpr int kMost = (4096 - 128) / (sizeof(Entry) + sizeof(uint32_t));
  int count = 0;
  uint32_t first_chunk[kMost + 1] = {};
  Entry entries[kMost];

  void add(const Entry& entry) {
    entries[count] = entry;
    first_chunk[count + 1] = first_chunk[count] + static_cast<uint32_t>(chunks_of(entry.numel));
    ++count;
  }
  uint32_t chunks() const { return first_chunk[count]; }
};

}  // namespace pera_fast
