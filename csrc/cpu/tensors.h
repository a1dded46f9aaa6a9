// From torch's stable ABI to what the kernels take: number formats, pointers, parallel loops. For the operators' .cpp
// files, which see torch; the kernel files do not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/rows.h"
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

// A new tensor of `like`'s dtype that asks for large pages where it fills some: the system clears a page when it is
// first written, and to clear pages of 4 KB one by one takes several times as long as writing does.
inline Tensor new_on_large_pages(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor tensor = torch::stable::new_empty(like, shape);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + page - 1) / page * page;
  // Where the system refuses, small pages do as well.
  if (first + page <= end) madvise(reinterpret_cast<void*>(first), end / page * page - first, MADV_HUGEPAGE);
#endif
  return tensor;
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
