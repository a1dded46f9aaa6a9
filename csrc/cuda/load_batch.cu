// load_batch on the GPU: one kernel a batch. A block makes a piece of an image, a thread 16 bytes of it at a time.
#include <cassert>

#include "../common/philox.h"
#include "pixels.h"

namespace bdcore {
namespace {

using Numbers = std::optional<std::vector<double>>;

constexpr int kThreads = 256;
constexpr int kPacks = 4;       // for each thread of a block

struct Job {
  const unsigned char* images;
  const unsigned char* images_end;
  int64_t samples, image_stride;
  int channel_stride, row_stride, column_stride;
  int channels, height, width;
  const int64_t* index;
  unsigned long long seed;
  int crop, cutout;
  bool flip;

  int triggers;             // 0: none
  const int64_t* trigger;   // each image's, -1: none; null: the first for all
  const int64_t* offset;    // top and left of each image's window; null: 0, 0
  const void* pattern;      // [T, C, rows, columns], float or double
  const void* mask;         // [T, mask_channels, rows, columns]
  int mask_channels, rows, columns;

  bool normalised;
  const void* table;        // [2, C], mean and 1 / std, of more than kChannels channels
  double mean[kChannels], factor[kChannels];
  int blocks;               // for each image
  void* out;
};

// What is the same for all pixels of an image; bdcore/ops/load_batch.py says which random number becomes what.
struct Sample {
  const unsigned char* source;
  int top, left;            // the source's pixel that the window begins at
  int hole_top, hole_left;
  bool flip;
  int64_t trigger;
  int window_top, window_left;
};

__device__ __forceinline__ int below(unsigned int bound, unsigned int number) {
  return static_cast<int>((static_cast<unsigned long long>(bound) * number) >> 32);
}

__device__ Sample draw(const Job& job, int64_t image) {
  const int64_t number = job.index[image];
  assert(number >= 0 && number < job.samples && "load_batch: index outside of the images");
  Sample sample = {job.images + number * job.image_stride, 0, 0, 0, 0, false, -1, 0, 0};
  if (job.crop != 0 || job.cutout != 0) {
    const PhiloxNumbers numbers = philox(job.seed, static_cast<unsigned long long>(number), 0);
    const unsigned int places = 2 * static_cast<unsigned int>(job.crop) + 1;
    sample.top = below(places, numbers.value[0]) - job.crop;
    sample.left = below(places, numbers.value[1]) - job.crop;
    sample.hole_top = below(job.height, numbers.value[2]) - job.cutout / 2;
    sample.hole_left = below(job.width, numbers.value[3]) - job.cutout / 2;
  }
  if (job.flip) sample.flip = (philox(job.seed, static_cast<unsigned long long>(number), 1).value[0] & 1u) != 0;
  if (job.triggers > 0) {
    sample.trigger = job.trigger == nullptr ? 0 : job.trigger[image];
    assert(sample.trigger >= -1 && sample.trigger < job.triggers && "load_batch: trigger outside of the patterns");
    const int64_t top = job.offset == nullptr ? 0 : job.offset[2 * image];
    const int64_t left = job.offset == nullptr ? 0 : job.offset[2 * image + 1];
    assert(top >= 0 && top <= job.height - job.rows && "load_batch: offset places a patch outside of the images");
    assert(left >= 0 && left <= job.width - job.columns && "load_batch: offset places a patch outside of the images");
    sample.window_top = static_cast<int>(top);
    sample.window_left = static_cast<int>(left);
  }
  return sample;
}

// A place in an image of the result, channels last.
struct Place {
  int y, x, c;
  __device__ __forceinline__ void advance(int width, int channels) {
    if (++c < channels) return;
    c = 0;
    if (++x < width) return;
    x = 0;
    ++y;
  }
};

// Whether the N values from `place` on lie in the source as they do in the result; if so, they are read four at a time.
template <int N>
__device__ __forceinline__ bool copied(const Job& job, const Sample& sample, Place place, int channels,
                                       unsigned char* value) {
  if constexpr (N % 4 != 0) {
    return false;
  } else {
    if (sample.flip || job.channel_stride != 1 || job.column_stride != channels) return false;
    const int row = place.y + sample.top, column = place.x + sample.left;
    if (row < 0 || row >= job.height || column < 0 || column >= job.width) return false;
    if (static_cast<unsigned>(place.y - sample.hole_top) < static_cast<unsigned>(job.cutout)) return false;
    const int line = job.width * channels, from = column * channels + place.c;
    if (place.x * channels + place.c + N > line || from + N > line) return false;
    const unsigned char* first = sample.source + static_cast<int64_t>(row) * job.row_stride + from;
    const unsigned int odd = static_cast<unsigned int>(reinterpret_cast<size_t>(first) & 3u);
    const unsigned char* words = first - odd;
    if (words < job.images || words + N + (odd == 0 ? 0 : 4) > job.images_end) return false;
    const unsigned int* word = reinterpret_cast<const unsigned int*>(words);
    unsigned int low = word[0];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const unsigned int high = i + 1 < N / 4 || odd != 0 ? word[i + 1] : 0;
      const unsigned int four =
          static_cast<unsigned int>(((static_cast<unsigned long long>(high) << 32) | low) >> (8 * odd));
#pragma unroll
      for (int k = 0; k < 4; ++k) value[4 * i + k] = static_cast<unsigned char>(four >> (8 * k));
      low = high;
    }
    return true;
  }
}

__device__ __forceinline__ unsigned char gathered(const Job& job, const Sample& sample, Place place) {
  const int row = place.y + sample.top;
  const int column = (sample.flip ? job.width - 1 - place.x : place.x) + sample.left;
  const bool hidden = static_cast<unsigned>(place.y - sample.hole_top) < static_cast<unsigned>(job.cutout) &&
                      static_cast<unsigned>(place.x - sample.hole_left) < static_cast<unsigned>(job.cutout);
  if (hidden || row < 0 || row >= job.height || column < 0 || column >= job.width) return 0;
  return sample.source[row * job.row_stride + column * job.column_stride + place.c * job.channel_stride];
}

template <class T, class A>
__device__ __forceinline__ T finished(const Job& job, const Sample& sample, Place place, const A* constants,
                                      unsigned char value) {
  const int y = place.y - sample.window_top, x = place.x - sample.window_left;
  const bool inside = sample.trigger >= 0 && static_cast<unsigned>(y) < static_cast<unsigned>(job.rows) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(job.columns);
  A m = 0, p = 0;
  if (inside) {
    const int64_t area = static_cast<int64_t>(job.rows) * job.columns;
    const int64_t pixel = static_cast<int64_t>(y) * job.columns + x;
    const int channel = job.mask_channels == 1 ? 0 : place.c;
    m = static_cast<const A*>(job.mask)[(sample.trigger * job.mask_channels + channel) * area + pixel];
    p = static_cast<const A*>(job.pattern)[(sample.trigger * job.channels + place.c) * area + pixel];
  }
  if constexpr (sizeof(T) == 1) {
    return inside ? nearest(blended(static_cast<A>(value), m, p * static_cast<A>(255))) : value;
  } else {
    A result = unit(static_cast<A>(value));
    if (inside) result = blended(result, m, p);
    if (job.normalised) result = (result - constants[place.c]) * constants[job.channels + place.c];
    if constexpr (sizeof(T) == sizeof(A)) {
      return result;
    } else {
      return static_cast<T>(static_cast<float>(result));
    }
  }
}

// N: values that a thread writes at once; Channels: 0 where they are not known here.
template <class T, class A, int N, int Channels>
__global__ void __launch_bounds__(kThreads) load_batch_kernel(Job job) {
  BDCORE_SHARED(A, arguments);
  const A* constants = job.table == nullptr ? arguments : static_cast<const A*>(job.table);
  __shared__ Sample sample;
  const int channels = Channels == 0 ? job.channels : Channels;
  const int64_t image = blockIdx.x / job.blocks;
  const int block = static_cast<int>(blockIdx.x % job.blocks);
  if (threadIdx.x == 0) sample = draw(job, image);
  for (int i = threadIdx.x; job.normalised && job.table == nullptr && i < 2 * channels; i += blockDim.x) {
    arguments[i] = static_cast<A>(i < channels ? job.mean[i] : job.factor[i - channels]);
  }
  __syncthreads();

  const unsigned int line = job.width * channels, packs = line * job.height / N;
  const unsigned int first = block * blockDim.x * kPacks, last = min(first + blockDim.x * kPacks, packs);
  Pack<T, N>* out = static_cast<Pack<T, N>*>(job.out) + image * packs;
  for (unsigned int pack = first + threadIdx.x; pack < last; pack += blockDim.x) {
    const unsigned int y = pack * N / line, within = pack * N - y * line, x = within / channels;
    const Place start = {static_cast<int>(y), static_cast<int>(x), static_cast<int>(within - x * channels)};
    unsigned char value[N];
    if (!copied<N>(job, sample, start, channels, value)) {
      Place place = start;
#pragma unroll
      for (int k = 0; k < N; ++k, place.advance(job.width, channels)) value[k] = gathered(job, sample, place);
    }
    Pack<T, N> result;
    Place place = start;
#pragma unroll
    for (int k = 0; k < N; ++k, place.advance(job.width, channels)) {
      result.value[k] = finished<T, A>(job, sample, place, constants, value[k]);
    }
    out[pack] = result;
  }
}

template <class T, class A, int N, int Channels>
void start(Job& job, const Tensor& out) {
  const int64_t numbers = static_cast<int64_t>(job.channels) * job.height * job.width;
  const int64_t packs = numbers / N;
  const int64_t threads = std::min<int64_t>(kThreads, (packs + kWarp - 1) / kWarp * kWarp);
  const int64_t blocks = (packs + threads * kPacks - 1) / (threads * kPacks);
  const int64_t grid = out.numel() / numbers * blocks;
  STD_TORCH_CHECK(grid < (int64_t{1} << 31), "load_batch: a batch of ", out.numel(), " numbers is too large");
  job.blocks = static_cast<int>(blocks);
  job.out = out.mutable_data_ptr();
  const size_t shared = job.normalised && job.table == nullptr ? 2 * static_cast<size_t>(job.channels) * sizeof(A) : 0;
  launch(out, load_batch_kernel<T, A, N, Channels>, dim3(static_cast<unsigned>(grid)),
         dim3(static_cast<unsigned>(threads)), shared, job);
}

template <class T>
void start_float(Job& job, const Tensor& out) {
  constexpr int N = 16 / sizeof(T);
  const int64_t numbers = static_cast<int64_t>(job.channels) * job.height * job.width;
  if (numbers % N != 0) {
    start<T, float, 1, 0>(job, out);
  } else if (job.channels == 3) {
    start<T, float, N, 3>(job, out);
  } else {
    start<T, float, N, 0>(job, out);
  }
}

int fits(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value < (int64_t{1} << 30), "load_batch: an image spans 2^30 bytes or more");
  return static_cast<int>(value);
}

Tensor load_batch(Tensor images, Tensor index, int64_t seed, int64_t crop, bool flip, int64_t cutout,
                  std::optional<Tensor> pattern, std::optional<Tensor> mask, std::optional<Tensor> trigger,
                  std::optional<Tensor> offset, Numbers mean, Numbers std, ScalarType out_dtype) {
  const OnDeviceOf guard(images);
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  Tensor out = torch::stable::empty({index.size(0), channels, height, width}, out_dtype, std::nullopt, images.device(),
                                    std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(images.size(0) > 0, "index chooses among no images");
  const bool wide = out_dtype == ScalarType::Double ||
                    (pattern.has_value() && (pattern->scalar_type() == ScalarType::Double ||
                                             mask->scalar_type() == ScalarType::Double));
  const ScalarType accumulator = wide ? ScalarType::Double : ScalarType::Float;

  fits(channels * height * width);
  const int64_t span =
      (channels - 1) * images.stride(1) + (height - 1) * images.stride(2) + (width - 1) * images.stride(3);
  fits(span);
  Job job{};
  job.images = static_cast<const unsigned char*>(images.const_data_ptr());
  job.images_end = job.images + (images.size(0) - 1) * images.stride(0) + span + 1;
  job.samples = images.size(0);
  job.image_stride = images.stride(0);
  job.channel_stride = channels == 1 ? 1 : fits(images.stride(1));
  job.row_stride = height == 1 ? 0 : fits(images.stride(2));
  job.column_stride = width == 1 ? static_cast<int>(channels) : fits(images.stride(3));
  job.channels = static_cast<int>(channels);
  job.height = static_cast<int>(height);
  job.width = static_cast<int>(width);
  job.seed = static_cast<unsigned long long>(seed);
  job.crop = static_cast<int>(crop);
  job.cutout = static_cast<int>(cutout);
  job.flip = flip;

  std::vector<Tensor> kept;
  const auto pointer = [&kept](const Tensor& tensor) {
    kept.push_back(as_contiguous(tensor));
    return kept.back().const_data_ptr();
  };
  job.index = static_cast<const int64_t*>(pointer(index));
  if (pattern.has_value()) {
    job.triggers = static_cast<int>(std::min<int64_t>(pattern->size(0), INT32_MAX));
    job.trigger = trigger.has_value() ? static_cast<const int64_t*>(pointer(*trigger)) : nullptr;
    job.offset = offset.has_value() ? static_cast<const int64_t*>(pointer(*offset)) : nullptr;
    job.pattern = pointer(pattern->scalar_type() == accumulator ? *pattern : torch::stable::to(*pattern, accumulator));
    job.mask = pointer(mask->scalar_type() == accumulator ? *mask : torch::stable::to(*mask, accumulator));
    job.mask_channels = static_cast<int>(mask->size(1));
    job.rows = static_cast<int>(pattern->size(2));
    job.columns = static_cast<int>(pattern->size(3));
  }
  job.normalised = mean.has_value();
  if (job.normalised && channels > kChannels) {
    job.table = pointer(table_of(images, accumulator, *mean, *std));
  } else if (job.normalised) {
    for (int64_t c = 0; c < channels; ++c) {
      job.mean[c] = (*mean)[static_cast<size_t>(c)];
      job.factor[c] = 1.0 / (*std)[static_cast<size_t>(c)];
    }
  }

  if (out_dtype == ScalarType::Byte) {
    wide ? start<unsigned char, double, 1, 0>(job, out) : start_float<unsigned char>(job, out);
  } else if (wide) {
    BDCORE_FLOATS(out_dtype, T, start<T, double, 1, 0>(job, out));
  } else if (out_dtype == ScalarType::Half) {
    start_float<Half>(job, out);
  } else if (out_dtype == ScalarType::BFloat16) {
    start_float<BFloat16>(job, out);
  } else {
    start_float<float>(job, out);
  }
  return out;
}

}  // namespace

BDCORE_CUDA_IMPL(m) { m.impl("load_batch", TORCH_BOX(&load_batch)); }

}  // namespace bdcore
