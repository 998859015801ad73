// The schema of every op; the kernels register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pera_fast, m) {
  m.def("isa() -> int");
  m.def("is_amd() -> bool");
  m.def("has_bfloat16() -> bool");
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
      "distill_forward(Tensor v_student, Tensor g_student, Tensor v_teacher, Tensor g_teacher, "
      "Tensor z_student_columns, Tensor z_teacher_columns, Tensor centre, float inverse_tau_teacher, "
      "float inverse_tau_student, Tensor(a!) scale_student, Tensor(b!) scale_teacher, Tensor(c!) norm_student, "
      "Tensor(d!) kept_teacher, Tensor(e!) kept_student, Tensor(f!) state) -> ()");
  m.def(
      "distill_backward(Tensor v_student, Tensor v_teacher, Tensor z_student_columns, Tensor z_teacher_columns, "
      "Tensor z_student_rows, Tensor centre, float inverse_tau_teacher, float inverse_tau_student, "
      "Tensor scale_student, Tensor scale_teacher, Tensor norm_student, Tensor kept_teacher, Tensor kept_student, "
      "Tensor log_sum_x, Tensor log_sum_y, Tensor weight, Tensor(a!) dz, Tensor(b!) dv, Tensor(c!) dot) -> ()");
  m.def(
      "distill_sums(Tensor teacher, Tensor student, Tensor scale_teacher, Tensor scale_student, Tensor centre, "
      "float inverse_tau_teacher, float inverse_tau_student, Tensor(a!) state) -> ()");
  m.def(
      "distill_gradient(Tensor teacher, Tensor student, Tensor scale_teacher, Tensor scale_student, "
      "Tensor centre, float inverse_tau_teacher, float inverse_tau_student, Tensor log_sum_x, Tensor log_sum_y, "
      "Tensor weight, Tensor(a!) gradient, Tensor(b!) dot) -> ()");
  m.def("distill_operand(Tensor v, Tensor(a!) operand, Tensor(b!) norm) -> ()");
  m.def("distill_finish(Tensor product, Tensor v, Tensor along, Tensor(a!) gradient) -> ()");
  m.def("gram_forward(Tensor v, Tensor g, Tensor columns, Tensor(a!) product) -> ()");
  m.def(
      "gram_backward(Tensor v, Tensor g, Tensor columns, Tensor right, bool by_rows, bool adds, Tensor(a!) dz, Tensor(b!) dv, "
      "Tensor(c!) dg) -> ()");
  m.def(
      "attention_forward(Tensor qkv, Tensor starts, float scale, Tensor(a!) out, Tensor(b!) softmax) -> ()");
  m.def(
      "attention_backward(Tensor gradient, Tensor qkv, Tensor starts, float scale, Tensor out, Tensor softmax, "
      "Tensor(a!) qkv_gradient) -> ()");
  m.def(
      "residual_norm_forward(Tensor source, Tensor(a!) x, Tensor? branch, Tensor? rows, Tensor? scale, Tensor? next_rows, "
      "Tensor? weight, Tensor? bias, float eps, Tensor(b!)? y, Tensor(c!)? normalised, "
      "Tensor(d!)? inverse_deviation) -> ()");
  m.def(
      "residual_norm_backward(Tensor? x_gradient, Tensor? y_gradient, Tensor? rows, Tensor? scale, "
      "Tensor? next_rows, Tensor? weight, Tensor? normalised, Tensor? inverse_deviation, Tensor(a!) out, "
      "Tensor(b!)? branch_gradient, Tensor(c!)? weight_gradient, Tensor(d!)? bias_gradient) -> ()");
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor(e!)[] teachers, Tensor(f!)[] shadows, Tensor(g!)[] teacher_shadows, Tensor hyper, "
      "Tensor grad_norm, float beta1, float beta2, float eps, float clip_norm, Tensor(h!) skipped) -> ()");
  m.def("ema_update(Tensor(a!)[] teachers, Tensor[] params, Tensor(b!)[] shadows, Tensor momentum) -> ()");
  m.def("grad_norm(Tensor[] grads, Tensor(a!) norm) -> ()");
}
