// Two kernels: the first sums the levels that contrast blends towards, the second makes the patches. Both
// work on tiles of at most kSide x kSide pixels of a crop, with one thread for each pixel, in rounds over as
// many source rows as the tile has rows. In a round each thread
//   - takes one value of one row through the horizontal pass into `narrowed`,
//   - computes one weight of the vertical pass, and after a barrier
//   - adds the round's rows to its own pixel.
// Every table has at most one entry for each thread, so that shared memory does not grow with the scale: more
// rows, or more taps than the table of the horizontal pass holds, take more rounds. Where the vertical pass
// comes first, the rows are columns of the source and the two axes change places.
#include "crop_patches.h"

#include "launch.h"

namespace pera_fast {
namespace {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kResidentBlocks = 4;  // of one multiprocessor: 64 registers for each thread
constexpr int kMaxParts = 32;       // blocks that share the sums over a crop's views

// A thread's place in its square block.
__device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int row() { return static_cast<int>(threadIdx.y); }
__device__ __forceinline__ int block_side() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int block_size() { return block_side() * block_side(); }
__device__ __forceinline__ int thread_number() { return row() * block_side() + column(); }
__device__ __forceinline__ bool is_first_thread() { return thread_number() == 0; }
__device__ __forceinline__ bool is_last_thread() { return thread_number() == block_size() - 1; }

// Pixels of a crop that a block makes together.
struct Tile {
  int top, left, rows, columns;

  __device__ __forceinline__ bool has_pixel() const { return column() < columns && row() < rows; }
};

// The taps of a tile's columns or rows.
template <class L>
struct TileAxis {
  int most;  // no position has more taps
  Taps<typename L::Real> taps[kSide];
  typename L::Real sum[kSide];

  __device__ __forceinline__ typename L::Weight weight(int position, int k) const {
    return L::weight(triangle(taps[position], k) / sum[position]);
  }
};

// One crop's box in its source image.
struct Box {
  const uint8_t* pixels;     // the first one in the first band
  int64_t width, band_size;  // of the image, in pixels
  int dtype;
  bool vertical_first;
};

// Where a block's patch comes from and goes to.
struct Patch {
  int64_t view;  // 2 * crop + view
  int set, top, left;
  int64_t start;  // of its row, in elements
};

// A view's colours.
template <class L>
struct Look {
  int operation[4];  // -1 for none
  float factor[4];   // of these
  int32_t hue_steps;
  bool grey, has_contrast;
  typename L::Pixel mean;  // that contrast blends towards
};

// What a block shares. group: the bands that are made together, 3 when colours mix them, else 1.
template <class L, int group>
struct Shared {
  Patch patch;
  Tile tile;
  Box box;
  Look<L> look;
  int64_t sums[kMaxParts];
  float low[group], inverse_span[group];
  Affine affine[group];
  TileAxis<L> axes[2];                                  // columns, rows
  typename L::Weight first_weights[kSide][kSide];       // [tap, position]
  typename L::Weight second_weights[2][kSide][kSide];   // [round, line, position]
  typename L::Stored narrowed[2][group][kSide][kSide];  // [round, band, line, position]
};

// --- geometry ---

template <class L>
__device__ __forceinline__ Box box_of(const CropPatches& a, int64_t crop) {
  const int64_t image = a.image[crop], *shape = a.shapes + 3 * image, *box = a.box + 4 * crop;
  const int dtype = static_cast<int>(a.dtypes[image]);
  const int64_t pixel_bytes = dtype == kUint8 ? 1 : (dtype == kUint16 ? 2 : 4);
  return {
      a.buffer + a.offsets[image] + (box[0] * shape[2] + box[1]) * pixel_bytes, shape[2], shape[1] * shape[2],
      dtype,
      L::vertical_first(static_cast<int>(box[2]), static_cast<int>(box[3]), static_cast<int>(a.crop_px))};
}

// Begins a tile: its taps and the sums of their weights. Flips only change which pixel a position stands for.
template <class L, int group>
__device__ __forceinline__ void place_taps(
    const CropPatches& a, int64_t crop, const Tile& tile, Shared<L, group>& s) {
  if (is_first_thread()) s.tile = tile;
  const int position = column(), crop_px = static_cast<int>(a.crop_px);
  for (int i = row(); i < 2; i += block_side()) {
    if (position >= (i == 0 ? tile.columns : tile.rows)) continue;
    const Axis axis = axis_of(static_cast<int>(a.box[4 * crop + 3 - i]), crop_px);
    const int pixel = (i == 0 ? tile.left : tile.top) + position;
    const auto taps = taps_of<typename L::Real>(axis, a.flip[2 * crop + i] ? crop_px - 1 - pixel : pixel);
    s.axes[i].taps[position] = taps;
    s.axes[i].sum[position] = triangle_sum(taps);
    if (position == 0) s.axes[i].most = static_cast<int>(2 * axis.support) + 2;
  }
}

// Weights of the first pass's taps from the k-th on, as many as the table holds.
template <class L, int group>
__device__ __forceinline__ void store_first_weights(int k, Shared<L, group>& s) {
  const bool vertical = s.box.vertical_first;
  const TileAxis<L>& axis = s.axes[vertical];
  const int position = column(), tap = k + row();
  if (position < (vertical ? s.tile.rows : s.tile.columns) && tap < axis.taps[position].count) {
    s.first_weights[row()][position] = axis.weight(position, tap);
  }
}

// Adds `count` taps of one line to `sum`. pixel: the first one's, in the first band.
template <class L, class T, bool are_levels, int group>
__device__ __forceinline__ void add_taps(
    const T* pixel, int64_t step, int position, int count, const Shared<L, group>& s,
    typename L::Sum (&sum)[group]) {
  for (int k = 0; k < count; ++k) {
    const typename L::Weight weight = s.first_weights[k][position];
    for (int b = 0; b < group; ++b) {
      const T value = pixel[b * s.box.band_size];
      if constexpr (are_levels) {
        sum[b] += static_cast<typename L::Sum>(value) * weight;
      } else {
        const float unit = scale_value(static_cast<float>(value), s.low[b], s.inverse_span[b]);
        sum[b] += static_cast<typename L::Sum>(L::from_unit(unit)) * weight;
      }
    }
    pixel += step;
  }
}

// start: of the line and its taps, in pixels from the box's first one.
template <class L, int group>
__device__ __forceinline__ void add_taps(
    int64_t start, int64_t step, int position, int count, const Shared<L, group>& s,
    typename L::Sum (&sum)[group]) {
  if (s.box.dtype == kUint8) {
    const uint8_t* const pixel = s.box.pixels + start;
    if constexpr (L::kRange == 255.0f) {  // scaling from 0..255 changes no 8-bit level
      bool are_levels = true;
      for (int b = 0; b < group; ++b) are_levels &= s.low[b] == 0.0f && s.inverse_span[b] == 1.0f / 255.0f;
      if (are_levels) return add_taps<L, uint8_t, true, group>(pixel, step, position, count, s, sum);
    }
    add_taps<L, uint8_t, false, group>(pixel, step, position, count, s, sum);
  } else if (s.box.dtype == kUint16) {
    const uint16_t* const pixel = reinterpret_cast<const uint16_t*>(s.box.pixels) + start;
    add_taps<L, uint16_t, false, group>(pixel, step, position, count, s, sum);
  } else {
    const float* const pixel = reinterpret_cast<const float*>(s.box.pixels) + start;
    add_taps<L, float, false, group>(pixel, step, position, count, s, sum);
  }
}

// Each thread's pixel of the tile, in `group` bands from `band` on: resized and flipped. The taps are placed
// and the first pass's first weights stored, with a barrier since.
template <class L, int group>
__device__ __forceinline__ void resample(
    int band, Shared<L, group>& s, typename L::Pixel (&pixel)[group]) {
  const int side = block_side();
  const bool vertical = s.box.vertical_first;
  const TileAxis<L>&first_pass = s.axes[vertical], &second_pass = s.axes[!vertical];
  // The thread's positions along the axes of the two passes. In the first pass the other one counts lines, so
  // that neighbouring threads read neighbouring columns either way.
  const int first_position = vertical ? row() : column();
  const int second_position = vertical ? column() : row();
  const int first_size = vertical ? s.tile.rows : s.tile.columns;
  const int second_size = vertical ? s.tile.columns : s.tile.rows;
  // All lines of the tile: taps advance with the position, or fall where the axis is flipped.
  const int one = second_pass.taps[0].first, other = second_pass.taps[second_size - 1].first;
  const int one_end = one + second_pass.taps[0].count;
  const int other_end = other + second_pass.taps[second_size - 1].count;
  const int end = one_end > other_end ? one_end : other_end;
  typename L::Sum sum[group];
  for (int b = 0; b < group; ++b) sum[b] = L::sum_start();
  int round = 0;
  for (int start = one < other ? one : other; start < end; start += side) {
    const int line = start + second_position;
    const bool has_value = first_position < first_size && line < end;
    typename L::Sum value[group];
    for (int b = 0; b < group; ++b) value[b] = L::sum_start();
    for (int k = 0; k < first_pass.most; k += side) {
      if (first_pass.most > side) {
        __syncthreads();
        store_first_weights<L, group>(k, s);
        __syncthreads();
      }
      if (has_value) {
        const int left = first_pass.taps[first_position].count - k;
        const int first = first_pass.taps[first_position].first + k;
        const int64_t width = s.box.width;
        add_taps<L, group>(
            band * s.box.band_size + (vertical ? first * width + line : line * width + first),
            vertical ? width : 1, first_position, left < side ? left : side, s, value);
      }
    }
    if (has_value) {
      for (int b = 0; b < group; ++b) {
        s.narrowed[round][b][second_position][first_position] = L::sum_end(value[b]);
      }
    }
    if (column() < second_size) {
      const int k = start + row() - second_pass.taps[column()].first;
      if (k >= 0 && k < second_pass.taps[column()].count) {
        s.second_weights[round][row()][column()] = second_pass.weight(column(), k);
      }
    }
    // The only barrier of a round: the next round's values go elsewhere.
    __syncthreads();
    if (s.tile.has_pixel()) {
      const int first = second_pass.taps[second_position].first - start;
      const int stop = first + second_pass.taps[second_position].count;
      for (int i = first > 0 ? first : 0; i < side && i < stop; ++i) {
        const typename L::Weight weight = s.second_weights[round][i][second_position];
        for (int b = 0; b < group; ++b) {
          sum[b] += static_cast<typename L::Sum>(s.narrowed[round][b][i][first_position]) * weight;
        }
      }
    }
    round ^= 1;
  }
  for (int b = 0; b < group; ++b) pixel[b] = static_cast<typename L::Pixel>(L::sum_end(sum[b]));
}

// --- colour ---

template <class L, int group>
__device__ __forceinline__ void load_look(const CropPatches& a, int64_t view, Look<L>& look) {
  look.grey = group == 3 && a.grey[view];
  look.has_contrast = false;
  look.hue_steps = 0;
  look.mean = 0;
  for (int i = 0; i < 4; ++i) {
    const int operation = static_cast<int>(a.order[4 * view + i]);
    const float factor = operation < 0 ? 0.0f : a.factor[4 * view + operation];
    look.operation[i] = operation;
    look.factor[i] = factor;
    if (operation == kContrast) look.has_contrast = !look.grey;
    if (operation == kHue) look.hue_steps = hue_steps(factor);
  }
}

// The operations up to contrast, or all of them.
template <class L, int group>
__device__ __forceinline__ void apply(
    const Look<L>& look, bool until_contrast, typename L::Pixel (&pixel)[group]) {
  using Pixel = typename L::Pixel;
  if constexpr (group == 3) {
    if (look.grey) {
      pixel[0] = pixel[1] = pixel[2] = L::luma(pixel[0], pixel[1], pixel[2]);
      return;
    }
  }
  for (int i = 0; i < 4; ++i) {
    const int operation = look.operation[i];
    if (operation < 0 || (until_contrast && operation == kContrast)) return;
    const float factor = look.factor[i];
    if (operation == kHue) {
      if constexpr (group == 3) L::turn_hue(pixel[0], pixel[1], pixel[2], look.hue_steps);
    } else if (group == 3 || operation != kSaturation) {
      Pixel towards = operation == kContrast ? look.mean : Pixel{0};
      if constexpr (group == 3) {
        if (operation == kSaturation) towards = L::luma(pixel[0], pixel[1], pixel[2]);
      }
      for (int b = 0; b < group; ++b) pixel[b] = L::blend(towards, pixel[b], factor);
    }
  }
}

// What the bands from `band` on need, loaded by the block's last row of threads.
template <class L, int group>
__device__ __forceinline__ void load_bands(
    const CropPatches& a, int64_t crop, int band, Shared<L, group>& s) {
  if (row() != block_side() - 1) return;
  for (int b = column(); b < group; b += block_side()) {
    const int64_t of_image = a.image[crop] * a.bands + band + b;
    s.low[b] = a.low[of_image];
    s.inverse_span[b] = 1.0f / (a.high[of_image] - a.low[of_image]);
    s.affine[b] = normalisation(a.mean[band + b], a.std[band + b], L::kRange);
  }
}

// --- the sums ---

// How many tiles cover `pixels` along one axis, and their side: as even as possible.
PERA_FAST_HOST_DEVICE int tiles_along(int64_t pixels) {
  return static_cast<int>((pixels + kSide - 1) / kSide);
}
PERA_FAST_HOST_DEVICE int tile_side(int64_t pixels) {
  const int tiles = tiles_along(pixels);
  return static_cast<int>((pixels + tiles - 1) / tiles);
}

// Blocks that share the sums over a crop: of fewer than a few tiles each, their start would be most of their work.
PERA_FAST_HOST_DEVICE int parts_of(const CropPatches& a) {
  const int parts = tiles_along(a.crop_px) * tiles_along(a.crop_px) / 4;
  return parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts;
}

// The number-th tile of a square of `pixels` at (top, left).
__device__ __forceinline__ Tile tile_of(int number, int pixels, int top, int left) {
  const int side = tile_side(pixels), along = tiles_along(pixels);
  const int down = number / along * side, across = number % along * side;
  return {
      top + down, left + across, pixels - down < side ? pixels - down : side,
      pixels - across < side ? pixels - across : side};
}

// What a block shares that sums.
template <class L, int group>
struct SumShared {
  Shared<L, group> tile;
  Look<L> looks[2];
  int64_t sums[2][kThreads];
};

// Block [crop, band / group, part]: the sums over every parts-th tile of both views' levels, just before contrast,
// go to sums[crop, view, band / group, part]. The views differ in colour alone, so their pixels are resampled once.
template <class L, int group>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) sum_levels_kernel(
    const CropPatches a, int64_t* __restrict__ sums) {
  using Both = SumShared<L, group>;
  PERA_FAST_DYNAMIC_SHARED(Both, both);
  Shared<L, group>& s = both->tile;
  const unsigned groups = static_cast<unsigned>(a.bands / group);
  const unsigned parts = static_cast<unsigned>(parts_of(a));
  const int64_t crop = blockIdx.x / parts / groups;
  const unsigned group_number = blockIdx.x / parts % groups, part = blockIdx.x % parts;
  const int band = static_cast<int>(group_number) * group;
  if (is_last_thread()) {
    for (int view = 0; view < 2; ++view) load_look<L, group>(a, 2 * crop + view, both->looks[view]);
  }
  load_bands<L, group>(a, crop, band, s);
  if (is_first_thread()) s.box = box_of<L>(a, crop);
  __syncthreads();
  if (!both->looks[0].has_contrast && !both->looks[1].has_contrast) return;

  const int crop_px = static_cast<int>(a.crop_px), tiles = tiles_along(crop_px) * tiles_along(crop_px);
  int64_t sum[2] = {0, 0};
  for (int number = static_cast<int>(part); number < tiles; number += static_cast<int>(parts)) {
    __syncthreads();
    place_taps<L, group>(a, crop, tile_of(number, crop_px, 0, 0), s);
    __syncthreads();
    store_first_weights<L, group>(0, s);
    __syncthreads();
    typename L::Pixel resampled[group];
    resample<L, group>(band, s, resampled);
    if (!s.tile.has_pixel()) continue;
    for (int view = 0; view < 2; ++view) {
      const Look<L>& look = both->looks[view];
      if (!look.has_contrast) continue;
      typename L::Pixel pixel[group];
      for (int b = 0; b < group; ++b) pixel[b] = resampled[b];
      apply<L, group>(look, true, pixel);
      if constexpr (group == 3) sum[view] += L::countable(L::luma(pixel[0], pixel[1], pixel[2]));
      else sum[view] += L::countable(pixel[0]);
    }
  }
  const int thread = thread_number();
  for (int view = 0; view < 2; ++view) both->sums[view][thread] = sum[view];
  for (int n = block_size(); n > 1;) {
    const int half = (n + 1) / 2;
    __syncthreads();
    if (thread + half < n) {
      for (int view = 0; view < 2; ++view) both->sums[view][thread] += both->sums[view][thread + half];
    }
    n = half;
  }
  if (!is_first_thread()) return;
  for (int view = 0; view < 2; ++view) {
    sums[((2 * crop + view) * groups + group_number) * parts + part] = both->sums[view][0];
  }
}

// --- the patches ---

__device__ __forceinline__ void store(const PatchSet& set, int64_t index, float value) {
  if (set.type == kRowFloat32) static_cast<float*>(set.rows)[index] = value;
  else if (set.type == kRowBfloat16) static_cast<uint16_t*>(set.rows)[index] = bfloat16_of(value);
  else static_cast<uint16_t*>(set.rows)[index] = float16_of(value);
}

__device__ __forceinline__ void zero_leading_rows(const CropPatches& a, int64_t crop) {
  const int64_t row_size = a.bands * a.patch_px * a.patch_px;
  for (int i = 0; i < 3; ++i) {
    const PatchSet& set = a.sets[i];
    const int64_t start = crop * (set.leading + set.count) * row_size;
    for (int64_t j = thread_number(); j < set.leading * row_size; j += block_size()) {
      store(set, start + j, 0.0f);
    }
  }
}

// Blocks of one crop: its patches, and one for the rows of zeros where there are any.
PERA_FAST_HOST_DEVICE int64_t blocks_per_crop(const CropPatches& a) {
  const bool has_leading = a.sets[0].leading > 0 || a.sets[1].leading > 0 || a.sets[2].leading > 0;
  return a.sets[0].count + a.sets[1].count + a.sets[2].count + has_leading;
}

// The number-th patch of one set of a crop.
__device__ __forceinline__ Patch patch_of(const CropPatches& a, int64_t crop, int i, int64_t number) {
  const PatchSet& set = a.sets[i];
  const int patch = static_cast<int>(set.patches[crop * set.count + number]);
  const int patch_px = static_cast<int>(a.patch_px), grid = static_cast<int>(a.crop_px) / patch_px;
  return {
      2 * crop + view_of_set(i), i, patch / grid * patch_px, patch % grid * patch_px,
      (crop * (set.leading + set.count) + set.leading + number) * a.bands * a.patch_px * a.patch_px};
}

template <class L, int group>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) crop_patches_kernel(
    const CropPatches a, const int64_t* __restrict__ sums) {
  using Block = Shared<L, group>;
  PERA_FAST_DYNAMIC_SHARED(Block, block);
  Block& s = *block;
  const unsigned blocks = static_cast<unsigned>(blocks_per_crop(a));
  const int64_t crop = blockIdx.x / blocks;
  int64_t number_in_set = blockIdx.x % blocks;
  int set_number = 0;
  while (set_number < 3 && number_in_set >= a.sets[set_number].count) {
    number_in_set -= a.sets[set_number++].count;
  }
  if (set_number == 3) return zero_leading_rows(a, crop);
  if (is_first_thread()) {
    s.patch = patch_of(a, crop, set_number, number_in_set);
    s.box = box_of<L>(a, crop);
  }
  if (is_last_thread()) load_look<L, group>(a, 2 * crop + view_of_set(set_number), s.look);

  const int patch_px = static_cast<int>(a.patch_px), tiles = tiles_along(patch_px) * tiles_along(patch_px);
  for (int number = 0; number < tiles; ++number) {
    for (int band = 0; band < a.bands; band += group) {
      __syncthreads();
      if (band == 0) {
        place_taps<L, group>(a, crop, tile_of(number, patch_px, s.patch.top, s.patch.left), s);
      }
      load_bands<L, group>(a, crop, band, s);
      if (s.look.has_contrast) {
        const int parts = parts_of(a);
        const int64_t first = (s.patch.view * (a.bands / group) + band / group) * parts;
        // From the last thread on: the first ones are busy with the taps.
        for (int i = block_size() - 1 - thread_number(); i < parts; i += block_size()) {
          s.sums[i] = sums[first + i];
        }
      }
      __syncthreads();
      if (band == 0) store_first_weights<L, group>(0, s);
      if (s.look.has_contrast && is_last_thread()) {
        int64_t sum = 0;
        for (int i = 0; i < parts_of(a); ++i) sum += s.sums[i];
        s.look.mean = L::mean_level(sum, a.crop_px * a.crop_px);
      }
      __syncthreads();
      typename L::Pixel pixel[group];
      resample<L, group>(band, s, pixel);
      if (!s.tile.has_pixel()) continue;
      apply<L, group>(s.look, false, pixel);
      const PatchSet& set = a.sets[s.patch.set];
      const int64_t patch_size = a.patch_px * a.patch_px;
      const int place = (s.tile.top - s.patch.top + row()) * patch_px + s.tile.left - s.patch.left + column();
      for (int b = 0; b < group; ++b) {
        const int64_t index = set.bands_last ? place * a.bands + band + b : (band + b) * patch_size + place;
        const Affine to = s.affine[b];
        store(set, s.patch.start + index, multiply(static_cast<float>(pixel[b]), to.scale) + to.shift);
      }
    }
  }
}

template <class L, int group>
int launch(const CropPatches& a, int64_t* sums, cudaStream_t stream) {
  const int64_t blocks = blocks_per_crop(a), sum_blocks = crop_patches_sums(a) / 2;
  if (a.crops == 0 || blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX / a.crops || sum_blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto sum_levels = sum_levels_kernel<L, group>;
  const unsigned crop_side = tile_side(a.crop_px), patch_side = tile_side(a.patch_px);
  PERA_FAST_LAUNCH(
      sum_levels, static_cast<unsigned>(sum_blocks), dim3(crop_side, crop_side), sizeof(SumShared<L, group>),
      stream)
  (a, sums);
  const auto crop_patches = crop_patches_kernel<L, group>;
  PERA_FAST_LAUNCH(
      crop_patches, static_cast<unsigned>(a.crops * blocks), dim3(patch_side, patch_side),
      sizeof(Shared<L, group>), stream)
  (a, sums);
  return cudaGetLastError();
}

}  // namespace

int64_t crop_patches_sums(const CropPatches& a) {
  return a.crops * 2 * (a.bands == 3 ? 1 : a.bands) * parts_of(a);
}

int launch_crop_patches(const CropPatches& a, int64_t* sums, void* stream) {
  const auto launch_for = a.exact ? (a.bands == 3 ? launch<ExactLevels, 3> : launch<ExactLevels, 1>)
                                  : (a.bands == 3 ? launch<FloatLevels, 3> : launch<FloatLevels, 1>);
  return launch_for(a, sums, static_cast<cudaStream_t>(stream));
}

}  // namespace pera_fast
