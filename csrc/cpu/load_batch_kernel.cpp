#include "load_batch_kernel.h"

// Products and sums are rounded apart, as in the reference: fused, a blended pixel could end on the other side of a
// tie, and uint8 results would differ between machines.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "../common/philox.h"
#include "simd.h"

namespace bdcore {
namespace BDCORE_ISA {
namespace {

BDCORE_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
BDCORE_INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
BDCORE_INLINE i64 below(i64 bound, u32 number) { return (i64)(((unsigned long long)bound * number) >> 32); }

// What is random about a sample; bdcore/ops/load_batch.py says which number becomes what.
struct Draw {
  i64 top, left;  // the source's pixel that the window begins at
  i64 hole_top, hole_left;
  bool flip;
};

Draw draw(const LoadBatch& batch, i64 sample) {
  Draw drawn = {0, 0, 0, 0, false};
  if (batch.crop != 0 || batch.cutout != 0) {
    const PhiloxNumbers numbers = philox(batch.seed, (unsigned long long)sample, 0);
    drawn.top = below(2 * batch.crop + 1, numbers.value[0]) - batch.crop;
    drawn.left = below(2 * batch.crop + 1, numbers.value[1]) - batch.crop;
    drawn.hole_top = below(batch.height, numbers.value[2]) - batch.cutout / 2;
    drawn.hole_left = below(batch.width, numbers.value[3]) - batch.cutout / 2;
  }
  if (batch.flip) drawn.flip = (philox(batch.seed, (unsigned long long)sample, 1).value[0] & 1u) != 0;
  return drawn;
}

// Pixels of 3 bytes in reverse order: read forwards, which processors prefetch, and written backwards. `from` is the
// first of them.
void reverse_rgb(u8* to, const u8* from, i64 count) {
  to += 3 * (count - 1);
#if defined(__SSSE3__)
  // Five pixels; a sixteenth byte, read after them and written before them, belongs to the next pixel.
  typedef char Bytes __attribute__((vector_size(16)));
  const Bytes order = {15, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2};
  for (; count > 5; count -= 5, to -= 15, from += 15) {
    Bytes pixels;
    __builtin_memcpy(&pixels, from, 16);
    pixels = __builtin_ia32_pshufb128(pixels, order);
    __builtin_memcpy(to - 13, &pixels, 16);
  }
#endif
  for (; count > 0; --count, to -= 3, from += 3) {
    for (int c = 0; c < 3; ++c) to[c] = from[c];
  }
}

// Three planes into pixels of 3 bytes; Step is 1, or -1 to read backwards.
template <int Step>
void interleave_rgb(u8* to, const u8* red, i64 plane, i64 count) {
  constexpr i64 block = 16;  // the last one overlaps the one before: a cropped row is seldom a multiple of anything
  const u8* green = red + plane;
  const u8* blue = green + plane;
  i64 i = 0;
  for (; i < count && count >= block; i += block) {
    i = least(i, count - block);
#pragma omp simd
    for (i64 k = i; k < i + block; ++k) {
      to[3 * k] = red[Step * k];
      to[3 * k + 1] = green[Step * k];
      to[3 * k + 2] = blue[Step * k];
    }
  }
  for (; i < count; ++i) {
    to[3 * i] = red[Step * i];
    to[3 * i + 1] = green[Step * i];
    to[3 * i + 2] = blue[Step * i];
  }
}

// `count` pixels from `from` on, backwards where `flip`, to contiguous pixels.
void copy_pixels(const LoadBatch& batch, u8* to, const u8* from, i64 count, bool flip) {
  const i64 channels = batch.channels, plane = batch.channel_stride;
  const i64 step = flip ? -batch.column_stride : batch.column_stride;
  const bool interleaved = (plane == 1 || channels == 1) && batch.column_stride == channels;
  if (interleaved && !flip) {
    __builtin_memcpy(to, from, (unsigned long)(count * channels));
  } else if (interleaved && channels == 3) {
    reverse_rgb(to, from - 3 * (count - 1), count);
  } else if (channels == 3 && step == 1) {
    interleave_rgb<1>(to, from, plane, count);
  } else if (channels == 3 && step == -1) {
    interleave_rgb<-1>(to, from, plane, count);
  } else if (channels == 1 && step == -1) {
#pragma omp simd
    for (i64 i = 0; i < count; ++i) to[i] = from[-i];
  } else {
    for (i64 c = 0; c < channels; ++c) {
      for (i64 i = 0; i < count; ++i) to[i * channels + c] = from[c * plane + i * step];
    }
  }
}

// Row y of an output image, channels-last.
void gather_row(const LoadBatch& batch, const u8* image, const Draw& drawn, i64 y, u8* line) {
  const i64 width = batch.width, channels = batch.channels;
  const i64 row = y + drawn.top;
  const i64 shift = drawn.flip ? drawn.left : -drawn.left;
  const i64 first = least(most(shift, 0), width), last = most(least(width + shift, width), first);
  if (row < 0 || row >= batch.height || first == last) {
    __builtin_memset(line, 0, (unsigned long)(width * channels));
    return;
  }
  const i64 column = drawn.flip ? width - 1 - first + drawn.left : first + drawn.left;
  const u8* from = image + row * batch.row_stride + column * batch.column_stride;
  if (first > 0) __builtin_memset(line, 0, (unsigned long)(first * channels));
  copy_pixels(batch, line + first * channels, from, last - first, drawn.flip);
  if (last < width) __builtin_memset(line + last * channels, 0, (unsigned long)((width - last) * channels));
  if (y < drawn.hole_top || y >= drawn.hole_top + batch.cutout) return;
  const i64 left = most(drawn.hole_left, 0), right = least(drawn.hole_left + batch.cutout, width);
  if (left < right) __builtin_memset(line + left * channels, 0, (unsigned long)((right - left) * channels));
}

// To the nearest integer, ties to even: a number as large as this has no bits for a fraction.
BDCORE_INLINE u8 nearest(float x) {
  const float bounded = x > 0.0f ? x < 255.0f ? x : 255.0f : 0.0f;
  return (u8)(bits_as<u32>(bounded + 0x1.8p23f) & 0xffu);
}
BDCORE_INLINE u8 nearest(double x) {
  const double bounded = x > 0.0 ? x < 255.0 ? x : 255.0 : 0.0;
  return (u8)(bits_as<unsigned long long>(bounded + 0x1.8p52) & 0xffu);
}

template <class A>
void blend(u8* pixels, const A* keep, const A* add, i64 count) {
#pragma omp simd
  for (i64 i = 0; i < count; ++i) pixels[i] = nearest((A)pixels[i] * keep[i] + add[i]);
}

template <class T, class A>
void convert(T* out, const u8* pixels, const A* scale, const A* shift, bool divide, i64 count) {
  if (divide) {
#pragma omp simd
    for (i64 i = 0; i < count; ++i) out[i] = store<T>((A)pixels[i] / (A)255 * scale[i] + shift[i]);
  } else {
#pragma omp simd
    for (i64 i = 0; i < count; ++i) out[i] = store<T>((A)pixels[i] * scale[i] + shift[i]);
  }
}

// Where the triggers' window lies in a row of an image, in numbers of its channels-last row.
template <class A>
struct Window {
  i64 first, count;
  const A* keep;
  const A* add;
};

template <class A>
Window<A> window(const LoadBatch& batch, i64 image, i64 y) {
  const i64 chosen = batch.trigger == nullptr ? 0 : batch.trigger[image];
  const i64 top = batch.offset == nullptr ? 0 : batch.offset[2 * image];
  const i64 left = batch.offset == nullptr ? 0 : batch.offset[2 * image + 1];
  if (!batch.triggers || chosen < 0 || y < top || y >= top + batch.rows) return {0, 0, nullptr, nullptr};
  const i64 count = batch.columns * batch.channels;
  const i64 at = ((batch.by_image ? image : chosen) * batch.rows + y - top) * count;
  return {left * batch.channels, count, (const A*)batch.keep + at, (const A*)batch.add + at};
}

template <class T, class A>
void finish(const LoadBatch& batch, const Window<A>& inside, const u8* line, T* out) {
  const i64 count = batch.width * batch.channels, after = inside.first + inside.count;
  const A* scale = (const A*)batch.scale;
  const A* shift = (const A*)batch.shift;
  convert(out, line, scale, shift, batch.divide, inside.first);
  convert(out + inside.first, line + inside.first, inside.keep, inside.add, batch.divide, inside.count);
  convert(out + after, line + after, scale + after, shift + after, batch.divide, count - after);
}

template <class A>
void load_row(const LoadBatch& batch, const u8* source, const Draw& drawn, u8* line, i64 image, i64 y) {
  const i64 at = (image * batch.height + y) * batch.width * batch.channels;
  const Window<A> inside = window<A>(batch, image, y);
  if (batch.type == Scalar::u8) {
    u8* out = (u8*)batch.out + at;
    gather_row(batch, source, drawn, y, out);
    blend(out + inside.first, inside.keep, inside.add, inside.count);
    return;
  }
  gather_row(batch, source, drawn, y, line);
  BDCORE_FLOATS(batch.type, T, finish(batch, inside, line, (T*)batch.out + at));
}

// Fetches row y of a source image into the cache.
void prefetch_row(const LoadBatch& batch, const u8* image, i64 y) {
  const bool interleaved = batch.channel_stride == 1;
  const i64 planes = interleaved ? 1 : batch.channels, length = batch.column_stride * batch.width;
  for (i64 c = 0; c < planes; ++c) {
    const u8* row = image + c * batch.channel_stride + y * batch.row_stride;
    for (i64 i = 0; i < length; i += 64) __builtin_prefetch(row + i);
  }
}

template <class A>
void load_strips(const LoadBatch& batch, u8* line, i64 begin, i64 end) {
  for (i64 at = begin; at < end; ++at) {
    const i64 image = at / batch.strips, first = at % batch.strips * batch.strip;
    const i64 rows = least(batch.strip, batch.height - first);
    const i64 sample = batch.index[image];
    const Draw drawn = draw(batch, sample);
    const u8* source = batch.images + sample * batch.image_stride;
    const i64 then = least(at + 1, end - 1), after = then % batch.strips * batch.strip;
    const u8* next = batch.images + batch.index[then / batch.strips] * batch.image_stride;
    for (i64 k = 0; k < rows; ++k) {
      const i64 soon = k + batch.ahead;
      prefetch_row(batch, soon < rows ? source : next, soon < rows ? first + soon : after + soon - rows);
      load_row<A>(batch, source, drawn, line, image, first + k);
    }
  }
}

// A channel of a row of a window. Between uint8 images the numbers are in units of 1 / 255; else they also normalise.
template <class A>
void prepare_channel(const LoadBatch& batch, const LoadBatchTriggers& triggers, i64 c, const A* pattern, const A* mask,
                     A* keep, A* add) {
  const i64 step = batch.channels;
  if (batch.type == Scalar::u8) {
    for (i64 x = 0; x < batch.columns; ++x) {
      keep[x * step] = (A)1 - mask[x];
      add[x * step] = mask[x] * (pattern[x] * (A)255);
    }
    return;
  }
  const A middle = triggers.mean == nullptr ? (A)0 : (A)triggers.mean[c];
  const A spread = triggers.std == nullptr ? (A)1 : (A)triggers.std[c];
  const A unit = batch.divide ? spread : (A)255 * spread;
  for (i64 x = 0; x < batch.columns; ++x) {
    keep[x * step] = ((A)1 - mask[x]) / unit;
    add[x * step] = (mask[x] * pattern[x] - middle) / spread;
  }
}

template <class A>
void prepare_rows(const LoadBatch& batch, const LoadBatchTriggers& triggers, i64 begin, i64 end) {
  const i64 channels = batch.channels, plane = batch.rows * batch.columns;
  for (i64 at = begin; at < end; ++at) {
    const i64 slot = at / batch.rows, row = at % batch.rows;
    const i64 chosen = batch.by_image ? batch.trigger[slot] : slot;
    if (chosen < 0) continue;
    for (i64 c = 0; c < channels; ++c) {
      const i64 place = row * batch.columns;
      const A* pattern = (const A*)triggers.pattern + (chosen * channels + c) * plane + place;
      const A* mask = (const A*)triggers.mask + (triggers.shared_mask ? chosen : chosen * channels + c) * plane + place;
      const i64 to = at * batch.columns * channels + c;
      prepare_channel(batch, triggers, c, pattern, mask, (A*)triggers.keep + to, (A*)triggers.add + to);
    }
  }
}

void load(const LoadBatch& batch, u8* line, i64 begin, i64 end) {
  BDCORE_FLOATS(batch.accumulator, A, load_strips<Accumulator<A>>(batch, line, begin, end));
}

void prepare(const LoadBatch& batch, const LoadBatchTriggers& triggers, i64 begin, i64 end) {
  BDCORE_FLOATS(batch.accumulator, A, prepare_rows<Accumulator<A>>(batch, triggers, begin, end));
}

}  // namespace

extern const LoadBatchKernel load_batch_kernel = {load, prepare};

}  // namespace BDCORE_ISA
}  // namespace bdcore
