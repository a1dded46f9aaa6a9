// InfoNCE on the GPU; see bdcore/ops/info_nce.py for the formulas. The products are our own, in float32 (float64), so
// that neither autocast nor a TF32 setting changes the result; the similarities are reduced where they are computed.
#include <cassert>
#include <tuple>

#include "launch.h"
#include "tile_product.h"

namespace bdcore {

namespace {

enum Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in bdcore/ops/info_nce.py

constexpr int64_t kBlocks = 264;  // as many as keep a large GPU busy; a constant, so that the order of sums is one, too

// A warp a row; the rows of both matrices.
template <class T>
__global__ void __launch_bounds__(kThreads) norms_of_rows(Rows anchors, Rows keys, int64_t width, void* anchor_norms,
                                                          void* key_norms) {
  using A = Accumulator<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const bool is_key = number >= anchors.count;
  const int64_t row = is_key ? number - anchors.count : number;
  if (is_key && row >= keys.count) return;
  const Rows& rows = is_key ? keys : anchors;
  const T* x = static_cast<const T*>(rows.data) + row * rows.stride;
  A square = 0;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    square += static_cast<A>(x[d]) * static_cast<A>(x[d]);
  }
  square = warp_sum(square);
  if (threadIdx.x % kWarp == 0) static_cast<A*>(is_key ? key_norms : anchor_norms)[row] = sqrt(square);
}

template <class A>
struct LogSum {  // sum * e^largest
  A largest, sum;
};

template <class A>
__device__ __forceinline__ LogSum<A> merged(LogSum<A> a, LogSum<A> b) {
  const A largest = b.largest > a.largest ? b.largest : a.largest;
  const A shift = largest == -static_cast<A>(INFINITY) ? static_cast<A>(0) : largest;  // both are of nothing
  return {largest, a.sum * exp(a.largest - shift) + b.sum * exp(b.largest - shift)};
}

// Block (x, y): anchors of tile x against the key tiles [y * tiles, (y + 1) * tiles). Their sums go to line y of
// `partial`, and the score of each anchor's positive to `positives`.
template <class T, int R>
__global__ void __launch_bounds__(kThreads, 2)
    forward_tiles(Rows anchors, Rows keys, int64_t width, double temperature, const int64_t* positive, int64_t tiles,
                  LogSum<Accumulator<T>>* partial, Accumulator<T>* positives) {
  using A = Accumulator<T>;
  constexpr int tile = kSide * R;
  __shared__ Shared<A, R> shared;
  __shared__ int64_t positive_of[tile];
  __shared__ A scale_of[tile];
  __shared__ LogSum<A> seen_by[R][kThreads];  // a thread's own; in registers it would be in the product's way
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int i = threadIdx.x; i < tile && first + i < anchors.count; i += kThreads) {
    positive_of[i] = positive[first + i];
    assert(positive_of[i] >= 0 && positive_of[i] < keys.count && "info_nce: positive_index out of range");
    const A norm = static_cast<const A*>(anchors.norms)[first + i];
    scale_of[i] = per_length(norm) / static_cast<A>(temperature);
  }
  __syncthreads();
  const ByRow<T> left{static_cast<const T*>(anchors.data), anchors.count, anchors.stride, width};
  const ByRow<T> right{static_cast<const T*>(keys.data), keys.count, keys.stride, width};
  for (int i = 0; i < R; ++i) seen_by[i][threadIdx.x] = {-static_cast<A>(INFINITY), 0};
  const int64_t last = min((static_cast<int64_t>(blockIdx.y) + 1) * tiles * tile, keys.count);
  for (int64_t key = static_cast<int64_t>(blockIdx.y) * tiles * tile; key < last; key += tile) {
    A sums[R][R];
    product<R>(left, first, right, key, 0, width, shared, sums);
    A scale[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t column = key + place(tx, j);
      scale[j] = column < last ? per_length(static_cast<const A*>(keys.norms)[column]) : static_cast<A>(0);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int line = place(ty, i);
      if (first + line >= anchors.count) continue;
      const int64_t hit = positive_of[line] - key;
      const LogSum<A> seen = seen_by[i][threadIdx.x];
      A largest = seen.largest;
#pragma unroll
      for (int j = 0; j < R; ++j) {
        sums[i][j] *= scale[j] * scale_of[line];
        const int column = place(tx, j);
        if (column == hit) positives[first + line] = sums[i][j];
        if (column != hit && key + column < last && sums[i][j] > largest) largest = sums[i][j];
      }
      const A shift = largest == -static_cast<A>(INFINITY) ? static_cast<A>(0) : largest;
      A sum = seen.sum * exp(seen.largest - shift);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int column = place(tx, j);
        if (column != hit && key + column < last) sum += exp(sums[i][j] - shift);
      }
      seen_by[i][threadIdx.x] = {largest, sum};
    }
  }
  for (int i = 0; i < R; ++i) {
    LogSum<A> seen = seen_by[i][threadIdx.x];
    for (int step = kSide / 2; step > 0; step /= 2) {
      seen = merged<A>(seen, {__shfl_xor_sync(0xffffffffu, seen.largest, step),
                              __shfl_xor_sync(0xffffffffu, seen.sum, step)});
    }
    const int64_t row = first + place(ty, i);
    if (tx == 0 && row < anchors.count) partial[blockIdx.y * anchors.count + row] = seen;
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) finish_rows(const LogSum<A>* partial, const A* positives, int64_t batch,
                                                        int64_t parts, A* losses, A* log_sums, A* misses) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= batch) return;
  LogSum<A> others = partial[row];
  for (int64_t part = 1; part < parts; ++part) others = merged(others, partial[part * batch + row]);
  // log of the sum over the other keys of e^(s / t), minus that of the positive.
  const A margin = others.largest + log(others.sum) - positives[row];
  const A e = exp(margin > 0 ? -margin : margin);
  const A loss = (margin > 0 ? margin : static_cast<A>(0)) + log1p(e);
  losses[row] = loss;
  log_sums[row] = positives[row] + loss;
  misses[row] = margin > 0 ? 1 / (1 + e) : e / (1 + e);
}

// What the slopes, dl/ds times what came from above, are computed from.
struct Losses {
  const void* grad;  // one for each `grad_stride` elements, to be multiplied by `scale`
  int64_t grad_stride;
  double scale, temperature;
  const int64_t* positive;
  const void* log_sums;
  const void* misses;
};

// Block (x, y): the slopes of anchor tile y and key tile x, both from the given rows on, in lines of keys.count.
template <class T, int R>
__global__ void __launch_bounds__(kThreads, 2)
    slopes_of_tiles(Rows anchors, Rows keys, int64_t key_first, int64_t width, Losses losses, Accumulator<T>* slopes) {
  using A = Accumulator<T>;
  constexpr int tile = kSide * R;
  __shared__ Shared<A, R> shared;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * tile, key = static_cast<int64_t>(blockIdx.x) * tile;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const ByRow<T> left{static_cast<const T*>(anchors.data), anchors.count, anchors.stride, width};
  const ByRow<T> right{static_cast<const T*>(keys.data), keys.count, keys.stride, width};
  A sums[R][R];
  product<R>(left, first, right, key, 0, width, shared, sums);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + place(ty, i);
    if (row >= anchors.count) continue;
    const A factor = static_cast<const A*>(losses.grad)[row * losses.grad_stride] * static_cast<A>(losses.scale);
    const A log_sum = static_cast<const A*>(losses.log_sums)[row];
    const A scale = per_length(static_cast<const A*>(anchors.norms)[row]) / static_cast<A>(losses.temperature);
    const int64_t hit = losses.positive[row] - key_first;
    assert(losses.positive[row] >= 0 && "info_nce: positive_index out of range");
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t column = key + place(tx, j);
      if (column >= keys.count) continue;
      const A score = sums[i][j] * (per_length(static_cast<const A*>(keys.norms)[column]) * scale);
      const A slope = column == hit ? -static_cast<const A*>(losses.misses)[row] : exp(score - log_sum);
      slopes[row * keys.count + column] = slope * factor;
    }
  }
}

// Block (x, y, z): to the sums over slopes times unit vectors, of tile y of rows and tile x of features, those of part
// z of the depths are added, or written where `first`; each part has sums of its own, `part_size` after one another.
template <int R, class A, class Left, class Right>
__global__ void __launch_bounds__(kThreads, 2)
    add_products(Left left, Right right, int64_t rows, int64_t width, int64_t depths, int64_t depths_of_part,
                 int64_t part_size, bool first, A* sums) {
  __shared__ Shared<A, R> shared;
  const int64_t row_first = static_cast<int64_t>(blockIdx.y) * kSide * R;
  const int64_t column_first = static_cast<int64_t>(blockIdx.x) * kSide * R;
  const int64_t begin = static_cast<int64_t>(blockIdx.z) * depths_of_part;
  A found[R][R];
  product<R>(left, row_first, right, column_first, begin, min(begin + depths_of_part, depths), shared, found);
  A* to = sums + static_cast<int64_t>(blockIdx.z) * part_size;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = row_first + place(threadIdx.x / kSide, i);
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t column = column_first + place(threadIdx.x % kSide, j);
      if (row >= rows || column >= width) continue;
      A& at = to[row * width + column];
      at = first ? found[i][j] : at + found[i][j];
    }
  }
}

// A warp a row: of x with length L and unit vector u, dx = (g - (g u) u) / L, where g is the gradient of u, the sum of
// all parts; below eps, where the length is a constant, dx = g / L.
template <class T>
__global__ void __launch_bounds__(kThreads) project_rows(Rows rows, int64_t width, Accumulator<T>* sums, int64_t parts,
                                                         int64_t part_size, T* gradients) {
  using A = Accumulator<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows.count) return;
  const T* x = static_cast<const T*>(rows.data) + row * rows.stride;
  A* g = sums + row * width;
  A along = 0;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    A total = g[d];
    for (int64_t part = 1; part < parts; ++part) total += g[part * part_size + d];
    g[d] = total;
    along += total * static_cast<A>(x[d]);
  }
  along = warp_sum(along);
  const A norm = static_cast<const A*>(rows.norms)[row], inverse = per_length(norm);
  const A bend = norm > static_cast<A>(kEps) ? along * inverse * inverse : static_cast<A>(0);
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    gradients[row * width + d] = static_cast<T>((g[d] - bend * static_cast<A>(x[d])) * inverse);
  }
}

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

// Calls run(R): 8 x 8 products a thread where that leaves enough blocks, else 4 x 4; float64 has not the registers for
// more.
template <class A, class Run>
void shaped(int64_t rows, int64_t columns, const Run& run) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (divided_up(rows, 8 * kSide) * divided_up(columns, 8 * kSide) >= kBlocks / 2) {
      run(std::integral_constant<int, 8>());
      return;
    }
  }
  run(std::integral_constant<int, 4>());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& anchor_, const Tensor& keys_, const Tensor& positive_,
                                           double temperature, int64_t reduction) {
  const OnDeviceOf guard(anchor_);
  const Tensor anchor = with_dense_rows(anchor_), keys = with_dense_rows(keys_);
  const Tensor positive = as_contiguous(positive_);
  const int64_t batch = anchor.size(0), count = keys.size(0), width = anchor.size(1);
  STD_TORCH_CHECK(batch == 0 || count > 0, "positive_index must be in [0, -1] for 0 keys: no index is");
  const ScalarType type = accumulator_of(anchor.scalar_type());
  Tensor losses = torch::stable::new_empty(anchor, {batch}, type);
  Tensor statistics = torch::stable::new_empty(anchor, {3, batch}, type);
  Tensor key_norms = torch::stable::new_empty(anchor, {count}, type);
  BDCORE_FLOATS(anchor.scalar_type(), T, {
    using A = Accumulator<T>;
    A* const norms_at = static_cast<A*>(statistics.mutable_data_ptr());
    A* const key_norms_at = static_cast<A*>(key_norms.mutable_data_ptr());
    const Rows anchors{anchor.const_data_ptr(), batch, anchor.stride(0), norms_at};
    const Rows others{keys.const_data_ptr(), count, keys.stride(0), key_norms_at};
    if (batch + count > 0) {
      launch(anchor, norms_of_rows<T>, dim3(blocks(divided_up(batch + count, kThreads / kWarp))), dim3(kThreads), 0,
             anchors, others, width, static_cast<void*>(norms_at), static_cast<void*>(key_norms_at));
    }
    if (batch > 0) {
      shaped<A>(batch, count, [&](auto r) {
        constexpr int R = decltype(r)::value;
        const int64_t row_tiles = divided_up(batch, kSide * R), key_tiles = divided_up(count, kSide * R);
        const int64_t tiles = divided_up(key_tiles, std::min(key_tiles, divided_up(kBlocks, row_tiles)));
        const int64_t parts = divided_up(key_tiles, tiles);
        Tensor partial = torch::stable::new_empty(anchor, {parts, batch, 2}, type);
        Tensor positives = torch::stable::new_empty(anchor, {batch}, type);
        auto* const partial_at = static_cast<LogSum<A>*>(partial.mutable_data_ptr());
        A* const positives_at = static_cast<A*>(positives.mutable_data_ptr());
        launch(anchor, forward_tiles<T, R>, dim3(blocks(row_tiles), blocks(parts)), dim3(kThreads), 0, anchors, others,
               width, temperature, static_cast<const int64_t*>(positive.const_data_ptr()), tiles, partial_at,
               positives_at);
        launch(anchor, finish_rows<A>, dim3(blocks(divided_up(batch, kThreads))), dim3(kThreads), 0,
               static_cast<const LogSum<A>*>(partial_at), static_cast<const A*>(positives_at), batch, parts,
               static_cast<A*>(losses.mutable_data_ptr()), norms_at + batch, norms_at + 2 * batch);
      });
    }
  });
  if (reduction == Reduction::none) return {losses, statistics, key_norms};
  Tensor result = torch::stable::new_empty(anchor, {}, type);
  const double divisor = reduction == Reduction::mean ? static_cast<double>(batch) : 1;
  const auto reduce = [&](auto zero) {
    using A = decltype(zero);
    launch(anchor, reduce_losses<A>, dim3(1), dim3(batch <= 128 ? 128 : 1024), 0,
           static_cast<const A*>(losses.const_data_ptr()), batch, divisor, static_cast<A*>(result.mutable_data_ptr()));
  };
  type == ScalarType::Double ? reduce(double{}) : reduce(float{});
  return {result, statistics, key_norms};
}

// A tile of slopes: 32 MB, which a large GPU's second cache holds; of few anchors it takes more keys.
constexpr int64_t kAnchorTile = 4096, kSlopes = kAnchorTile * 2048, kMostKeys = 16384;

// Sums of slopes times unit vectors, [parts][rows][width]; their depth, `depths` at a time, is split so that there are
// enough blocks.
template <class A>
struct Sums {
  int64_t rows, width, parts;
  Tensor values;

  Sums(const Tensor& like, ScalarType type, bool needed, int64_t rows, int64_t width, int64_t depths)
      : rows(rows),
        width(width),
        parts(std::clamp<int64_t>(
            std::min(2 * kBlocks / (divided_up(rows, 4 * kSide) * divided_up(width, 4 * kSide)), depths / 64), 1, 32)),
        values(torch::stable::new_empty(like, {needed ? parts * rows * width : 0}, type)) {}

  A* at() const { return static_cast<A*>(values.mutable_data_ptr()); }

  // Adds to rows [row_first, row_first + number), or writes them where `first`.
  template <class Left, class Right>
  void add(const Left& left, const Right& right, int64_t row_first, int64_t number, int64_t depths, bool first) const {
    shaped<A>(number, width, [&](auto r) {
      constexpr int R = decltype(r)::value;
      const dim3 grid(blocks(divided_up(width, kSide * R)), blocks(divided_up(number, kSide * R)), blocks(parts));
      launch(values, add_products<R, A, Left, Right>, grid, dim3(kThreads), 0, left, right, number, width, depths,
             divided_up(depths, parts), rows * width, first, at() + row_first * width);
    });
  }
};

template <class T>
void project(const Rows& rows, int64_t width, const Sums<Accumulator<T>>& sums, const Tensor& like, void* gradients) {
  launch(like, project_rows<T>, dim3(blocks(divided_up(rows.count, kThreads / kWarp))), dim3(kThreads), 0, rows, width,
         sums.at(), sums.parts, sums.rows * width, static_cast<T*>(gradients));
}

template <class T>
void backward_of(const Tensor& anchor, const Tensor& keys, const Tensor& statistics, const Tensor& key_norms,
                 const Losses& losses, const Tensor& grad_anchor, const Tensor& grad_keys, bool need_anchor,
                 bool need_keys) {
  using A = Accumulator<T>;
  const int64_t batch = anchor.size(0), count = keys.size(0), width = anchor.size(1);
  const ScalarType type = accumulator_of(anchor.scalar_type());
  const A* const norms = static_cast<const A*>(statistics.const_data_ptr());
  const A* const norms_of_keys = static_cast<const A*>(key_norms.const_data_ptr());
  const T* const anchor_at = static_cast<const T*>(anchor.const_data_ptr());
  const T* const keys_at = static_cast<const T*>(keys.const_data_ptr());
  const int64_t most_anchors = std::min(kAnchorTile, batch);
  const int64_t most_keys = std::min({kSlopes / most_anchors, kMostKeys, count});
  const Sums<A> anchor_sums(anchor, type, need_anchor, batch, width, most_keys);
  const Sums<A> key_sums(anchor, type, need_keys, most_keys, width, most_anchors);
  Tensor slopes = torch::stable::new_empty(anchor, {most_anchors * most_keys}, type);
  A* const slopes_at = static_cast<A*>(slopes.mutable_data_ptr());

  for (int64_t key = 0; key < count; key += most_keys) {
    const Rows tile_keys{keys_at + key * keys.stride(0), std::min(most_keys, count - key), keys.stride(0),
                         norms_of_keys + key};
    for (int64_t row = 0; row < batch; row += kAnchorTile) {
      const Rows anchors{anchor_at + row * anchor.stride(0), std::min(kAnchorTile, batch - row), anchor.stride(0),
                         norms + row};
      Losses here = losses;
      here.grad = static_cast<const A*>(losses.grad) + row * losses.grad_stride;
      here.positive += row;
      here.log_sums = norms + batch + row;
      here.misses = norms + 2 * batch + row;
      shaped<A>(anchors.count, tile_keys.count, [&](auto r) {
        constexpr int R = decltype(r)::value;
        const dim3 grid(blocks(divided_up(tile_keys.count, kSide * R)), blocks(divided_up(anchors.count, kSide * R)));
        launch(anchor, slopes_of_tiles<T, R>, grid, dim3(kThreads), 0, anchors, tile_keys, key, width, here, slopes_at);
      });
      if (need_anchor) {
        const ByRow<A> left{slopes_at, anchors.count, tile_keys.count, tile_keys.count};
        const ByColumn<T> right{keys_at + key * keys.stride(0), width, keys.stride(0), tile_keys.count};
        anchor_sums.add(left, UnitByColumn<T>{right, norms_of_keys + key}, row, anchors.count, tile_keys.count,
                        key == 0);
      }
      if (need_keys) {
        const ByColumn<A> left{slopes_at, tile_keys.count, tile_keys.count, anchors.count};
        const ByColumn<T> right{anchor_at + row * anchor.stride(0), width, anchor.stride(0), anchors.count};
        key_sums.add(left, UnitByColumn<T>{right, norms + row}, 0, tile_keys.count, anchors.count, row == 0);
      }
    }
    if (need_keys) {
      project<T>(tile_keys, width, key_sums, anchor, static_cast<T*>(grad_keys.mutable_data_ptr()) + key * width);
    }
  }
  if (need_anchor) {
    const Rows anchors{anchor_at, batch, anchor.stride(0), norms};
    project<T>(anchors, width, anchor_sums, anchor, grad_anchor.mutable_data_ptr());
  }
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& anchor_, const Tensor& keys_,
                                    const Tensor& positive_, const Tensor& statistics_, const Tensor& key_norms_,
                                    double temperature, int64_t reduction, bool need_anchor, bool need_keys) {
  const OnDeviceOf guard(anchor_);
  const Tensor anchor = with_dense_rows(anchor_), keys = with_dense_rows(keys_);
  const Tensor positive = as_contiguous(positive_), statistics = as_contiguous(statistics_);
  const Tensor key_norms = as_contiguous(key_norms_);
  const int64_t batch = anchor.size(0), count = keys.size(0), width = anchor.size(1);
  const ScalarType type = accumulator_of(anchor.scalar_type());
  const Tensor grad = grad_.scalar_type() == type ? grad_ : torch::stable::to(grad_, type);
  const auto shape = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, {like.size(0), width}) : torch::stable::new_empty(like, {0});
  };
  Tensor grad_anchor = shape(need_anchor, anchor), grad_keys = shape(need_keys, keys);
  if (width == 0 || batch == 0) {
    if (need_keys && count > 0 && width > 0) torch::stable::zero_(grad_keys);
    return {grad_anchor, grad_keys};
  }
  Losses losses{};
  losses.grad = grad.const_data_ptr();
  losses.grad_stride = reduction == Reduction::none ? grad.stride(0) : 0;
  losses.scale = 1 / (temperature * (reduction == Reduction::mean ? static_cast<double>(batch) : 1));
  losses.temperature = temperature;
  losses.positive = static_cast<const int64_t*>(positive.const_data_ptr());
  BDCORE_FLOATS(anchor.scalar_type(), T, backward_of<T>(anchor, keys, statistics, key_norms, losses, grad_anchor,
                                                         grad_keys, need_anchor, need_keys));
  return {grad_anchor, grad_keys};
}

}  // namespace

BDCORE_CUDA_IMPL(m) {
  m.impl("info_nce", TORCH_BOX(&forward));
  m.impl("info_nce_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
