// The loops of isolation_loss, see isolation_loss_kernel.h.
#include "isolation_loss_kernel.h"

#include "simd.h"

namespace bdcore {
namespace BDCORE_ISA {

namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));

constexpr i64 kCe = 0, kAscent = 1, kLga = 2;
constexpr i64 kNone = 0, kMean = 1, kBatch = 3;
constexpr int kGroup = 16;   // rows whose last steps are taken together
constexpr i64 kNarrow = 16;  // up to so many classes the lanes of a vector are rows, beyond it classes
constexpr i64 kTile = 1024;  // values that are looked at together; at least kGroup * kNarrow

// Vectors as long as a register: longer ones the compiler takes apart into single numbers, and loops over floats it
// turns into branches where exponentials are among much else.
#if defined(__AVX512F__)
constexpr i64 kRegister = 64;
#elif defined(__AVX__)
constexpr i64 kRegister = 32;
#else
constexpr i64 kRegister = 16;
#endif
constexpr i64 kLanes = kRegister / sizeof(float);
typedef float Floats __attribute__((vector_size(kRegister)));
typedef int Ints __attribute__((vector_size(kRegister)));
typedef u32 Bits __attribute__((vector_size(kRegister)));
typedef float Near __attribute__((vector_size(kRegister), may_alias, aligned(sizeof(float))));  // at any address

BDCORE_INLINE Floats load_lanes(const float* from) { return *(const Near*)from; }

// All lanes combined by `of`, which takes two vectors.
template <class Of>
BDCORE_INLINE float folded(f32x4 v, const Of& of) {
  v = of(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  return of(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
}
template <class Of>
BDCORE_INLINE float folded(f32x8 v, const Of& of) {
  return folded(of(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), of);
}
template <class Of>
BDCORE_INLINE float folded(f32x16 v, const Of& of) {
  return folded(of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)), of);
}
struct Higher {
  template <class V>
  __attribute__((always_inline)) V operator()(V a, V b) const { return b > a ? b : a; }
};
struct Plus {
  template <class V>
  __attribute__((always_inline)) V operator()(V a, V b) const { return a + b; }
};

// `count` values in the type in which they are added up.
BDCORE_INLINE const float* widened(const float* values, i64, float*) { return values; }
BDCORE_INLINE const double* widened(const double* values, i64, double*) { return values; }
template <class T>
BDCORE_INLINE const float* widened(const T* values, i64 count, float* room) {
#pragma omp simd
  for (i64 i = 0; i < count; ++i) room[i] = load(values[i]);
  return room;
}

// e^x for x <= 0 with a relative error below 1e-7; 0 below -87.3, NaN for NaN. F is float and I int, or both vectors.
// Here all exponents are differences to a maximum; exponential() in simd.h, which knows no bound, takes half as long
// again.
template <class F, class I>
BDCORE_INLINE F exponential_below(F x) {
  const F shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;                     // ln 2 in two parts
  F p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;  // Taylor's series suffices for |r| <= ln(2) / 2
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low bits of `shifted` are n; out of range they may be anything.
  const F y = p * bits_as<F>((bits_as<I>(shifted) << 23) + (127 << 23));
  return x < -87.3f ? F{} : y;
}
BDCORE_INLINE float exponential_of(float x) { return exponential_below<float, u32>(x); }
BDCORE_INLINE Floats exponential_of(Floats x) { return exponential_below<Floats, Bits>(x); }
BDCORE_INLINE double exponential_of(double x) { return exponential(x); }

// log(1 + x) for 0 <= x < 1e38 with a relative error below 3e-7.
BDCORE_INLINE float log1p_positive(float x) {
  const float u = 1.0f + x;
  // u = 2^exponent * m with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s)
  const int shifted = (int)(bits_as<u32>(u) - 0x3f3504f3u);
  const float exponent = (float)(shifted >> 23);
  const float m = bits_as<float>((u32)(shifted & 0x007fffff) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series = ((((1.0f / 9.0f) * q + 1.0f / 7.0f) * q + 0.2f) * q + 1.0f / 3.0f) * q;
  const float high = exponent * 0.693359375f, low = exponent * -2.12194440e-4f;  // ln 2 in two parts
  const float y = high + (2.0f * s + (2.0f * s * series + low));
  // What the rounding of u lost is x - (u - 1), and the derivative of log is 1 / u. It is all there is of a tiny x, and
  // what keeps a NaN.
  return y + (x - (u - 1.0f)) / u;
}
BDCORE_INLINE double log1p_positive(double x) { return logarithm_1p(x); }

// Loops over registers end with one that overlaps the one before; what is shorter than a register goes one by one.
BDCORE_INLINE i64 place_of(i64 i, i64 count) { return i + kLanes <= count ? i : count - kLanes; }

// y = e^(x - shift)
BDCORE_INLINE void exponentials(const float* x, float shift, i64 count, float* y) {
  for (i64 i = 0; i < count && count >= kLanes; i += kLanes) {
    const i64 at = place_of(i, count);
    *(Near*)(y + at) = exponential_of(load_lanes(x + at) - shift);
  }
  for (i64 i = 0; i < count && count < kLanes; ++i) y[i] = exponential_of(x[i] - shift);
}
BDCORE_INLINE void exponentials(const double* x, double shift, i64 count, double* y) {
  for (i64 i = 0; i < count; ++i) y[i] = exponential_of(x[i] - shift);
}

// The sum of e^(x - shift) over all but one place.
template <class A>
BDCORE_INLINE A sum_without(const A* x, A shift, i64 count, i64 left_out) {
  A sum = 0;
  for (i64 i = 0; i < count; ++i) sum += i == left_out ? (A)0 : exponential_of(x[i] - shift);
  return sum;
}
BDCORE_INLINE float sum_without(const float* x, float shift, i64 count, i64 left_out) {
  if (count < kLanes) return sum_without<float>(x, shift, count, left_out);
  Ints lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  Floats sums = {};
  for (i64 i = 0; i < count; i += kLanes) {
    const i64 at = place_of(i, count);
    const Ints counted = (lane >= (int)(i - at)) & (lane != (int)(left_out - at));
    sums += counted ? exponential_of(load_lanes(x + at) - shift) : Floats{};
  }
  return folded(sums, Plus());
}

template <class A>
BDCORE_INLINE A highest_of(const A* values, i64 count) {
  A highest = values[0];
  for (i64 i = 1; i < count; ++i) highest = values[i] > highest ? values[i] : highest;
  return highest;
}
BDCORE_INLINE float highest_of(const float* values, i64 count) {
  if (count < kLanes) return highest_of<float>(values, count);
  Floats highest = load_lanes(values);
  for (i64 i = kLanes; i < count; i += kLanes) highest = Higher()(highest, load_lanes(values + place_of(i, count)));
  return folded(highest, Higher());
}

template <class A>
BDCORE_INLINE A plain_sum(const A* values, i64 count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// What is known of kGroup rows once their logits have been read.
template <class A>
struct Rows {
  A top[kGroup];      // largest logit
  A rest[kGroup];     // sum of e^(logit - top) over all classes but the label's
  A picked[kGroup];   // the label's logit
  A total[kGroup];    // sum of the logits, where labels are smoothed
  int label[kGroup];  // -1: ignored
};

template <class A>
struct Results {
  A loss[kGroup], slope[kGroup], inverse[kGroup], excess[kGroup];
};

template <class A>
BDCORE_INLINE A shift_of(A top) {
  return top == -(A)__builtin_inff() ? (A)0 : top;  // e^(-inf - -inf) would be NaN
}

// Few classes: the rows of a group side by side.
template <class A>
void read_narrow(const A* values, i64 count, i64 classes, Rows<A>& rows) {
  A tile[kNarrow * kGroup], top[kGroup], total[kGroup], picked[kGroup], rest[kGroup];
  for (i64 r = 0; r < kGroup; ++r) {
    const A* row = values + (r < count ? r : count - 1) * classes;
    for (i64 j = 0; j < classes; ++j) tile[j * kGroup + r] = row[j];
  }
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) {
    top[r] = -(A)__builtin_inff();
    total[r] = picked[r] = rest[r] = 0;
  }
  for (int j = 0; j < (int)classes; ++j) {
    const A* column = tile + j * kGroup;
#pragma omp simd
    for (int r = 0; r < kGroup; ++r) {
      top[r] = column[r] > top[r] ? column[r] : top[r];
      total[r] += column[r];
      picked[r] = rows.label[r] == j ? column[r] : picked[r];
    }
  }
  for (int j = 0; j < (int)classes; ++j) {
    const A* column = tile + j * kGroup;
#pragma omp simd
    for (int r = 0; r < kGroup; ++r) {
      const A term = exponential_of(column[r] - shift_of(top[r]));
      rest[r] += rows.label[r] == j ? (A)0 : term;
    }
  }
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) {
    rows.top[r] = top[r];
    rows.rest[r] = rest[r];
    rows.picked[r] = picked[r];
    rows.total[r] = total[r];
  }
}

// Many classes: one row, tile by tile, with a running maximum.
template <class T, class A>
void read_wide(const T* logits, i64 classes, bool smooth, int r, Rows<A>& rows) {
  A room[kTile];
  A top = -(A)__builtin_inff(), rest = 0, total = 0;
  for (i64 start = 0; start < classes; start += kTile) {
    const i64 count = classes - start < kTile ? classes - start : kTile;
    const A* values = widened(logits + start, count, room);
    const A found = highest_of(values, count), higher = found > top ? found : top, shift = shift_of(higher);
    const A more = sum_without(values, shift, count, rows.label[r] - start);
    rest = start == 0 ? more : rest * exponential_of(top - shift) + more;
    if (smooth) total += plain_sum(values, count);
    top = higher;
  }
  rows.top[r] = top;
  rows.rest[r] = rest;
  rows.total[r] = total;
  rows.picked[r] = (A)load(logits[rows.label[r]]);
}

template <class A>
BDCORE_INLINE A slope_of(A loss, i64 mode, A gamma) {
  const A distance = loss - gamma, sign = (A)((int)(distance > 0) - (int)(distance < 0));
  return mode == kCe ? (A)1 : mode == kAscent ? (A)-1 : distance == distance ? sign : distance;
}
template <class A>
BDCORE_INLINE A value_of(A loss, A slope, i64 mode, A gamma) {
  return mode <= kLga ? slope * loss : slope * (loss - gamma) + gamma;
}

// From what has been read to what is kept. Several short loops, because a long one would get branches.
template <class A>
void finish(const Rows<A>& rows, i64 mode, A gamma, A smoothing, A each, Results<A>& to) {
  A below[kGroup], term[kGroup], entropy[kGroup], slope[kGroup], value[kGroup];
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) below[r] = rows.picked[r] - rows.top[r];
  exponentials(below, (A)0, kGroup, term);
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) {
    const A rest = rows.rest[r], sum = rest + term[r];
    // Where the label has the largest logit its term is exactly 1, and what the others add to it decides.
    const A logsum = log1p_positive(below[r] == 0 ? rest : sum - (A)1);
    entropy[r] = logsum - below[r];
    term[r] = logsum;
    to.inverse[r] = (A)1 / sum;
    to.excess[r] = -rest / sum;
  }
  if (smoothing > 0) {
#pragma omp simd
    for (int r = 0; r < kGroup; ++r) {
      const A even = term[r] + (rows.top[r] - rows.total[r] * each);
      entropy[r] = ((A)1 - smoothing) * entropy[r] + smoothing * even;
    }
  }
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) slope[r] = slope_of(entropy[r], mode, gamma);
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) value[r] = value_of(entropy[r], slope[r], mode, gamma);
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) to.loss[r] = rows.label[r] < 0 ? (A)0 : value[r];
#pragma omp simd
  for (int r = 0; r < kGroup; ++r) to.slope[r] = rows.label[r] < 0 ? (A)0 : slope[r];
}

template <class T>
void forward_rows(const IsolationLossForward& work, i64 begin, i64 end) {
  using A = Accumulator<T>;
  const T* logits = (const T*)work.logits;
  const i64 classes = work.classes;
  A *losses = (A*)work.losses, *saved = (A*)work.saved;
  const A smoothing = (A)work.smoothing, gamma = (A)work.gamma, each = (A)1 / (A)classes;
  // The batch's mean is of plain cross entropies; `reduce` applies the mode to it.
  const i64 mode = work.reduction == kBatch ? kCe : work.mode;
  A room[kGroup * kNarrow];
  Rows<A> rows;
  Results<A> results;
  for (i64 first = begin; first < end; first += kGroup) {
    const i64 count = end - first < kGroup ? end - first : kGroup;
    for (i64 r = 0; r < kGroup; ++r) {
      const i64 label = r < count ? work.labels[first + r] : work.ignore;
      rows.label[r] = label == work.ignore ? -1 : (int)label;
      rows.top[r] = rows.rest[r] = rows.picked[r] = rows.total[r] = 0;
    }
    if (classes <= kNarrow) {
      read_narrow(widened(logits + first * classes, count * classes, room), count, classes, rows);
    } else {
      for (i64 r = 0; r < count; ++r) {
        if (rows.label[r] < 0) continue;
        read_wide(logits + (first + r) * classes, classes, smoothing > 0, (int)r, rows);
      }
    }
    finish(rows, mode, gamma, smoothing, each, results);
    for (i64 r = 0; r < count; ++r) {
      losses[first + r] = results.loss[r];
      saved[first + r] = rows.top[r];
      saved[work.rows + first + r] = results.inverse[r];
      saved[2 * work.rows + first + r] = results.slope[r];
      saved[3 * work.rows + first + r] = results.excess[r];
    }
  }
}

template <class A>
void reduce_rows(const IsolationLossForward& work, i64 used, void* result) {
  A& factor = ((A*)work.saved)[4 * work.rows];
  factor = 1;
  if (work.reduction == kNone) return;
  const A gamma = (A)work.gamma;
  A sum = plain_sum((const A*)work.losses, work.rows);
  if (work.reduction == kMean || work.reduction == kBatch) {
    factor = (A)1 / (A)used;
    sum /= (A)used;
  }
  if (work.reduction == kBatch) {
    const A slope = slope_of(sum, work.mode, gamma);
    sum = value_of(sum, slope, work.mode, gamma);
    factor *= slope;
  }
  *(A*)result = sum;
}

template <class T>
void backward_rows(const IsolationLossBackward& work, i64 begin, i64 end) {
  using A = Accumulator<T>;
  const T* logits = (const T*)work.logits;
  T* out = (T*)work.grad_logits;
  const A *grad = (const A*)work.grad, *top = (const A*)work.saved;
  const A *inverse = top + work.rows, *slope = inverse + work.rows, *excess = slope + work.rows;
  const A factor = excess[work.rows], smoothing = (A)work.smoothing, each = smoothing / (A)work.classes;
  const i64 classes = work.classes;
  // Rows of few classes are taken many at once: their exponentials are then one long loop.
  const i64 together = classes <= kTile / 2 ? kTile / classes : 1;
  A room[kTile], shifted[kTile], terms[kTile];
  for (i64 first = begin; first < end; first += together) {
    const i64 last = first + together < end ? first + together : end;
    for (i64 start = 0; start < classes; start += kTile) {
      const i64 width = classes - start < kTile ? classes - start : kTile, count = (last - first) * width;
      const A* values = widened(logits + first * classes + start, count, room);
      if (last - first == 1) {
        exponentials(values, top[first], count, terms);
      } else {
        for (i64 row = first; row < last; ++row) {
          const i64 place = (row - first) * width;
#pragma omp simd
          for (i64 j = 0; j < width; ++j) shifted[place + j] = values[place + j] - top[row];
        }
        exponentials(shifted, (A)0, count, terms);
      }
      for (i64 row = first; row < last; ++row) {
        T* to = out + row * classes + start;
        const A* term = terms + (row - first) * width;
        if (slope[row] == 0) {  // ignored, or on the edge: no gradient, not even of NaN
          for (i64 j = 0; j < width; ++j) to[j] = store<T>((A)0);
          continue;
        }
        const A pull = grad[row * work.grad_stride] * factor * slope[row], weight = pull * inverse[row];
        const A even = pull * each;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) to[j] = store<T>(term[j] * weight - even);
        const i64 label = work.labels[row] - start;
        if (label >= 0 && label < width) to[label] = store<T>(pull * (excess[row] + smoothing) - even);
      }
    }
  }
}

LabelRange range(const i64* labels, i64 rows, i64 ignore) {
  i64 lowest = 0, highest = -1, used = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(+ : used)
  for (i64 i = 0; i < rows; ++i) {
    const bool keep = labels[i] != ignore;
    const i64 low = keep ? labels[i] : 0, high = keep ? labels[i] : -1;
    lowest = low < lowest ? low : lowest;
    highest = high > highest ? high : highest;
    used += keep;
  }
  return {lowest, highest, used};
}

void forward(const IsolationLossForward& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, forward_rows<T>(work, begin, end))
}
void reduce(const IsolationLossForward& work, i64 used, void* result) {
  if (work.type == Scalar::f64) {
    reduce_rows<double>(work, used, result);
  } else {
    reduce_rows<float>(work, used, result);
  }
}
void backward(const IsolationLossBackward& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, backward_rows<T>(work, begin, end))
}

}  // namespace

extern const IsolationLoss isolation_loss_kernels = {range, forward, reduce, backward};

}  // namespace BDCORE_ISA
}  // namespace bdcore
