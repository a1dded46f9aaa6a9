#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "info_nce_kernel.h"
#include "tensors.h"

namespace bdcore {

namespace {

enum Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in bdcore/ops/info_nce.py

NceRows rows_of(const Tensor& tensor, const Tensor& norms) {
  return {scalar_of(tensor.scalar_type()), tensor.const_data_ptr(), tensor.stride(0), tensor.size(1),
          norms.mutable_data_ptr()};
}

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// What a call has at hand: kernels, sizes in panels, threads' shares.
struct Work {
  const InfoNce& kernels = chosen_info_nce();
  ScalarType type;  // of accumulators
  int64_t width, wide, tall, tile_of_keys, size;

  explicit Work(const Tensor& anchor)
      : type(accumulator_of(anchor.scalar_type())),
        width(anchor.size(1)),
        wide(type == ScalarType::Double ? kernels.wide_double : kernels.wide_float),
        tall(kernels.tall),
        size(type == ScalarType::Double ? 8 : 4) {
    // A tile of keys fits into a core's second cache, and is worth going through all anchors for.
    constexpr int64_t cache = 768 * 1024, fewest = 128;
    const int64_t fitting = cache / std::max<int64_t>(1, width * size) / fewest * fewest;
    tile_of_keys = std::clamp(fitting, fewest, kNceTile);
  }

  Tensor numbers(const Tensor& like, int64_t count) const { return torch::stable::new_empty(like, {count}, type); }

  // As parallel(), for groups of `rows` rows that are multiplied with `columns` others: a product takes as long as
  // moving a byte for each eight operations.
  template <class Part>
  void multiply(int64_t groups, int64_t rows, int64_t columns, const Part& part) const {
    parallel(groups, rows * columns * std::max<int64_t>(1, width) / 4, part);
  }

  void norms(const NceRows& rows, int64_t count) const {
    parallel(count, width * size, [&](int64_t begin, int64_t end) { kernels.norms(rows, begin, end); });
  }

  void row_panels(const NceRows& rows, int64_t first, int64_t count, const Tensor& panels) const {
    void* const at = panels.mutable_data_ptr();
    parallel(divided_up(count, wide), 4 * wide * width * size, [&](int64_t begin, int64_t end) {
      kernels.row_panels(rows, first, count, begin, end, at);
    });
  }

  void column_panels(const NceRows& rows, int64_t first, int64_t count, const Tensor& panels) const {
    void* const at = panels.mutable_data_ptr();
    parallel(divided_up(width, wide), 2 * wide * count * size, [&](int64_t begin, int64_t end) {
      kernels.column_panels(rows, first, count, begin, end, at);
    });
  }
};

void check_positive(const Tensor& positive, int64_t keys) {
  const int64_t* values = static_cast<const int64_t*>(positive.const_data_ptr());
  if (positive.numel() == 0) return;
  const auto [least, most] = std::minmax_element(values, values + positive.numel());
  STD_TORCH_CHECK(*least >= 0 && *most < keys, "positive_index must be in [0, ", keys - 1, "] for ", keys,
                  " keys, got ", *least, " to ", *most);
}

template <class A>
void reduce(const Tensor& losses, int64_t batch, bool averaged, Tensor& result) {
  const A* values = static_cast<const A*>(losses.const_data_ptr());
  double total = 0;  // one after the other: the order of threads is not that of rows
  for (int64_t row = 0; row < batch; ++row) total += values[row];
  if (averaged) total = batch == 0 ? std::nan("") : total / static_cast<double>(batch);
  *static_cast<A*>(result.mutable_data_ptr()) = static_cast<A>(total);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& anchor_, const Tensor& keys_, const Tensor& positive_,
                                           double temperature, int64_t reduction) {
  const Tensor anchor = with_dense_rows(anchor_), keys = with_dense_rows(keys_);
  const Tensor positive = as_contiguous(positive_);
  const int64_t batch = anchor.size(0), count = keys.size(0);
  check_positive(positive, count);
  const Work work(anchor);
  Tensor losses = work.numbers(anchor, batch);
  Tensor key_norms = work.numbers(anchor, count);
  Tensor statistics = torch::stable::new_empty(anchor, {3, batch}, work.type);
  char* const at = static_cast<char*>(statistics.mutable_data_ptr());
  char* const log_sums = at + batch * work.size;
  char* const misses = log_sums + batch * work.size;

  NceTile tile{};
  tile.anchors = rows_of(anchor, statistics);  // norms are the first of the statistics
  tile.keys = rows_of(keys, key_norms);
  tile.temperature = temperature;
  tile.positive = static_cast<const int64_t*>(positive.const_data_ptr());
  tile.anchor_count = batch;
  work.norms(tile.anchors, batch);
  work.norms(tile.keys, count);
  const double nothing = -std::numeric_limits<double>::infinity();
  Tensor largest = torch::stable::fill_(work.numbers(anchor, batch), nothing);
  Tensor sums = torch::stable::fill_(work.numbers(anchor, batch), 0);
  Tensor of_positive = work.numbers(anchor, batch);
  const NceState state{largest.mutable_data_ptr(), sums.mutable_data_ptr(), of_positive.mutable_data_ptr()};
  Tensor panels = work.numbers(anchor, std::min(divided_up(count, work.wide) * work.wide, work.tile_of_keys) *
                                           work.width);
  tile.key_panels = panels.const_data_ptr();
  for (tile.key_first = 0; tile.key_first < count && batch > 0; tile.key_first += work.tile_of_keys) {
    tile.key_count = std::min(work.tile_of_keys, count - tile.key_first);
    work.row_panels(tile.keys, tile.key_first, tile.key_count, panels);
    work.multiply(divided_up(batch, work.tall), work.tall, tile.key_count, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> room(new char[work.tall * (work.width + kNceLine) * work.size]);
      work.kernels.forward(tile, state, begin, end, room.get());
    });
  }
  void* const losses_at = losses.mutable_data_ptr();
  parallel(batch, 64 * work.size, [&](int64_t begin, int64_t end) {
    work.kernels.finish(tile.anchors.scalar, state, begin, end, losses_at, log_sums, misses);
  });
  if (reduction == Reduction::none) return {losses, statistics, key_norms};
  Tensor result = torch::stable::new_empty(anchor, {}, work.type);
  if (work.type == ScalarType::Double) {
    reduce<double>(losses, batch, reduction == Reduction::mean, result);
  } else {
    reduce<float>(losses, batch, reduction == Reduction::mean, result);
  }
  return {result, statistics, key_norms};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& anchor_, const Tensor& keys_,
                                    const Tensor& positive_, const Tensor& statistics_, const Tensor& key_norms_,
                                    double temperature, int64_t reduction, bool need_anchor, bool need_keys) {
  const Tensor anchor = with_dense_rows(anchor_), keys = with_dense_rows(keys_);
  const Tensor positive = as_contiguous(positive_), statistics = as_contiguous(statistics_);
  const Tensor key_norms = as_contiguous(key_norms_);
  const int64_t batch = anchor.size(0), count = keys.size(0);
  check_positive(positive, count);
  const Work work(anchor);
  const Tensor grad = grad_.scalar_type() == work.type ? grad_ : torch::stable::to(grad_, work.type);
  Tensor grad_anchor = need_anchor ? new_on_large_pages(anchor, {batch, work.width})
                                   : torch::stable::new_empty(anchor, {0});
  Tensor grad_keys = need_keys ? new_on_large_pages(keys, {count, work.width}) : torch::stable::new_empty(keys, {0});

  NceTile tile{};
  tile.anchors = rows_of(anchor, statistics);
  tile.keys = rows_of(keys, key_norms);
  tile.temperature = temperature;
  tile.positive = static_cast<const int64_t*>(positive.const_data_ptr());
  NceGradients grads{};
  grads.grad = grad.const_data_ptr();
  grads.grad_stride = reduction == Reduction::none ? grad.stride(0) : 0;
  grads.scale = 1 / (temperature * (reduction == Reduction::mean ? static_cast<double>(batch) : 1));
  const char* const at = static_cast<const char*>(statistics.const_data_ptr());
  grads.log_sums = at + batch * work.size;
  grads.misses = at + 2 * batch * work.size;

  const int64_t columns = divided_up(work.width, work.wide) * work.wide;
  const int64_t most_keys = std::min(work.tile_of_keys, count), most_anchors = std::min(kNceTile, batch);
  Tensor slopes = work.numbers(anchor, divided_up(most_anchors, work.tall) * work.tall * kNceLine);
  Tensor key_panels = work.numbers(anchor, divided_up(most_keys, work.wide) * work.wide * work.width);
  Tensor key_columns = work.numbers(anchor, need_anchor ? most_keys * columns : 0);
  Tensor anchor_columns = work.numbers(anchor, need_keys ? most_anchors * columns : 0);
  // The sums of a gradient stand where the gradient will, if that has their type; keys are done with tile by tile.
  const bool in_place = anchor.scalar_type() == work.type;
  Tensor anchor_sums = in_place ? grad_anchor : work.numbers(anchor, need_anchor ? batch * work.width : 0);
  Tensor key_sums = work.numbers(anchor, need_keys ? most_keys * work.width : 0);
  if (need_anchor) torch::stable::zero_(anchor_sums);
  grads.slopes = slopes.mutable_data_ptr();
  grads.key_columns = key_columns.const_data_ptr();
  grads.anchor_columns = anchor_columns.const_data_ptr();
  grads.anchors = need_anchor ? anchor_sums.mutable_data_ptr() : nullptr;
  grads.keys = need_keys ? key_sums.mutable_data_ptr() : nullptr;
  tile.key_panels = key_panels.const_data_ptr();

  const auto project = [&](const NceRows& rows, int64_t first, int64_t number, const Tensor& sums, void* gradients) {
    const void* const sums_at = sums.const_data_ptr();
    parallel(number, 3 * work.width * work.size, [&](int64_t begin, int64_t end) {
      work.kernels.project(rows, first, begin, end, sums_at, gradients);
    });
  };
  for (tile.key_first = 0; tile.key_first < count; tile.key_first += work.tile_of_keys) {
    tile.key_count = std::min(work.tile_of_keys, count - tile.key_first);
    work.row_panels(tile.keys, tile.key_first, tile.key_count, key_panels);
    if (need_anchor) work.column_panels(tile.keys, tile.key_first, tile.key_count, key_columns);
    if (need_keys) torch::stable::zero_(key_sums);
    for (tile.anchor_first = 0; tile.anchor_first < batch; tile.anchor_first += kNceTile) {
      tile.anchor_count = std::min(kNceTile, batch - tile.anchor_first);
      if (need_keys) work.column_panels(tile.anchors, tile.anchor_first, tile.anchor_count, anchor_columns);
      work.multiply(divided_up(tile.anchor_count, work.tall), work.tall, (1 + need_anchor) * tile.key_count,
                    [&](int64_t begin, int64_t end) {
                      const std::unique_ptr<char[]> room(new char[work.tall * work.width * work.size]);
                      work.kernels.backward_anchors(tile, grads, begin, end, room.get());
                    });
      if (!need_keys) continue;
      work.multiply(divided_up(tile.key_count, work.tall), work.tall, tile.anchor_count,
                    [&](int64_t begin, int64_t end) { work.kernels.backward_keys(tile, grads, begin, end); });
    }
    if (!need_keys) continue;
    char* const to = static_cast<char*>(grad_keys.mutable_data_ptr());
    project(tile.keys, tile.key_first, tile.key_count, key_sums,
            to + tile.key_first * work.width * static_cast<int64_t>(keys.element_size()));
  }
  if (need_anchor) project(tile.anchors, 0, batch, anchor_sums, grad_anchor.mutable_data_ptr());
  return {grad_anchor, grad_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&forward));
  m.impl("info_nce_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
