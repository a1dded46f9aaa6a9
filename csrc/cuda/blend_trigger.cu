// blend_trigger and its gradients on the GPU; see bdcore/ops/blend_trigger.py for the formulas.
#include <cassert>
#include <tuple>

#include "../common/images.h"
#include "launch.h"

namespace bdcore {

namespace {

using OptionalTensor = std::optional<Tensor>;
using OptionalFloats = std::optional<std::vector<double>>;

constexpr int kThreads = 256;
constexpr int kTogether = 4;   // images that a thread blends at once: loads in flight, and coefficients used again
constexpr int kInline = 16;    // channels whose factors travel with a launch
constexpr int kChannels = 4;   // channels, and
constexpr int kPair = 2;       // images whose gradients a thread reads at once
constexpr int64_t kBlocks = 256, kImages = 256;  // sums: blocks that fill a GPU, images that are worth a block

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

// y = image (1 - m) x + pattern m p + constant for each channel, m being 0 outside the window.
template <class A>
struct Factors {
  A image[kInline], pattern[kInline], constant[kInline];
};

template <class A>
struct BlendJob {
  Geometry geometry;
  const void* images;
  void* out;
  ScalarType from, to;
  bool fraction;       // uint8 images stand for x / 255
  bool covered;        // the window is the whole image
  const A* pattern;    // [T, C, rows, columns]; nullptr: zeros
  const A* mask;       // [T, 1 or C, rows, columns]
  A pattern_unit;
  Factors<A> factors;
  const A* table;      // [3, C], the factors of more channels than kInline, or nullptr
};

// Products and sums are rounded apart, as in the reference: uint8 results then are the same on every device.
__device__ __forceinline__ float scaled(float a, float x, float b) { return __fadd_rn(__fmul_rn(a, x), b); }
__device__ __forceinline__ double scaled(double a, double x, double b) { return __dadd_rn(__dmul_rn(a, x), b); }

template <class A, class X>
__device__ __forceinline__ A read(X x, bool) {
  return static_cast<A>(x);
}
// x / 255, rounded once: x times the first of the two parts of 1 / 255 is exact.
template <>
__device__ __forceinline__ float read<float, uint8_t>(uint8_t x, bool fraction) {
  const float value = x;
  return fraction ? scaled(value, 0x1.0101p-8f, __fmul_rn(value, 0x1.010102p-32f)) : value;
}
template <>
__device__ __forceinline__ double read<double, uint8_t>(uint8_t x, bool fraction) {
  return fraction ? x / 255.0 : x;
}

// Bytes are rounded to the nearest, ties to even: adding 1.5 * 2^23 leaves the result in the lowest bits.
template <class Y, class A>
__device__ __forceinline__ Y rounded(A value) {
  if constexpr (std::is_same_v<Y, uint8_t>) {
    const float bounded = static_cast<float>(fmin(fmax(value, A(0)), A(255)));
    return static_cast<uint8_t>(__float_as_uint(bounded + 0x1.8p23f));
  } else if constexpr (std::is_same_v<Y, A>) {
    return value;
  } else {
    return static_cast<Y>(static_cast<float>(value));
  }
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
    *reinterpret_cast<Pack<Y, N>*>(static_cast<Y*>(job.out) + at) = result;
  }
};

template <class A>
__device__ A read_any(const void* from, ScalarType type, int64_t at, bool fraction) {
  if (type == ScalarType::Byte) return read<A>(static_cast<const uint8_t*>(from)[at], fraction);
  if (type == ScalarType::Half) return static_cast<A>(static_cast<float>(static_cast<const Half*>(from)[at]));
  if (type == ScalarType::BFloat16) return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(from)[at]));
  if (type == ScalarType::Float) return static_cast<A>(static_cast<const float*>(from)[at]);
  return static_cast<A>(static_cast<const double*>(from)[at]);
}

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
    const bool held = job.table != nullptr;
    const A image = held ? job.table[c] : job.factors.image[c];
    const A constant = held ? job.table[2 * g.channels + c] : job.factors.constant[c];
    const int row = y - top, column = x - left;
    scale[i] = image;
    shift[i] = constant;
    if (trigger >= 0 && row >= 0 && row < g.rows && column >= 0 && column < g.columns) {
      const int64_t place = static_cast<int64_t>(row) * g.columns + column, area = static_cast<int64_t>(g.rows) * g.columns;
      const A m = job.mask[(trigger * g.mask_channels + (g.mask_channels == 1 ? 0 : c)) * area + place];
      scale[i] = (A(1) - m) * image;
      if (job.pattern != nullptr) {
        const A p = job.pattern[(trigger * g.channels + c) * area + place] * job.pattern_unit;
        const A share = held ? job.table[g.channels + c] : job.factors.pattern[c];
        shift[i] = scaled(m * p, share, constant);
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

// Each thread: some elements of an image, in kTogether images after the other, and so on.
template <class Format>
__global__ void __launch_bounds__(kThreads) blend(const __grid_constant__ BlendJob<typename Format::A> job) {
  using A = typename Format::A;
  constexpr int N = Format::count;
  const Geometry& g = job.geometry;
  const int64_t size = g.size(), first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= size) return;
  A scale[N], shift[N];
  int64_t known = -2;  // the trigger that they belong to
  for (int64_t group = int64_t{blockIdx.y} * kTogether; group < g.batch; group += int64_t{gridDim.y} * kTogether) {
    typename Format::Raw raw[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (group + k < g.batch) raw[k] = Format::load(job, (group + k) * size + first);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int64_t image = group + k;
      if (image < g.batch) {
        const int64_t trigger = g.trigger(image);
        const int top = g.top(image), left = g.left(image);
        if (!job.covered || trigger != known) {
          coefficients(job, static_cast<int>(first), trigger, top, left, scale, shift);
          known = trigger;
        }
        A y[N];
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = scaled(scale[i], Format::value(job, raw[k], i), shift[i]);
        Format::store(job, image * size + first, y);
      }
    }
  }
}

template <class A>
__global__ void write_factors(const __grid_constant__ Factors<A> factors, A* table, int channels, int first) {
  const int c = first + threadIdx.x;
  if (c >= channels) return;
  table[c] = factors.image[threadIdx.x];
  table[channels + c] = factors.pattern[threadIdx.x];
  table[2 * channels + c] = factors.constant[threadIdx.x];
}

template <class A>
struct SumJob {
  Geometry geometry;
  const void* images;
  const void* grad;
  ScalarType images_type, grad_type;
  const A* pattern;
  const A* mask;
  A image_unit;
  A factor[kInline];    // 1 / std of each channel,
  const A* table;       // or of more channels than kInline
  A* grad_pattern;      // [chunks, T, C, rows, columns], or nullptr
  A* grad_mask;         // [chunks, T, 1 or C, rows, columns], or nullptr
  int tiles;            // of kWarp pixels, in the window
  int64_t chunk;        // images that one block adds up
};

template <class X>
struct Known {
  template <class A>
  static __device__ A load(const void* from, ScalarType, int64_t at) {
    return read<A>(static_cast<const X*>(from)[at], false);
  }
};
struct Unknown {
  template <class A>
  static __device__ A load(const void* from, ScalarType type, int64_t at) {
    return read_any<A>(from, type, at, false);
  }
};

template <class A>
constexpr int most_warps = sizeof(A) == 8 ? 16 : 32;  // 32 KB of shared memory

// With g = dy / std: dp = m g and dm = (p - x) g, summed over a trigger's images. A block has kWarp pixels of a trigger
// and a chunk of the images, a warp every blockDim.y-th image of these; the order of the sums is fixed.
template <class X, class G, class A>
__global__ void __launch_bounds__(kWarp * most_warps<A>) sum_gradients(const __grid_constant__ SumJob<A> job) {
  const Geometry& g = job.geometry;
  const int tile = blockIdx.x % job.tiles, lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t trigger = blockIdx.x / job.tiles % g.triggers, chunk = blockIdx.x / job.tiles / g.triggers;
  const int area = g.rows * g.columns, pixel = tile * kWarp + lane, size = g.size();
  const int row = pixel / g.columns, column = pixel % g.columns;
  const int64_t begin = chunk * job.chunk, end = min(begin + job.chunk, g.batch);
  const bool apart = g.mask_channels > 1;  // else a mask for all channels: its gradient is the sum of theirs
  const int step = g.interleaved ? 1 : g.height * g.width;
  A* const grad_pattern =
      job.grad_pattern == nullptr ? nullptr : job.grad_pattern + (chunk * g.triggers + trigger) * g.channels * area;
  A* const grad_mask =
      job.grad_mask == nullptr ? nullptr : job.grad_mask + (chunk * g.triggers + trigger) * g.mask_channels * area;
  BDCORE_SHARED(A, shared);  // [2 * kChannels, warps, kWarp]
  A together[1] = {};

  // The sums of `values` numbers of each thread over the warps; sum v goes to the pixel of target(v), if there is one.
  const auto reduce = [&](const auto& mine, int values, const auto& target) {
    __syncthreads();  // the sums before have been read
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(mine) / sizeof(A)); ++v) {
      if (v < values) shared[(v * warps + warp) * kWarp + lane] = mine[v];
    }
    __syncthreads();
    for (int v = warp; v < values; v += warps) {
      A* const to = target(v);
      if (to == nullptr || pixel >= area) continue;
      A total = 0;
      for (int w = 0; w < warps; ++w) total += shared[(v * warps + w) * kWarp + lane];
      to[pixel] = total;
    }
  };

  for (int c0 = 0; c0 < g.channels; c0 += kChannels) {
    A slope[kChannels] = {}, product[kChannels] = {};
    for (int64_t base = begin; base < end; base += int64_t{kWarp} * warps) {
      const int64_t candidate = base + int64_t{lane} * warps + warp;
      unsigned int rest = __ballot_sync(0xffffffffu, candidate < end && g.trigger(candidate) == trigger);
      while (rest != 0) {
        int64_t at[kPair];
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          at[k] = -1;
          if (rest == 0) continue;
          const int64_t image = base + int64_t{__ffs(static_cast<int>(rest)) - 1} * warps + warp;
          rest &= rest - 1;
          if (pixel < area) at[k] = image * size + g.element(c0, g.top(image) + row, g.left(image) + column);
        }
        A slopes[kPair][kChannels], values[kPair][kChannels];
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const bool there = at[k] >= 0 && c0 + c < g.channels;
            const int64_t place = at[k] + static_cast<int64_t>(c) * step;
            slopes[k][c] = there ? G::template load<A>(job.grad, job.grad_type, place) : A(0);
            values[k][c] = there && grad_mask != nullptr ? X::template load<A>(job.images, job.images_type, place) : A(0);
          }
        }
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            slope[c] += slopes[k][c];
            product[c] += values[k][c] * slopes[k][c];
          }
        }
      }
    }
    A mine[2 * kChannels] = {};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int channel = c0 + c;
      if (channel >= g.channels || pixel >= area) continue;
      const A factor = job.table == nullptr ? job.factor[channel] : job.table[channel];
      const A m = job.mask[(trigger * g.mask_channels + (apart ? channel : 0)) * area + pixel];
      const A p = job.pattern[(trigger * g.channels + channel) * area + pixel];
      mine[c] = m * (slope[c] * factor);
      mine[kChannels + c] = (p * slope[c] - product[c] * job.image_unit) * factor;
      together[0] += mine[kChannels + c];
    }
    reduce(mine, apart ? 2 * kChannels : kChannels, [&](int v) -> A* {
      const int channel = c0 + v % kChannels;
      A* const to = v < kChannels ? grad_pattern : grad_mask;
      return to == nullptr || channel >= g.channels ? nullptr : to + static_cast<int64_t>(channel) * area;
    });
  }
  if (!apart && grad_mask != nullptr) reduce(together, 1, [&](int) { return grad_mask; });
}

template <class A>
__global__ void __launch_bounds__(kThreads) add_chunks(const A* parts, A* sums, int64_t size, int chunks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * size + i];
  sums[i] = sum;
}

int64_t parts(int64_t value, int64_t size) { return (value + size - 1) / size; }

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

struct ChannelFactors {
  std::vector<double> image, pattern, constant;
  double pattern_unit;
};

// The factors of more channels than kInline, [3, C] on the device.
template <class A>
Tensor factor_table(const Tensor& like, const ChannelFactors& factors) {
  const int channels = static_cast<int>(factors.image.size());
  Tensor table = torch::stable::new_empty(like, {3, channels}, like.scalar_type());
  for (int first = 0; first < channels; first += kInline) {
    Factors<A> part{};
    for (int c = 0; c < kInline && first + c < channels; ++c) {
      part.image[c] = static_cast<A>(factors.image[first + c]);
      part.pattern[c] = static_cast<A>(factors.pattern[first + c]);
      part.constant[c] = static_cast<A>(factors.constant[first + c]);
    }
    launch(like, write_factors<A>, dim3(1), dim3(kInline), 0, part, static_cast<A*>(table.mutable_data_ptr()), channels,
           first);
  }
  return table;
}

template <class Format>
void launch_blend(const Tensor& images, const BlendJob<typename Format::A>& job) {
  const int64_t size = images.numel() / images.size(0);
  const auto groups = static_cast<unsigned>(std::min<int64_t>(parts(images.size(0), kTogether), 65535));
  const dim3 grid(static_cast<unsigned>(parts(parts(size, Format::count), kThreads)), groups);
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

template <class A>
void transform(const Tensor& images, const Tensor* pattern, const Tensor& mask, const Geometry& geometry,
               const ChannelFactors& factors, Tensor& out) {
  const int channels = geometry.channels;
  BlendJob<A> job{};
  job.geometry = geometry;
  job.images = images.const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.from = images.scalar_type();
  job.to = out.scalar_type();
  job.fraction = job.from == ScalarType::Byte && job.to != ScalarType::Byte;
  job.covered = geometry.rows == geometry.height && geometry.columns == geometry.width;
  job.pattern = pattern == nullptr ? nullptr : static_cast<const A*>(pattern->const_data_ptr());
  job.mask = static_cast<const A*>(mask.const_data_ptr());
  job.pattern_unit = static_cast<A>(factors.pattern_unit);
  for (int c = 0; c < std::min(channels, kInline); ++c) {
    job.factors.image[c] = static_cast<A>(factors.image[c]);
    job.factors.pattern[c] = static_cast<A>(factors.pattern[c]);
    job.factors.constant[c] = static_cast<A>(factors.constant[c]);
  }
  OptionalTensor table;
  if (channels > kInline) {
    table = factor_table<A>(mask, factors);
    job.table = static_cast<const A*>(table->const_data_ptr());
  }
  if constexpr (std::is_same_v<A, float>) {
    if (blend_vectors(images, job)) return;
  }
  launch_blend<Any<A>>(images, job);
}

void transform(const Tensor& images, const Tensor* pattern, const Tensor& mask, const Geometry& geometry,
               const ChannelFactors& factors, Tensor& out) {
  if (mask.scalar_type() == ScalarType::Double) {
    transform<double>(images, pattern, mask, geometry, factors, out);
  } else {
    transform<float>(images, pattern, mask, geometry, factors, out);
  }
}

Tensor forward(const Tensor& images_, const Tensor& pattern_, const Tensor& mask_, const OptionalTensor& index_,
               const OptionalTensor& offset_, const OptionalFloats& mean, const OptionalFloats& std,
               ScalarType out_type) {
  const OnDeviceOf device(images_);
  const Layout layout = layout_of(images_);
  Tensor out = result_like(images_, layout, out_type);
  if (images_.numel() > 0) {
    const Tensor images = laid_out(images_, layout);
    const ScalarType type = working_type(images, pattern_);
    const Tensor pattern = as(pattern_, type), mask = as(mask_, type);
    const OptionalTensor index = dense(index_), offset = dense(offset_);
    const size_t channels = images.size(1);
    const bool from_bytes = images.scalar_type() == ScalarType::Byte, to_bytes = out_type == ScalarType::Byte;
    ChannelFactors factors;
    factors.image.assign(channels, to_bytes && !from_bytes ? 255.0 : 1.0);
    factors.pattern.assign(channels, 1.0);
    factors.constant.assign(channels, -0.0);  // x + -0.0 is x, also for -0.0
    factors.pattern_unit = to_bytes ? 255.0 : 1.0;
    for (size_t c = 0; mean && std && c < channels; ++c) {
      factors.image[c] = factors.pattern[c] = 1.0 / (*std)[c];
      factors.constant[c] = -(*mean)[c] / (*std)[c];
    }
    transform(images, &pattern, mask, geometry_of(images, mask, layout, index, offset), factors, out);
  }
  return given_back(out, images_, layout);
}

template <class A>
Tensor added(const Tensor& parts_of, const std::vector<int64_t>& shape, int64_t chunks) {
  Tensor sums = torch::stable::new_empty(parts_of, shape, parts_of.scalar_type());
  const int64_t size = sums.numel();
  if (size == 0) return sums;
  launch(sums, add_chunks<A>, dim3(static_cast<unsigned>(parts(size, kThreads))), dim3(kThreads), 0,
         static_cast<const A*>(parts_of.const_data_ptr()), static_cast<A*>(sums.mutable_data_ptr()), size,
         static_cast<int>(chunks));
  return sums;
}

template <class A, class X>
void launch_sums(const Tensor& like, const SumJob<A>& job, dim3 grid, dim3 block, size_t shared) {
  if constexpr (std::is_same_v<A, float>) {
    switch (job.grad_type) {
      case ScalarType::Half: launch(like, sum_gradients<X, Known<Half>, A>, grid, block, shared, job); return;
      case ScalarType::BFloat16: launch(like, sum_gradients<X, Known<BFloat16>, A>, grid, block, shared, job); return;
      case ScalarType::Float: launch(like, sum_gradients<X, Known<float>, A>, grid, block, shared, job); return;
      default: break;
    }
  }
  launch(like, sum_gradients<Unknown, Unknown, A>, grid, block, shared, job);
}

template <class A>
std::tuple<OptionalTensor, OptionalTensor> sums_of(const Tensor& grad, const Tensor& images, const Tensor& pattern,
                                                   const Tensor& mask, const Geometry& geometry,
                                                   const ChannelFactors& factors, bool need_pattern, bool need_mask) {
  const int64_t area = int64_t{geometry.rows} * geometry.columns, tiles = parts(area, kWarp);
  const int64_t blocks = std::max<int64_t>(1, tiles * geometry.triggers);
  const int64_t wanted = std::min(parts(geometry.batch, kImages), parts(kBlocks, blocks));
  const int64_t chunk = std::max<int64_t>(1, parts(geometry.batch, std::max<int64_t>(1, wanted)));
  const int64_t chunks = std::max<int64_t>(1, parts(geometry.batch, chunk));
  const auto shape = [&](const Tensor& like) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    return sizes;
  };
  const auto parts_for = [&](const Tensor& like) {
    std::vector<int64_t> sizes = shape(like);
    if (chunks > 1) sizes.insert(sizes.begin(), chunks);
    return torch::stable::new_empty(like, sizes, like.scalar_type());
  };
  OptionalTensor grad_pattern, grad_mask, table;
  SumJob<A> job{};
  job.geometry = geometry;
  job.images = images.const_data_ptr();
  job.grad = grad.const_data_ptr();
  job.images_type = images.scalar_type();
  job.grad_type = grad.scalar_type();
  job.pattern = static_cast<const A*>(pattern.const_data_ptr());
  job.mask = static_cast<const A*>(mask.const_data_ptr());
  job.image_unit = job.images_type == ScalarType::Byte ? static_cast<A>(1.0 / 255.0) : A(1);
  for (int c = 0; c < std::min(geometry.channels, kInline); ++c) job.factor[c] = static_cast<A>(factors.image[c]);
  if (need_pattern) {
    grad_pattern = parts_for(pattern);
    job.grad_pattern = static_cast<A*>(grad_pattern->mutable_data_ptr());
  }
  if (need_mask) {
    grad_mask = parts_for(mask);
    job.grad_mask = static_cast<A*>(grad_mask->mutable_data_ptr());
  }
  if (area > 0) {
    if (geometry.channels > kInline) {
      table = factor_table<A>(mask, factors);
      job.table = static_cast<const A*>(table->const_data_ptr());
    }
    job.tiles = static_cast<int>(tiles);
    job.chunk = chunk;
    int64_t warps = 4;
    while (warps < most_warps<A> && warps * 8 <= geometry.batch) warps *= 2;
    const dim3 grid(static_cast<unsigned>(tiles * geometry.triggers * chunks)), block(kWarp, static_cast<unsigned>(warps));
    const size_t shared = 2 * kChannels * static_cast<size_t>(warps) * kWarp * sizeof(A);
    switch (job.images_type) {
      case ScalarType::Byte: launch_sums<A, Known<uint8_t>>(mask, job, grid, block, shared); break;
      case ScalarType::Half: launch_sums<A, Known<Half>>(mask, job, grid, block, shared); break;
      case ScalarType::BFloat16: launch_sums<A, Known<BFloat16>>(mask, job, grid, block, shared); break;
      default: launch_sums<A, Known<float>>(mask, job, grid, block, shared); break;
    }
  }
  if (chunks > 1 && need_pattern) grad_pattern = added<A>(*grad_pattern, shape(pattern), chunks);
  if (chunks > 1 && need_mask) grad_mask = added<A>(*grad_mask, shape(mask), chunks);
  return {grad_pattern, grad_mask};
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
  const size_t channels = images_.size(1);
  ChannelFactors factors;
  factors.image.assign(channels, 1.0);
  for (size_t c = 0; std && c < channels; ++c) factors.image[c] = 1.0 / (*std)[c];
  factors.pattern = factors.image;
  factors.constant.assign(channels, -0.0);
  factors.pattern_unit = 1.0;

  Tensor grad_images = need_images ? result_like(images_, layout, images_.scalar_type())
                                   : torch::stable::new_empty(images_, {0});
  if (need_images) {
    // dx is a blend of the gradient with nothing.
    if (images_.numel() > 0) transform(grad, nullptr, mask, geometry, factors, grad_images);
    grad_images = given_back(grad_images, images_, layout);
  }
  Tensor grad_pattern = torch::stable::new_empty(pattern_, {0}), grad_mask = torch::stable::new_empty(mask_, {0});
  if (need_pattern || need_mask) {
    const Tensor images = need_mask ? laid_out(images_, layout) : images_;
    const auto [for_pattern, for_mask] =
        type == ScalarType::Double
            ? sums_of<double>(grad, images, pattern, mask, geometry, factors, need_pattern, need_mask)
            : sums_of<float>(grad, images, pattern, mask, geometry, factors, need_pattern, need_mask);
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
