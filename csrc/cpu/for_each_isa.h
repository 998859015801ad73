// Compiles the file that PERA_FAST_KERNEL names once per instruction set, in the namespaces baseline, avx2,
// avx512 and avx512bf16 (PERA_FAST_ISA 0 to 3): its loops are plain C++ that the compiler vectorises for that
// set. So the file may use nothing of the standard library, whose functions the linker would share between them.

#define PERA_FAST_ISA 0
namespace baseline {
#include PERA_FAST_KERNEL
}
#undef PERA_FAST_ISA

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define PERA_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#ifdef __clang__
#define PERA_FAST_BEGIN(isa) \
  PERA_FAST_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PERA_FAST_END PERA_FAST_PRAGMA(clang attribute pop)
#else
#define PERA_FAST_BEGIN(isa) PERA_FAST_PRAGMA(GCC push_options) PERA_FAST_PRAGMA(GCC target(isa))
#define PERA_FAST_END PERA_FAST_PRAGMA(GCC pop_options)
#endif
#define PERA_FAST_PRAGMA(text) _Pragma(#text)

#define PERA_FAST_ISA 1
PERA_FAST_BEGIN("avx2,fma")
namespace avx2 {
#include PERA_FAST_KERNEL
}
PERA_FAST_END
#undef PERA_FAST_ISA

#define PERA_FAST_ISA 2
PERA_FAST_BEGIN(PERA_FAST_AVX512)
namespace avx512 {
#include PERA_FAST_KERNEL
}
PERA_FAST_END
#undef PERA_FAST_ISA

#define PERA_FAST_ISA 3
PERA_FAST_BEGIN(PERA_FAST_AVX512 ",avx512bf16")
namespace avx512bf16 {
#include PERA_FAST_KERNEL
}
PERA_FAST_END
#undef PERA_FAST_ISA

#define PERA_FAST_CHOOSE(function) \
  choose_by_isa(baseline::function, avx2::function, avx512::function, avx512bf16::function)
#else
#define PERA_FAST_CHOOSE(function) (baseline::function)
#endif

#undef PERA_FAST_KERNEL
