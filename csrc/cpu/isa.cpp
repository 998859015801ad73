#include "isa.h"

#include <torch/csrc/stable/library.h>

namespace pera_fast {
namespace {

int64_t chosen_isa() { return isa(); }

bool is_amd() {
#ifdef __x86_64__
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}

// Whether products of bfloat16 have instructions; off x86 that is for torch to know.
bool has_bfloat16() {
#ifdef __x86_64__
  return isa() >= 3;
#else
  return true;
#endif
}

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&pera_fast::chosen_isa));
  m.impl("is_amd", TORCH_BOX(&pera_fast::is_amd));
  m.impl("has_bfloat16", TORCH_BOX(&pera_fast::has_bfloat16));
}
