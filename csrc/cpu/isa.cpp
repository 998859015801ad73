#include "isa.h"

#include <torch/csrc/stable/library.h>

namespace pera_fast {
namespace {

int64_t chosen_isa() { return isa(); }

}  // namespace
}  // namespace pera_fast

STABLE_TORCH_LIBRARY_IMPL(pera_fast, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&pera_fast::chosen_isa));
}
