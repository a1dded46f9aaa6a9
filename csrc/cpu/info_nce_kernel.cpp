#include "info_nce_kernel.h"

#include "lanes.h"

namespace bdcore {
namespace BDCORE_ISA {

namespace {

constexpr double kEps = 1e-8;

// kTall x 2 registers of sums, two of the right operand, and some to spare.
#if defined(__AVX512F__)
constexpr i64 kTall = 12;
#else
constexpr i64 kTall = 6;
#endif
template <class A>
constexpr i64 kWide = 2 * kLanes<A>;

template <class A>
BDCORE_INLINE A length(A norm) {
  return norm < (A)kEps ? (A)kEps : norm;  // NaN stays
}

// kTall x kWide sums over `depth` of left(i, d) right(d, j), where left(i, d) is left[i * Row + d * Step] and right is
// a panel.
template <i64 Row, i64 Step, class A>
BDCORE_INLINE void product(const A* left, const A* right, i64 depth, Vec<A> (&sums)[kTall][2]) {
  Vec<A> s[kTall][2] = {};
  for (i64 d = 0; d < depth; ++d) {
    const Vec<A> first = load_vec(right), second = load_vec(right + kLanes<A>);
#pragma GCC unroll 12
    for (i64 i = 0; i < kTall; ++i) {
      s[i][0] += left[i * Row] * first;
      s[i][1] += left[i * Row] * second;
    }
    left += Step;
    right += kWide<A>;
  }
#pragma GCC unroll 12
  for (i64 i = 0; i < kTall; ++i) {
    sums[i][0] = s[i][0];
    sums[i][1] = s[i][1];
  }
}

// Unit vectors of rows from `from` on, times `factor`, side by side: to[d * Count + row], zero from `valid` on.
template <i64 Count, class T, class A>
void side_by_side(const NceRows& rows, i64 from, i64 valid, A factor, A* to) {
  const T* data = (const T*)rows.data + from * rows.stride;
  const A* norms = (const A*)rows.norms + from;
  for (i64 row = 0; row < Count; ++row) {
    if (row >= valid) {
      for (i64 d = 0; d < rows.width; ++d) to[d * Count + row] = 0;
      continue;
    }
    const A scale = factor / length(norms[row]);
    const T* x = data + row * rows.stride;
    for (i64 d = 0; d < rows.width; ++d) to[d * Count + row] = load(x[d]) * scale;
  }
}

template <class T>
void norms_of(const NceRows& rows, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row) {
    const T* x = (const T*)rows.data + row * rows.stride;
    ((Accumulator<T>*)rows.norms)[row] = root(dots<false>(x, x, rows.width).ww);
  }
}

template <class T>
void row_panels_of(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels) {
  using A = Accumulator<T>;
  for (i64 panel = begin; panel < end; ++panel) {
    const i64 start = panel * kWide<A>;
    side_by_side<kWide<A>, T>(rows, first + start, count - start, (A)1, (A*)panels + start * rows.width);
  }
}

template <class T>
void column_panels_of(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels) {
  using A = Accumulator<T>;
  constexpr i64 wide = kWide<A>;
  for (i64 panel = begin; panel < end; ++panel) {
    const i64 start = panel * wide, left = rows.width - start;
    A* to = (A*)panels + panel * count * wide;
    for (i64 row = 0; row < count; ++row, to += wide) {
      const T* x = (const T*)rows.data + (first + row) * rows.stride + start;
      const A scale = 1 / length(((const A*)rows.norms)[first + row]);
      if (left >= wide) {
        store_vec(to, load_vec(x) * scale);
        store_vec(to + kLanes<A>, load_vec(x + kLanes<A>) * scale);
      } else {
        for (i64 j = 0; j < wide; ++j) to[j] = j < left ? load(x[j]) * scale : 0;
      }
    }
  }
}

// s / t of a group's anchors with the tile's keys, into lines[row * kNceLine + key].
template <class T>
BDCORE_INLINE void cosines(const NceTile& tile, i64 group, Accumulator<T>* room, Accumulator<T>* lines) {
  using A = Accumulator<T>;
  const i64 start = group * kTall, width = tile.anchors.width;
  side_by_side<kTall, T>(tile.anchors, tile.anchor_first + start, tile.anchor_count - start, (A)(1 / tile.temperature),
                         room);
  for (i64 key = 0; key < tile.key_count; key += kWide<A>) {
    Vec<A> sums[kTall][2];
    product<1, kTall>(room, (const A*)tile.key_panels + key * width, width, sums);
#pragma GCC unroll 12
    for (i64 i = 0; i < kTall; ++i) {
      store_vec(lines + i * kNceLine + key, sums[i][0]);
      store_vec(lines + i * kNceLine + key + kLanes<A>, sums[i][1]);
    }
  }
}

template <class T>
void forward_groups(const NceTile& tile, const NceState& state, i64 begin, i64 end, void* room) {
  using A = Accumulator<T>;
  A* lines = (A*)room + kTall * tile.anchors.width;
  for (i64 group = begin; group < end; ++group) {
    cosines<T>(tile, group, (A*)room, lines);
    const i64 left = tile.anchor_count - group * kTall;
    for (i64 i = 0; i < kTall && i < left; ++i) {
      const i64 row = tile.anchor_first + group * kTall + i;
      A* line = lines + i * kNceLine;
      const i64 positive = tile.positive[row] - tile.key_first;
      if (positive >= 0 && positive < tile.key_count) {
        ((A*)state.positive)[row] = line[positive];
        line[positive] = -__builtin_huge_val();
      }
      const A before = ((A*)state.largest)[row];
      A largest = before;
#pragma omp simd reduction(max : largest)
      for (i64 key = 0; key < tile.key_count; ++key) largest = line[key] > largest ? line[key] : largest;
      ((A*)state.largest)[row] = largest;
      const A shift = largest == -(A)__builtin_huge_val() ? (A)0 : largest;  // nothing but the positive so far
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 key = 0; key < tile.key_count; ++key) sum += exponential(line[key] - shift);
      ((A*)state.sums)[row] = ((A*)state.sums)[row] * exponential(before - shift) + sum;
    }
  }
}

template <class A>
void finish_rows(const NceState& state, i64 begin, i64 end, void* losses, void* log_sums, void* misses) {
  for (i64 row = begin; row < end; ++row) {
    const A positive = ((const A*)state.positive)[row];
    // log of the sum over the other keys of e^(s / t), minus that of the positive.
    const A margin = ((const A*)state.largest)[row] + logarithm(((const A*)state.sums)[row]) - positive;
    const A e = exponential(margin > 0 ? -margin : margin);
    const A loss = (margin > 0 ? margin : (A)0) + logarithm_1p(e);
    ((A*)losses)[row] = loss;
    ((A*)log_sums)[row] = positive + loss;
    ((A*)misses)[row] = margin > 0 ? 1 / (1 + e) : e / (1 + e);
  }
}

// Adds sums, `rows` x `columns` of them valid, to a matrix with lines of `line` numbers.
template <class A>
BDCORE_INLINE void add(const Vec<A> (&sums)[kTall][2], i64 rows, i64 columns, A* to, i64 line) {
  for (i64 i = 0; i < kTall && i < rows; ++i) {
    if (columns >= kWide<A>) {
      store_vec(to + i * line, load_vec(to + i * line) + sums[i][0]);
      store_vec(to + i * line + kLanes<A>, load_vec(to + i * line + kLanes<A>) + sums[i][1]);
    } else {
      for (i64 j = 0; j < columns; ++j) to[i * line + j] += sums[i][j / kLanes<A>][j % kLanes<A>];
    }
  }
}

template <class T>
void backward_anchor_groups(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end, void* room) {
  using A = Accumulator<T>;
  const i64 width = tile.anchors.width;
  for (i64 group = begin; group < end; ++group) {
    const i64 start = group * kTall, left = tile.anchor_count - start;
    A* lines = (A*)grads.slopes + start * kNceLine;
    cosines<T>(tile, group, (A*)room, lines);
    for (i64 i = 0; i < kTall && i < left; ++i) {
      const i64 row = tile.anchor_first + start + i;
      A* line = lines + i * kNceLine;
      const A factor = ((const A*)grads.grad)[row * grads.grad_stride] * (A)grads.scale;
      const A log_sum = ((const A*)grads.log_sums)[row];
#pragma omp simd
      for (i64 key = 0; key < tile.key_count; ++key) line[key] = exponential(line[key] - log_sum) * factor;
      const i64 positive = tile.positive[row] - tile.key_first;
      if (positive >= 0 && positive < tile.key_count) line[positive] = -((const A*)grads.misses)[row] * factor;
    }
    if (grads.anchors == nullptr) continue;
    A* sums_of_group = (A*)grads.anchors + (tile.anchor_first + start) * width;
    for (i64 column = 0; column < width; column += kWide<A>) {
      Vec<A> sums[kTall][2];
      product<kNceLine, 1>(lines, (const A*)grads.key_columns + column * tile.key_count, tile.key_count, sums);
      add(sums, left, width - column, sums_of_group + column, width);
    }
  }
}

template <class T>
void backward_key_groups(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end) {
  using A = Accumulator<T>;
  const i64 width = tile.keys.width;
  for (i64 group = begin; group < end; ++group) {
    const i64 start = group * kTall;
    for (i64 column = 0; column < width; column += kWide<A>) {
      Vec<A> sums[kTall][2];
      product<1, kNceLine>((const A*)grads.slopes + start, (const A*)grads.anchor_columns + column * tile.anchor_count,
                           tile.anchor_count, sums);
      add(sums, tile.key_count - start, width - column, (A*)grads.keys + start * width + column, width);
    }
  }
}

// Of x with length L and unit vector u: dx = (g - (g u) u) / L, where g is the gradient of u; below eps, where the
// length is a constant, dx = g / L.
template <class T>
void project_rows(const NceRows& rows, i64 first, i64 begin, i64 end, const void* sums, void* gradients) {
  using A = Accumulator<T>;
  const i64 width = rows.width;
  for (i64 row = begin; row < end; ++row) {
    const T* x = (const T*)rows.data + (first + row) * rows.stride;
    const A* g = (const A*)sums + row * width;
    T* to = (T*)gradients + row * width;
    const A norm = ((const A*)rows.norms)[first + row], inverse = 1 / length(norm);
    A along = 0;
#pragma omp simd reduction(+ : along)
    for (i64 d = 0; d < width; ++d) along += g[d] * load(x[d]);
    const A bend = norm > (A)kEps ? along * inverse * inverse : (A)0;
#pragma omp simd
    for (i64 d = 0; d < width; ++d) to[d] = store<T>((g[d] - bend * load(x[d])) * inverse);
  }
}

void norms(const NceRows& rows, i64 begin, i64 end) { BDCORE_FLOATS(rows.scalar, T, norms_of<T>(rows, begin, end)); }

void row_panels(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels) {
  BDCORE_FLOATS(rows.scalar, T, row_panels_of<T>(rows, first, count, begin, end, panels));
}

void column_panels(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels) {
  BDCORE_FLOATS(rows.scalar, T, column_panels_of<T>(rows, first, count, begin, end, panels));
}

void forward(const NceTile& tile, const NceState& state, i64 begin, i64 end, void* room) {
  BDCORE_FLOATS(tile.anchors.scalar, T, forward_groups<T>(tile, state, begin, end, room));
}

void finish(Scalar scalar, const NceState& state, i64 begin, i64 end, void* losses, void* log_sums, void* misses) {
  if (scalar == Scalar::f64) {
    finish_rows<double>(state, begin, end, losses, log_sums, misses);
  } else {
    finish_rows<float>(state, begin, end, losses, log_sums, misses);
  }
}

void backward_anchors(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end, void* room) {
  BDCORE_FLOATS(tile.anchors.scalar, T, backward_anchor_groups<T>(tile, grads, begin, end, room));
}

void backward_keys(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end) {
  if (tile.keys.scalar == Scalar::f64) {
    backward_key_groups<double>(tile, grads, begin, end);
  } else {
    backward_key_groups<float>(tile, grads, begin, end);
  }
}

void project(const NceRows& rows, i64 first, i64 begin, i64 end, const void* sums, void* gradients) {
  BDCORE_FLOATS(rows.scalar, T, project_rows<T>(rows, first, begin, end, sums, gradients));
}

}  // namespace

extern const InfoNce info_nce = {kTall,   kWide<float>, kWide<double>,    norms,         row_panels, column_panels,
                                 forward, finish,       backward_anchors, backward_keys, project};

}  // namespace BDCORE_ISA
}  // namespace bdcore
