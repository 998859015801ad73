// The schema of every op; the kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pera_fast, m) {
  m.def(
      "disjoint_masks(Tensor crop_index, int seed, int step, int num_patches, int num_student, int num_target)"
      " -> (Tensor student, Tensor target, Tensor teacher)");
  m.def(
      "crop_patches(Tensor buffer, Tensor offsets, Tensor shapes, Tensor dtypes, Tensor low, Tensor high, "
      "Tensor image, Tensor box, Tensor flip, Tensor factor, Tensor order, Tensor grey, "
      "Tensor student_patches, Tensor target_patches, Tensor teacher_patches, Tensor mean, Tensor std, "
      "int crop_px, int patch_px, bool exact, Tensor(a!) student_rows, Tensor(b!) target_pixels, "
      "Tensor(c!) teacher_rows) -> ()");
  m.def(
      "distill_sums(Tensor teacher, Tensor student, Tensor scale_teacher, Tensor scale_student, Tensor centre, "
      "float inverse_tau_teacher, float inverse_tau_student, Tensor(a!) state) -> ()");
  m.def(
      "distill_gradient(Tensor teacher, Tensor student, Tensor scale_teacher, Tensor scale_student, "
      "Tensor centre, float inverse_tau_teacher, float inverse_tau_student, Tensor log_sum_x, Tensor log_sum_y, "
      "Tensor weight, Tensor(a!) gradient, Tensor(b!) dot) -> ()");
  m.def("distill_operand(Tensor v, Tensor(a!) operand, Tensor(b!) norm) -> ()");
  m.def("distill_finish(Tensor product, Tensor v, Tensor along, Tensor(a!) gradient) -> ()");
}
