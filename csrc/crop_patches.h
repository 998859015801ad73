// From source images to the patches that are used: the arguments and the maths shared by the CPU and the CUDA
// kernel. No torch here.
//
// A view's pixels are made in two steps. Geometry, the same for both views: the box of the source image is
// resized to crop_px x crop_px by antialiased bilinear resampling and flipped. Colour, of each view:
// brightness, contrast, saturation and hue in the drawn order, or grey. Both steps come in two kinds:
//   exact  levels are 8 bit, rounded after each pass and each colour operation as Pillow does;
//   float  levels are float in 0..1 and nothing is rounded. Pillow's colour operations cut off rather than
//          round, which on average costs half a level or half a step of hue each: float subtracts the half,
//          so that the two kinds agree in the mean.
// Everything below is written for one pixel, without branches, so that a loop over it vectorises.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pera_fast {

enum : int { kUint8, kUint16, kFloat32 };                     // CropPatches::dtypes
enum : int { kBrightness, kContrast, kSaturation, kHue };     // CropPatches::order, -1 for none
enum : int { kStudent, kTarget, kTeacher };                   // CropPatches::sets
enum RowType : int { kRowFloat32, kRowBfloat16, kRowFloat16 };  // PatchSet::type

// One of the three sets of patches, and where its rows go.
struct PatchSet {
  const int64_t* patches;  // [crops, count] raster indices
  int64_t count;
  void* rows;            // [crops, leading + count, bands * patch_px^2] of `type`
  int64_t leading;       // rows of zeros before each crop's patches
  RowType type;
  bool bands_last;       // (p, q, band) order within a row, else (band, p, q)
};

struct CropPatches {
  // Source images [bands, height, width] in one buffer.
  const uint8_t* buffer;
  const int64_t* offsets;  // [images] first byte
  const int64_t* shapes;   // [images, 3] bands, height, width
  const int64_t* dtypes;   // [images]
  const float* low;        // [images, bands] the value that becomes 0
  const float* high;       // [images, bands] the value that becomes 1
  int64_t images, bands;
  // Crop pairs.
  const int64_t* image;  // [crops]
  const int64_t* box;    // [crops, 4] top, left, height, width
  const bool* flip;      // [crops, 2] horizontal, vertical
  const float* factor;   // [crops, 2, 4] by operation
  const int64_t* order;  // [crops, 2, 4] operations as they apply
  const bool* grey;      // [crops, 2]
  int64_t crops, crop_px, patch_px;
  const float* mean;  // [bands]
  const float* std;   // [bands]
  bool exact;
  PatchSet sets[3];
};

PERA_FAST_HOST_DEVICE int view_of_set(int set) { return set == kTeacher ? 1 : 0; }

// --- geometry ---

// Antialiased bilinear resampling of `in` source pixels to `out`, as Pillow's resize: a triangle as wide as
// one output pixel, at least one source pixel to each side.
struct Axis {
  double scale;    // source pixels per output pixel
  double support;  // half the triangle's base in source pixels
  int in;
};

// The source pixels that one output pixel is made of. Real: what weights are computed in. Only places need double
// whatever the kind, and they are few: GPUs that are not for data centres have 1/64 of the units for it.
template <class Real>
struct Taps {
  Real centre;           // in source pixels from the left edge of the first one
  Real inverse_support;  // of the axis
  int first;             // first source pixel with a weight
  int count;
};

PERA_FAST_HOST_DEVICE Axis axis_of(int in, int out) {
  const double scale = static_cast<double>(in) / out;
  return {scale, scale < 1.0 ? 1.0 : scale, in};
}

template <class Real>
PERA_FAST_HOST_DEVICE Taps<Real> taps_of(const Axis& axis, int position) {
  const double centre = multiply(position + 0.5, axis.scale);
  const int first = static_cast<int>(centre - axis.support + 0.5);
  const int end = static_cast<int>(centre + axis.support + 0.5);
  const int clamped = first < 0 ? 0 : first;
  // `clamped` is a multiple of the centre's last bit and no larger: this difference is exact.
  return {
      static_cast<Real>(centre - clamped), static_cast<Real>(1.0 / axis.support), clamped,
      (end > axis.in ? axis.in : end) - clamped};
}

// Weight of the k-th tap, still to be divided by the sum over all taps.
template <class Real>
PERA_FAST_HOST_DEVICE Real triangle(const Taps<Real>& taps, int k) {
  const Real distance = multiply(k - taps.centre + static_cast<Real>(0.5), taps.inverse_support);
  const Real weight = 1 - (distance < 0 ? -distance : distance);
  return weight < 0 ? 0 : weight;
}

template <class Real>
PERA_FAST_HOST_DEVICE Real triangle_sum(const Taps<Real>& taps) {
  Real sum = 0;
  for (int k = 0; k < taps.count; ++k) sum += triangle(taps, k);
  return sum;
}

// Hue turned by a share of a full circle, -1 to 1, in whole steps of 8-bit hue.
PERA_FAST_HOST_DEVICE int32_t hue_steps(float turn) {
  return static_cast<int32_t>(multiply(static_cast<double>(turn), 255.0));
}

// --- float levels in 0..1 ---

PERA_FAST_HOST_DEVICE float clamp01(float x) {
  // Comparisons with NaN are false, so NaN becomes 0.
  x = x > 0.0f ? x : 0.0f;
  return x < 1.0f ? x : 1.0f;
}

// A source value as a level.
PERA_FAST_HOST_DEVICE float scale_value(float value, float low, float inverse_span) {
  return clamp01(multiply(value - low, inverse_span));
}

struct FloatLevels {
  using Stored = float;  // in memory
  using Pixel = float;   // in a register
  using Weight = float;
  using Sum = float;
  using Real = float;  // of weights, before they are rounded to Weight
  static constexpr float kRange = 1.0f;

  // Only rounding between the passes makes their order matter.
  static PERA_FAST_HOST_DEVICE bool vertical_first(int, int, int) { return false; }

  static PERA_FAST_HOST_DEVICE Weight weight(Real share) { return share; }
  static PERA_FAST_HOST_DEVICE Sum sum_start() { return 0.0f; }
  static PERA_FAST_HOST_DEVICE Stored sum_end(Sum sum) { return sum; }
  static PERA_FAST_HOST_DEVICE Stored from_unit(float unit) { return unit; }

  static PERA_FAST_HOST_DEVICE Pixel blend(Pixel towards, Pixel level, float factor) {
    // A factor of 1 leaves 8-bit levels as they are, so nothing is cut off.
    const float half_level = factor == 1.0f ? 0.0f : 0.5f / 255.0f;
    return clamp01(level * factor + (towards * (1.0f - factor) - half_level));
  }
  // ITU-R 601.
  static PERA_FAST_HOST_DEVICE Pixel luma(Pixel r, Pixel g, Pixel b) {
    return r * 0.299f + g * 0.587f + b * 0.114f;
  }
  // Sums of levels are taken in whole numbers: their order then changes nothing, whoever adds.
  static PERA_FAST_HOST_DEVICE int32_t countable(Pixel level) {
    return static_cast<int32_t>(level * 1048576.0f + 0.5f);
  }
  static PERA_FAST_HOST_DEVICE Pixel mean_level(int64_t sum, int64_t pixels) {
    return static_cast<float>(static_cast<double>(sum) / (static_cast<double>(pixels) * 1048576.0));
  }
  // Through HSV; back by Smith 1978: each channel is the value minus chroma times a clipped triangle wave of
  // the hue.
  static PERA_FAST_HOST_DEVICE void turn_hue(Pixel& r, Pixel& g, Pixel& b, int32_t steps) {
    const float rg = r > g ? r : g, rg_min = r < g ? r : g;
    const float value = rg > b ? rg : b;
    const float chroma = value - (rg_min < b ? rg_min : b);
    const float inverse = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
    const float hue = r == value ? (g - b) * inverse
                                 : (g == value ? 2.0f + (b - r) * inverse : 4.0f + (r - g) * inverse);
    // In -1..5 plus at most 6 either way, brought to 0..6.
    float sextant = hue + (static_cast<float>(steps) - 0.5f) * (6.0f / 255.0f);
    sextant = sextant < 0.0f ? sextant + 6.0f : sextant;
    sextant = sextant < 0.0f ? sextant + 6.0f : sextant;
    sextant = sextant >= 6.0f ? sextant - 6.0f : sextant;
    r = value - chroma * wave(sextant + 5.0f);
    g = value - chroma * wave(sextant + 3.0f);
    b = value - chroma * wave(sextant + 1.0f);
  }

 private:
  static PERA_FAST_HOST_DEVICE float wave(float phase) {
    phase = phase >= 6.0f ? phase - 6.0f : phase;
    const float other = 4.0f - phase;
    return clamp01(phase < other ? phase : other);
  }
};

// --- 8-bit levels, as Pillow computes them ---

struct ExactLevels {
  using Stored = uint8_t;
  using Pixel = int32_t;
  using Weight = int32_t;
  using Sum = int32_t;
  using Real = double;
  static constexpr float kRange = 255.0f;
  static constexpr int kBits = 22;  // of a weight: 8 bits of level and 2 spare in an int32

  // Whether Pillow resizes along the vertical axis first.
  static PERA_FAST_HOST_DEVICE bool vertical_first(int height, int width, int crop_px) {
    return height > crop_px && height - crop_px > 2 * (width - crop_px);
  }

  static PERA_FAST_HOST_DEVICE Weight weight(Real share) {
    return static_cast<int32_t>(0.5 + multiply(share, static_cast<double>(1 << kBits)));
  }
  static PERA_FAST_HOST_DEVICE Sum sum_start() { return 1 << (kBits - 1); }
  // Weights are positive and add up to 1 within their rounding, so no sum passes 255.
  static PERA_FAST_HOST_DEVICE Stored sum_end(Sum sum) { return static_cast<uint8_t>(sum >> kBits); }
  static PERA_FAST_HOST_DEVICE Stored from_unit(float unit) {
    return static_cast<uint8_t>(static_cast<int32_t>(multiply(unit, 255.0f) + 0.5f));
  }

  static PERA_FAST_HOST_DEVICE Pixel blend(Pixel towards, Pixel level, float factor) {
    float blended = static_cast<float>(towards) + multiply(factor, static_cast<float>(level - towards));
    blended = blended > 0.0f ? blended : 0.0f;
    return static_cast<int32_t>(blended < 255.0f ? blended : 255.0f);
  }
  static PERA_FAST_HOST_DEVICE Pixel luma(Pixel r, Pixel g, Pixel b) {
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
  }
  static PERA_FAST_HOST_DEVICE int32_t countable(Pixel level) { return level; }
  static PERA_FAST_HOST_DEVICE Pixel mean_level(int64_t sum, int64_t pixels) {
    return static_cast<int32_t>(static_cast<double>(sum) / static_cast<double>(pixels) + 0.5);
  }
  // Through 8-bit HSV, where a full circle is 256 steps when turning and 255 when converting.
  static PERA_FAST_HOST_DEVICE void turn_hue(Pixel& r, Pixel& g, Pixel& b, int32_t steps) {
    const int32_t rg = r > g ? r : g, rg_min = r < g ? r : g;
    const int32_t value = rg > b ? rg : b;
    const int32_t chroma = value - (rg_min < b ? rg_min : b);
    const float divisor = static_cast<float>(chroma + (chroma == 0));
    const float to_r = static_cast<float>(value - r) / divisor;
    const float to_g = static_cast<float>(value - g) / divisor;
    const float to_b = static_cast<float>(value - b) / divisor;
    const float from_red = to_b - to_g;
    const float from_green = static_cast<float>(2.0 + to_r - to_b);
    const float from_blue = static_cast<float>(4.0 + to_g - to_r);
    const float sextant = r == value ? from_red : (g == value ? from_green : from_blue);
    // Products where Pillow divides: the last bit they differ in is gone in the rounding that follows, for all
    // colours (tests/test_crop_patches.py).
    double circle = multiply(static_cast<double>(sextant), 1.0 / 6.0) + 1.0;
    circle -= static_cast<double>(static_cast<int32_t>(circle));
    int32_t hue = static_cast<int32_t>(multiply(static_cast<double>(static_cast<float>(circle)), 255.0));
    const float share = static_cast<float>(chroma) / static_cast<float>(value + (value == 0));
    const int32_t saturation = static_cast<int32_t>(multiply(static_cast<double>(share), 255.0));

    hue = ((hue & -static_cast<int32_t>(chroma != 0)) + steps) & 255;
    const double sixths = multiply(static_cast<double>(hue), 6.0 / 255.0);
    const int32_t sixth = static_cast<int32_t>(sixths);
    const float within = static_cast<float>(sixths - sixth);
    const float fs = static_cast<float>(multiply(static_cast<double>(saturation), 1.0 / 255.0));
    const double v = value;
    const int32_t p = static_cast<int32_t>(multiply(v, 1.0 - fs) + 0.5);
    const int32_t q = static_cast<int32_t>(multiply(v, 1.0 - multiply(fs, within)) + 0.5);
    const int32_t t = static_cast<int32_t>(
        multiply(v, 1.0 - multiply(static_cast<double>(fs), 1.0 - within)) + 0.5);
    // Sector 6 is hue 255 itself, the same as 0.
    const int32_t sector = sixth == 6 ? 0 : sixth;
    r = pick(sector == 0, value, pick(sector == 5, value, pick(sector == 1, q, pick(sector == 4, t, p))));
    g = pick(sector == 1, value, pick(sector == 2, value, pick(sector == 0, t, pick(sector == 3, q, p))));
    b = pick(sector == 3, value, pick(sector == 4, value, pick(sector == 2, t, pick(sector == 5, q, p))));
  }

 private:
  // condition ? a : b, in a form that no compiler turns into a branch.
  static PERA_FAST_HOST_DEVICE int32_t pick(bool condition, int32_t a, int32_t b) {
    return b ^ ((a ^ b) & -static_cast<int32_t>(condition));
  }
};

// --- output ---

PERA_FAST_HOST_DEVICE uint16_t float16_of(float x) {
  const uint32_t all = bits_of(x);
  const uint32_t sign = (all >> 16) & 0x8000u;
  const uint32_t bits = all & 0x7fffffffu;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the multiples of 2^-24 that a subnormal counts in the low bits.
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t size = bits < (113u << 23) ? subnormal : (bits < 0x477ff000u ? normal : 0x7c00u);
  return static_cast<uint16_t>(sign | size);
}

// (level - mean) / std as one product and one sum.
struct Affine {
  float scale, shift;
};

PERA_FAST_HOST_DEVICE Affine normalisation(float mean, float std, float range) {
  return {
      static_cast<float>(1.0 / (static_cast<double>(range) * std)),
      static_cast<float>(-static_cast<double>(mean) / std)};
}

}  // namespace pera_fast
