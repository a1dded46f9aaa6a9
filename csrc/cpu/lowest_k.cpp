// lowest_k on the CPU.
#include "lowest_k.h"

#include "tensors.h"

namespace bdcore {
namespace {

Tensor lowest_k(const Tensor& losses, int64_t k) {
  STD_TORCH_CHECK(losses.dim() == 1 && k >= 0 && k <= losses.size(0), "lowest_k: losses must be [N], and k in [0, N]");
  const ScalarType type = losses.scalar_type();
  const bool narrow = type == ScalarType::Half || type == ScalarType::BFloat16;
  const Tensor values = as_contiguous(narrow ? torch::stable::to(losses, ScalarType::Float) : losses);
  LowestK lowest(k);
  const auto index_of = [](int64_t i) { return i; };
  if (type == ScalarType::Double) {
    lowest.add(static_cast<const double*>(values.const_data_ptr()), losses.size(0), index_of);
  } else {
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float, "lowest_k: losses must be floating point");
    lowest.add(static_cast<const float*>(values.const_data_ptr()), losses.size(0), index_of);
  }
  const std::vector<int64_t> found = lowest.indices();
  Tensor out = torch::stable::new_empty(losses, {k}, ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace bdcore

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) { m.impl("lowest_k", TORCH_BOX(&bdcore::lowest_k)); }
