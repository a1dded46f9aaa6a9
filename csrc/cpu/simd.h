// What the kernel files share: number formats, conversions, exp. A kernel file is compiled once for each instruction
// set (BDCORE_ISA is baseline, avx2 or avx512), and so includes no standard header: an inline function of theirs,
// compiled with AVX-512 here and without elsewhere, would be merged by the linker into one and fail on older
// processors. Everything here lies in a namespace of the instruction set for the same reason. Loops are written so that
// `#pragma omp simd` vectorises them.
#pragma once

#include "scalar.h"

#define BDCORE_INLINE static inline __attribute__((always_inline))

namespace bdcore {
namespace BDCORE_ISA {

// The type in which numbers are added up: float, or double for double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class To, class From>
BDCORE_INLINE To bits_as(From value) {
  return __builtin_bit_cast(To, value);
}

BDCORE_INLINE float load(float value) { return value; }
BDCORE_INLINE double load(double value) { return value; }
BDCORE_INLINE float load(u8 value) { return (float)value; }
BDCORE_INLINE float load(bf16 value) { return bits_as<float>((u32)value.bits << 16); }
BDCORE_INLINE float load(f16 value) {
  const u32 sign = ((u32)value.bits & 0x8000u) << 16;
  const u32 magnitude = (u32)value.bits & 0x7fffu;
  const float small = (float)(int)magnitude * 0x1p-24f;  // below 2^-14 the bits are a multiple of 2^-24
  const u32 normal = (magnitude << 13) + (112u << 23);   // 112: the difference of the exponents' biases
  const u32 special = (magnitude << 13) | 0x7f800000u;   // infinity and NaN
  const u32 found = magnitude < 0x400u ? bits_as<u32>(small) : magnitude >= 0x7c00u ? special : normal;
  return bits_as<float>(found | sign);
}

// Rounds to nearest, ties to even, as torch does.
template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  BDCORE_INLINE float from(float value) { return value; }
  BDCORE_INLINE float from(double value) { return (float)value; }
};
template <>
struct Rounded<double> {
  BDCORE_INLINE double from(float value) { return (double)value; }
  BDCORE_INLINE double from(double value) { return value; }
};
template <>
struct Rounded<bf16> {
  BDCORE_INLINE bf16 from(float value) {
    const u32 x = bits_as<u32>(value);
    const u32 rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    const u32 nan = (x >> 16) | 0x40u;
    return {(u16)((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
  BDCORE_INLINE bf16 from(double value) { return from((float)value); }
};
template <>
struct Rounded<f16> {
  BDCORE_INLINE f16 from(float value) {
    const u32 x = bits_as<u32>(value) & 0x7fffffffu;
    const u32 sign = (bits_as<u32>(value) >> 16) & 0x8000u;
    // Adding 0.5 leaves 24 bits below the point: the sum is rounded where a float16 below 2^-14 is.
    const u32 small = bits_as<u32>(bits_as<float>(x) + 0.5f) - 0x3f000000u;
    const u32 normal = (x - (112u << 23) + 0xfffu + ((x >> 13) & 1u)) >> 13;
    const u32 special = x > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {(u16)(sign | (x < 0x38800000u ? small : x >= 0x47800000u ? special : normal))};
  }
  BDCORE_INLINE f16 from(double value) { return from((float)value); }
};
template <class T, class A>
BDCORE_INLINE T store(A value) {
  return Rounded<T>::from(value);
}

// Copies `count` values past the caches, so that writing does not first read what is overwritten and does not drive out
// what is to be read again. For results larger than the caches; stream_fence() comes after the last one.
template <class T>
BDCORE_INLINE void stream_out(T* to, const T* from, i64 count) {
  i64 done = 0;
#if defined(__SSE2__)
#if defined(__AVX512F__)
  typedef float Wide __attribute__((vector_size(64)));
#define BDCORE_STREAM(to, value) __builtin_ia32_movntps512(to, value)
#elif defined(__AVX__)
  typedef float Wide __attribute__((vector_size(32)));
#define BDCORE_STREAM(to, value) __builtin_ia32_movntps256(to, value)
#else
  typedef float Wide __attribute__((vector_size(16)));
#define BDCORE_STREAM(to, value) __builtin_ia32_movntps(to, value)
#endif
  constexpr i64 step = sizeof(Wide) / sizeof(T);
  if ((__UINTPTR_TYPE__)to % sizeof(Wide) == 0) {
    for (; done + step <= count; done += step) {
      Wide value;
      __builtin_memcpy(&value, from + done, sizeof(value));
      BDCORE_STREAM((float*)(to + done), value);
    }
  }
#undef BDCORE_STREAM
#endif
  for (; done < count; ++done) to[done] = from[done];
}
BDCORE_INLINE void stream_fence() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// e^x with a relative error below 1e-7; 0 below -87.3, infinity above 88.72, NaN for NaN.
BDCORE_INLINE float exponential(float x) {
  // Adding 1.5 * 2^23 rounds to an integer; rintf would not vectorise below SSE 4.1.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040.0f;  // Taylor's series suffices for |r| <= ln(2) / 2
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n as two factors: n = 128 has no float of its own. The low bits of `shifted` are n, and out of range anything.
  const int whole = (int)(bits_as<u32>(shifted) & 0x007fffffu) - 0x00400000, half = whole >> 1;
  const float one = bits_as<float>((u32)(half + 127) << 23), two = bits_as<float>((u32)(whole - half + 127) << 23);
  // Each comparison comes once, and none within another: compilers would make branches of them, and not vectorise the
  // loop.
  const float above = x < -87.3f ? 0.0f : p * one * two;
  const float within = x > 88.7228394f ? __builtin_inff() : above;
  return x == x ? within : x;
}
BDCORE_INLINE double exponential(double x) { return __builtin_exp(x); }

BDCORE_INLINE float logarithm(float x) { return __builtin_logf(x); }
BDCORE_INLINE double logarithm(double x) { return __builtin_log(x); }
BDCORE_INLINE float logarithm_1p(float x) { return __builtin_log1pf(x); }
BDCORE_INLINE double logarithm_1p(double x) { return __builtin_log1p(x); }
BDCORE_INLINE float root(float x) { return __builtin_sqrtf(x); }
BDCORE_INLINE double root(double x) { return __builtin_sqrt(x); }

}  // namespace BDCORE_ISA
}  // namespace bdcore
