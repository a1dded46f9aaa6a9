// How batches of images [B, C, H, W] lie in memory. For the operators' interfaces, on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <optional>

namespace bdcore {

enum class Layout { planar, interleaved, other };  // contiguous, channels-last; what fits both is planar

inline bool is_channels_last(const torch::stable::Tensor& images) {
  const int64_t channels = images.size(1), width = images.size(3);
  const int64_t strides[] = {images.size(2) * width * channels, 1, width * channels, channels};
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (images.size(dim) != 1 && images.stride(dim) != strides[dim]) return false;
  }
  return true;
}

inline Layout layout_of(const torch::stable::Tensor& images) {
  return images.is_contiguous() ? Layout::planar : is_channels_last(images) ? Layout::interleaved : Layout::other;
}

// The images in that layout, copied if need be; as planar ones for Layout::other.
inline torch::stable::Tensor laid_out(const torch::stable::Tensor& images, Layout layout) {
  if (layout != Layout::interleaved) {
    return images.is_contiguous() ? images : torch::stable::contiguous(images);
  }
  return is_channels_last(images)
             ? images
             : torch::stable::contiguous(images, torch::headeronly::MemoryFormat::ChannelsLast);
}

// As torch.empty_like: with the strides of `like` where its elements lie densely.
inline torch::stable::Tensor empty_like(const torch::stable::Tensor& like, torch::headeronly::ScalarType type) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(like),         from(std::make_optional(type)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),             from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// A new tensor for a result computed from laid_out(images, layout); given_back turns it into the operator's.
inline torch::stable::Tensor result_like(const torch::stable::Tensor& images, Layout layout,
                                         torch::headeronly::ScalarType type) {
  return layout == Layout::other ? torch::stable::new_empty(images, images.sizes(), type) : empty_like(images, type);
}

inline torch::stable::Tensor given_back(const torch::stable::Tensor& result, const torch::stable::Tensor& images,
                                        Layout layout) {
  if (layout != Layout::other) return result;
  torch::stable::Tensor strided = empty_like(images, result.scalar_type());
  return torch::stable::copy_(strided, result);
}

}  // namespace bdcore
