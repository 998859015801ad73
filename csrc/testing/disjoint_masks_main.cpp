// Runs the CUDA kernel's source on the CPU (cuda_host.h):
//   disjoint_masks_main SEED STEP NUM_PATCHES NUM_STUDENT NUM_TARGET CROP...
// prints one line per crop: its student, target and teacher patches.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../cuda/disjoint_masks.h"

int main(int argc, char** argv) {
  if (argc < 7) return 2;
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const uint32_t step = static_cast<uint32_t>(std::strtoull(argv[2], nullptr, 10));
  const int num_patches = std::atoi(argv[3]), num_student = std::atoi(argv[4]);
  const int num_target = std::atoi(argv[5]), num_teacher = num_patches - num_student - num_target;
  std::vector<int64_t> crops;
  for (int i = 6; i < argc; ++i) {
    crops.push_back(std::strtoll(argv[i], nullptr, 10));
    crops.push_back(-1);  // the kernel has to respect the stride
  }
  const size_t rows = crops.size() / 2;
  // Exact sizes, so that the sanitizer sees a write past the end.
  std::unique_ptr<int64_t[]> student(new int64_t[rows * num_student]);
  std::unique_ptr<int64_t[]> target(new int64_t[rows * num_target]);
  std::unique_ptr<int64_t[]> teacher(new int64_t[rows * num_teacher]);
  const int error = pera_fast::launch_disjoint_masks(
      crops.data(), 2, static_cast<int64_t>(rows), seed, step, num_patches, num_student, num_target,
      student.get(), target.get(), teacher.get(), nullptr);
  if (error != 0) return 3;
  for (size_t row = 0; row < rows; ++row) {
    for (int i = 0; i < num_student; ++i) std::printf("%ld ", long(student[row * num_student + i]));
    for (int i = 0; i < num_target; ++i) std::printf("%ld ", long(target[row * num_target + i]));
    for (int i = 0; i < num_teacher; ++i) std::printf("%ld ", long(teacher[row * num_teacher + i]));
    std::printf("\n");
  }
  return 0;
}
