// Random disjoint patch sets: the maths shared by the CPU and the CUDA kernel. No torch here.
//
// Patch p of crop c draws the key Philox4x32-10(key = seed, counter = (p/4, step, c))[p % 4]. In ascending
// order of (key, p), the first num_student patches are the student's, the next num_target the target's, the
// rest the teacher's. A key depends on nothing but (seed, step, c, p): not on the batch, the device or the
// number of processes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pera_fast {

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// counter[4] is replaced by the four output words.
PERA_FAST_HOST_DEVICE void philox4x32_10(uint32_t key0, uint32_t key1, uint32_t counter[4]) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t word1 = counter[1];
    const uint32_t word3 = counter[3];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Keys of patches 4*group .. 4*group+3, each with its patch index below it in one word, so that comparing
// two words compares (key, patch): no two are equal, hence every sort gives the same order.
PERA_FAST_HOST_DEVICE void sort_words(
    uint64_t seed, uint32_t step, int64_t crop, uint32_t group, uint64_t words[4]) {
  uint32_t counter[4] = {
      group,
      step,
      static_cast<uint32_t>(crop),
      static_cast<uint32_t>(static_cast<uint64_t>(crop) >> 32)};
  philox4x32_10(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
  for (uint32_t i = 0; i < 4; ++i) {
    words[i] = (static_cast<uint64_t>(counter[i]) << 32) | (4 * group + i);
  }
}

// Which set a rank belongs to: 0 student, 1 target, 2 teacher.
PERA_FAST_HOST_DEVICE uint32_t set_of_rank(int64_t rank, int64_t num_student, int64_t num_target) {
  return (rank >= num_student) + (rank >= num_student + num_target);
}

}  // namespace pera_fast
