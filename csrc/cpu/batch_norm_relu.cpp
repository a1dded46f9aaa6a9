// batch_norm_relu on the CPU.
#include "batch_norm_relu_kernel.h"

#include <cmath>

#include "../common/images.h"
#include "tensors.h"

namespace bdcore {
namespace {

// Numbers in a chunk of rows: few enough that the second pass over them finds them in the cache.
constexpr int64_t kChunk = 16 * 1024;

Tensor as_channels_last(const Tensor& tensor) { return laid_out(tensor, Layout::interleaved); }

Tensor like(const Tensor& tensor) {
  return torch::stable::empty({tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, tensor.scalar_type(),
                              std::nullopt, tensor.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

BatchNormRelu work_on(const Tensor& x) {
  BatchNormRelu work{};
  work.type = scalar_of(x.scalar_type());
  work.x = x.const_data_ptr();
  work.channels = x.size(1);
  work.rows = x.size(0) * x.size(2) * x.size(3);
  work.chunk = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, work.channels));
  return work;
}

int64_t chunks_of(const BatchNormRelu& work) { return (work.rows + work.chunk - 1) / work.chunk; }

// Calls `part(begin, end)` over all chunks, each of which reads and writes `tensors` tensors.
template <class Part>
void over_chunks(const BatchNormRelu& work, int64_t tensors, const Part& part) {
  parallel(chunks_of(work), work.chunk * work.channels * tensors * 4, part);
}

void check(const Tensor& x, std::initializer_list<Tensor> of_channels) {
  STD_TORCH_CHECK(x.dim() == 4, "batch_norm_relu: x must be [B, C, H, W]");
  for (const Tensor& one : of_channels) {
    STD_TORCH_CHECK(one.dim() == 1 && one.size(0) == x.size(1) &&
                        one.scalar_type() == accumulator_of(x.scalar_type()),
                    "batch_norm_relu: what belongs to channels must be [C], float32 or with x float64");
  }
}

template <class A>
const A* numbers(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

// Mean and variance of all rows out of those of the chunks (Chan, Golub, LeVeque 1979).
template <class A>
void combine(const BatchNormRelu& work, A* mean, A* variance) {
  const auto channels = static_cast<size_t>(work.channels);
  std::vector<double> center(channels, 0.0), squares(channels, 0.0);
  double counted = 0;
  for (int64_t chunk = 0; chunk < chunks_of(work); ++chunk) {
    const A* partial = static_cast<const A*>(work.partial) + chunk * 2 * work.channels;
    const auto rows = static_cast<double>(std::min(work.chunk, work.rows - chunk * work.chunk));
    const double share = rows / (counted + rows), spread = counted * share;
    for (size_t c = 0; c < channels; ++c) {
      const double away = static_cast<double>(partial[c]) - center[c];
      center[c] += away * share;
      squares[c] += static_cast<double>(partial[channels + c]) + away * away * spread;
    }
    counted += rows;
  }
  for (size_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<A>(center[c]);
    variance[c] = static_cast<A>(squares[c] / counted);
  }
}

// weight / standard deviation
template <class A>
std::vector<A> scales(const Tensor& weight, const A* variance, double eps) {
  std::vector<A> scale(static_cast<size_t>(weight.size(0)));
  for (size_t c = 0; c < scale.size(); ++c) {
    scale[c] = static_cast<A>(static_cast<double>(numbers<A>(weight)[c]) /
                              std::sqrt(static_cast<double>(variance[c]) + eps));
  }
  return scale;
}

template <class A>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                   const Tensor& variance, bool training, double eps) {
  BatchNormRelu work = work_on(x);
  const auto& kernels = chosen_batch_norm_relu_kernels();
  Tensor statistics = torch::stable::new_empty(mean, {2, work.channels});
  A* found = static_cast<A*>(statistics.mutable_data_ptr());
  if (training) {
    std::vector<A> partial(static_cast<size_t>(chunks_of(work) * 2 * work.channels));
    work.partial = partial.data();
    over_chunks(work, 1, [&](int64_t begin, int64_t end) { kernels.statistics(work, begin, end); });
    combine(work, found, found + work.channels);
  } else {
    std::copy_n(numbers<A>(mean), work.channels, found);
    std::copy_n(numbers<A>(variance), work.channels, found + work.channels);
  }
  const std::vector<A> scale = scales<A>(weight, found + work.channels, eps);
  Tensor y = like(x);
  work.mean = found;
  work.scale = scale.data();
  work.bias = bias.const_data_ptr();
  work.y = y.mutable_data_ptr();
  over_chunks(work, 2, [&](int64_t begin, int64_t end) { kernels.forward(work, begin, end); });
  return {y, statistics};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                            const Tensor& bias, const Tensor& statistics, bool training, bool affine,
                                            double eps) {
  BatchNormRelu work = work_on(x);
  const auto& kernels = chosen_batch_norm_relu_kernels();
  const A* mean = numbers<A>(statistics);
  const A* variance = mean + work.channels;
  const std::vector<A> scale = scales<A>(weight, variance, eps);
  Tensor grad_x = like(x), grad_weight = torch::stable::new_empty(weight, {affine ? work.channels : 0}),
         grad_bias = torch::stable::new_empty(bias, {affine ? work.channels : 0});
  work.mean = mean;
  work.scale = scale.data();
  work.bias = bias.const_data_ptr();
  work.grad = grad.const_data_ptr();
  work.grad_x = grad_x.mutable_data_ptr();
  const auto channels = static_cast<size_t>(work.channels);
  std::vector<A> partial, constant, slope;
  if (training || affine) {
    partial.resize(static_cast<size_t>(chunks_of(work)) * 2 * channels);
    work.partial = partial.data();
    over_chunks(work, 2, [&](int64_t begin, int64_t end) { kernels.gradient_sums(work, begin, end); });
    constant.resize(channels);
    slope.resize(channels);
    for (size_t c = 0; c < channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t chunk = 0; chunk < chunks_of(work); ++chunk) {
        const A* one = partial.data() + static_cast<size_t>(chunk) * 2 * channels;
        sum += static_cast<double>(one[c]);
        product += static_cast<double>(one[channels + c]);
      }
      const double spread = static_cast<double>(variance[c]) + eps, rows = static_cast<double>(work.rows);
      if (affine) {
        static_cast<A*>(grad_weight.mutable_data_ptr())[c] = static_cast<A>(product / std::sqrt(spread));
        static_cast<A*>(grad_bias.mutable_data_ptr())[c] = static_cast<A>(sum);
      }
      constant[c] = static_cast<A>(static_cast<double>(scale[c]) * sum / rows);
      slope[c] = static_cast<A>(static_cast<double>(scale[c]) * product / (spread * rows));
    }
  }
  if (training) {
    work.constant = constant.data();
    work.slope = slope.data();
  }
  over_chunks(work, 3, [&](int64_t begin, int64_t end) { kernels.backward(work, begin, end); });
  return {grad_x, grad_weight, grad_bias};
}

// y, statistics
std::tuple<Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const Tensor& mean, const Tensor& variance, bool training, double eps) {
  check(x, {weight, bias, mean, variance});
  const auto run = x.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  return run(as_channels_last(x), as_contiguous(weight), as_contiguous(bias), as_contiguous(mean),
             as_contiguous(variance), training, eps);
}

// Gradients of x, weight and bias; without `affine` those of the last two are empty.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& statistics,
                                                            bool training, bool affine, double eps) {
  check(x, {weight, bias});
  STD_TORCH_CHECK(grad.dim() == 4 && grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() &&
                      statistics.numel() == 2 * x.size(1),
                  "batch_norm_relu_backward: grad must be like x, and statistics what the forward pass returned");
  const auto run = x.scalar_type() == ScalarType::Double ? &backward<double> : &backward<float>;
  return run(as_channels_last(grad), as_channels_last(x), as_contiguous(weight), as_contiguous(bias),
             as_contiguous(statistics), training, affine, eps);
}

}  // namespace
}  // namespace bdcore

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&bdcore::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&bdcore::batch_norm_relu_backward));
}
