// Vectors as wide as the registers of the instruction set, for sums and products that the compiler does not vectorise
// well by itself: for `omp simd reduction` it goes through memory and takes the last elements one after the other.
// No standard header, see simd.h.
#pragma once

#include "simd.h"

namespace bdcore {
namespace BDCORE_ISA {

#if defined(__AVX512F__)
#define BDCORE_LANES_BYTES 64
#elif defined(__AVX2__)
#define BDCORE_LANES_BYTES 32
#else
#define BDCORE_LANES_BYTES 16
#endif

// Vec<T>: a register full of T.
template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(BDCORE_LANES_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

// How many T a register holds.
template <class T>
constexpr i64 kLanes = BDCORE_LANES_BYTES / sizeof(T);

// Reads or writes a register from any address.
template <class T>
BDCORE_INLINE Vec<T> load_vec(const T* from) {
  Vec<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
BDCORE_INLINE Vec<float> load_vec(const bf16* from) {
  typedef u16 Half __attribute__((vector_size(BDCORE_LANES_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return (Vec<float>)(__builtin_convertvector(half, Vec<u32>) << 16);
}
BDCORE_INLINE Vec<float> load_vec(const f16* from) {
#if defined(__AVX512F__)
  typedef short Half __attribute__((vector_size(32)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_ia32_vcvtph2ps512_mask(half, Vec<float>{}, (u16)-1, 4);
#elif defined(__F16C__)
  typedef short Half __attribute__((vector_size(16)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_ia32_vcvtph2ps256(half);
#else  // as load(f16) in simd.h
  typedef u16 Half __attribute__((vector_size(BDCORE_LANES_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  const Vec<u32> bits = __builtin_convertvector(half, Vec<u32>), magnitude = bits & 0x7fffu;
  const Vec<u32> small = (Vec<u32>)(__builtin_convertvector((Vec<int>)magnitude, Vec<float>) * 0x1p-24f);
  const Vec<u32> normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000u;
  const Vec<u32> found = magnitude < 0x400u ? small : magnitude >= 0x7c00u ? special : normal;
  return (Vec<float>)(found | (bits & 0x8000u) << 16);
#endif
}
template <class T>
BDCORE_INLINE void store_vec(T* to, const Vec<T>& value) {
  __builtin_memcpy(to, &value, sizeof(value));
}
// Rounds as store() in simd.h does.
BDCORE_INLINE void store_vec(bf16* to, const Vec<float>& value) {
  typedef u16 Half __attribute__((vector_size(BDCORE_LANES_BYTES / 2)));
  const Vec<u32> bits = (Vec<u32>)value, high = bits >> 16;
  const Vec<u32> rounded = (bits + (high & 1u) + 0x7fffu) >> 16;
  const Half half = __builtin_convertvector(value == value ? rounded : high | 0x40u, Half);
  __builtin_memcpy(to, &half, sizeof(half));
}
BDCORE_INLINE void store_vec(f16* to, const Vec<float>& value) {
#pragma omp simd
  for (i64 i = 0; i < kLanes<float>; ++i) to[i] = store<f16>(value[i]);
}

// Zero in the lanes before `first`.
BDCORE_INLINE Vec<float> without_first(const Vec<float>& value, i64 first) {
  static const int lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_vec(lanes) >= (int)first ? value : Vec<float>{};
}
BDCORE_INLINE Vec<double> without_first(const Vec<double>& value, i64 first) {
  static const i64 lanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return load_vec(lanes) >= first ? value : Vec<double>{};
}

typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x2 __attribute__((vector_size(16)));
BDCORE_INLINE float sum_of(const f32x4& v) {
  const f32x4 pairs = v + __builtin_shufflevector(v, v, 2, 3, 0, 1);
  return pairs[0] + pairs[1];
}
BDCORE_INLINE double sum_of(const f64x2& v) { return v[0] + v[1]; }
#if defined(__AVX2__)
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
BDCORE_INLINE float sum_of(const f32x8& v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
BDCORE_INLINE double sum_of(const f64x4& v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
}
#endif
#if defined(__AVX512F__)
BDCORE_INLINE float sum_of(const Vec<float>& v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
BDCORE_INLINE double sum_of(const Vec<double>& v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#endif

// The sums of w w and of z w over a row, and that of z z where `Own`.
template <class A>
struct Dots {
  A zz, ww, zw;
};
template <bool Own, class T>
BDCORE_INLINE Dots<Accumulator<T>> dots(const T* z, const T* w, i64 width) {
  using A = Accumulator<T>;
  constexpr i64 step = kLanes<A>;
  if (width < step) {
    Dots<A> sums = {0, 0, 0};
    for (i64 i = 0; i < width; ++i) {
      const A a = load(z[i]), b = load(w[i]);
      if (Own) sums.zz += a * a;
      sums.ww += b * b;
      sums.zw += a * b;
    }
    return sums;
  }
  Vec<A> zz[2] = {}, ww[2] = {}, zw[2] = {};
  const auto add = [&](int which, const Vec<A>& a, const Vec<A>& b) __attribute__((always_inline)) {
    if (Own) zz[which] += a * a;
    ww[which] += b * b;
    zw[which] += a * b;
  };
  i64 i = 0;
  for (; i + 2 * step <= width; i += 2 * step) {
    add(0, load_vec(z + i), load_vec(w + i));
    add(1, load_vec(z + i + step), load_vec(w + i + step));
  }
  if (i + step <= width) {
    add(0, load_vec(z + i), load_vec(w + i));
    i += step;
  }
  if (i < width) {  // the last full register once more, without what is counted already
    const i64 last = width - step;
    add(1, without_first(load_vec(z + last), i - last), without_first(load_vec(w + last), i - last));
  }
  return {sum_of(zz[0] + zz[1]), sum_of(ww[0] + ww[1]), sum_of(zw[0] + zw[1])};
}

}  // namespace BDCORE_ISA
}  // namespace bdcore
