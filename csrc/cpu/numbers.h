// How a stored number becomes a float32 and back. Part of a kernel file (for_each_isa.h).

struct Float32 {
  typedef float Type;
  static inline float to(float x) { return x; }
  static inline float from(float x) { return x; }
};

struct Bfloat16 {
  typedef uint16_t Type;
  static inline float to(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static inline uint16_t from(float x) { return bfloat16_of(x); }
};
