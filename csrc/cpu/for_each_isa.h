// Compiles the file that PERA_FAST_KERNEL names once per instruction set, in the namespaces baseline, avx2 and
// avx512: its loops are plain C++ that the compiler vectorises for that set. So the file may use nothing of
// the standard library, whose functions the linker would share between the three.

namespace baseline {
#include PERA_FAST_KERNEL
}

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#include PERA_FAST_KERNEL
}
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include PERA_FAST_KERNEL
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define PERA_FAST_CHOOSE(function) \
  choose_by_isa(baseline::function, avx2::function, avx512::function)
#else
#define PERA_FAST_CHOOSE(function) (baseline::function)
#endif

#undef PERA_FAST_KERNEL
