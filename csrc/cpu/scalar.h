// Number formats as the kernels see them; no standard header, see simd.h.
#pragma once

namespace bdcore {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = __INT64_TYPE__;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

enum class Scalar { u8, f16, bf16, f32, f64 };

// Runs the statements with T as the C++ type of `scalar`; floating-point formats only.
#define BDCORE_FLOATS(scalar, T, ...)                                    \
  switch (scalar) {                                                      \
    case ::bdcore::Scalar::f16: { using T = ::bdcore::f16; __VA_ARGS__; break; }   \
    case ::bdcore::Scalar::bf16: { using T = ::bdcore::bf16; __VA_ARGS__; break; } \
    case ::bdcore::Scalar::f32: { using T = float; __VA_ARGS__; break; }           \
    case ::bdcore::Scalar::f64: { using T = double; __VA_ARGS__; break; }          \
    case ::bdcore::Scalar::u8: break;                                    \
  }

}  // namespace bdcore
