// Arrays that a test program reads from stdin and writes to stdout, in this machine's byte order. Each of its exact
// size, so that the sanitizer sees an access past the end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace pera_fast::testing {

inline std::vector<std::unique_ptr<char[]>> arrays;

inline char* new_array(size_t bytes) {
  arrays.emplace_back(new char[bytes]);
  return arrays.back().get();
}

inline char* read_bytes(size_t bytes, size_t offset = 0) {
  char* const array = new_array(bytes + offset) + offset;
  if (std::fread(array, 1, bytes, stdin) != bytes) std::exit(2);
  return array;
}

template <class T>
const T* read(int64_t count) {
  return reinterpret_cast<const T*>(read_bytes(static_cast<size_t>(count) * sizeof(T)));
}

inline void write(const void* array, size_t bytes) { std::fwrite(array, 1, bytes, stdout); }

}  // namespace pera_fast::testing
