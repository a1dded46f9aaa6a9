// From torch's stable ABI to what the kernels take: number formats, pointers, parallel loops. For the operators' .cpp
// files, which see torch; the kernel files do not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "level.h"
#include "scalar.h"

namespace bdcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Scalar::u8;
    case ScalarType::Half: return Scalar::f16;
    case ScalarType::BFloat16: return Scalar::bf16;
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::Double: return Scalar::f64;
    default: STD_TORCH_CHECK(false, "bdcore: unsupported dtype, expected uint8, float16, bfloat16, float32 or float64");
  }
}

inline ScalarType accumulator_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Runs `part(begin, end)` over [0, items) on torch's threads, on this one alone where the whole takes less than about
// 20 microseconds: waking a thread costs as much. `bytes` is what one item reads and writes. Never throws inside.
template <class Part>
void parallel(int64_t items, int64_t bytes, const Part& part) {
  constexpr int64_t least = 128 * 1024;
  if (items <= 0) return;
  if (items * bytes <= 2 * least) {
    part(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, least / std::max<int64_t>(1, bytes)), part);
}

}  // namespace bdcore
