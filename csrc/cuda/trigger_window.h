// What the kernels of blend_trigger share: where elements and windows lie, what is done to channels, number formats.
#pragma once

#include <cassert>

#include "pixels.h"

namespace bdcore {

using OptionalTensor = std::optional<Tensor>;
using OptionalFloats = std::optional<std::vector<double>>;

// Where the elements of the images and of the triggers' windows lie.
struct Geometry {
  int64_t batch, triggers;
  int channels, height, width, rows, columns, mask_channels;
  bool interleaved;
  const int64_t* index;   // [batch], or nullptr
  const int64_t* offset;  // [batch, 2], or nullptr

  __device__ int size() const { return channels * height * width; }
  __device__ int64_t trigger(int64_t image) const {
    const int64_t found = index == nullptr ? 0 : index[image];
    assert(found >= -1 && found < triggers && "index must be -1 or the number of a trigger");
    return found;
  }
  __device__ int top(int64_t image) const { return edge(image, 0, height - rows); }
  __device__ int left(int64_t image) const { return edge(image, 1, width - columns); }
  __device__ int edge(int64_t image, int which, int limit) const {
    if (offset == nullptr) return 0;
    const int64_t found = offset[2 * image + which];
    assert(found >= 0 && found <= limit && "offset must place the patch inside the image");
    return static_cast<int>(found);
  }
  // The element of an image at this place.
  __device__ int element(int channel, int y, int x) const {
    return interleaved ? (y * width + x) * channels + channel : (channel * height + y) * width + x;
  }
};

// (y - mean) / std as factor y + shift, for each channel; y itself where it is not asked for.
template <class A>
struct Normalisation {
  bool asked;
  A mean[kChannels], scale[kChannels];
  const A* table;  // [2, C], means and 1 / std, of more channels than kChannels

  __device__ A factor(int c, int channels) const {
    return !asked ? A(1) : table == nullptr ? scale[c] : table[channels + c];
  }
  __device__ A shift(int c, int channels) const {
    if (!asked) return A(-0.0);  // y + -0.0 is y, also for -0.0
    return -(table == nullptr ? mean[c] : table[c]) * factor(c, channels);
  }
};

// `kept` holds the table while it is in use.
template <class A>
Normalisation<A> normalisation_of(const Tensor& like, const OptionalFloats& mean, const OptionalFloats& std,
                                  OptionalTensor& kept) {
  Normalisation<A> result{};
  result.asked = mean && std;
  if (!result.asked) return result;
  if (std->size() > kChannels) {
    kept = table_of(like, like.scalar_type(), *mean, *std);
    result.table = static_cast<const A*>(kept->const_data_ptr());
    return result;
  }
  for (size_t c = 0; c < std->size(); ++c) {
    result.mean[c] = static_cast<A>((*mean)[c]);
    result.scale[c] = static_cast<A>(1.0 / (*std)[c]);
  }
  return result;
}

template <class A, class X>
__device__ __forceinline__ A read(X x, bool) {
  return static_cast<A>(static_cast<std::conditional_t<std::is_same_v<X, double>, double, float>>(x));
}
// uint8 as it is, or as the fraction x / 255.
template <class A>
__device__ __forceinline__ A read(uint8_t x, bool fraction) {
  return fraction ? unit(static_cast<A>(x)) : static_cast<A>(x);
}

template <class A>
__device__ A read_any(const void* from, ScalarType type, int64_t at, bool fraction) {
  if (type == ScalarType::Byte) return read<A>(static_cast<const uint8_t*>(from)[at], fraction);
  if (type == ScalarType::Half) return read<A>(static_cast<const Half*>(from)[at], false);
  if (type == ScalarType::BFloat16) return read<A>(static_cast<const BFloat16*>(from)[at], false);
  if (type == ScalarType::Float) return read<A>(static_cast<const float*>(from)[at], false);
  return read<A>(static_cast<const double*>(from)[at], false);
}

inline int64_t parts(int64_t value, int64_t size) { return (value + size - 1) / size; }

}  // namespace bdcore
