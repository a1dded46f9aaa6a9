#include <cmath>
#include <memory>
#include <tuple>

#include "model_contrastive_loss_kernel.h"
#include "tensors.h"

namespace bdcore {

namespace {

enum Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in bdcore/ops/model_contrastive_loss.py

ContrastiveRows rows_of(const Tensor& anchor, const Tensor& positive, const Tensor& negatives, double temperature) {
  ContrastiveRows rows{};
  rows.scalar = scalar_of(anchor.scalar_type());
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

// Gradients of more bytes than this are written past the caches, from which they would drive the inputs.
constexpr int64_t kStreamed = 24 << 20;

int64_t bytes_of_row(const Tensor& anchor, int64_t vectors) {
  return vectors * anchor.size(1) * static_cast<int64_t>(anchor.element_size());
}

template <class A>
void reduce(const void* losses, int64_t batch, bool averaged, Tensor& result) {
  const A* values = static_cast<const A*>(losses);
  double total = 0;  // one after the other: the order of threads is not that of rows
  for (int64_t row = 0; row < batch; ++row) total += values[row];
  if (averaged) total = batch == 0 ? std::nan("") : total / static_cast<double>(batch);
  *static_cast<A*>(result.mutable_data_ptr()) = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& anchor_, const Tensor& positive_, const Tensor& negatives_,
                                           double temperature, int64_t reduction) {
  const Tensor anchor = with_dense_rows(anchor_), positive = with_dense_rows(positive_);
  const Tensor negatives = with_dense_rows(negatives_);
  const int64_t batch = anchor.size(0), count = negatives.size(1);
  const ScalarType type = accumulator_of(anchor.scalar_type());
  const bool each = reduction == Reduction::none;
  Tensor result = each ? torch::stable::new_empty(anchor, {batch}, type) : torch::stable::new_empty(anchor, {}, type);
  // Where they are only to be added up: a tensor would take longer to make than the losses of a small batch.
  const std::unique_ptr<double[]> added(each ? nullptr : new double[static_cast<size_t>(batch)]);
  void* const losses = each ? result.mutable_data_ptr() : added.get();
  Tensor norms = torch::stable::new_empty(anchor, {batch, 2 + count}, type);
  Tensor cosines = torch::stable::new_empty(anchor, {batch, 1 + count}, type);
  const ContrastiveRows rows = rows_of(anchor, positive, negatives, temperature);
  const ModelContrastiveLoss& kernels = chosen_model_contrastive_loss();
  void* const norms_at = norms.mutable_data_ptr();
  void* const cosines_at = cosines.mutable_data_ptr();
  parallel(batch, bytes_of_row(anchor, 2 + count), [&](int64_t begin, int64_t end) {
    kernels.forward(rows, begin, end, losses, norms_at, cosines_at);
  });
  if (each) return {result, norms, cosines};
  if (type == ScalarType::Double) {
    reduce<double>(losses, batch, reduction == Reduction::mean, result);
  } else {
    reduce<float>(losses, batch, reduction == Reduction::mean, result);
  }
  return {result, norms, cosines};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& anchor_, const Tensor& positive_,
                                            const Tensor& negatives_, const Tensor& norms_, const Tensor& cosines_,
                                            double temperature, int64_t reduction, bool need_anchor,
                                            bool need_positive, bool need_negatives) {
  const Tensor anchor = with_dense_rows(anchor_), positive = with_dense_rows(positive_);
  const Tensor negatives = with_dense_rows(negatives_);
  const Tensor norms = as_contiguous(norms_), cosines = as_contiguous(cosines_);
  const int64_t batch = anchor.size(0), count = negatives.size(1), width = anchor.size(1);
  const ScalarType type = norms.scalar_type();
  const Tensor grad = grad_.scalar_type() == type ? grad_ : torch::stable::to(grad_, type);
  const auto shaped = [&](bool needed, std::initializer_list<int64_t> shape) {
    return needed ? new_on_large_pages(anchor, shape) : torch::stable::new_empty(anchor, {0});
  };
  Tensor grad_anchor = shaped(need_anchor, {batch, width});
  Tensor grad_positive = shaped(need_positive, {batch, width});
  Tensor grad_negatives = shaped(need_negatives, {batch, count, width});

  const ContrastiveRows rows = rows_of(anchor, positive, negatives, temperature);
  ContrastiveGradients grads{};
  grads.grad = grad.const_data_ptr();
  grads.grad_stride = reduction == Reduction::none ? grad.stride(0) : 0;
  grads.scale = 1 / (temperature * (reduction == Reduction::mean ? static_cast<double>(batch) : 1));
  grads.norms = norms.const_data_ptr();
  grads.cosines = cosines.const_data_ptr();
  grads.anchor = need_anchor ? grad_anchor.mutable_data_ptr() : nullptr;
  grads.positive = need_positive ? grad_positive.mutable_data_ptr() : nullptr;
  grads.negatives = need_negatives ? grad_negatives.mutable_data_ptr() : nullptr;
  const int64_t written = need_anchor + need_positive + count * need_negatives;
  grads.streamed = batch * bytes_of_row(anchor, written) > kStreamed;
  const ModelContrastiveLoss& kernels = chosen_model_contrastive_loss();
  parallel(batch, bytes_of_row(anchor, 2 + count + written), [&](int64_t begin, int64_t end) {
    std::vector<double> room(static_cast<size_t>(2 * (1 + count) * kContrastiveRows));
    kernels.backward(rows, begin, end, grads, room.data());
  });
  return {grad_anchor, grad_positive, grad_negatives};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) {
  m.impl("model_contrastive_loss", TORCH_BOX(&forward));
  m.impl("model_contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
