// load_batch on the CPU: checks values, prepares the triggers in use, splits the batch among threads.
#include "load_batch_kernel.h"

#include <string>

#include "tensors.h"

namespace bdcore {
namespace {

using Numbers = std::optional<std::vector<double>>;

// Tensors whose memory a LoadBatch points to.
using Kept = std::vector<Tensor>;

const int64_t* integers(const Tensor& tensor, Kept& kept) {
  kept.push_back(as_contiguous(tensor));
  return static_cast<const int64_t*>(kept.back().const_data_ptr());
}

// The least and the greatest of every `step`-th of `count` numbers.
struct Range {
  Range(const int64_t* values, int64_t count, int64_t step) : none(count == 0) {
    for (int64_t i = 0; i < count; ++i) {
      low = i == 0 ? values[0] : std::min(low, values[i * step]);
      high = i == 0 ? values[0] : std::max(high, values[i * step]);
    }
  }
  bool within(int64_t first, int64_t last) const { return none || (low >= first && high <= last); }
  std::string text() const { return std::to_string(low) + " to " + std::to_string(high); }
  bool none;
  int64_t low = 0, high = 0;
};

void check_values(const LoadBatch& batch, int64_t samples, int64_t triggers) {
  const Range index(batch.index, batch.count, 1);
  STD_TORCH_CHECK(index.within(0, samples - 1), "index must be in [0, ", samples - 1, "] for ", samples,
                  " images, got ", index.text());
  if (batch.trigger != nullptr) {
    const Range trigger(batch.trigger, batch.count, 1);
    STD_TORCH_CHECK(trigger.within(-1, triggers - 1), "trigger must be in [-1, ", triggers - 1, "] for ", triggers,
                    " triggers, got ", trigger.text());
  }
  if (batch.offset != nullptr) {
    const Range top(batch.offset, batch.count, 2), left(batch.offset + 1, batch.count, 2);
    const int64_t lowest = batch.height - batch.rows, rightmost = batch.width - batch.columns;
    STD_TORCH_CHECK(top.within(0, lowest) && left.within(0, rightmost), "offset places a patch of ", batch.rows, " x ",
                    batch.columns, " pixels outside images of ", batch.height, " x ", batch.width,
                    ": top must be in [0, ", lowest, "] and left in [0, ", rightmost, "], got top ", top.text(),
                    " and left ", left.text());
  }
}

Tensor contiguous_in(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// Computes keep and add of the triggers in use.
void prepare(LoadBatch& batch, const Tensor& pattern, const Tensor& mask, const Numbers& mean, const Numbers& std,
             Kept& kept) {
  // Of more triggers than images only those of the batch are prepared, again for each image.
  batch.by_image = batch.trigger != nullptr && pattern.size(0) > batch.count;
  const int64_t slots = batch.trigger == nullptr ? 1 : std::min(pattern.size(0), batch.count);
  const ScalarType dtype = batch.accumulator == Scalar::f64 ? ScalarType::Double : ScalarType::Float;
  const Tensor patterns = contiguous_in(pattern, dtype), masks = contiguous_in(mask, dtype);
  Tensor prepared = torch::stable::new_empty(patterns, {2, slots, batch.rows, batch.columns, batch.channels});
  char* first = static_cast<char*>(prepared.mutable_data_ptr());
  char* second = first + prepared.numel() / 2 * static_cast<int64_t>(prepared.element_size());
  const LoadBatchTriggers triggers{patterns.const_data_ptr(),
                                   masks.const_data_ptr(),
                                   mask.size(1) == 1,
                                   mean.has_value() ? mean->data() : nullptr,
                                   std.has_value() ? std->data() : nullptr,
                                   first,
                                   second};
  kept.push_back(prepared);
  batch.keep = first;
  batch.add = second;
  parallel(slots * batch.rows, batch.columns * batch.channels * 16, [&](int64_t begin, int64_t end) {
    chosen_load_batch_kernel().prepare(batch, triggers, begin, end);
  });
}

template <class A>
void load(LoadBatch& batch, const Numbers& mean, const Numbers& std) {
  const int64_t channels = batch.channels, width = batch.width * channels;
  std::vector<A> scale(static_cast<size_t>(width), A(1)), shift(static_cast<size_t>(width), A(0));
  for (int64_t i = 0; mean.has_value() && i < width; ++i) {
    const double spread = (*std)[static_cast<size_t>(i % channels)];
    scale[static_cast<size_t>(i)] = static_cast<A>(1.0 / (255.0 * spread));
    shift[static_cast<size_t>(i)] = static_cast<A>(-(*mean)[static_cast<size_t>(i % channels)] / spread);
  }
  batch.scale = scale.data();
  batch.shift = shift.data();
  const int64_t bytes = batch.strip * width * (batch.type == Scalar::u8 ? 2 : 5);
  parallel(batch.count * batch.strips, bytes, [&](int64_t begin, int64_t end) {
    std::vector<u8> line(static_cast<size_t>(width));
    chosen_load_batch_kernel().load(batch, line.data(), begin, end);
  });
}

Tensor load_batch(Tensor images, Tensor index, int64_t seed, int64_t crop, bool flip, int64_t cutout,
                  std::optional<Tensor> pattern, std::optional<Tensor> mask, std::optional<Tensor> trigger,
                  std::optional<Tensor> offset, Numbers mean, Numbers std, ScalarType out_dtype) {
  LoadBatch batch{};
  batch.images = static_cast<const u8*>(images.const_data_ptr());
  batch.image_stride = images.stride(0);
  batch.channel_stride = images.stride(1);
  batch.row_stride = images.stride(2);
  batch.column_stride = images.stride(3);
  batch.channels = images.size(1);
  batch.height = images.size(2);
  batch.width = images.size(3);
  batch.count = index.size(0);
  batch.seed = static_cast<unsigned long long>(seed);
  batch.crop = crop;
  batch.flip = flip;
  batch.cutout = cutout;
  batch.triggers = pattern.has_value();
  batch.type = scalar_of(out_dtype);
  const bool wide = out_dtype == ScalarType::Double ||
                    (batch.triggers && (pattern->scalar_type() == ScalarType::Double ||
                                        mask->scalar_type() == ScalarType::Double));
  batch.accumulator = wide ? Scalar::f64 : Scalar::f32;
  batch.divide = !mean.has_value();

  Tensor out = torch::stable::empty({batch.count, batch.channels, batch.height, batch.width}, out_dtype, std::nullopt,
                                    images.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  batch.out = out.mutable_data_ptr();
  Kept kept;
  batch.index = integers(index, kept);
  batch.trigger = trigger.has_value() ? integers(*trigger, kept) : nullptr;
  batch.offset = offset.has_value() ? integers(*offset, kept) : nullptr;
  batch.rows = batch.triggers ? pattern->size(2) : 0;
  batch.columns = batch.triggers ? pattern->size(3) : 0;
  check_values(batch, images.size(0), batch.triggers ? pattern->size(0) : 0);
  if (out.numel() == 0) return out;

  constexpr int64_t numbers = 16 * 1024;  // in a strip: little enough to share a batch of few large images fairly
  batch.strip = std::min(batch.height, std::max<int64_t>(1, numbers / (batch.width * batch.channels)));
  batch.ahead = std::min(batch.strip, 2 + 2048 / (batch.width * batch.channels));
  batch.strips = (batch.height + batch.strip - 1) / batch.strip;
  if (batch.triggers) prepare(batch, *pattern, *mask, mean, std, kept);
  wide ? load<double>(batch, mean, std) : load<float>(batch, mean, std);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) { m.impl("load_batch", TORCH_BOX(&load_batch)); }

}  // namespace bdcore
