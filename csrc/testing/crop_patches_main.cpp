// Runs the CUDA kernels' source on the CPU (cuda_host.h):
//   crop_patches_main < arguments > rows
// Both are binary, in this machine's byte order. Arguments: as int64 images, bands, crops, crop_px, patch_px,
// exact, the buffer's bytes, and each set's count, leading and type; then the arrays in the order of
// CropPatches, last the patches of each set. Rows: of each set.
#include <cstring>

#include "../cuda/crop_patches.h"
#include "arrays.h"

using pera_fast::testing::new_array;
using pera_fast::testing::read;

int main() {
  pera_fast::CropPatches a{};
  const int64_t* const sizes = read<int64_t>(7 + 3 * 3);
  a.images = sizes[0];
  a.bands = sizes[1];
  a.crops = sizes[2];
  a.crop_px = sizes[3];
  a.patch_px = sizes[4];
  a.exact = sizes[5] != 0;
  a.buffer = read<uint8_t>(sizes[6]);
  a.offsets = read<int64_t>(a.images);
  a.shapes = read<int64_t>(a.images * 3);
  a.dtypes = read<int64_t>(a.images);
  a.low = read<float>(a.images * a.bands);
  a.high = read<float>(a.images * a.bands);
  a.image = read<int64_t>(a.crops);
  a.box = read<int64_t>(a.crops * 4);
  a.flip = read<bool>(a.crops * 2);
  a.factor = read<float>(a.crops * 2 * 4);
  a.order = read<int64_t>(a.crops * 2 * 4);
  a.grey = read<bool>(a.crops * 2);
  a.mean = read<float>(a.bands);
  a.std = read<float>(a.bands);
  size_t bytes[3];
  for (int i = 0; i < 3; ++i) {
    pera_fast::PatchSet& set = a.sets[i];
    set.count = sizes[7 + 3 * i];
    set.leading = sizes[8 + 3 * i];
    set.type = static_cast<pera_fast::RowType>(sizes[9 + 3 * i]);
    set.bands_last = i == pera_fast::kTarget;
    set.patches = read<int64_t>(a.crops * set.count);
    bytes[i] = static_cast<size_t>(a.crops * (set.leading + set.count) * a.bands * a.patch_px * a.patch_px) *
               (set.type == pera_fast::kRowFloat32 ? 4 : 2);
    // Not a number in any of the types, where nothing is written.
    set.rows = std::memset(new_array(bytes[i]), 0xff, bytes[i]);
  }
  const size_t sums_bytes = static_cast<size_t>(pera_fast::crop_patches_sums(a)) * sizeof(int64_t);
  void* const sums = std::memset(new_array(sums_bytes), 0xff, sums_bytes);
  const int error = pera_fast::launch_crop_patches(a, static_cast<int64_t*>(sums), nullptr);
  if (error != 0) return 3;
  for (int i = 0; i < 3; ++i) std::fwrite(a.sets[i].rows, 1, bytes[i], stdout);
  return 0;
}
