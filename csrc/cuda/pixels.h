// What the image operators share on the GPU: the arithmetic of pixels, rounded as the reference rounds it, and the
// numbers of each channel.
#pragma once

#include "launch.h"

namespace bdcore {

// Products and sums rounded one by one, as in the reference: fused, a sum could end on the other side of a tie.
__device__ __forceinline__ float blended(float x, float m, float p) {
  return __fadd_rn(__fmul_rn(1.0f - m, x), __fmul_rn(m, p));
}
__device__ __forceinline__ double blended(double x, double m, double p) {
  return __dadd_rn(__dmul_rn(1.0 - m, x), __dmul_rn(m, p));
}

__device__ __forceinline__ unsigned char nearest(float x) {
  return static_cast<unsigned char>(rintf(fminf(fmaxf(x, 0.0f), 255.0f)));
}
__device__ __forceinline__ unsigned char nearest(double x) {
  return static_cast<unsigned char>(rint(fmin(fmax(x, 0.0), 255.0)));
}

// x / 255, rounded once: 1 / 255 in two parts, of which the product with the first is exact.
__device__ __forceinline__ float unit(float x) { return fmaf(x, 0x1.010102p-32f, x * 0x1.0101p-8f); }
__device__ __forceinline__ double unit(double x) { return x / 255.0; }

constexpr int kChannels = 64;  // whose mean and std travel as arguments; of more, as a tensor

// Mean and 1 / std as a tensor, filled without a copy from the host, which a CUDA graph could not repeat.
inline Tensor table_of(const Tensor& like, ScalarType dtype, const std::vector<double>& mean,
                       const std::vector<double>& std) {
  const int64_t channels = static_cast<int64_t>(std.size());
  Tensor table = torch::stable::new_empty(like, {2 * channels}, dtype);
  for (int64_t i = 0; i < 2 * channels; ++i) {
    const size_t c = static_cast<size_t>(i % channels);
    torch::stable::fill_(torch::stable::narrow(table, 0, i, 1), i < channels ? mean[c] : 1.0 / std[c]);
  }
  return table;
}

}  // namespace bdcore
