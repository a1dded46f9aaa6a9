// The model-contrastive loss on the GPU; see bdcore/ops/model_contrastive_loss.py for the formulas.
#include <tuple>

#include "launch.h"

namespace bdcore {

namespace {

constexpr double kEps = 1e-8;

enum Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in bdcore/ops/model_contrastive_loss.py

// The inputs of one call. Strides are in elements; a row's own elements lie side by side.
struct Rows {
  int64_t batch, width, count;  // count: negatives of a row
  double temperature;
  const void* anchor;
  const void* positive;
  const void* negatives;
  int64_t anchor_stride, positive_stride, negatives_stride, negative_stride;

  // The row's vector k: 0 is the positive, 1 the first negative.
  template <class T>
  __device__ const T* other(int64_t row, int64_t k) const {
    if (k == 0) return static_cast<const T*>(positive) + row * positive_stride;
    return static_cast<const T*>(negatives) + row * negatives_stride + (k - 1) * negative_stride;
  }
};

struct Gradients {
  const void* grad;  // of the losses, one for each `grad_stride` elements, to be multiplied by `scale`
  int64_t grad_stride;
  double scale;
  const void* norms;
  const void* cosines;
  void* anchor;  // contiguous, of the inputs' type; null where not asked for
  void* positive;
  void* negatives;
};

template <class A>
__device__ __forceinline__ A length(A norm) {
  return norm < static_cast<A>(kEps) ? static_cast<A>(kEps) : norm;  // NaN stays
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& value) {
  if constexpr (sizeof(value) == sizeof(uint4)) {  // an intrinsic: a plain store is taken apart into single values
    __stcg(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(value));
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = value;
  }
}

// Sums over the threads of a row, all of them at once; every thread gets them.
template <int Warps, int Sums, class A>
__device__ __forceinline__ void row_sums(A (&sums)[Sums], A (*shared)[Sums]) {
#pragma unroll
  for (int i = 0; i < Sums; ++i) sums[i] = warp_sum(sums[i]);
  if (Warps == 1) return;
  __syncthreads();  // others may still be reading the sums before
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < Sums; ++i) shared[threadIdx.x / kWarp][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Sums; ++i) {
    sums[i] = 0;
    for (int warp = 0; warp < Warps; ++warp) sums[i] += shared[warp][i];
  }
}

// blockDim = (threads of a row, rows of a block); several warps share a row only where it is a block's only one.
template <class T, int N, int Warps>
__global__ void __launch_bounds__(256) forward_rows(Rows rows, void* losses, void* norms_, void* cosines_) {
  using A = Accumulator<T>;
  __shared__ A shared[Warps][5];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows.batch) return;  // all threads of the row, and of the block where they meet
  const int64_t count = rows.count;
  const A temperature = static_cast<A>(rows.temperature);
  const T* z = static_cast<const T*>(rows.anchor) + row * rows.anchor_stride;
  A* norms = static_cast<A*>(norms_) + row * (2 + count);
  A* cosines = static_cast<A*>(cosines_) + row * (1 + count);
  const bool writes = threadIdx.x == 0;

  A z_length = 0, positive = 0;
  A largest = -INFINITY, total = 0;  // of e^(s_k / t): total * e^largest
  // Two other vectors at a time, so that with one negative everything is read once and at once.
  for (int64_t k = 0; k <= count; k += 2) {
    const bool pair = k < count;
    const T* first = rows.other<T>(row, k);
    const T* second = rows.other<T>(row, pair ? k + 1 : k);
    A sums[5] = {0, 0, 0, 0, 0};  // z z, w w, z w of the first, then of the second
#pragma unroll 2
    for (int64_t i = threadIdx.x * N; i < rows.width; i += Warps * kWarp * N) {
      const Pack<T, N> a = load_pack<T, N>(z + i), b = load_pack<T, N>(first + i), c = load_pack<T, N>(second + i);
#pragma unroll
      for (int lane = 0; lane < N; ++lane) {
        const A x = static_cast<A>(a.value[lane]), y = static_cast<A>(b.value[lane]);
        const A w = static_cast<A>(c.value[lane]);
        sums[0] += x * x;
        sums[1] += y * y;
        sums[2] += x * y;
        sums[3] += w * w;
        sums[4] += x * w;
      }
    }
    row_sums<Warps>(sums, shared);
    if (k == 0) {
      const A norm = sqrt(sums[0]);
      if (writes) norms[0] = norm;
      z_length = length(norm);
    }
    for (int which = 0; which <= (pair ? 1 : 0); ++which) {
      const A norm = sqrt(sums[1 + 2 * which]);
      const A cosine = sums[2 + 2 * which] / z_length / length(norm);
      if (writes) {
        norms[1 + k + which] = norm;
        cosines[k + which] = cosine;
      }
      const A scaled = cosine / temperature;
      if (k + which == 0) {
        positive = scaled;
      } else if (scaled <= largest) {
        total += exp(scaled - largest);
      } else {  // NaN as well
        total = total * exp(largest - scaled) + 1;
        largest = scaled;
      }
    }
  }
  if (!writes) return;
  const A margin = count == 0 ? -INFINITY : largest - positive + log(total);
  const A loss = margin > 0 ? margin + log1p(exp(-margin)) : log1p(exp(margin));
  static_cast<A*>(losses)[row] = loss;
}

template <class T, int N, int Warps>
__global__ void __launch_bounds__(256) backward_rows(Rows rows, Gradients grads) {
  using A = Accumulator<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows.batch) return;
  const int64_t count = rows.count, width = rows.width;
  const A temperature = static_cast<A>(rows.temperature), eps = static_cast<A>(kEps);
  const A* norms = static_cast<const A*>(grads.norms) + row * (2 + count);
  const A* cosines = static_cast<const A*>(grads.cosines) + row * (1 + count);

  // Every warp of the row goes through its cosines for itself: the softmax, and with a_k = dl/ds_k (times what came
  // from above) the sums of a_k and of a_k s_k over the negatives. That of the positive is minus the sum of the others.
  const int lane = threadIdx.x % kWarp;
  A largest = cosines[0];
  for (int64_t k = lane; k <= count; k += kWarp) largest = cosines[k] > largest ? cosines[k] : largest;
  largest = warp_max(largest);
  A total = 0, others = 0, along = 0;
  for (int64_t k = lane; k <= count; k += kWarp) {
    const A p = exp((cosines[k] - largest) / temperature);
    total += p;
    if (k > 0) {
      others += p;
      along += p * cosines[k];
    }
  }
  total = warp_sum(total);
  others = warp_sum(others);
  along = warp_sum(along);
  const A grad = static_cast<const A*>(grads.grad)[row * grads.grad_stride];
  const A factor = grad * static_cast<A>(grads.scale) / total;
  const A slope_of_positive = -others * factor;
  along = along * factor + slope_of_positive * cosines[0];
  const A per_z = 1 / length(norms[0]);
  const A bend = norms[0] > eps ? -along * per_z * per_z : static_cast<A>(0);

  // dw_k = a_k / (L_k L_z) z - a_k s_k / L_k^2 w_k,  dz = sum_k a_k / (L_k L_z) w_k - sum_k a_k s_k / L_z^2 z, with the
  // last term of each only for a norm above eps.
  const T* z = static_cast<const T*>(rows.anchor) + row * rows.anchor_stride;
  const int64_t first = grads.anchor != nullptr || grads.positive != nullptr ? 0 : 1;  // what is needed for nothing
  const int64_t end = grads.anchor != nullptr || grads.negatives != nullptr ? count + 1 : 1;  // is not read
  for (int64_t i = threadIdx.x * N; i < width; i += Warps * kWarp * N) {
    const Pack<T, N> a = load_pack<T, N>(z + i);
    A sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = bend * static_cast<A>(a.value[j]);
    // Computed anew for each pack: cheaper than the memory that it would take to keep the slopes for any count.
    const auto add = [&](int64_t k, const Pack<T, N>& b) {
      const A slope = k == 0 ? slope_of_positive : exp((cosines[k] - largest) / temperature) * factor;
      const A norm = norms[1 + k], per_w = 1 / length(norm);
      const A pull = slope * per_w * per_z;
      const A own = norm > eps ? -slope * cosines[k] * per_w * per_w : static_cast<A>(0);
      Pack<T, N> written;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A x = static_cast<A>(a.value[j]), y = static_cast<A>(b.value[j]);
        sum[j] += pull * y;
        written.value[j] = static_cast<T>(pull * x + own * y);
      }
      T* target = static_cast<T*>(k == 0 ? grads.positive : grads.negatives);
      if (target != nullptr) store_pack(target + (k == 0 ? row : row * count + k - 1) * width + i, written);
    };
    // Two at a time, so that both are on their way before the first is waited for.
    for (int64_t k = first; k < end; k += 2) {
      const bool pair = k + 1 < end;
      const Pack<T, N> b = load_pack<T, N>(rows.other<T>(row, k) + i);
      const Pack<T, N> c = load_pack<T, N>(rows.other<T>(row, pair ? k + 1 : k) + i);
      add(k, b);
      if (pair) add(k + 1, c);
    }
    if (grads.anchor == nullptr) continue;
    Pack<T, N> written;
#pragma unroll
    for (int j = 0; j < N; ++j) written.value[j] = static_cast<T>(sum[j]);
    store_pack(static_cast<T*>(grads.anchor) + row * width + i, written);
  }
}

Rows rows_of(const Tensor& anchor, const Tensor& positive, const Tensor& negatives, double temperature) {
  Rows rows{};
  rows.batch = anchor.size(0);
  rows.width = anchor.size(1);
  rows.count = negatives.size(1);
  rows.temperature = temperature;
  rows.anchor = anchor.const_data_ptr();
  rows.positive = positive.const_data_ptr();
  rows.negatives = negatives.const_data_ptr();
  rows.anchor_stride = anchor.stride(0);
  rows.positive_stride = positive.stride(0);
  rows.negatives_stride = negatives.stride(0);
  rows.negative_stride = negatives.stride(1);
  return rows;
}

// Whether every row begins where 16 bytes can be read at once, and ends with 16 bytes; new tensors begin so.
template <class T>
bool in_packs(const Rows& rows) {
  constexpr int64_t lanes = 16 / sizeof(T);
  const auto aligned = [](const void* at, int64_t stride) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride % lanes == 0;
  };
  return rows.width % lanes == 0 && aligned(rows.anchor, rows.anchor_stride) &&
         aligned(rows.positive, rows.positive_stride) && aligned(rows.negatives, rows.negatives_stride) &&
         rows.negative_stride % lanes == 0;
}

// Calls run(N, Warps, grid, block) as compile-time numbers: how much is read at once and how many warps share a row.
template <class T, class Run>
void shaped(const Rows& rows, const Run& run) {
  constexpr int lanes = 16 / sizeof(T);
  const auto split = [&](auto n) {
    constexpr int wide = 8, several = 4;
    if (rows.width >= wide * kWarp * decltype(n)::value) {
      run(n, std::integral_constant<int, wide>(), dim3(static_cast<unsigned>(rows.batch)), dim3(wide * kWarp, 1));
    } else {
      const auto blocks = static_cast<unsigned>((rows.batch + several - 1) / several);
      run(n, std::integral_constant<int, 1>(), dim3(blocks), dim3(kWarp, several));
    }
  };
  if (in_packs<T>(rows)) {
    split(std::integral_constant<int, lanes>());
  } else {
    split(std::integral_constant<int, 1>());
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& anchor_, const Tensor& positive_, const Tensor& negatives_,
                                           double temperature, int64_t reduction) {
  const OnDeviceOf guard(anchor_);
  const Tensor anchor = with_dense_rows(anchor_), positive = with_dense_rows(positive_);
  const Tensor negatives = with_dense_rows(negatives_);
  const int64_t batch = anchor.size(0), count = negatives.size(1);
  const ScalarType type = accumulator_of(anchor.scalar_type());
  Tensor losses = torch::stable::new_empty(anchor, {batch}, type);
  Tensor norms = torch::stable::new_empty(anchor, {batch, 2 + count}, type);
  Tensor cosines = torch::stable::new_empty(anchor, {batch, 1 + count}, type);
  const Rows rows = rows_of(anchor, positive, negatives, temperature);
  if (batch > 0) {
    BDCORE_FLOATS(anchor.scalar_type(), T, shaped<T>(rows, [&](auto n, auto warps, dim3 grid, dim3 block) {
                    launch(anchor, forward_rows<T, decltype(n)::value, decltype(warps)::value>, grid, block, 0, rows,
                           losses.mutable_data_ptr(), norms.mutable_data_ptr(), cosines.mutable_data_ptr());
                  }));
  }
  if (reduction == Reduction::none) return {losses, norms, cosines};
  Tensor result = torch::stable::new_empty(anchor, {}, type);
  const double divisor = reduction == Reduction::mean ? static_cast<double>(batch) : 1;
  const auto reduce = [&](auto zero) {
    using A = decltype(zero);
    launch(anchor, reduce_losses<A>, dim3(1), dim3(batch <= 128 ? 128 : 1024), 0,
           static_cast<const A*>(losses.const_data_ptr()), batch, divisor, static_cast<A*>(result.mutable_data_ptr()));
  };
  type == ScalarType::Double ? reduce(double{}) : reduce(float{});
  return {result, norms, cosines};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& anchor_, const Tensor& positive_,
                                            const Tensor& negatives_, const Tensor& norms_, const Tensor& cosines_,
                                            double temperature, int64_t reduction, bool need_anchor,
                                            bool need_positive, bool need_negatives) {
  const OnDeviceOf guard(anchor_);
  const Tensor anchor = with_dense_rows(anchor_), positive = with_dense_rows(positive_);
  const Tensor negatives = with_dense_rows(negatives_);
  const Tensor norms = as_contiguous(norms_), cosines = as_contiguous(cosines_);
  const int64_t batch = anchor.size(0), count = negatives.size(1), width = anchor.size(1);
  const ScalarType type = norms.scalar_type();
  const Tensor grad = grad_.scalar_type() == type ? grad_ : torch::stable::to(grad_, type);
  const auto shape = [&](bool needed, std::initializer_list<int64_t> full) {
    return needed ? torch::stable::new_empty(anchor, full) : torch::stable::new_empty(anchor, {0});
  };
  Tensor grad_anchor = shape(need_anchor, {batch, width});
  Tensor grad_positive = shape(need_positive, {batch, width});
  Tensor grad_negatives = shape(need_negatives, {batch, count, width});
  if (batch == 0 || width == 0) return {grad_anchor, grad_positive, grad_negatives};

  const Rows rows = rows_of(anchor, positive, negatives, temperature);
  Gradients grads{};
  grads.grad = grad.const_data_ptr();
  grads.grad_stride = reduction == Reduction::none ? grad.stride(0) : 0;
  grads.scale = 1 / (temperature * (reduction == Reduction::mean ? static_cast<double>(batch) : 1));
  grads.norms = norms.const_data_ptr();
  grads.cosines = cosines.const_data_ptr();
  grads.anchor = need_anchor ? grad_anchor.mutable_data_ptr() : nullptr;
  grads.positive = need_positive ? grad_positive.mutable_data_ptr() : nullptr;
  grads.negatives = need_negatives ? grad_negatives.mutable_data_ptr() : nullptr;
  BDCORE_FLOATS(anchor.scalar_type(), T, shaped<T>(rows, [&](auto n, auto warps, dim3 grid, dim3 block) {
                  launch(anchor, backward_rows<T, decltype(n)::value, decltype(warps)::value>, grid, block, 0, rows,
                         grads);
                }));
  return {grad_anchor, grad_positive, grad_negatives};
}

}  // namespace

BDCORE_CUDA_IMPL(m) {
  m.impl("model_contrastive_loss", TORCH_BOX(&forward));
  m.impl("model_contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
