// The CPU kernel of crop_patches, one crop pair at a time. Compiled once per instruction set (for_each_isa.h).
//
// A crop's source rows pass in strips through
//   tile      [width, kStrip]   transposed, as levels: pixels of one column lie together,
//   narrowed  [crop_px, kStrip] after the horizontal pass, then transposed back into
//   ring      [ring_rows, crop_px], the rows that the vertical pass still needs,
//   plane     [crop_px, crop_px], one per band: the geometry of both views.
// So both passes are weighted sums of contiguous rows. Colour works on tiles of a plane in cache.
// Where the vertical pass comes first, strips are of columns and everything is made lying on its side.

// --- weighted sums of rows ---

// Rows of a ring of `size` rows, from `first` on.
template <class L>
struct Rows {
  const typename L::Stored* base;
  int stride, first, size;
  const typename L::Stored* operator[](int k) const {
    const int row = first + k;
    return base + static_cast<int64_t>(row < size ? row : row - size) * stride;
  }
};

template <class L, int count>
inline void weigh_rows(
    typename L::Stored* __restrict out, const Rows<L>& rows, const typename L::Weight* weights, int n) {
  const typename L::Stored* row[count];
  typename L::Weight weight[count];
  for (int k = 0; k < count; ++k) {
    row[k] = rows[k];
    weight[k] = weights[k];
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    typename L::Sum sum = L::sum_start();
    for (int k = 0; k < count; ++k) sum += static_cast<typename L::Sum>(row[k][i]) * weight[k];
    out[i] = L::sum_end(sum);
  }
}

// out[i] = sum over k of rows[k][i] * weights[k], added in the order of k. sums: room for n.
template <class L>
inline void weigh_rows(
    typename L::Stored* __restrict out, const Rows<L>& rows, const typename L::Weight* weights, int count,
    int n, typename L::Sum* __restrict sums) {
  switch (count) {
    case 1: return weigh_rows<L, 1>(out, rows, weights, n);
    case 2: return weigh_rows<L, 2>(out, rows, weights, n);
    case 3: return weigh_rows<L, 3>(out, rows, weights, n);
    case 4: return weigh_rows<L, 4>(out, rows, weights, n);
    case 5: return weigh_rows<L, 5>(out, rows, weights, n);
    case 6: return weigh_rows<L, 6>(out, rows, weights, n);
    case 7: return weigh_rows<L, 7>(out, rows, weights, n);
    case 8: return weigh_rows<L, 8>(out, rows, weights, n);
    default: break;
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) sums[i] = L::sum_start();
  for (int k = 0; k < count; ++k) {
    const typename L::Stored* row = rows[k];
    const typename L::Weight weight = weights[k];
#pragma omp simd
    for (int i = 0; i < n; ++i) sums[i] += static_cast<typename L::Sum>(row[i]) * weight;
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = L::sum_end(sums[i]);
}

// --- transposition ---

typedef uint8_t Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Words8 __attribute__((vector_size(16), aligned(1), may_alias));
typedef float Floats4 __attribute__((vector_size(16), aligned(1), may_alias));

// Lanes a0 b0 a1 b1 … of the lower (0) or upper (1) halves of two vectors.
#ifdef __clang__
#define PERA_FAST_SHUFFLE(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PERA_FAST_SHUFFLE(a, b, type, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif
inline Bytes16 interleave_low(Bytes16 a, Bytes16 b) {
  return PERA_FAST_SHUFFLE(a, b, Bytes16, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes16 interleave_high(Bytes16 a, Bytes16 b) {
  return PERA_FAST_SHUFFLE(a, b, Bytes16, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Words8 interleave_low(Words8 a, Words8 b) {
  return PERA_FAST_SHUFFLE(a, b, Words8, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Words8 interleave_high(Words8 a, Words8 b) {
  return PERA_FAST_SHUFFLE(a, b, Words8, 4, 12, 5, 13, 6, 14, 7, 15);
}
#ifdef __clang__
inline Floats4 interleave_low(Floats4 a, Floats4 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Floats4 interleave_high(Floats4 a, Floats4 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
typedef int32_t Lanes4 __attribute__((vector_size(16)));
inline Floats4 interleave_low(Floats4 a, Floats4 b) { return __builtin_shuffle(a, b, Lanes4{0, 4, 1, 5}); }
inline Floats4 interleave_high(Floats4 a, Floats4 b) { return __builtin_shuffle(a, b, Lanes4{2, 6, 3, 7}); }
#endif

template <class T> struct VectorOf;
template <> struct VectorOf<uint8_t> { typedef Bytes16 Type; };
template <> struct VectorOf<uint16_t> { typedef Words8 Type; };
template <> struct VectorOf<float> { typedef Floats4 Type; };

// [rows, columns] with row stride `in_stride` -> [columns, rows] with row stride `out_stride`.
template <class T>
inline void transpose(
    const T* in, int64_t in_stride, T* __restrict out, int64_t out_stride, int rows, int columns) {
  typedef typename VectorOf<T>::Type Vector;
  constexpr int lanes = 16 / sizeof(T);
  int row = 0;
  for (; row + lanes <= rows; row += lanes) {
    int column = 0;
    for (; column + lanes <= columns; column += lanes) {
      Vector block[lanes], next[lanes];
      for (int i = 0; i < lanes; ++i) {
        block[i] = *reinterpret_cast<const Vector*>(in + (row + i) * in_stride + column);
      }
      // Each round interleaves the lower with the upper half of the vectors; after log2(lanes) rounds lane
      // and vector have changed places.
      for (int width = 1; width < lanes; width *= 2) {
        for (int i = 0; i < lanes / 2; ++i) {
          next[2 * i] = interleave_low(block[i], block[i + lanes / 2]);
          next[2 * i + 1] = interleave_high(block[i], block[i + lanes / 2]);
        }
        for (int i = 0; i < lanes; ++i) block[i] = next[i];
      }
      for (int i = 0; i < lanes; ++i) {
        *reinterpret_cast<Vector*>(out + (column + i) * out_stride + row) = block[i];
      }
    }
    for (; column < columns; ++column) {
      for (int i = 0; i < lanes; ++i) out[column * out_stride + row + i] = in[(row + i) * in_stride + column];
    }
  }
  for (; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      out[column * out_stride + row] = in[row * in_stride + column];
    }
  }
}

// --- geometry ---

constexpr int kStrip = 32;  // source rows that pass the horizontal pass together

// The taps of every output pixel along one axis, made equally many by weights of zero.
template <class L>
struct TapTable {
  int count;
  int* first;                   // [out]
  typename L::Weight* weights;  // [out, count]
};

inline int most_taps(int in, int out) {
  const Axis axis = axis_of(in, out);
  const double most = 2 * axis.support + 2;
  return most < in ? static_cast<int>(most) : in;
}

template <class L>
inline void fill_taps(TapTable<L>& table, int in, int out, bool flipped) {
  const Axis axis = axis_of(in, out);
  int count = 1;
  for (int i = 0; i < out; ++i) {
    const int taps = taps_of<typename L::Real>(axis, i).count;
    count = taps > count ? taps : count;
  }
  table.count = count;
  for (int i = 0; i < out; ++i) {
    const int position = flipped ? out - 1 - i : i;
    const auto taps = taps_of<typename L::Real>(axis, i);
    const auto sum = triangle_sum(taps);
    const int first = taps.first + count > in ? in - count : taps.first;
    table.first[position] = first;
    typename L::Weight* weights = table.weights + static_cast<int64_t>(position) * count;
    for (int k = 0; k < count; ++k) weights[k] = 0;
    for (int k = 0; k < taps.count; ++k) {
      weights[taps.first - first + k] = L::weight(triangle(taps, k) / sum);
    }
  }
}

// What one crop needs of memory; made twice, first over nothing to learn its size.
template <class L>
struct Scratch {
  typename L::Stored *tile, *narrowed, *ring, *planes, *turned;
  void* source;
  TapTable<L> first_pass, second_pass;
  typename L::Sum* sums;
  typename L::Pixel* pixels;
  int ring_rows, pixels_per_band;
  int64_t bytes;

  // first_in, second_in: the box's size along the axes of the first and the second pass.
  Scratch(int first_in, int second_in, int crop_px, int patch_px, int band_group, uint8_t* base) {
    bytes = 0;
    const int first_most = most_taps(first_in, crop_px), second_most = most_taps(second_in, crop_px);
    ring_rows = second_most + kStrip < second_in ? second_most + kStrip : second_in;
    pixels_per_band = patch_px > 256 ? patch_px : 256;
    const int64_t plane_size = int64_t{crop_px} * crop_px;
    take(base, source, int64_t{first_in} * kStrip * 4);
    take(base, tile, int64_t{first_in} * kStrip);
    take(base, narrowed, int64_t{crop_px} * kStrip);
    take(base, ring, int64_t{ring_rows} * crop_px);
    take(base, planes, band_group * plane_size);
    take(base, turned, plane_size);
    take(base, first_pass.first, crop_px);
    take(base, first_pass.weights, int64_t{crop_px} * first_most);
    take(base, second_pass.first, crop_px);
    take(base, second_pass.weights, int64_t{crop_px} * second_most);
    take(base, sums, crop_px > kStrip ? crop_px : kStrip);
    take(base, pixels, int64_t{band_group} * pixels_per_band);
  }

 private:
  template <class T>
  void take(uint8_t* base, T*& pointer, int64_t n) {
    pointer = reinterpret_cast<T*>(base + bytes);
    bytes += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  void take(uint8_t* base, void*& pointer, int64_t n) {
    pointer = base + bytes;
    bytes += (n + 63) / 64 * 64;
  }
};

struct Band {
  const uint8_t* pixels;  // of the whole image's band
  int dtype;
  int64_t stride;  // image width
  int top, left, height, width;
  float low, high;
};

// The source's next `lines` rows (turned: columns) from `start` on, as they are: out[k * kStrip + i] is
// pixel k of line `start + i`.
template <class T>
inline void load_raw(const Band& band, T* out, bool turned, int start, int lines) {
  const T* in = reinterpret_cast<const T*>(band.pixels) + band.top * band.stride + band.left;
  if (!turned) return transpose<T>(in + start * band.stride, band.stride, out, kStrip, lines, band.width);
  for (int y = 0; y < band.height; ++y) {
    __builtin_memcpy(out + y * kStrip, in + y * band.stride + start, lines * sizeof(T));
  }
}

template <class L, class T>
inline void load_tile(const Band& band, Scratch<L>& s, bool turned, int start, int lines) {
  T* raw = static_cast<T*>(s.source);
  load_raw<T>(band, raw, turned, start, lines);
  const int n = (turned ? band.height : band.width) * kStrip;
  const float low = band.low, inverse_span = 1.0f / (band.high - band.low);
  typename L::Stored* __restrict tile = s.tile;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    tile[i] = L::from_unit(scale_value(static_cast<float>(raw[i]), low, inverse_span));
  }
}

template <class L>
inline void load_tile(const Band& band, Scratch<L>& s, bool turned, int start, int lines) {
  if constexpr (L::kRange == 255.0f) {
    if (band.dtype == kUint8 && band.low == 0.0f && band.high == 255.0f) {  // levels already
      return load_raw<uint8_t>(band, s.tile, turned, start, lines);
    }
  }
  if (band.dtype == kUint8) load_tile<L, uint8_t>(band, s, turned, start, lines);
  else if (band.dtype == kUint16) load_tile<L, uint16_t>(band, s, turned, start, lines);
  else load_tile<L, float>(band, s, turned, start, lines);
}

// The first pass over a tile.
template <class L>
inline void narrow(Scratch<L>& s, int crop_px) {
  const int count = s.first_pass.count;
  for (int position = 0; position < crop_px; ++position) {
    const typename L::Stored* lines = s.tile + int64_t{s.first_pass.first[position]} * kStrip;
    const typename L::Weight* weights = s.first_pass.weights + int64_t{position} * count;
    weigh_rows<L>(s.narrowed + position * kStrip, Rows<L>{lines, kStrip, 0, count}, weights, count, kStrip, s.sums);
  }
}

// One band's box, resized and flipped. The tap tables are filled, that of the first pass flipped already.
template <class L>
inline void resample(
    const Band& band, Scratch<L>& s, int crop_px, bool turned, bool flip_second, typename L::Stored* plane) {
  const int length = turned ? band.width : band.height;
  const int strip = length < kStrip ? length : kStrip;
  const int count = s.second_pass.count;
  int done = 0;  // lines that have been through the ring
  for (int position = 0; position < crop_px; ++position) {
    const int first = s.second_pass.first[position];
    while (done < first + count) {
      // The last strip goes back over lines that are there already, to be a whole one.
      const int start = done + strip > length ? length - strip : done;
      load_tile<L>(band, s, turned, start, strip);
      narrow<L>(s, crop_px);
      for (int i = 0; i < strip;) {
        const int place = (start + i) % s.ring_rows;
        const int together = strip - i < s.ring_rows - place ? strip - i : s.ring_rows - place;
        transpose<typename L::Stored>(
            s.narrowed + i, kStrip, s.ring + int64_t{place} * crop_px, crop_px, crop_px, together);
        i += together;
      }
      done = start + strip;
    }
    const int line = flip_second ? crop_px - 1 - position : position;
    weigh_rows<L>(
        (turned ? s.turned : plane) + int64_t{line} * crop_px,
        Rows<L>{s.ring, crop_px, first % s.ring_rows, s.ring_rows},
        s.second_pass.weights + int64_t{position} * count, count, crop_px, s.sums);
  }
  if (turned) transpose<typename L::Stored>(s.turned, crop_px, plane, crop_px, crop_px, crop_px);
}

// --- colour ---

// n pixels of one or three bands; band b starts at pixels + b * stride.
template <class L>
struct Tile {
  typename L::Pixel* pixels;
  int64_t stride;
  int n;
  bool is_rgb;
};

template <class L>
inline void blend_bands(const Tile<L>& tile, typename L::Pixel towards, float factor) {
  for (int band = 0; band < (tile.is_rgb ? 3 : 1); ++band) {
    typename L::Pixel* __restrict level = tile.pixels + band * tile.stride;
#pragma omp simd
    for (int i = 0; i < tile.n; ++i) level[i] = L::blend(towards, level[i], factor);
  }
}

template <class L>
inline void apply_operation(const Tile<L>& tile, int operation, float factor, typename L::Pixel mean) {
  typename L::Pixel* __restrict r = tile.pixels;
  typename L::Pixel* __restrict g = tile.pixels + tile.stride;
  typename L::Pixel* __restrict b = tile.pixels + 2 * tile.stride;
  if (operation == kBrightness) {
    blend_bands<L>(tile, 0, factor);
  } else if (operation == kContrast) {
    blend_bands<L>(tile, mean, factor);
  } else if (operation == kSaturation && tile.is_rgb) {
#pragma omp simd
    for (int i = 0; i < tile.n; ++i) {
      const typename L::Pixel grey = L::luma(r[i], g[i], b[i]);
      r[i] = L::blend(grey, r[i], factor);
      g[i] = L::blend(grey, g[i], factor);
      b[i] = L::blend(grey, b[i], factor);
    }
  } else if (operation == kHue && tile.is_rgb) {
    const int32_t steps = hue_steps(factor);
#pragma omp simd
    for (int i = 0; i < tile.n; ++i) {
      typename L::Pixel red = r[i], green = g[i], blue = b[i];
      L::turn_hue(red, green, blue, steps);
      r[i] = red;
      g[i] = green;
      b[i] = blue;
    }
  }
}

template <class L>
inline void turn_grey(const Tile<L>& tile) {
  typename L::Pixel* __restrict r = tile.pixels;
  typename L::Pixel* __restrict g = tile.pixels + tile.stride;
  typename L::Pixel* __restrict b = tile.pixels + 2 * tile.stride;
#pragma omp simd
  for (int i = 0; i < tile.n; ++i) {
    const typename L::Pixel grey = L::luma(r[i], g[i], b[i]);
    r[i] = grey;
    g[i] = grey;
    b[i] = grey;
  }
}

template <class L>
inline int64_t sum_luma(const Tile<L>& tile) {
  const typename L::Pixel *r = tile.pixels, *g = tile.pixels + tile.stride, *b = tile.pixels + 2 * tile.stride;
  int32_t sum = 0;  // at most 2^10 pixels of 2^20 each
  if (tile.is_rgb) {
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < tile.n; ++i) sum += L::countable(L::luma(r[i], g[i], b[i]));
  } else {
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < tile.n; ++i) sum += L::countable(r[i]);
  }
  return sum;
}

// One view's colours.
template <class L>
struct Look {
  const int64_t* order;
  const float* factor;
  bool grey;
  typename L::Pixel mean;  // that contrast blends towards

  // The operations up to contrast, or all of them.
  void apply(const Tile<L>& tile, bool until_contrast) const {
    if (grey) return turn_grey<L>(tile);
    for (int i = 0; i < 4 && order[i] >= 0; ++i) {
      if (until_contrast && order[i] == kContrast) return;
      apply_operation<L>(tile, static_cast<int>(order[i]), factor[order[i]], mean);
    }
  }
};

template <class L>
inline void find_mean(
    Look<L>& look, Scratch<L>& s, int crop_px, bool is_rgb) {
  bool has_contrast = false;
  for (int i = 0; i < 4 && look.order[i] >= 0; ++i) has_contrast |= look.order[i] == kContrast;
  if (look.grey || !has_contrast) return;
  const int64_t plane_size = static_cast<int64_t>(crop_px) * crop_px;
  int64_t sum = 0;
  for (int64_t start = 0; start < plane_size; start += 256) {
    const int n = plane_size - start < 256 ? static_cast<int>(plane_size - start) : 256;
    const Tile<L> tile{s.pixels, s.pixels_per_band, n, is_rgb};
    for (int band = 0; band < (is_rgb ? 3 : 1); ++band) {
      const typename L::Stored* in = s.planes + band * plane_size + start;
      typename L::Pixel* __restrict out = s.pixels + band * s.pixels_per_band;
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = static_cast<typename L::Pixel>(in[i]);
    }
    look.apply(tile, true);
    sum += sum_luma<L>(tile);
  }
  look.mean = L::mean_level(sum, plane_size);
}

// --- output ---

struct AsFloat32 { typedef float Type; static inline float of(float x) { return x; } };
struct AsBfloat16 { typedef uint16_t Type; static inline uint16_t of(float x) { return bfloat16_of(x); } };
struct AsFloat16 { typedef uint16_t Type; static inline uint16_t of(float x) { return float16_of(x); } };

// Normalised levels to out[0], out[stride], …
template <class As, class L>
inline void store_as(
    void* rows, int64_t start, int64_t stride, const typename L::Pixel* level, int n, Affine to) {
  typename As::Type* __restrict out = static_cast<typename As::Type*>(rows) + start;
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = As::of(static_cast<float>(level[i]) * to.scale + to.shift);
  } else {
    for (int i = 0; i < n; ++i) out[i * stride] = As::of(static_cast<float>(level[i]) * to.scale + to.shift);
  }
}

template <class L>
inline void store(
    const PatchSet& set, int64_t start, int64_t stride, const typename L::Pixel* level, int n, Affine to) {
  if (set.type == kRowFloat32) store_as<AsFloat32, L>(set.rows, start, stride, level, n, to);
  else if (set.type == kRowBfloat16) store_as<AsBfloat16, L>(set.rows, start, stride, level, n, to);
  else store_as<AsFloat16, L>(set.rows, start, stride, level, n, to);
}

// The patches of one set of one crop, of `group` bands from `band` on, which the planes hold.
template <class L>
inline void gather(
    const CropPatches& a, const PatchSet& set, int64_t crop, int band, int group, const Look<L>& look,
    Scratch<L>& s) {
  const int patch_px = static_cast<int>(a.patch_px), crop_px = static_cast<int>(a.crop_px);
  const int grid = crop_px / patch_px;
  const int64_t patch_size = a.patch_px * a.patch_px, row_size = a.bands * patch_size;
  const int rows_at_once = s.pixels_per_band / patch_px;
  for (int64_t j = 0; j < set.count; ++j) {
    const int patch = static_cast<int>(set.patches[crop * set.count + j]);
    const int top = patch / grid * patch_px, left = patch % grid * patch_px;
    const int64_t row = (crop * (set.leading + set.count) + set.leading + j) * row_size;
    for (int p = 0; p < patch_px; p += rows_at_once) {
      const int rows = patch_px - p < rows_at_once ? patch_px - p : rows_at_once;
      const Tile<L> tile{s.pixels, s.pixels_per_band, rows * patch_px, group == 3};
      for (int b = 0; b < group; ++b) {
        for (int i = 0; i < rows; ++i) {
          const typename L::Stored* in =
              s.planes + (static_cast<int64_t>(b) * crop_px + top + p + i) * crop_px + left;
          typename L::Pixel* __restrict out = s.pixels + b * s.pixels_per_band + i * patch_px;
#pragma omp simd
          for (int q = 0; q < patch_px; ++q) out[q] = static_cast<typename L::Pixel>(in[q]);
        }
      }
      look.apply(tile, false);
      for (int b = 0; b < group; ++b) {
        const Affine to = normalisation(a.mean[band + b], a.std[band + b], L::kRange);
        const int64_t start = set.bands_last ? row + static_cast<int64_t>(p) * patch_px * a.bands + band + b
                                             : row + (band + b) * patch_size + p * patch_px;
        store<L>(set, start, set.bands_last ? a.bands : 1, s.pixels + b * s.pixels_per_band, tile.n, to);
      }
    }
  }
}

inline void zero_leading_rows(const CropPatches& a, const PatchSet& set, int64_t crop) {
  if (set.leading == 0) return;  // the set may be empty, then, and its address null
  const int64_t row_bytes =
      a.bands * a.patch_px * a.patch_px * (set.type == kRowFloat32 ? int64_t{4} : int64_t{2});
  __builtin_memset(
      static_cast<uint8_t*>(set.rows) + crop * (set.leading + set.count) * row_bytes, 0,
      static_cast<size_t>(set.leading * row_bytes));
}

template <class L>
inline int64_t process(const CropPatches& a, int64_t crop, uint8_t* base) {
  const int64_t* box = a.box + 4 * crop;
  const int height = static_cast<int>(box[2]), width = static_cast<int>(box[3]);
  const int crop_px = static_cast<int>(a.crop_px);
  // Bands that colours mix are made together, others one after the other.
  const int group = a.bands == 3 ? 3 : 1;
  const bool turned = L::vertical_first(height, width, crop_px);
  Scratch<L> s(
      turned ? height : width, turned ? width : height, crop_px, static_cast<int>(a.patch_px), group, base);
  if (base == nullptr) return s.bytes;

  for (int set = 0; set < 3; ++set) zero_leading_rows(a, a.sets[set], crop);
  const int64_t image = a.image[crop];
  const int64_t *shape = a.shapes + 3 * image, dtype = a.dtypes[image];
  const bool flip_across = a.flip[2 * crop], flip_down = a.flip[2 * crop + 1];
  fill_taps<L>(s.first_pass, turned ? height : width, crop_px, turned ? flip_down : flip_across);
  fill_taps<L>(s.second_pass, turned ? width : height, crop_px, false);
  for (int band = 0; band < a.bands; band += group) {
    for (int b = 0; b < group; ++b) {
      const int64_t size = dtype == kUint8 ? 1 : (dtype == kUint16 ? 2 : 4);
      const Band source{
          a.buffer + a.offsets[image] + (band + b) * shape[1] * shape[2] * size,
          static_cast<int>(dtype), shape[2], static_cast<int>(box[0]), static_cast<int>(box[1]), height, width,
          a.low[image * a.bands + band + b], a.high[image * a.bands + band + b]};
      resample<L>(
          source, s, crop_px, turned, turned ? flip_across : flip_down,
          s.planes + static_cast<int64_t>(b) * crop_px * crop_px);
    }
    for (int view = 0; view < 2; ++view) {
      Look<L> look{
          a.order + (2 * crop + view) * 4, a.factor + (2 * crop + view) * 4,
          a.grey[2 * crop + view] && group == 3, 0};
      find_mean<L>(look, s, crop_px, group == 3);
      for (int set = 0; set < 3; ++set) {
        if (view_of_set(set) == view) gather<L>(a, a.sets[set], crop, band, group, look, s);
      }
    }
  }
  return s.bytes;
}

#undef PERA_FAST_SHUFFLE

// One crop pair; `scratch` of at least as many bytes as the call with nullptr says.
int64_t crop_patches(const CropPatches& a, int64_t crop, uint8_t* scratch) {
  return a.exact ? process<ExactLevels>(a, crop, scratch) : process<FloatLevels>(a, crop, scratch);
}
