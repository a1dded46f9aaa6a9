// isolation_loss on the CPU.
#include "isolation_loss_kernel.h"
#include "tensors.h"

namespace bdcore {
namespace {

constexpr int64_t kNone = 0;
constexpr int64_t kRows = 16;  // rows that a thread takes at once

// Arithmetic, not memory, takes the time: a logit counts as four times the bytes of a float.
int64_t cost(int64_t classes) { return kRows * classes * 16; }

// new_empty asks the dispatcher for a function by its name, which takes as long as the arithmetic of a small batch.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t strides[] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// losses, saved
std::tuple<Tensor, Tensor> isolation_loss(const Tensor& logits, const Tensor& labels, double gamma, int64_t mode,
                                          int64_t ignore_index, double smoothing, int64_t reduction) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && labels.dim() == 1 &&
                      labels.size(0) == logits.size(0) && labels.scalar_type() == ScalarType::Long,
                  "isolation_loss: logits must be [B, C] with C >= 1, and labels int64 [B]");
  const Tensor dense = as_contiguous(logits), dense_labels = as_contiguous(labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const auto& kernels = chosen_isolation_loss_kernels();
  const i64* label = static_cast<const i64*>(dense_labels.const_data_ptr());
  const LabelRange range = kernels.range(label, rows, ignore_index);
  STD_TORCH_CHECK(range.lowest >= 0 && range.highest < classes, "labels must be in [0, ", classes - 1,
                  "] or ignore_index (", ignore_index, "), got ", range.lowest, " to ", range.highest);

  const ScalarType type = accumulator_of(logits.scalar_type());
  Tensor saved = empty({4 * rows + 1}, type);
  Tensor losses = empty({rows}, type);
  const IsolationLossForward work{scalar_of(logits.scalar_type()), dense.const_data_ptr(), label, rows, classes,
                                  mode, reduction, ignore_index, gamma, smoothing,
                                  losses.mutable_data_ptr(), saved.mutable_data_ptr()};
  parallel((rows + kRows - 1) / kRows, cost(classes), [&](int64_t begin, int64_t end) {
    kernels.forward(work, begin * kRows, std::min(end * kRows, rows));
  });
  if (reduction == kNone) {
    kernels.reduce(work, range.used, nullptr);
    return {losses, saved};
  }
  Tensor result = empty({}, type);
  kernels.reduce(work, range.used, result.mutable_data_ptr());
  return {result, saved};
}

Tensor isolation_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& saved,
                               double smoothing) {
  const Tensor dense = as_contiguous(logits), dense_labels = as_contiguous(labels), dense_saved = as_contiguous(saved);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(saved.numel() == 4 * rows + 1 && grad.scalar_type() == saved.scalar_type() && classes >= 1 &&
                      labels.numel() == rows && (grad.dim() == 0 || (grad.dim() == 1 && grad.size(0) == rows)),
                  "isolation_loss_backward: grad must be a scalar or [B], and saved what the forward pass returned");
  Tensor out = empty({rows, classes}, logits.scalar_type());
  const IsolationLossBackward work{scalar_of(logits.scalar_type()), grad.const_data_ptr(),
                                   grad.dim() == 0 ? 0 : grad.stride(0), dense.const_data_ptr(),
                                   static_cast<const i64*>(dense_labels.const_data_ptr()),
                                   dense_saved.const_data_ptr(), rows, classes, smoothing, out.mutable_data_ptr()};
  const auto& kernels = chosen_isolation_loss_kernels();
  parallel((rows + kRows - 1) / kRows, cost(classes), [&](int64_t begin, int64_t end) {
    kernels.backward(work, begin * kRows, std::min(end * kRows, rows));
  });
  return out;
}

}  // namespace
}  // namespace bdcore

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) {
  m.impl("isolation_loss", TORCH_BOX(&bdcore::isolation_loss));
  m.impl("isolation_loss_backward", TORCH_BOX(&bdcore::isolation_loss_backward));
}
