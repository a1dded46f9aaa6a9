// A product of matrices in tiles, as info_nce takes it: in float32 (float64), with operands that are read from any
// layout and number format, and results that stay in registers for what comes next.
#pragma once

#include "launch.h"

namespace bdcore {

namespace {

constexpr double kEps = 1e-8;

constexpr int kSide = 16;  // a block is kSide x kSide threads, each of which computes R x R products
constexpr int kDepth = 8;  // how much of the sum is in shared memory at a time
constexpr int kThreads = kSide * kSide;

// A matrix whose rows' elements lie side by side.
struct Rows {
  const void* data;
  int64_t count, stride;
  const void* norms;  // in the accumulator's type, as are all sums
};

template <class A>
__device__ __forceinline__ A per_length(A norm) {
  return 1 / (norm < static_cast<A>(kEps) ? static_cast<A>(kEps) : norm);  // NaN stays
}

// Reads operands of a product. Of an index (row of the result on the left, column on the right) and a depth:
template <class T>
struct ByRow {  // element `depth` of row `index`
  static constexpr bool depth_is_contiguous = true;
  const T* data;
  int64_t count, stride, depths;
  __device__ Accumulator<T> operator()(int64_t index, int64_t depth) const {
    return index < count && depth < depths ? static_cast<Accumulator<T>>(data[index * stride + depth])
                                           : static_cast<Accumulator<T>>(0);
  }
};
template <class T>
struct ByColumn {  // element `index` of row `depth`
  static constexpr bool depth_is_contiguous = false;
  const T* data;
  int64_t count, stride, depths;
  __device__ Accumulator<T> operator()(int64_t index, int64_t depth) const {
    return index < count && depth < depths ? static_cast<Accumulator<T>>(data[depth * stride + index])
                                           : static_cast<Accumulator<T>>(0);
  }
};
template <class T>
struct UnitByColumn {  // the same of the row's unit vector
  static constexpr bool depth_is_contiguous = false;
  ByColumn<T> rows;
  const Accumulator<T>* norms;
  __device__ Accumulator<T> operator()(int64_t index, int64_t depth) const {
    return depth < rows.depths ? rows(index, depth) * per_length(norms[depth]) : static_cast<Accumulator<T>>(0);
  }
};

// Which of the tile's rows, or columns, is number r of a thread's: four next to each other at a time.
__device__ __forceinline__ int place(int thread, int r) { return r / 4 * 4 * kSide + thread * 4 + r % 4; }

template <class A, int R>
struct Shared {
  // Four more, so that the threads that write one depth after the other do not meet in the same bank.
  A left[2][kDepth][kSide * R + 4];
  A right[2][kDepth][kSide * R + 4];
};

// sums[i][j] becomes the sum over depths [begin, end) of left(first_left + i, d) right(first_right + j, d), for the
// rows and columns of this thread. Called by all threads of the block.
template <int R, class A, class Left, class Right>
__device__ __forceinline__ void product(const Left& left, int64_t first_left, const Right& right, int64_t first_right,
                                        int64_t begin, int64_t end, Shared<A, R>& shared, A (&sums)[R][R]) {
  constexpr int tile = kSide * R, loads = tile * kDepth / kThreads;
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const auto index_of = [&](bool by_depth, int n) {
    const int at = thread + n * kThreads;
    return by_depth ? at / kDepth : at % tile;
  };
  const auto depth_of = [&](bool by_depth, int n) {
    const int at = thread + n * kThreads;
    return by_depth ? at % kDepth : at / tile;
  };
  A next_left[loads], next_right[loads];
  const auto fetch = [&](int64_t depth) {
#pragma unroll
    for (int n = 0; n < loads; ++n) {
      const int64_t d = depth + depth_of(Left::depth_is_contiguous, n);
      next_left[n] = d < end ? left(first_left + index_of(Left::depth_is_contiguous, n), d) : static_cast<A>(0);
    }
#pragma unroll
    for (int n = 0; n < loads; ++n) {
      const int64_t d = depth + depth_of(Right::depth_is_contiguous, n);
      next_right[n] = d < end ? right(first_right + index_of(Right::depth_is_contiguous, n), d) : static_cast<A>(0);
    }
  };
#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int j = 0; j < R; ++j) sums[i][j] = 0;
  }
  fetch(begin);
  int turn = 0;
  for (int64_t depth = begin; depth < end; depth += kDepth, turn ^= 1) {
#pragma unroll
    for (int n = 0; n < loads; ++n) {
      shared.left[turn][depth_of(Left::depth_is_contiguous, n)][index_of(Left::depth_is_contiguous, n)] = next_left[n];
      shared.right[turn][depth_of(Right::depth_is_contiguous, n)][index_of(Right::depth_is_contiguous, n)] =
          next_right[n];
    }
    __syncthreads();  // one is enough: what is written next is the other half
    if (depth + kDepth < end) fetch(depth + kDepth);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      A a[R], b[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        a[r] = shared.left[turn][d][place(ty, r)];
        b[r] = shared.right[turn][d][place(tx, r)];
      }
#pragma unroll
      for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < R; ++j) sums[i][j] += a[i] * b[j];
      }
    }
  }
  __syncthreads();  // before the next product
}

}  // namespace

}  // namespace bdcore
