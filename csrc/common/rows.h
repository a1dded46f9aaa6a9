// Tensors as the kernels take them: contiguous, or at least with the elements of each row side by side. For the
// operators' interfaces, on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace bdcore {

// Not named contiguous: a call of that would also find torch::stable::contiguous.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Rows are read where they lie as long as the elements of each lie side by side.
inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) < 2 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace bdcore
