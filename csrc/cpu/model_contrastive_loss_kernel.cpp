#include "model_contrastive_loss_kernel.h"

#include "lanes.h"

namespace bdcore {
namespace BDCORE_ISA {

namespace {

constexpr double kEps = 1e-8;

template <class A>
BDCORE_INLINE A length(A norm) {
  return norm < (A)kEps ? (A)kEps : norm;  // NaN stays
}

// log(1 + e^x) without overflow, and exact for results near 0.
BDCORE_INLINE float softplus(float x) {
  const float e = exponential(x > 0 ? -x : x);
  // log(1 + e) = 2 artanh(e / (2 + e)), whose series converges fast because e / (2 + e) <= 1/3.
  const float u = e / (2.0f + e), square = u * u;
  float p = 1.0f / 15.0f;
  p = p * square + 1.0f / 13.0f;
  p = p * square + 1.0f / 11.0f;
  p = p * square + 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  p = p * square + 1.0f / 3.0f;
  p = p * square + 1.0f;
  return (x > 0 ? x : 0.0f) + 2.0f * u * p;
}
BDCORE_INLINE double softplus(double x) { return (x > 0 ? x : 0.0) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x)); }

template <class A>
BDCORE_INLINE A margin(const A* cosines, i64 count, A per_temperature) {
  A largest = -__builtin_huge_val();
  for (i64 k = 1; k <= count; ++k) largest = cosines[k] > largest ? cosines[k] : largest;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 k = 1; k <= count; ++k) sum += exponential((cosines[k] - largest) * per_temperature);
  return count == 0 ? largest : (largest - cosines[0]) * per_temperature + logarithm(sum);
}

// Rows that are worked on together: what is one number a row is computed for all of them at once.
constexpr i64 kRows = kContrastiveRows;

// Fewer where they are long, so that the anchors are still in the first cache when their negatives come.
BDCORE_INLINE i64 rows_together(i64 left, i64 width) {
  const i64 fitting = 4096 / (width + 1) + 1;
  const i64 most = fitting < kRows ? fitting : kRows;
  return left < most ? left : most;
}

template <class T>
void forward_rows(const ContrastiveRows& rows, i64 begin, i64 end, void* losses_, void* norms_, void* cosines_) {
  using A = Accumulator<T>;
  const i64 width = rows.width, count = rows.count;
  const A per_temperature = (A)(1 / rows.temperature);
  A z_lengths[kRows], squares[kRows], products[kRows];
  for (i64 first = begin, size; first < end; first += size) {
    size = rows_together(end - first, width);
    A* losses = (A*)losses_ + first;
    A* norms = (A*)norms_ + first * (2 + count);
    A* cosines = (A*)cosines_ + first * (1 + count);
    for (i64 k = 0; k <= count; ++k) {
      const T* z = (const T*)rows.anchor + first * rows.anchor_stride;
      const i64 stride = k == 0 ? rows.positive_stride : rows.negatives_stride;
      const T* w = k == 0 ? (const T*)rows.positive : (const T*)rows.negatives + (k - 1) * rows.negative_stride;
      w += first * stride;
      for (i64 row = 0; row < size; ++row, z += rows.anchor_stride, w += stride) {
        const Dots<A> sums = k == 0 ? dots<true>(z, w, width) : dots<false>(z, w, width);
        if (k == 0) z_lengths[row] = sums.zz;
        squares[row] = sums.ww;
        products[row] = sums.zw;
      }
      if (k == 0) {
#pragma omp simd
        for (i64 row = 0; row < size; ++row) {
          const A norm = root(z_lengths[row]);
          norms[row * (2 + count)] = norm;
          z_lengths[row] = length(norm);
        }
      }
#pragma omp simd
      for (i64 row = 0; row < size; ++row) {
        const A norm = root(squares[row]);
        norms[row * (2 + count) + 1 + k] = norm;
        cosines[row * (1 + count) + k] = products[row] / z_lengths[row] / length(norm);
      }
    }
    // The margin: log of the sum over negatives of e^(s_k / t), minus s+ / t.
    if (count == 1) {
#pragma omp simd
      for (i64 row = 0; row < size; ++row) losses[row] = (cosines[2 * row + 1] - cosines[2 * row]) * per_temperature;
    } else {
      for (i64 row = 0; row < size; ++row) losses[row] = margin<A>(cosines + row * (1 + count), count, per_temperature);
    }
#pragma omp simd
    for (i64 row = 0; row < size; ++row) losses[row] = softplus(losses[row]);
  }
}

// Elements of a row that are worked on at a time, so that they stay in the first cache.
constexpr i64 kTile = 512;

// Of one other vector w: its gradient pull z + own w where `Other`, and its part pull w of the anchor's where `Anchor`,
// to which the anchor's own part, bend z, is added with the `first` one.
template <bool Anchor, bool Other, class T, class A>
BDCORE_INLINE void pass(const T* z, const T* w, i64 size, bool first, A pull, A own, A bend, A* total, T* grad) {
  if (first) {
#pragma omp simd
    for (i64 i = 0; i < size; ++i) {
      const A a = load(z[i]), b = load(w[i]);
      if (Other) grad[i] = store<T>(pull * a + own * b);
      if (Anchor) total[i] = bend * a + pull * b;
    }
  } else {
#pragma omp simd
    for (i64 i = 0; i < size; ++i) {
      const A a = load(z[i]), b = load(w[i]);
      if (Other) grad[i] = store<T>(pull * a + own * b);
      if (Anchor) total[i] += pull * b;
    }
  }
}

template <class T>
void backward_rows(const ContrastiveRows& rows, i64 begin, i64 end, const ContrastiveGradients& grads, void* room) {
  using A = Accumulator<T>;
  const i64 width = rows.width, count = rows.count;
  const A per_temperature = (A)(1 / rows.temperature), scale = (A)grads.scale;
  A* pulls = (A*)room;
  A* owns = pulls + (1 + count) * kRows;
  A bends[kRows], factors[kRows], largest[kRows], sums[kRows];
  A total[kTile];
  T streamed[kTile];
  for (i64 first = begin, size; first < end; first += size) {
    size = end - first < kRows ? end - first : kRows;
    const A* norms = (const A*)grads.norms + first * (2 + count);
    const A* cosines = (const A*)grads.cosines + first * (1 + count);
    const A* grad = (const A*)grads.grad + first * grads.grad_stride;
    // The softmax p of the cosines, in `owns`.
#pragma omp simd
    for (i64 row = 0; row < size; ++row) {
      largest[row] = cosines[row * (1 + count)];
      sums[row] = 0;
    }
    for (i64 k = 1; k <= count; ++k) {
#pragma omp simd
      for (i64 row = 0; row < size; ++row) {
        const A cosine = cosines[row * (1 + count) + k];
        largest[row] = cosine > largest[row] ? cosine : largest[row];
      }
    }
    for (i64 k = 0; k <= count; ++k) {
#pragma omp simd
      for (i64 row = 0; row < size; ++row) {
        const A p = exponential((cosines[row * (1 + count) + k] - largest[row]) * per_temperature);
        owns[k * kRows + row] = p;
        sums[row] += p;
      }
    }
#pragma omp simd
    for (i64 row = 0; row < size; ++row) {
      factors[row] = grad[row * grads.grad_stride] * scale / sums[row];
      largest[row] = 1 / length(norms[row * (2 + count)]);
      bends[row] = 0;
      sums[row] = 0;
    }
    // From here on `largest` holds 1 / L_z. With the slope a_k = dl/ds_k (times what came from above), which for the
    // positive, k = 0, is minus the sum of the others, and lengths L:
    //   dw_k = a_k / (L_k L_z) z - a_k s_k / L_k^2 w_k,    dz = sum_k a_k / (L_k L_z) w_k - sum_k a_k s_k / L_z^2 z,
    // where the last term of each is there only for a norm above eps.
    for (i64 k = count; k >= 0; --k) {
#pragma omp simd
      for (i64 row = 0; row < size; ++row) {
        const A slope = k == 0 ? -sums[row] : owns[k * kRows + row] * factors[row];
        sums[row] += slope;
        const A norm = norms[row * (2 + count) + 1 + k], inverse = 1 / length(norm);
        const A along = slope * cosines[row * (1 + count) + k];
        pulls[k * kRows + row] = slope * inverse * largest[row];
        owns[k * kRows + row] = norm > (A)kEps ? -along * inverse * inverse : (A)0;
        bends[row] -= along;
      }
    }
#pragma omp simd
    for (i64 row = 0; row < size; ++row) {
      bends[row] = norms[row * (2 + count)] > (A)kEps ? bends[row] * largest[row] * largest[row] : (A)0;
    }

    for (i64 row = 0; row < size; ++row) {
      const i64 at = first + row;
      for (i64 start = 0; start < width; start += kTile) {
        const i64 part = width - start < kTile ? width - start : kTile;
        const T* z = (const T*)rows.anchor + at * rows.anchor_stride + start;
        for (i64 k = 0; k <= count; ++k) {
          const T* w = k == 0 ? (const T*)rows.positive + at * rows.positive_stride + start
                              : (const T*)rows.negatives + at * rows.negatives_stride +
                                    (k - 1) * rows.negative_stride + start;
          T* target = k == 0 ? (T*)grads.positive : (T*)grads.negatives;
          if (target != nullptr) target += (k == 0 ? at : at * count + k - 1) * width + start;
          T* written = grads.streamed ? streamed : target;
          const A pull = pulls[k * kRows + row], own = owns[k * kRows + row], bend = bends[row];
          if (grads.anchor != nullptr && target != nullptr) {
            pass<true, true>(z, w, part, k == 0, pull, own, bend, total, written);
          } else if (grads.anchor != nullptr) {
            pass<true, false>(z, w, part, k == 0, pull, own, bend, total, written);
          } else if (target != nullptr) {
            pass<false, true>(z, w, part, k == 0, pull, own, bend, total, written);
          }
          if (target != nullptr && grads.streamed) stream_out(target, streamed, part);
        }
        if (grads.anchor == nullptr) continue;
        T* target = (T*)grads.anchor + at * width + start;
        T* written = grads.streamed ? streamed : target;
#pragma omp simd
        for (i64 i = 0; i < part; ++i) written[i] = store<T>(total[i]);
        if (grads.streamed) stream_out(target, streamed, part);
      }
    }
  }
  if (grads.streamed) stream_fence();
}

void forward(const ContrastiveRows& rows, i64 begin, i64 end, void* losses, void* norms, void* cosines) {
  BDCORE_FLOATS(rows.scalar, T, forward_rows<T>(rows, begin, end, losses, norms, cosines));
}

void backward(const ContrastiveRows& rows, i64 begin, i64 end, const ContrastiveGradients& grads, void* room) {
  BDCORE_FLOATS(rows.scalar, T, backward_rows<T>(rows, begin, end, grads, room));
}

}  // namespace

extern const ModelContrastiveLoss model_contrastive_loss = {forward, backward};

}  // namespace BDCORE_ISA
}  // namespace bdcore
