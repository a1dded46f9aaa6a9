// What the CUDA sources share: launches on the current stream, number formats, reductions.
//
// The same sources are compiled for the CPU by the tests (BDCORE_EMULATED, see tests/emulator/README.md): a machine
// without a GPU then runs every thread of every block. So kernels are launched by `launch` alone, dynamic shared memory
// is declared by BDCORE_SHARED, and what they use of CUDA is what the emulator knows: threadIdx, blockIdx, blockDim,
// gridDim, __shared__, __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, and the mathematical functions.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/rows.h"

#if defined(BDCORE_EMULATED)
#include "emulator.h"
#define BDCORE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(bdcore_emulated, CPU, m)
#else
#include <cuda_runtime.h>
#define BDCORE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(bdcore, CUDA, m)
#define BDCORE_SHARED(Type, name)                              \
  extern __shared__ __align__(16) unsigned char bdcore_shared_[]; \
  Type* name = reinterpret_cast<Type*>(bdcore_shared_)
#endif

namespace bdcore {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;

// The type in which numbers are added up.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// N values that are read or written at once; N * sizeof(T) is at most 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

#if defined(BDCORE_EMULATED)
template <class Kernel, class... Arguments>
void launch(const Tensor&, Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  emulator::run(grid, block, shared, [&] { kernel(arguments...); });
}
// Makes the tensor's device the current one while it lives.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
#else
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
// Launches on the current stream of the tensor's device, which an OnDeviceOf has made the current one.
template <class Kernel, class... Arguments>
void launch(const Tensor& like, Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream));
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

// The sum over a warp, in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value || other != other ? other : value;  // NaN wins
  }
  return value;
}

// One block: the sum of all losses, in an order that depends on their number alone.
template <class A>
__global__ void __launch_bounds__(1024) reduce_losses(const A* losses, int64_t batch, double divisor, A* result) {
  __shared__ double shared[kWarp];
  double total = 0;
  for (int64_t row = threadIdx.x; row < batch; row += blockDim.x) total += static_cast<double>(losses[row]);
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  total = warp_sum(threadIdx.x < blockDim.x / kWarp ? shared[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) *result = static_cast<A>(total / divisor);
}

inline ScalarType accumulator_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Runs the statements with T as the C++ type of a floating-point `scalar`.
#define BDCORE_FLOATS(scalar, T, ...)                                                     \
  switch (scalar) {                                                                       \
    case ::bdcore::ScalarType::Half: { using T = ::bdcore::Half; __VA_ARGS__; break; }         \
    case ::bdcore::ScalarType::BFloat16: { using T = ::bdcore::BFloat16; __VA_ARGS__; break; } \
    case ::bdcore::ScalarType::Float: { using T = float; __VA_ARGS__; break; }                 \
    case ::bdcore::ScalarType::Double: { using T = double; __VA_ARGS__; break; }               \
    default: STD_TORCH_CHECK(false, "bdcore: expected float16, bfloat16, float32 or float64");  \
  }

}  // namespace bdcore
