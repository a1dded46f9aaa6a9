// blend_trigger and its gradients on the CPU: checks values, allocates, splits the work among threads.
#include "blend_trigger_kernel.h"

#include <tuple>

#include "../common/images.h"
#include "tensors.h"

namespace bdcore {

namespace {

using OptionalTensor = std::optional<Tensor>;
using OptionalFloats = std::optional<std::vector<double>>;

constexpr int64_t kCaches = 16 << 20;     // bytes of a result that the caches may hold until it is read
constexpr int64_t kSums = 8192;          // elements whose sums over the batch stay in the second cache
constexpr int64_t kPeriod = 512;         // elements outside the window whose coefficients are laid out, at least
constexpr int64_t kLine = 64;            // bytes in a line of the caches

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t parts(int64_t value, int64_t size) { return (value + size - 1) / size; }

Tensor as(const Tensor& tensor, ScalarType type) {
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// The numbers of an optional int64 tensor, while this lives.
class Integers {
 public:
  explicit Integers(const OptionalTensor& given) {
    if (given) tensor_ = as_contiguous(*given);
  }
  const i64* data() const { return tensor_ ? static_cast<const i64*>(tensor_->const_data_ptr()) : nullptr; }

 private:
  OptionalTensor tensor_;
};

void check_values(const Tensor& images, const Tensor& pattern, const i64* index, const i64* offset) {
  const int64_t batch = images.size(0), triggers = pattern.size(0);
  const int64_t bottom = images.size(2) - pattern.size(2), right = images.size(3) - pattern.size(3);
  if (batch == 0) return;
  if (index != nullptr) {
    const auto [least, most] = std::minmax_element(index, index + batch);
    STD_TORCH_CHECK(*least >= -1 && *most < triggers, "index must be in [-1, ", triggers - 1, "] for ", triggers,
                    " triggers, got ", *least, " to ", *most);
  }
  if (offset != nullptr) {
    i64 least[] = {offset[0], offset[1]}, most[] = {offset[0], offset[1]};
    for (int64_t i = 2; i < 2 * batch; ++i) {
      least[i % 2] = std::min(least[i % 2], offset[i]);
      most[i % 2] = std::max(most[i % 2], offset[i]);
    }
    STD_TORCH_CHECK(least[0] >= 0 && most[0] <= bottom && least[1] >= 0 && most[1] <= right,
                    "offset places a patch of ", pattern.size(2), " x ", pattern.size(3), " pixels outside images of ",
                    images.size(2), " x ", images.size(3), ": top must be in [0, ", bottom, "] and left in [0, ", right,
                    "], got top ", least[0], " to ", most[0], " and left ", least[1], " to ", most[1]);
  }
}

ScalarType working_type(const Tensor& images, const Tensor& pattern) {
  const bool wide = images.scalar_type() == ScalarType::Double || pattern.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

Window window_of(const Tensor& images, const Tensor& pattern, Layout layout, const i64* offset) {
  const int64_t channels = images.size(1);
  Window window{};
  window.batch = images.size(0);
  window.lanes = layout == Layout::interleaved ? channels : 1;
  window.planes = layout == Layout::interleaved ? 1 : channels;
  window.row = images.size(3) * window.lanes;
  window.plane = images.size(2) * window.row;
  window.rows = pattern.size(2);
  window.columns = pattern.size(3) * window.lanes;
  window.offset = offset;
  if (window.rows * window.columns == window.plane) {
    window.rows = 1;
    window.columns = window.plane;
    window.offset = nullptr;  // only (0, 0) is valid
  }
  return window;
}

// y = image (1 - m) x + pattern m p + constant for each channel, m being 0 outside the window.
struct Factors {
  std::vector<double> image, pattern, constant;
  double pattern_unit;
  bool copied;  // y is x where m is 0, in its own format
};

void transform(const Tensor& images, const Tensor* pattern, const Tensor& mask, const i64* index, const Window& window,
               const Factors& factors, Tensor& out) {
  const ScalarType type = mask.scalar_type();
  const int64_t triggers = mask.size(0), channels = images.size(1), size = type == ScalarType::Double ? 8 : 4;
  const int64_t pixels = mask.size(2) * mask.size(3), per_image = channels * pixels;
  const bool whole = window.rows * window.columns == window.plane;
  const BlendTrigger& kernels = chosen_blend_trigger();

  Tensor tables = torch::stable::new_empty(mask, {2, triggers, per_image}, type);
  CoefficientsJob coefficients{};
  coefficients.pattern = pattern == nullptr ? nullptr : pattern->const_data_ptr();
  coefficients.mask = mask.const_data_ptr();
  coefficients.channels = channels;
  coefficients.mask_channels = mask.size(1);
  coefficients.pixels = pixels;
  coefficients.lanes = window.lanes;
  coefficients.pattern_unit = factors.pattern_unit;
  coefficients.image_factor = factors.image.data();
  coefficients.pattern_factor = factors.pattern.data();
  coefficients.constant = factors.constant.data();
  coefficients.scale = tables.mutable_data_ptr();
  coefficients.shift = static_cast<char*>(coefficients.scale) + triggers * per_image * size;
  coefficients.wide = type == ScalarType::Double;
  parallel(triggers * channels, pixels * 4 * size,
           [&](int64_t begin, int64_t end) { kernels.coefficients(coefficients, begin, end); });

  BlendJob job{};
  job.window = window;
  job.images = images.const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.from = scalar_of(images.scalar_type());
  job.to = scalar_of(out.scalar_type());
  job.fraction = job.from == Scalar::u8 && job.to != Scalar::u8;
  job.index = index;
  job.scale = coefficients.scale;
  job.shift = coefficients.shift;
  job.wide = coefficients.wide;
  const int64_t plane_bytes = window.plane * static_cast<int64_t>(out.element_size());
  job.streamed = whole && window.batch * window.planes * plane_bytes > kCaches && plane_bytes % kLine == 0;

  std::vector<double> outside;
  std::vector<float> narrow;
  if (!factors.copied && (!whole || index != nullptr)) {
    // A multiple of whole lines, so that what is streamed out stays aligned.
    job.period = window.lanes * rounded_up(parts(kPeriod, window.lanes), kLine);
    const int64_t half = window.planes * job.period;
    outside.resize(2 * half);
    for (int64_t i = 0; i < half; ++i) {
      const int64_t channel = window.lanes == 1 ? i / job.period : i % window.lanes;
      outside[i] = factors.image[channel];
      outside[half + i] = factors.constant[channel];
    }
    if (!job.wide) narrow.assign(outside.begin(), outside.end());
    job.outside_scale = job.wide ? static_cast<const void*>(outside.data()) : narrow.data();
    job.outside_shift = job.wide ? static_cast<const void*>(outside.data() + half) : narrow.data() + half;
  }
  const int64_t bytes = static_cast<int64_t>(images.element_size() + out.element_size());
  parallel(parts(window.batch, kTogether) * window.planes, kTogether * window.plane * bytes,
           [&](int64_t begin, int64_t end) { kernels.blend(job, begin, end); });
}

Tensor forward(const Tensor& images_, const Tensor& pattern_, const Tensor& mask_, const OptionalTensor& index_,
               const OptionalTensor& offset_, const OptionalFloats& mean, const OptionalFloats& std,
               ScalarType out_type) {
  const Integers index(index_), offset(offset_);
  check_values(images_, pattern_, index.data(), offset.data());
  const Layout layout = layout_of(images_);
  Tensor out = result_like(images_, layout, out_type);
  if (images_.numel() > 0) {
    const Tensor images = laid_out(images_, layout);
    const ScalarType type = working_type(images, pattern_);
    const Tensor pattern = as(pattern_, type), mask = as(mask_, type);
    const size_t channels = images.size(1);
    const bool from_bytes = images.scalar_type() == ScalarType::Byte, to_bytes = out_type == ScalarType::Byte;
    const bool normalised = mean && std;
    Factors factors;
    factors.image.assign(channels, to_bytes && !from_bytes ? 255.0 : 1.0);
    factors.pattern.assign(channels, 1.0);
    factors.constant.assign(channels, -0.0);  // x + -0.0 is x, also for -0.0
    factors.pattern_unit = to_bytes ? 255.0 : 1.0;
    factors.copied = images.scalar_type() == out_type && !normalised;
    for (size_t c = 0; normalised && c < channels; ++c) {
      factors.image[c] = factors.pattern[c] = 1.0 / (*std)[c];
      factors.constant[c] = -(*mean)[c] / (*std)[c];
    }
    transform(images, &pattern, mask, index.data(), window_of(images, pattern, layout, offset.data()), factors, out);
  }
  return given_back(out, images_, layout);
}

// The images of a batch, those of a trigger together, cut into pieces that are summed one by one.
struct Pieces {
  std::vector<i64> order;   // images; empty: as they are
  std::vector<i64> starts;  // of the pieces, in `order`; one more than there are pieces
  std::vector<i64> first;   // [T + 1], each trigger's first piece
};

Pieces pieces_of(int64_t batch, int64_t triggers, const i64* index, int64_t blocks) {
  // Enough items for many threads, but by sizes alone, so that the sums never depend on their number.
  const int64_t size = std::clamp<int64_t>(parts(batch, parts(16, blocks)), 32, 512);
  Pieces pieces;
  std::vector<i64> ends(triggers + 1, 0);
  if (index == nullptr) {
    ends[0] = batch;
    std::fill(ends.begin(), ends.end(), batch);
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      if (index[b] >= 0) ++ends[index[b] + 1];
    }
    for (int64_t t = 0; t < triggers; ++t) ends[t + 1] += ends[t];
    pieces.order.resize(ends[triggers]);
    for (int64_t b = 0; b < batch; ++b) {
      if (index[b] >= 0) pieces.order[ends[index[b]]++] = b;
    }
  }
  int64_t start = 0;  // ends[t] is now the end of trigger t
  for (int64_t t = 0; t < triggers; ++t) {
    pieces.first.push_back(static_cast<i64>(pieces.starts.size()));
    for (; start < ends[t]; start = std::min(start + size, ends[t])) pieces.starts.push_back(start);
  }
  pieces.first.push_back(static_cast<i64>(pieces.starts.size()));
  pieces.starts.push_back(start);
  return pieces;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& images_, const Tensor& pattern_,
                                            const Tensor& mask_, const OptionalTensor& index_,
                                            const OptionalTensor& offset_, const OptionalFloats& std, bool need_images,
                                            bool need_pattern, bool need_mask) {
  const Integers index(index_), offset(offset_);
  check_values(images_, pattern_, index.data(), offset.data());
  const Layout layout = layout_of(images_);
  const Tensor grad = laid_out(grad_, layout);
  const ScalarType type = working_type(images_, pattern_);
  const Tensor pattern = as(pattern_, type), mask = as(mask_, type);
  const int64_t triggers = pattern.size(0), channels = images_.size(1), pixels = pattern.size(2) * pattern.size(3);
  const Window window = window_of(images_, pattern, layout, offset.data());
  std::vector<double> factor(channels, 1.0);
  for (int64_t c = 0; std && c < channels; ++c) factor[c] = 1.0 / (*std)[c];

  Tensor grad_images = need_images ? result_like(images_, layout, images_.scalar_type())
                                   : torch::stable::new_empty(images_, {0});
  if (need_images && images_.numel() > 0) {
    // dx is a blend of the gradient with nothing.
    const Factors factors{factor, factor, std::vector<double>(channels, -0.0), 1.0,
                          !std && grad.scalar_type() == images_.scalar_type()};
    transform(grad, nullptr, mask, index.data(), window, factors, grad_images);
  }
  if (need_images) grad_images = given_back(grad_images, images_, layout);

  Tensor grad_pattern = need_pattern ? torch::stable::new_empty(pattern, pattern.sizes(), type)
                                     : torch::stable::new_empty(pattern_, {0});
  Tensor grad_mask =
      need_mask ? torch::stable::new_empty(mask, mask.sizes(), type) : torch::stable::new_empty(mask_, {0});
  if (need_pattern || need_mask) {
    const Tensor images = need_mask ? laid_out(images_, layout) : images_;
    const int64_t all = channels * pixels, blocks = std::max<int64_t>(1, parts(all, kSums));
    const Pieces pieces = pieces_of(images.size(0), triggers, index.data(), blocks);
    const int64_t count = static_cast<int64_t>(pieces.starts.size()) - 1;
    Tensor sums = torch::stable::new_empty(pattern, {count, need_mask ? 2 : 1, all}, type);
    const BlendTrigger& kernels = chosen_blend_trigger();

    SumJob job{};
    job.window = window;
    job.images = images.const_data_ptr();
    job.grad = grad.const_data_ptr();
    job.images_type = scalar_of(images.scalar_type());
    job.grad_type = scalar_of(grad.scalar_type());
    job.order = pieces.order.empty() ? nullptr : pieces.order.data();
    job.starts = pieces.starts.data();
    job.block = rounded_up(parts(all, blocks), 16);
    job.blocks = blocks;
    job.products = need_mask;
    job.wide = type == ScalarType::Double;
    job.sums = sums.mutable_data_ptr();
    const int64_t bytes = static_cast<int64_t>(images.element_size() + grad.element_size());
    const int64_t images_each = parts(images.size(0), std::max<int64_t>(1, count));
    parallel(count * blocks, job.block * images_each * bytes,
             [&](int64_t begin, int64_t end) { kernels.sum(job, begin, end); });

    GradientsJob gradients{};
    gradients.pattern = pattern.const_data_ptr();
    gradients.mask = mask.const_data_ptr();
    gradients.channels = channels;
    gradients.mask_channels = mask.size(1);
    gradients.pixels = pixels;
    gradients.lanes = window.lanes;
    gradients.sums = job.sums;
    gradients.products = need_mask;
    gradients.wide = job.wide;
    gradients.pieces = pieces.first.data();
    gradients.image_unit = job.images_type == Scalar::u8 ? 1.0 / 255.0 : 1.0;
    gradients.factor = factor.data();
    gradients.grad_pattern = need_pattern ? grad_pattern.mutable_data_ptr() : nullptr;
    gradients.grad_mask = need_mask ? grad_mask.mutable_data_ptr() : nullptr;
    gradients.blocks = parts(pixels, kBlock);
    const int64_t in_trigger = (count / triggers + 4) * (need_mask ? 2 : 1) * (job.wide ? 8 : 4);
    parallel(triggers * gradients.blocks, std::min(pixels, kBlock) * channels * in_trigger,
             [&](int64_t begin, int64_t end) { kernels.gradients(gradients, begin, end); });
    if (need_pattern) grad_pattern = as(grad_pattern, pattern_.scalar_type());
    if (need_mask) grad_mask = as(grad_mask, mask_.scalar_type());
  }
  return {grad_images, grad_pattern, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdcore, CPU, m) {
  m.impl("blend_trigger", TORCH_BOX(&forward));
  m.impl("blend_trigger_backward", TORCH_BOX(&backward));
}

}  // namespace bdcore
