// The gradients of patterns and masks: sums over the images of each trigger, in an order that never changes.
#pragma once

#include <tuple>

#include "trigger_window.h"

namespace bdcore {

constexpr int kAdders = 256;  // threads of add_chunks
constexpr int kTogether = 4;  // channels, and
constexpr int kPair = 2;      // images whose gradients a thread reads at once
constexpr int64_t kBlocks = 256, kImages = 256;  // blocks that fill a GPU, images that are worth a block

template <class A>
struct SumJob {
  Geometry geometry;
  const void* images;
  const void* grad;
  ScalarType images_type, grad_type;
  const A* pattern;
  const A* mask;
  A image_unit;
  Normalisation<A> normalisation;
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
  BDCORE_SHARED(A, shared);  // [2 * kTogether, warps, kWarp]
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

  for (int c0 = 0; c0 < g.channels; c0 += kTogether) {
    A slope[kTogether] = {}, product[kTogether] = {};
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
        A slopes[kPair][kTogether], values[kPair][kTogether];
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
#pragma unroll
          for (int c = 0; c < kTogether; ++c) {
            const bool there = at[k] >= 0 && c0 + c < g.channels;
            const int64_t place = at[k] + static_cast<int64_t>(c) * step;
            slopes[k][c] = there ? G::template load<A>(job.grad, job.grad_type, place) : A(0);
            const bool wanted = there && grad_mask != nullptr;
            values[k][c] = wanted ? X::template load<A>(job.images, job.images_type, place) : A(0);
          }
        }
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
#pragma unroll
          for (int c = 0; c < kTogether; ++c) {
            slope[c] += slopes[k][c];
            product[c] += values[k][c] * slopes[k][c];
          }
        }
      }
    }
    A mine[2 * kTogether] = {};
#pragma unroll
    for (int c = 0; c < kTogether; ++c) {
      const int channel = c0 + c;
      if (channel >= g.channels || pixel >= area) continue;
      const A factor = job.normalisation.factor(channel, g.channels);
      const A m = job.mask[(trigger * g.mask_channels + (apart ? channel : 0)) * area + pixel];
      const A p = job.pattern[(trigger * g.channels + channel) * area + pixel];
      mine[c] = m * (slope[c] * factor);
      mine[kTogether + c] = (p * slope[c] - product[c] * job.image_unit) * factor;
      together[0] += mine[kTogether + c];
    }
    reduce(mine, apart ? 2 * kTogether : kTogether, [&](int v) -> A* {
      const int channel = c0 + v % kTogether;
      A* const to = v < kTogether ? grad_pattern : grad_mask;
      return to == nullptr || channel >= g.channels ? nullptr : to + static_cast<int64_t>(channel) * area;
    });
  }
  if (!apart && grad_mask != nullptr) reduce(together, 1, [&](int) { return grad_mask; });
}

template <class A>
__global__ void __launch_bounds__(kAdders) add_chunks(const A* parts, A* sums, int64_t size, int chunks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAdders + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * size + i];
  sums[i] = sum;
}

template <class A>
Tensor added(const Tensor& parts_of, const std::vector<int64_t>& shape, int64_t chunks) {
  Tensor sums = torch::stable::new_empty(parts_of, shape, parts_of.scalar_type());
  const int64_t size = sums.numel();
  if (size == 0) return sums;
  launch(sums, add_chunks<A>, dim3(static_cast<unsigned>(parts(size, kAdders))), dim3(kAdders), 0,
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
                                                   const OptionalFloats& mean, const OptionalFloats& std,
                                                   bool need_pattern, bool need_mask) {
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
  job.normalisation = normalisation_of<A>(mask, mean, std, table);
  if (need_pattern) {
    grad_pattern = parts_for(pattern);
    job.grad_pattern = static_cast<A*>(grad_pattern->mutable_data_ptr());
  }
  if (need_mask) {
    grad_mask = parts_for(mask);
    job.grad_mask = static_cast<A*>(grad_mask->mutable_data_ptr());
  }
  if (area > 0) {
    job.tiles = static_cast<int>(tiles);
    job.chunk = chunk;
    int64_t warps = 4;
    while (warps < most_warps<A> && warps * 8 <= geometry.batch) warps *= 2;
    const dim3 grid(static_cast<unsigned>(tiles * geometry.triggers * chunks));
    const dim3 block(kWarp, static_cast<unsigned>(warps));
    const size_t shared = 2 * kTogether * static_cast<size_t>(warps) * kWarp * sizeof(A);
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

}  // namespace bdcore
