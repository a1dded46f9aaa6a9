// blend_trigger and its gradients on the GPU; see bdcore/ops/blend_trigger.py for the formulas.
#include <cassert>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../common/images.h"
#include "trigger_sums.h"

namespace bdcore {

namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // images that a thread blends at once: loads in flight
constexpr int64_t kBlocksAtOnce = 2112;  // of a large GPU; with more, threads would only compute coefficients again

template <class A>
struct BlendJob {
  Geometry geometry;
  const void* images;
  void* out;
  ScalarType from, to;
  bool fraction;       // uint8 images stand for x / 255
  const A* pattern;    // [T, C, rows, columns]; nullptr: zeros
  const A* mask;       // [T, 1 or C, rows, columns]
  A image_unit, pattern_unit;  // 1 of x and of p in units of the result
  Normalisation<A> normalisation;
};

// Products and sums are rounded apart, as in the reference: uint8 results then are the same on every device.
__device__ __forceinline__ float scaled(float a, float x, float b) { return __fadd_rn(__fmul_rn(a, x), b); }
__device__ __forceinline__ double scaled(double a, double x, double b) { return __dadd_rn(__dmul_rn(a, x), b); }

template <class Y, class A>
__device__ __forceinline__ Y rounded(A value) {
  if constexpr (std::is_same_v<Y, uint8_t>) {
    return nearest(value);
  } else if constexpr (std::is_same_v<Y, A>) {
    return value;
  } else {
    return static_cast<Y>(static_cast<float>(value));
  }
}

// At once: a plain store of a Pack is taken apart into single values.
template <class Bits, class T, int N>
__device__ __forceinline__ void store_pack(void* to, const Pack<T, N>& value) {
  static_assert(sizeof(Bits) == sizeof(value));
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  __stcg(static_cast<Bits*>(to), bits);
}

// How a thread reads and writes: N elements of known types at once, or one of any type.
template <class X, class Y, int N>
struct Typed {
  static constexpr int count = N;
  using Raw = Pack<X, N>;
  using A = float;
  static __device__ Raw load(const BlendJob<A>& job, int64_t at) {
    return *reinterpret_cast<const Raw*>(static_cast<const X*>(job.images) + at);
  }
  static __device__ A value(const BlendJob<A>& job, const Raw& raw, int i) {
    return read<A>(raw.value[i], job.fraction);
  }
  static __device__ void store(const BlendJob<A>& job, int64_t at, const A (&y)[N]) {
    Pack<Y, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.value[i] = rounded<Y>(y[i]);
    using Less = std::conditional_t<sizeof(result) == 8, uint2, unsigned int>;
    using Bits = std::conditional_t<sizeof(result) == 16, uint4, Less>;
    store_pack<Bits>(static_cast<Y*>(job.out) + at, result);
  }
};

template <class A_>
struct Any {
  static constexpr int count = 1;
  using Raw = A_;
  using A = A_;
  static __device__ Raw load(const BlendJob<A>& job, int64_t at) {
    return read_any<A>(job.images, job.from, at, job.fraction);
  }
  static __device__ A value(const BlendJob<A>&, const Raw& raw, int) { return raw; }
  static __device__ void store(const BlendJob<A>& job, int64_t at, const A (&y)[1]) {
    if (job.to == ScalarType::Byte) static_cast<uint8_t*>(job.out)[at] = rounded<uint8_t>(y[0]);
    if (job.to == ScalarType::Half) static_cast<Half*>(job.out)[at] = rounded<Half>(y[0]);
    if (job.to == ScalarType::BFloat16) static_cast<BFloat16*>(job.out)[at] = rounded<BFloat16>(y[0]);
    if (job.to == ScalarType::Float) static_cast<float*>(job.out)[at] = static_cast<float>(y[0]);
    if (job.to == ScalarType::Double) static_cast<double*>(job.out)[at] = y[0];
  }
};

// What the trigger makes of N elements x from `first` on is scale x + shift.
template <int N, class A>
__device__ void coefficients(const BlendJob<A>& job, int first, int64_t trigger, int top, int left, A (&scale)[N],
                             A (&shift)[N]) {
  const Geometry& g = job.geometry;
  const int pixel = g.interleaved ? first / g.channels : first % (g.height * g.width);
  int c = g.interleaved ? first % g.channels : first / (g.height * g.width);
  int y = pixel / g.width, x = pixel % g.width;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A factor = job.normalisation.factor(c, g.channels);
    const int row = y - top, column = x - left;
    scale[i] = job.image_unit * factor;
    shift[i] = job.normalisation.shift(c, g.channels);
    if (trigger >= 0 && row >= 0 && row < g.rows && column >= 0 && column < g.columns) {
      const int64_t area = static_cast<int64_t>(g.rows) * g.columns, place = row * g.columns + column;
      const A m = job.mask[(trigger * g.mask_channels + (g.mask_channels == 1 ? 0 : c)) * area + place];
      scale[i] *= A(1) - m;
      if (job.pattern != nullptr) {
        const A p = job.pattern[(trigger * g.channels + c) * area + place] * job.pattern_unit;
        shift[i] = scaled(m * p, factor, shift[i]);
      }
    }
    if (g.interleaved) {
      if (++c < g.channels) continue;
      c = 0;
    }
    if (++x < g.width) continue;
    x = 0;
    if (++y < g.height || g.interleaved) continue;
    y = 0;
    ++c;
  }
}

// Each thread: some elements of an image, in kGroup images after the other, and so on.
template <class Format>
__global__ void __launch_bounds__(kThreads) blend(const __grid_constant__ BlendJob<typename Format::A> job) {
  using A = typename Format::A;
  constexpr int N = Format::count;
  const Geometry& g = job.geometry;
  const int64_t size = g.size(), first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= size) return;
  A scale[N], shift[N];
  int64_t known = -2;  // the trigger that they belong to, and its place
  int known_top = 0, known_left = 0;
  for (int64_t group = int64_t{blockIdx.y} * kGroup; group < g.batch; group += int64_t{gridDim.y} * kGroup) {
    typename Format::Raw raw[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (group + k < g.batch) raw[k] = Format::load(job, (group + k) * size + first);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int64_t image = group + k;
      if (image < g.batch) {
        const int64_t trigger = g.trigger(image);
        const int top = g.top(image), left = g.left(image);
        if (trigger != known || top != known_top || left != known_left) {
          coefficients(job, static_cast<int>(first), trigger, top, left, scale, shift);
          known = trigger, known_top = top, known_left = left;
        }
        A y[N];
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = scaled(scale[i], Format::value(job, raw[k], i), shift[i]);
        Format::store(job, image * size + first, y);
      }
    }
  }
}

Tensor as(const Tensor& tensor, ScalarType type) {
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

const int64_t* integers(const OptionalTensor& tensor) {
  return tensor ? static_cast<const int64_t*>(tensor->const_data_ptr()) : nullptr;
}

ScalarType working_type(const Tensor& images, const Tensor& pattern) {
  const bool wide = images.scalar_type() == ScalarType::Double || pattern.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

Geometry geometry_of(const Tensor& images, const Tensor& mask, Layout layout, const OptionalTensor& index,
                     const OptionalTensor& offset) {
  STD_TORCH_CHECK(images.size(1) * images.size(2) * images.size(3) < (int64_t{1} << 31) - 16 * kThreads,
                  "an image of ", images.size(1), " x ", images.size(2), " x ", images.size(3),
                  " elements is too large for the GPU: it must have fewer than 2^31");
  const auto size = [](const Tensor& tensor, int64_t dim) { return static_cast<int>(tensor.size(dim)); };
  return {images.size(0),       mask.size(0),      size(images, 1), size(images, 2),
          size(images, 3),      size(mask, 2),     size(mask, 3),   size(mask, 1),
          layout == Layout::interleaved, integers(index), integers(offset)};
}

template <class Format>
void launch_blend(const Tensor& images, const BlendJob<typename Format::A>& job) {
  const int64_t size = images.numel() / images.size(0);
  const int64_t across = parts(parts(size, Format::count), kThreads);
  const int64_t groups = std::min(parts(images.size(0), kGroup), std::max<int64_t>(kBlocksAtOnce / across, 1));
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(groups));
  launch(images, blend<Format>, grid, dim3(kThreads), 0, job);
}

template <class X, class Y>
bool blend_typed(const Tensor& images, const BlendJob<float>& job) {
  constexpr int N = 16 / std::max(sizeof(X), sizeof(Y));
  const auto aligned = [](const void* place, size_t bytes) { return reinterpret_cast<uintptr_t>(place) % bytes == 0; };
  if (images.numel() / images.size(0) % N != 0) return false;
  if (!aligned(job.images, N * sizeof(X)) || !aligned(job.out, N * sizeof(Y))) return false;
  launch_blend<Typed<X, Y, N>>(images, job);
  return true;
}

template <class X>
bool blend_to(const Tensor& images, const BlendJob<float>& job) {
  switch (job.to) {
    case ScalarType::Byte: return blend_typed<X, uint8_t>(images, job);
    case ScalarType::Half: return blend_typed<X, Half>(images, job);
    case ScalarType::BFloat16: return blend_typed<X, BFloat16>(images, job);
    case ScalarType::Float: return blend_typed<X, float>(images, job);
    default: return false;
  }
}

bool blend_vectors(const Tensor& images, const BlendJob<float>& job) {
  switch (job.from) {
    case ScalarType::Byte: return blend_to<uint8_t>(images, job);
    case ScalarType::Half: return blend_to<Half>(images, job);
    case ScalarType::BFloat16: return blend_to<BFloat16>(images, job);
    case ScalarType::Float: return blend_to<float>(images, job);
    default: return false;
  }
}

// y = ((1 - m) x + m p - mean) / std, or without a pattern the gradient (1 - m) x / std.
template <class A>
void transform(const Tensor& images, const Tensor* pattern, const Tensor& mask, const Geometry& geometry,
               const OptionalFloats& mean, const OptionalFloats& std, Tensor& out) {
  BlendJob<A> job{};
  job.geometry = geometry;
  job.images = images.const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.from = images.scalar_type();
  job.to = out.scalar_type();
  const bool from_bytes = job.from == ScalarType::Byte, to_bytes = job.to == ScalarType::Byte;
  job.fraction = from_bytes && !to_bytes;
  job.pattern = pattern == nullptr ? nullptr : static_cast<const A*>(pattern->const_data_ptr());
  job.mask = static_cast<const A*>(mask.const_data_ptr());
  job.image_unit = to_bytes && !from_bytes ? A(255) : A(1);
  job.pattern_unit = to_bytes ? A(255) : A(1);
  OptionalTensor table;
  job.normalisation = normalisation_of<A>(mask, mean, std, table);
  if constexpr (std::is_same_v<A, float>) {
    if (blend_vectors(images, job)) return;
  }
  launch_blend<Any<A>>(images, job);
}

void transform(const Tensor& images, const Tensor* pattern, const Tensor& mask, const Geometry& geometry,
               const OptionalFloats& mean, const OptionalFloats& std, Tensor& out) {
  if (images.numel() == 0) return;
  if (mask.scalar_type() == ScalarType::Double) {
    transform<double>(images, pattern, mask, geometry, mean, std, out);
  } else {
    transform<float>(images, pattern, mask, geometry, mean, std, out);
  }
}

Tensor forward(const Tensor& images_, const Tensor& pattern_, const Tensor& mask_, const OptionalTensor& index_,
               const OptionalTensor& offset_, const OptionalFloats& mean, const OptionalFloats& std,
               ScalarType out_type) {
  const OnDeviceOf device(images_);
  const Layout layout = layout_of(images_);
  const Tensor images = laid_out(images_, layout);
  const ScalarType type = working_type(images, pattern_);
  const Tensor pattern = as(pattern_, type), mask = as(mask_, type);
  const OptionalTensor index = dense(index_), offset = dense(offset_);
  Tensor out = result_like(images_, layout, out_type);
  transform(images, &pattern, mask, geometry_of(images, mask, layout, index, offset), mean, std, out);
  return given_back(out, images_, layout);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& images_, const Tensor& pattern_,
                                            const Tensor& mask_, const OptionalTensor& index_,
                                            const OptionalTensor& offset_, const OptionalFloats& std, bool need_images,
                                            bool need_pattern, bool need_mask) {
  const OnDeviceOf device(images_);
  const Layout layout = layout_of(images_);
  const Tensor grad = laid_out(grad_, layout);
  const ScalarType type = working_type(images_, pattern_);
  const Tensor pattern = as(pattern_, type), mask = as(mask_, type);
  const OptionalTensor index = dense(index_), offset = dense(offset_);
  const Geometry geometry = geometry_of(images_, mask, layout, index, offset);
  const OptionalFloats mean = std ? OptionalFloats(std::vector<double>(std->size(), 0.0)) : std::nullopt;

  Tensor grad_images = torch::stable::new_empty(images_, {0});
  if (need_images) {
    Tensor result = result_like(images_, layout, images_.scalar_type());
    transform(grad, nullptr, mask, geometry, mean, std, result);
    grad_images = given_back(result, images_, layout);
  }
  Tensor grad_pattern = torch::stable::new_empty(pattern_, {0}), grad_mask = torch::stable::new_empty(mask_, {0});
  if (need_pattern || need_mask) {
    const Tensor images = need_mask ? laid_out(images_, layout) : images_;
    const auto [for_pattern, for_mask] =
        type == ScalarType::Double
            ? sums_of<double>(grad, images, pattern, mask, geometry, mean, std, need_pattern, need_mask)
            : sums_of<float>(grad, images, pattern, mask, geometry, mean, std, need_pattern, need_mask);
    if (need_pattern) grad_pattern = as(*for_pattern, pattern_.scalar_type());
    if (need_mask) grad_mask = as(*for_mask, mask_.scalar_type());
  }
  return {grad_images, grad_pattern, grad_mask};
}

}  // namespace

BDCORE_CUDA_IMPL(m) {
  m.impl("blend_trigger", TORCH_BOX(&forward));
  m.impl("blend_trigger_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
