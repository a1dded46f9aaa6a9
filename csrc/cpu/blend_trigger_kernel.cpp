#include "blend_trigger_kernel.h"

// Products and sums are rounded apart, as in the reference, so that a poisoned uint8 image has the same bits whichever
// computed it.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "simd.h"

namespace bdcore {
namespace BDCORE_ISA {

// A uint8 that stands for x / 255.
struct fraction8 {
  u8 value;
};
// 1 / 255 in two parts: x times the first is exact (0x10101 * 255 has 24 bits), and so the sum is x / 255 rounded once.
BDCORE_INLINE float load(fraction8 x) { return (float)x.value * 0x1.0101p-8f + (float)x.value * 0x1.010102p-32f; }

// In the format of the second argument.
BDCORE_INLINE double read(fraction8 x, double) { return (double)x.value / 255.0; }
template <class X, class A>
BDCORE_INLINE A read(X x, A) {
  return (A)load(x);
}

constexpr i64 kBuffer = 512;  // elements that are worked on at a time; what belongs to them stays in the first cache

// The nearest integer, ties to even, bounded to [0, 255]. Adding 1.5 * 2^23 (or 2^52) leaves it in the lowest bits, and
// the order of such numbers is that of their bits.
BDCORE_INLINE int to_level(float value) {
  constexpr int zero = 0x4b400000, most = zero + 255;
  const int shifted = bits_as<int>(value + 0x1.8p23f);
  const int bounded = shifted > zero ? shifted : zero;
  return bounded < most ? bounded : most;
}
BDCORE_INLINE int to_level(double value) {
  constexpr i64 zero = 0x4338000000000000, most = zero + 255;
  const i64 shifted = bits_as<i64>(value + 0x1.8p52);
  const i64 bounded = shifted > zero ? shifted : zero;
  return (int)(bounded < most ? bounded : most);
}

// In a loop of its own: in one with what makes the levels, gcc would bound bytes, by masks.
static void narrow(const int* __restrict levels, u8* __restrict y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) y[i] = (u8)levels[i];
}

template <class X, class A>
static void scale_and_shift(const X* __restrict x, const A* __restrict scale, const A* __restrict shift,
                            A* __restrict y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) y[i] = scale[i] * read(x[i], A{}) + shift[i];
}

template <class A>
static void blend_bytes(const u8* __restrict x, const A* __restrict scale, const A* __restrict shift,
                        u8* __restrict y, i64 n) {
  int levels[kBuffer];
#pragma omp simd
  for (i64 i = 0; i < n; ++i) levels[i] = to_level(scale[i] * (A)x[i] + shift[i]);
  narrow(levels, y, n);
}

template <class A>
static void to_bytes(const A* __restrict x, u8* __restrict y, i64 n) {
  int levels[kBuffer];
#pragma omp simd
  for (i64 i = 0; i < n; ++i) levels[i] = to_level(x[i]);
  narrow(levels, y, n);
}

template <class A, class Y>
static void to_floats(const A* __restrict x, Y* __restrict y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) y[i] = store<Y>(x[i]);
}

BDCORE_INLINE i64 size_of(Scalar type) {
  return type == Scalar::u8 ? 1 : type == Scalar::f32 ? 4 : type == Scalar::f64 ? 8 : 2;
}
BDCORE_INLINE Scalar scalar_of(float) { return Scalar::f32; }
BDCORE_INLINE Scalar scalar_of(double) { return Scalar::f64; }

template <class A>
static void convert(const A* x, void* y, Scalar to, i64 n) {
  if (to == Scalar::u8) {
    to_bytes(x, (u8*)y, n);
    return;
  }
  BDCORE_FLOATS(to, Y, to_floats<A>(x, (Y*)y, n))
}

// At most kBuffer elements at `begin`: y = scale x + shift, in the format of the result.
template <class X, class A>
static void transform(const BlendJob& job, i64 begin, const A* scale, const A* shift, i64 n) {
  const X* x = (const X*)job.images + begin;
  char* y = (char*)job.out + begin * size_of(job.to);
  char line[kBuffer * 8];  // what is streamed out; of the widest format
  void* to = job.streamed ? line : y;
  if (job.from == Scalar::u8 && job.to == Scalar::u8) {
    blend_bytes((const u8*)x, scale, shift, (u8*)to, n);
  } else if (job.to == scalar_of(A{})) {
    scale_and_shift(x, scale, shift, (A*)to, n);
  } else {
    A buffer[kBuffer];
    scale_and_shift(x, scale, shift, buffer, n);
    convert(buffer, to, job.to, n);
  }
  if (job.streamed) stream_out(y, (const char*)line, n * size_of(job.to));
}

// n elements of a plane that the trigger leaves as they are; the first belongs to lane 0.
template <class X, class A>
static void pass(const BlendJob& job, i64 plane, i64 begin, i64 n) {
  if (job.period == 0) {
    const i64 size = size_of(job.to);
    __builtin_memcpy((char*)job.out + begin * size, (const char*)job.images + begin * size, n * size);
    return;
  }
  const A* scale = (const A*)job.outside_scale + plane * job.period;
  const A* shift = (const A*)job.outside_shift + plane * job.period;
  for (i64 done = 0; done < n; done += job.period) {
    const i64 left = n - done < job.period ? n - done : job.period;
    for (i64 i = 0; i < left; i += kBuffer) {
      transform<X>(job, begin + done + i, scale + i, shift + i, left - i < kBuffer ? left - i : kBuffer);
    }
  }
}

// A plane of `count` images with the same trigger, which covers it; `first` is that of the first one.
template <class X, class A>
static void blend_covered(const BlendJob& job, i64 first, i64 count, const A* scale, const A* shift) {
  const i64 size = job.window.plane, next = job.window.planes * size;
  for (i64 done = 0; done < size; done += kBuffer) {
    const i64 n = size - done < kBuffer ? size - done : kBuffer;
    for (i64 k = 0; k < count; ++k) {
      const i64 place = first + k * next + done;
      const char* ahead = (const char*)((const X*)job.images + place + kBuffer);  // its next turn
      for (i64 i = 0; i < n * (i64)sizeof(X); i += 64) __builtin_prefetch(ahead + i);
      transform<X>(job, place, scale + done, shift + done, n);
    }
  }
}

template <class X, class A>
static void blend_around(const BlendJob& job, i64 image, i64 plane, i64 start, const A* scale, const A* shift) {
  const Window& window = job.window;
  const i64 top = window.offset == nullptr ? 0 : window.offset[2 * image];
  const i64 left = window.offset == nullptr ? 0 : window.offset[2 * image + 1] * window.lanes;
  i64 done = 0;
  for (i64 line = 0; line < window.rows; ++line) {
    const i64 place = (top + line) * window.row + left;
    if (place > done) pass<X, A>(job, plane, start + done, place - done);
    for (i64 i = 0; i < window.columns; i += kBuffer) {
      const i64 n = window.columns - i < kBuffer ? window.columns - i : kBuffer, at = line * window.columns + i;
      transform<X>(job, start + place + i, scale + at, shift + at, n);
    }
    done = place + window.columns;
  }
  if (done < window.plane) pass<X, A>(job, plane, start + done, window.plane - done);
}

template <class X, class A>
static void blend_items(const BlendJob& job, i64 begin, i64 end) {
  const Window& window = job.window;
  const i64 area = window.rows * window.columns;
  for (i64 item = begin; item < end; ++item) {
    const i64 plane = item % window.planes, first = item / window.planes * kTogether;
    const i64 last = first + kTogether < window.batch ? first + kTogether : window.batch;
    for (i64 image = first, next; image < last; image = next) {
      const i64 trigger = job.index == nullptr ? 0 : job.index[image];
      next = image + 1;
      while (next < last && (job.index == nullptr || job.index[next] == trigger)) ++next;
      const i64 start = (image * window.planes + plane) * window.plane;
      const A* scale = (const A*)job.scale + (trigger * window.planes + plane) * area;
      const A* shift = (const A*)job.shift + (trigger * window.planes + plane) * area;
      if (trigger >= 0 && area == window.plane) {
        blend_covered<X>(job, start, next - image, scale, shift);
        continue;
      }
      for (i64 k = 0; image + k < next; ++k) {
        const i64 place = start + k * window.planes * window.plane;
        if (trigger < 0) {
          pass<X, A>(job, plane, place, window.plane);
        } else {
          blend_around<X>(job, image + k, plane, place, scale, shift);
        }
      }
    }
  }
  if (job.streamed) stream_fence();
}

template <class A>
static void blend_from(const BlendJob& job, i64 begin, i64 end) {
  if (job.from == Scalar::u8) {
    job.fraction ? blend_items<fraction8, A>(job, begin, end) : blend_items<u8, A>(job, begin, end);
    return;
  }
  BDCORE_FLOATS(job.from, X, blend_items<X, A>(job, begin, end))
}

static void blend(const BlendJob& job, i64 begin, i64 end) {
  job.wide ? blend_from<double>(job, begin, end) : blend_from<float>(job, begin, end);
}

template <class A>
static void coefficients_of(const CoefficientsJob& job, i64 trigger, i64 c) {
  const i64 n = job.pixels, first = trigger * job.channels * n;
  const A* mask = (const A*)job.mask + (trigger * job.mask_channels + (job.mask_channels == 1 ? 0 : c)) * n;
  const A unit = (A)job.pattern_unit, x = (A)job.image_factor[c], p = (A)job.pattern_factor[c];
  const A constant = (A)job.constant[c];
  const i64 step = job.lanes, start = job.lanes == 1 ? first + c * n : first + c;
  A* __restrict scale = (A*)job.scale + start;
  A* __restrict shift = (A*)job.shift + start;
  for (i64 i = 0; i < n; ++i) scale[i * step] = ((A)1 - mask[i]) * x;
  if (job.pattern == nullptr) {
    for (i64 i = 0; i < n; ++i) shift[i * step] = constant;
  } else {
    const A* pattern = (const A*)job.pattern + first + c * n;
    for (i64 i = 0; i < n; ++i) shift[i * step] = mask[i] * (pattern[i] * unit) * p + constant;
  }
}

static void coefficients(const CoefficientsJob& job, i64 begin, i64 end) {
  for (i64 item = begin; item < end; ++item) {
    const i64 trigger = item / job.channels, c = item % job.channels;
    job.wide ? coefficients_of<double>(job, trigger, c) : coefficients_of<float>(job, trigger, c);
  }
}

// sum += g, and products += x g, for kTogether images or for one.
template <class A>
static void add_slopes(const A* const* g, A* __restrict sum, i64 n) {
  const A *a = g[0], *b = g[1], *c = g[2], *d = g[3];
#pragma omp simd
  for (i64 i = 0; i < n; ++i) sum[i] += (a[i] + b[i]) + (c[i] + d[i]);
}

template <class X, class A>
static void add_products(const X* const* x, const A* const* g, A* __restrict sum, A* __restrict products, i64 n) {
  const X *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  const A *a = g[0], *b = g[1], *c = g[2], *d = g[3];
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    sum[i] += (a[i] + b[i]) + (c[i] + d[i]);
    const A first = read(x0[i], A{}) * a[i] + read(x1[i], A{}) * b[i];
    products[i] += first + (read(x2[i], A{}) * c[i] + read(x3[i], A{}) * d[i]);
  }
}

template <class A>
static void add_one_slope(const A* __restrict g, A* __restrict sum, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) sum[i] += g[i];
}

template <class X, class A>
static void add_one_product(const X* __restrict x, const A* __restrict g, A* __restrict sum,
                            A* __restrict products, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    sum[i] += g[i];
    products[i] += read(x[i], A{}) * g[i];
  }
}

template <class G, class A>
static void read_all(const G* __restrict g, A* __restrict y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) y[i] = read(g[i], A{});
}

template <class X, class A>
static void add_group(const X* const* x, const A* const* g, i64 count, bool both, A* sum, A* products, i64 n) {
  if (count == kTogether) {
    both ? add_products(x, g, sum, products, n) : add_slopes(g, sum, n);
    return;
  }
  for (i64 k = 0; k < count; ++k) {
    both ? add_one_product(x[k], g[k], sum, products, n) : add_one_slope(g[k], sum, n);
  }
}

// Adds n elements of `count` images, each image's at its place and lying together.
template <class X, class A>
static void add_runs(const SumJob& job, const i64* places, i64 count, A* sum, A* products, i64 n) {
  const A* g[kTogether];
  const X* x[kTogether];
  if (job.grad_type == scalar_of(A{})) {
    for (i64 k = 0; k < count; ++k) {
      x[k] = (const X*)job.images + places[k];
      g[k] = (const A*)job.grad + places[k];
    }
    add_group(x, g, count, job.products, sum, products, n);
    return;
  }
  A buffers[kTogether][kBuffer];
  for (i64 done = 0; done < n; done += kBuffer) {
    const i64 size = n - done < kBuffer ? n - done : kBuffer;
    for (i64 k = 0; k < count; ++k) {
      x[k] = (const X*)job.images + places[k] + done;
      g[k] = buffers[k];
      BDCORE_FLOATS(job.grad_type, G, read_all((const G*)job.grad + places[k] + done, buffers[k], size))
    }
    add_group(x, g, count, job.products, sum + done, products + done, size);
  }
}

template <class X, class A>
static void sum_items(const SumJob& job, i64 begin, i64 end) {
  const Window& window = job.window;
  const bool whole = window.rows * window.columns == window.plane;
  const i64 all = window.planes * window.rows * window.columns;
  const i64 run = whole ? all : window.columns;  // elements that lie together
  for (i64 item = begin; item < end; ++item) {
    const i64 piece = item / job.blocks, first = item % job.blocks * job.block;
    const i64 last = first + job.block < all ? first + job.block : all;
    A* sum = (A*)job.sums + piece * (job.products ? 2 : 1) * all;
    A* products = sum + all;
    for (i64 e = first; e < last; ++e) sum[e] = 0;
    for (i64 e = first; e < last && job.products; ++e) products[e] = 0;
    for (i64 k = job.starts[piece]; k < job.starts[piece + 1]; k += kTogether) {
      const i64 count = job.starts[piece + 1] - k < kTogether ? job.starts[piece + 1] - k : kTogether;
      for (i64 e = first; e < last;) {
        const i64 number = e / run, within = e % run;
        const i64 n = run - within < last - e ? run - within : last - e;
        const i64 place = number / window.rows * window.plane + number % window.rows * window.row + within;
        i64 places[kTogether];
        for (i64 j = 0; j < count; ++j) {
          const i64 image = job.order == nullptr ? k + j : job.order[k + j];
          const i64 top = window.offset == nullptr ? 0 : window.offset[2 * image];
          const i64 left = window.offset == nullptr ? 0 : window.offset[2 * image + 1] * window.lanes;
          places[j] = image * window.planes * window.plane + top * window.row + left + place;
        }
        add_runs<X>(job, places, count, sum + e, products + e, n);
        e += n;
      }
    }
  }
}

template <class A>
static void sum_from(const SumJob& job, i64 begin, i64 end) {
  if (job.images_type == Scalar::u8) {
    sum_items<u8, A>(job, begin, end);
    return;
  }
  BDCORE_FLOATS(job.images_type, X, sum_items<X, A>(job, begin, end))
}

static void sum(const SumJob& job, i64 begin, i64 end) {
  job.wide ? sum_from<double>(job, begin, end) : sum_from<float>(job, begin, end);
}

// The sum over a trigger's pieces, of n elements that are `step` apart.
template <class A>
static void collect(const A* sums, i64 pieces, i64 next, i64 step, A* __restrict total, i64 n) {
  for (i64 i = 0; i < n; ++i) total[i] = 0;
  for (i64 piece = 0; piece < pieces; ++piece) {
    const A* from = sums + piece * next;
    if (step == 1) {
#pragma omp simd
      for (i64 i = 0; i < n; ++i) total[i] += from[i];
    } else {
      for (i64 i = 0; i < n; ++i) total[i] += from[i * step];
    }
  }
}

// With G the sum of g / std and X the sum of x g / std: dp = m G and dm = p G - X.
template <class A>
static void gradients_of(const GradientsJob& job, i64 trigger, i64 block) {
  const i64 first = block * kBlock, n = job.pixels - first < kBlock ? job.pixels - first : kBlock;
  const i64 all = job.channels * job.pixels, kinds = job.products ? 2 : 1;
  const i64 pieces = job.pieces[trigger + 1] - job.pieces[trigger];
  const A unit = (A)job.image_unit;
  A slopes[kBlock], products[kBlock];
  for (i64 c = 0; c < job.channels; ++c) {
    const i64 place = job.lanes == 1 ? c * job.pixels + first : first * job.lanes + c;
    const A* sums = (const A*)job.sums + job.pieces[trigger] * kinds * all + place;
    collect(sums, pieces, kinds * all, job.lanes, slopes, n);
    const A factor = (A)job.factor[c];
    const i64 channel = job.mask_channels == 1 ? 0 : c;
    const i64 mask_place = (trigger * job.mask_channels + channel) * job.pixels + first;
    const i64 pattern_place = (trigger * job.channels + c) * job.pixels + first;
    if (job.grad_pattern != nullptr) {
      const A* mask = (const A*)job.mask + mask_place;
      A* __restrict grad = (A*)job.grad_pattern + pattern_place;
#pragma omp simd
      for (i64 i = 0; i < n; ++i) grad[i] = mask[i] * (slopes[i] * factor);
    }
    if (job.grad_mask != nullptr) {
      collect(sums + all, pieces, kinds * all, job.lanes, products, n);
      const A* pattern = (const A*)job.pattern + pattern_place;
      A* __restrict grad = (A*)job.grad_mask + mask_place;
      for (i64 i = 0; i < n && channel == c; ++i) grad[i] = 0;  // else a mask for all channels: their sum
#pragma omp simd
      for (i64 i = 0; i < n; ++i) grad[i] += (pattern[i] * slopes[i] - products[i] * unit) * factor;
    }
  }
}

static void gradients(const GradientsJob& job, i64 begin, i64 end) {
  for (i64 item = begin; item < end; ++item) {
    const i64 trigger = item / job.blocks, block = item % job.blocks;
    job.wide ? gradients_of<double>(job, trigger, block) : gradients_of<float>(job, trigger, block);
  }
}

extern const BlendTrigger blend_trigger = {&coefficients, &blend, &sum, &gradients};

}  // namespace BDCORE_ISA
}  // namespace bdcore
