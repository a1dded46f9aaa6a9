// isolation_loss on the GPU; bdcore/ops/isolation_loss.py has the equations.
#include <cassert>
#include <tuple>

#include "launch.h"

namespace bdcore {
namespace {

enum Mode : int64_t { ce = 0, ascent = 1, lga = 2, flood = 3 };        // as in bdcore/ops/isolation_loss.py
enum Reduction : int64_t { none = 0, mean = 1, sum = 2, batch = 3 };  // likewise

constexpr int kThreads = 256, kMostThreads = 1024;
constexpr int64_t kMostBlocks = 4096;   // not the device's number, so that sums have the same order on all
constexpr int64_t kOneBlock = 16384;    // logits that one block reduces sooner than a second kernel starts
constexpr int64_t kMostFlat = 1 << 20;  // blocks of the backward pass

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm_1p(float x) { return log1pf(x); }
__device__ __forceinline__ double logarithm_1p(double x) { return log1p(x); }

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  Pack<T, V> pack;
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    reinterpret_cast<uint4&>(pack) = *reinterpret_cast<const uint4*>(from);
  } else {
    pack = *reinterpret_cast<const Pack<T, V>*>(from);
  }
  return pack;
}

template <class T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(pack);
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

// What the mode makes of a cross entropy, and its derivative.
template <class A>
struct Shape {
  int64_t mode;
  A gamma;

  __device__ A slope(A loss) const {
    if (mode == ce) return 1;
    if (mode == ascent) return -1;
    const A distance = loss - gamma;
    return distance > 0 ? A(1) : distance < 0 ? A(-1) : distance == distance ? A(0) : distance;
  }
  __device__ A value(A loss, A slope) const { return mode == flood ? slope * (loss - gamma) + gamma : slope * loss; }
};

template <class A>
struct Work {
  const int64_t* labels;
  int64_t rows, classes, ignore, reduction;
  Shape<A> shape;
  A smoothing;
  A* losses;    // [rows] where nothing is reduced
  A* saved;     // [4, rows] and the factor, see isolation_loss.py
  A* partial;   // [2, blocks] of the losses' sum and the number of samples not ignored
  A* result;    // where something is reduced
};

// What the losses of all rows come to; one thread calls it.
template <class A>
__device__ void conclude(const Work<A>& work, A total, A used) {
  A factor = 1;
  if (work.reduction == mean || work.reduction == batch) {
    factor = A(1) / used;
    total /= used;
  }
  if (work.reduction == batch) {
    const A slope = work.shape.slope(total);
    total = work.shape.value(total, slope);
    factor *= slope;
  }
  *work.result = total;
  work.saved[4 * work.rows] = factor;
}

// The sum over a block, in thread 0, always in the same order.
template <class A>
__device__ A block_sum(A value) {
  __shared__ A warps[kMostThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = 0;
  if (threadIdx.x == 0) {
    for (unsigned int warp = 0; warp < blockDim.x / kWarp; ++warp) total += warps[warp];
  }
  return total;
}

// From what has been read of a row to what is kept: `highest` is the largest logit of all classes but the label's,
// `rest` their sum of e^(logit - highest), `total` the sum of all logits. Returns the loss.
template <class A>
__device__ A keep(const Work<A>& work, int64_t row, A picked, A highest, A rest, A total) {
  const A top = picked > highest ? picked : highest;
  rest *= exponential(highest - top);
  const A below = picked - top, all = rest + exponential(below);
  // Where the label has the largest logit its term is exactly 1, and what the others add to it decides.
  const A logsum = logarithm_1p(below == 0 ? rest : all - 1);
  A loss = logsum - below;
  if (work.smoothing > 0) {
    loss = (1 - work.smoothing) * loss + work.smoothing * (logsum + (top - total / work.classes));
  }
  // The batch's mean is of plain cross entropies; `conclude` applies the mode to it.
  const A slope = work.reduction == batch ? A(1) : work.shape.slope(loss);
  loss = work.reduction == batch ? loss : work.shape.value(loss, slope);
  A* saved = work.saved + row;
  saved[0] = top;
  saved[work.rows] = 1 / all;
  saved[2 * work.rows] = slope;
  saved[3 * work.rows] = -rest / all;
  if (work.reduction == none) work.losses[row] = loss;
  return loss;
}

// Likewise for an ignored sample.
template <class A>
__device__ A keep_nothing(const Work<A>& work, int64_t row) {
  for (int k = 0; k < 4; ++k) work.saved[k * work.rows + row] = 0;
  if (work.reduction == none) work.losses[row] = 0;
  return 0;
}

// G neighbouring threads take a row, V logits each at a time; the threads of a warp stay together.
template <class T, int V, int G>
__global__ void __launch_bounds__(kMostThreads) forward_kernel(const T* logits, Work<Accumulator<T>> work) {
  using A = Accumulator<T>;
  const A infinity = static_cast<A>(INFINITY);
  const int lane = threadIdx.x % G;
  const int64_t per_block = blockDim.x / G;
  A losses = 0, used = 0;
  for (int64_t first = blockIdx.x * per_block; first < work.rows; first += gridDim.x * per_block) {
    const int64_t row = first + threadIdx.x / G;
    const int64_t label = row < work.rows ? work.labels[row] : work.ignore;
    const bool counts = label != work.ignore;
    if (counts) assert(label >= 0 && label < work.classes && "labels must be in [0, C) or ignore_index");
    const T* z = logits + (counts ? row * work.classes : 0);
    // Of all classes but the label's: the largest logit, and the sum of e^(logit - top).
    A top = -infinity, rest = 0, total = 0;
#pragma unroll 4
    for (int64_t j = lane * V; j < (counts ? work.classes : 0); j += G * V) {
      const Pack<T, V> pack = load_pack<T, V>(z + j);
      A value[V], highest = -infinity;
#pragma unroll
      for (int k = 0; k < V; ++k) value[k] = static_cast<A>(pack.value[k]);
      if (work.smoothing > 0) {
#pragma unroll
        for (int k = 0; k < V; ++k) total += value[k];
      }
      if (static_cast<unsigned long long>(label - j) < V) {
#pragma unroll
        for (int k = 0; k < V; ++k) value[k] = label - j == k ? -infinity : value[k];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) highest = value[k] > highest ? value[k] : highest;
      if (highest > top) {
        rest *= exponential(top - highest);
        top = highest;
      }
      const A shift = top == -infinity ? A(0) : top;  // e^(-inf - -inf) would be NaN
#pragma unroll
      for (int k = 0; k < V; ++k) rest += exponential(value[k] - shift);
    }
    A highest = top;
#pragma unroll
    for (int step = G / 2; step > 0; step /= 2) {
      const A other = __shfl_xor_sync(0xffffffffu, highest, step);
      highest = other > highest ? other : highest;
    }
    rest *= exponential(top - (highest == -infinity ? A(0) : highest));
#pragma unroll
    for (int step = G / 2; step > 0; step /= 2) {
      rest += __shfl_xor_sync(0xffffffffu, rest, step);
      total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (lane == 0 && row < work.rows) {
      losses += counts ? keep(work, row, static_cast<A>(z[label]), highest, rest, total) : keep_nothing(work, row);
      used += counts;
    }
  }
  if (work.reduction == none) {
    if (blockIdx.x == 0 && threadIdx.x == 0) work.saved[4 * work.rows] = 1;
    return;
  }
  losses = block_sum(losses);
  used = block_sum(used);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    conclude(work, losses, used);
  } else {
    work.partial[blockIdx.x] = losses;
    work.partial[gridDim.x + blockIdx.x] = used;
  }
}

template <class A>
__global__ void reduce_kernel(int blocks, Work<A> work) {
  A losses = 0, used = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    losses += work.partial[i];
    used += work.partial[blocks + i];
  }
  losses = block_sum(losses);
  used = block_sum(used);
  if (threadIdx.x == 0) conclude(work, losses, used);
}

// What all logits of a row have in common.
template <class A>
struct RowGradient {
  int64_t label;
  A top, weight, even, at_label;
  bool zero;

  __device__ RowGradient(const A* grad, int64_t grad_stride, const int64_t* labels, const A* saved, int64_t rows,
                         int64_t row, A smoothing, A each) {
    const A slope = saved[2 * rows + row], pull = grad[row * grad_stride] * saved[4 * rows] * slope;
    label = labels[row];
    top = saved[row];
    weight = pull * saved[rows + row];
    even = pull * each;
    at_label = pull * (saved[3 * rows + row] + smoothing) - even;
    zero = slope == 0;  // ignored, or on the edge: no gradient, not even of NaN
  }
  __device__ A at(int64_t column, A logit) const {
    const A found = column == label ? at_label : exponential(logit - top) * weight - even;
    return zero ? A(0) : found;
  }
};

// Over all logits as one long row; Index is of 32 bits where they can count them, since 64-bit division is slow.
template <class T, int V, class Index>
__global__ void backward_kernel(const Accumulator<T>* grad, int64_t grad_stride, const T* logits, const int64_t* labels,
                                const Accumulator<T>* saved, Index rows, Index classes, Accumulator<T> smoothing,
                                T* out) {
  using A = Accumulator<T>;
  const Index total = rows * classes, threads = static_cast<Index>(gridDim.x) * blockDim.x;
  const A each = smoothing / static_cast<A>(classes);
  for (Index pack = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; pack < (total + V - 1) / V;
       pack += threads) {
    const Index first = pack * V;
    Index row = first / classes, column = first - row * classes;
    RowGradient<A> common(grad, grad_stride, labels, saved, rows, row, smoothing, each);
    const bool whole = first + V <= total;
    Pack<T, V> values = {};
    if (whole) values = load_pack<T, V>(logits + first);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (!whole) {
        if (first + k >= total) break;
        values.value[k] = logits[first + k];
      }
      if (column == classes) {
        column = 0;
        ++row;
        common = RowGradient<A>(grad, grad_stride, labels, saved, rows, row, smoothing, each);
      }
      values.value[k] = static_cast<T>(common.at(static_cast<int64_t>(column), static_cast<A>(values.value[k])));
      ++column;
      if (!whole) out[first + k] = values.value[k];
    }
    if (whole) store_pack<T, V>(out + first, values);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t blocks_for(int64_t items, int64_t per_block, int64_t most) {
  return std::clamp<int64_t>((items + per_block - 1) / per_block, 1, most);
}

template <class T>
void forward(const Tensor& logits, int64_t blocks, int threads, int lanes, bool packed,
             const Work<Accumulator<T>>& work) {
  constexpr int V = 16 / sizeof(T);
  const T* z = static_cast<const T*>(logits.const_data_ptr());
  const dim3 grid(static_cast<unsigned int>(blocks)), block(threads);
  if (packed) {
    if (lanes == kWarp) {
      launch(logits, forward_kernel<T, V, kWarp>, grid, block, 0, z, work);
    } else {
      launch(logits, forward_kernel<T, V, 8>, grid, block, 0, z, work);
    }
  } else if (lanes == kWarp) {
    launch(logits, forward_kernel<T, 1, kWarp>, grid, block, 0, z, work);
  } else {
    launch(logits, forward_kernel<T, 1, 8>, grid, block, 0, z, work);
  }
}

// losses, saved
std::tuple<Tensor, Tensor> isolation_loss(const Tensor& logits, const Tensor& labels, double gamma, int64_t mode,
                                          int64_t ignore_index, double smoothing, int64_t reduction) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && labels.dim() == 1 &&
                      labels.size(0) == logits.size(0) && labels.scalar_type() == ScalarType::Long,
                  "isolation_loss: logits must be [B, C] with C >= 1, and labels int64 [B]");
  const OnDeviceOf on(logits);
  const Tensor dense = as_contiguous(logits), dense_labels = as_contiguous(labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType type = accumulator_of(logits.scalar_type());
  Tensor saved = torch::stable::new_empty(logits, {4 * rows + 1}, type);
  Tensor result = reduction == none ? torch::stable::new_empty(logits, {rows}, type)
                                    : torch::stable::new_empty(logits, {}, type);

  const bool alone = reduction != none && rows * classes <= kOneBlock;
  const int threads = alone ? kMostThreads : kThreads;
  BDCORE_FLOATS(logits.scalar_type(), T, {
    using A = Accumulator<T>;
    constexpr int64_t V = 16 / sizeof(T);
    const bool packed = classes % V == 0 && aligned(dense.const_data_ptr());
    const int lanes = classes / (packed ? V : 1) > 16 ? kWarp : 8;
    const int64_t blocks = alone ? 1 : blocks_for(rows, threads / lanes, kMostBlocks);
    std::optional<Tensor> partial;
    if (reduction != none && blocks > 1) partial = torch::stable::new_empty(logits, {2 * blocks}, type);
    A* out = static_cast<A*>(result.mutable_data_ptr());
    const Work<A> work{static_cast<const int64_t*>(dense_labels.const_data_ptr()),
                       rows,
                       classes,
                       ignore_index,
                       reduction,
                       {mode, static_cast<A>(gamma)},
                       static_cast<A>(smoothing),
                       reduction == none ? out : nullptr,
                       static_cast<A*>(saved.mutable_data_ptr()),
                       partial ? static_cast<A*>(partial->mutable_data_ptr()) : nullptr,
                       reduction == none ? nullptr : out};
    forward<T>(dense, blocks, threads, lanes, packed, work);
    if (partial) {
      launch(dense, reduce_kernel<A>, dim3(1), dim3(kThreads), 0, static_cast<int>(blocks), work);
    }
  })
  return {result, saved};
}

template <class T, class Index>
void backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& saved, double smoothing,
              Tensor& out) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const T* z = static_cast<const T*>(logits.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const auto run = [&](auto kernel, int64_t width) {
    const int64_t blocks = blocks_for((rows * classes + width - 1) / width, kThreads, kMostFlat);
    launch(logits, kernel, dim3(static_cast<unsigned int>(blocks)), dim3(kThreads), 0,
           static_cast<const A*>(grad.const_data_ptr()), grad.dim() == 0 ? int64_t{0} : grad.stride(0), z,
           static_cast<const int64_t*>(labels.const_data_ptr()), static_cast<const A*>(saved.const_data_ptr()),
           static_cast<Index>(rows), static_cast<Index>(classes), static_cast<A>(smoothing), to);
  };
  if (aligned(z) && aligned(to)) {
    run(backward_kernel<T, V, Index>, V);
  } else {
    run(backward_kernel<T, 1, Index>, 1);
  }
}

Tensor isolation_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& saved,
                               double smoothing) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(saved.numel() == 4 * rows + 1 && grad.scalar_type() == saved.scalar_type() && classes >= 1 &&
                      labels.numel() == rows && (grad.dim() == 0 || (grad.dim() == 1 && grad.size(0) == rows)),
                  "isolation_loss_backward: grad must be a scalar or [B], and saved what the forward pass returned");
  const OnDeviceOf on(logits);
  const Tensor dense = as_contiguous(logits), dense_labels = as_contiguous(labels), dense_saved = as_contiguous(saved);
  Tensor out = torch::stable::new_empty(logits, {rows, classes}, logits.scalar_type());
  if (rows == 0) return out;
  BDCORE_FLOATS(logits.scalar_type(), T, {
    if (rows * classes < (int64_t{1} << 30)) {
      backward<T, unsigned int>(grad, dense, dense_labels, dense_saved, smoothing, out);
    } else {
      backward<T, unsigned long long>(grad, dense, dense_labels, dense_saved, smoothing, out);
    }
  })
  return out;
}

}  // namespace
}  // namespace bdcore

BDCORE_CUDA_IMPL(m) {
  m.impl("isolation_loss", TORCH_BOX(&bdcore::isolation_loss));
  m.impl("isolation_loss_backward", TORCH_BOX(&bdcore::isolation_loss_backward));
}
