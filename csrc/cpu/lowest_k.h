// The k smallest numbers of a stream with their indices: what the operator lowest_k and the streaming class share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace bdcore {

class LowestK {
 public:
  explicit LowestK(int64_t k) : k_(static_cast<size_t>(k)) {}

  // Considers `count` numbers; index_of(i) is the index of the i-th.
  template <class T, class IndexOf>
  void add(const T* values, int64_t count, const IndexOf& index_of) {
    if (k_ == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const double value = static_cast<double>(values[i]);
      // Most are too large; while the limit is NaN none is.
      if (value > limit_ || (value == limit_ && index_of(i) > limit_index_)) continue;
      kept_.push_back({key_of(value), index_of(i)});
      // Twice k, so that the work of choosing is spread over k additions; not much less than that many for small k.
      if (kept_.size() >= 2 * k_ + 256) choose();
    }
  }

  // The indices of the k smallest, or of all where there are fewer, in ascending order of (number, index); NaN last.
  std::vector<int64_t> indices() {
    choose();
    std::sort(kept_.begin(), kept_.end());
    std::vector<int64_t> found(kept_.size());
    std::transform(kept_.begin(), kept_.end(), found.begin(), [](const Entry& entry) { return entry.index; });
    return found;
  }

 private:
  struct Entry {
    uint64_t key;
    int64_t index;
    bool operator<(const Entry& other) const { return key != other.key ? key < other.key : index < other.index; }
  };

  static constexpr uint64_t kSign = uint64_t{1} << 63;
  static constexpr uint64_t kNan = ~uint64_t{0};

  // Unsigned integers in the order of the numbers: 0.0 and -0.0 are one, NaN is the largest.
  static uint64_t key_of(double value) {
    if (std::isnan(value)) return kNan;
    const double unsigned_zero = value + 0.0;
    uint64_t bits;
    std::memcpy(&bits, &unsigned_zero, sizeof bits);
    return bits & kSign ? ~bits : bits | kSign;
  }
  static double value_of(uint64_t key) {
    if (key == kNan) return std::numeric_limits<double>::quiet_NaN();
    const uint64_t bits = key & kSign ? key & ~kSign : ~key;
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Drops all but the k smallest of those kept.
  void choose() {
    if (kept_.size() < k_ || k_ == 0) return;
    const auto last = kept_.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
    std::nth_element(kept_.begin(), last, kept_.end());
    limit_ = value_of(last->key);
    limit_index_ = last->index;
    kept_.resize(k_);
  }

  size_t k_;
  double limit_ = std::numeric_limits<double>::quiet_NaN();  // the k-th smallest, once there are k
  int64_t limit_index_ = 0;
  std::vector<Entry> kept_;
};

}  // namespace bdcore
