// The schema of every op; the kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pera_fast, m) {
  m.def(
      "disjoint_masks(Tensor crop_index, int seed, int step, int num_patches, int num_student, int num_target)"
      " -> (Tensor student, Tensor target, Tensor teacher)");
}
