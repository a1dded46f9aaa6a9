// The loops of batch_norm_relu, see batch_norm_relu_kernel.h.
#include "batch_norm_relu_kernel.h"

#include "lanes.h"
#include "simd.h"

namespace bdcore {
namespace BDCORE_ISA {

namespace {

// A pack is what is computed at once: a register of channels side by side, or one channel where there are fewer than a
// register holds.
template <class Pack, class T>
BDCORE_INLINE Pack load_pack(const T* from) {
  if constexpr (sizeof(Pack) == sizeof(Accumulator<T>)) {
    return load(*from);
  } else {
    return load_vec(from);
  }
}
template <class T, class Pack>
BDCORE_INLINE void store_pack(T* to, const Pack& value) {
  if constexpr (sizeof(Pack) == sizeof(Accumulator<T>)) {
    *to = store<T>(value);
  } else {
    store_vec(to, value);
  }
}

// Not `value > 0 ? value : 0`: a NaN has to come through, as it does in PyTorch.
template <class Pack>
BDCORE_INLINE Pack relu(const Pack& value) {
  return value <= Pack{} ? Pack{} : value;
}
template <class Pack>
BDCORE_INLINE Pack passed(const Pack& grad, const Pack& value) {
  return value <= Pack{} ? Pack{} : grad;
}

// Calls `tile.run<Pack, N>(at)` for all channels, N packs at a time that begin at the channels `at`. The last pack
// overlaps the one before it where the channels do not fill it: the same numbers are computed twice.
template <class A, class Tile>
BDCORE_INLINE void for_tiles(i64 channels, const Tile& tile) {
  const i64 lanes = kLanes<A>;
  if (channels < lanes) {
    for (i64 c = 0; c < channels; ++c) tile.template run<A, 1>(&c);
    return;
  }
  i64 c = 0;
  const auto place = [&](i64 pack) {
    return c + (pack + 1) * lanes <= channels ? c + pack * lanes : channels - lanes;
  };
  for (; c + 3 * lanes < channels; c += 4 * lanes) {
    const i64 at[4] = {c, place(1), place(2), place(3)};
    tile.template run<Vec<A>, 4>(at);
  }
  for (; c + lanes < channels; c += 2 * lanes) {
    const i64 at[2] = {c, place(1)};
    tile.template run<Vec<A>, 2>(at);
  }
  for (; c < channels; c += lanes) {
    const i64 at[1] = {place(0)};
    tile.template run<Vec<A>, 1>(at);
  }
}

// Sums over rows of what `terms(row, n, values)` gives for the n-th of N packs: M values each. Four rows or packs run
// side by side whatever N is, because each sum waits for its last addition.
template <class Pack, int N, int M, class Terms>
BDCORE_INLINE void sum_rows(i64 rows, Pack (&sums)[M][N], const Terms& terms) {
  constexpr int kAtOnce = 4 / N;
  Pack running[kAtOnce][M][N] = {};
  const auto add = [&](int side, i64 row) __attribute__((always_inline)) {
    for (int n = 0; n < N; ++n) {
      Pack values[M];
      terms(row, n, values);
      for (int m = 0; m < M; ++m) running[side][m][n] += values[m];
    }
  };
  i64 row = 0;
  for (; row + kAtOnce <= rows; row += kAtOnce) {
    for (int side = 0; side < kAtOnce; ++side) add(side, row + side);
  }
  for (; row < rows; ++row) add(0, row);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      sums[m][n] = running[0][m][n];
      for (int side = 1; side < kAtOnce; ++side) sums[m][n] += running[side][m][n];
    }
  }
}

BDCORE_INLINE i64 rows_of(const BatchNormRelu& work, i64 chunk) {
  const i64 left = work.rows - chunk * work.chunk;
  return left < work.chunk ? left : work.chunk;
}

// Mean and sum of squared deviations from it. In two passes, the second out of the cache: differences of sums of
// squares would lose all digits where the mean is much larger than the deviations. What the first one's rounding left
// of the mean, the second one finds.
template <class T>
struct Statistics {
  using A = Accumulator<T>;
  const T* x;
  i64 rows, channels;
  A* mean;
  A* squares;
  template <class Pack, int N>
  __attribute__((always_inline)) void run(const i64* at) const {
    const T* from[N];
    Pack total[1][N], sums[2][N];
    for (int n = 0; n < N; ++n) from[n] = x + at[n];
    const auto value = [&](i64 row, int n) __attribute__((always_inline)) {
      return load_pack<Pack>(from[n] + row * channels);
    };
    sum_rows(rows, total, [&](i64 row, int n, Pack (&values)[1]) __attribute__((always_inline)) {
      values[0] = value(row, n);
    });
    const A share = (A)1 / (A)rows;
    for (int n = 0; n < N; ++n) total[0][n] *= share;
    sum_rows(rows, sums, [&](i64 row, int n, Pack (&values)[2]) __attribute__((always_inline)) {
      values[0] = value(row, n) - total[0][n];
      values[1] = values[0] * values[0];
    });
    for (int n = 0; n < N; ++n) {
      store_pack(mean + at[n], Pack(total[0][n] + sums[0][n] * share));
      store_pack(squares + at[n], Pack(sums[1][n] - sums[0][n] * sums[0][n] * share));
    }
  }
};

template <class T>
void statistics_of(const BatchNormRelu& work, i64 begin, i64 end) {
  using A = Accumulator<T>;
  for (i64 chunk = begin; chunk < end; ++chunk) {
    A* partial = static_cast<A*>(work.partial) + chunk * 2 * work.channels;
    const T* x = static_cast<const T*>(work.x) + chunk * work.chunk * work.channels;
    for_tiles<A>(work.channels,
                 Statistics<T>{x, rows_of(work, chunk), work.channels, partial, partial + work.channels});
  }
}

// What belongs to the N packs of channels of a tile.
template <class Pack, int N, class A>
BDCORE_INLINE void load_channels(const void* values, const i64* at, Pack (&to)[N]) {
  for (int n = 0; n < N; ++n) to[n] = load_pack<Pack>(static_cast<const A*>(values) + at[n]);
}

// The normalisation of a tile, up to the ReLU.
template <class Pack, int N, class A>
struct Normalisation {
  Pack mean[N], scale[N], bias[N];
  __attribute__((always_inline)) Normalisation(const BatchNormRelu& work, const i64* at) {
    load_channels<Pack, N, A>(work.mean, at, mean);
    load_channels<Pack, N, A>(work.scale, at, scale);
    load_channels<Pack, N, A>(work.bias, at, bias);
  }
  __attribute__((always_inline)) Pack of(const Pack& deviation, int n) const { return deviation * scale[n] + bias[n]; }
};

template <class T>
struct Forward {
  using A = Accumulator<T>;
  const BatchNormRelu& work;
  i64 first, rows;
  template <class Pack, int N>
  __attribute__((always_inline)) void run(const i64* at) const {
    const Normalisation<Pack, N, A> normal(work, at);
    const T* x = static_cast<const T*>(work.x);
    T* y = static_cast<T*>(work.y);
    for (i64 row = first; row < first + rows; ++row) {
      for (int n = 0; n < N; ++n) {
        const i64 place = row * work.channels + at[n];
        store_pack(y + place, relu<Pack>(normal.of(load_pack<Pack>(x + place) - normal.mean[n], n)));
      }
    }
  }
};

template <class T>
struct GradientSums {
  using A = Accumulator<T>;
  const BatchNormRelu& work;
  i64 first, rows;
  A* partial;
  template <class Pack, int N>
  __attribute__((always_inline)) void run(const i64* at) const {
    const Normalisation<Pack, N, A> normal(work, at);
    Pack sums[2][N];
    const T* x = static_cast<const T*>(work.x) + first * work.channels;
    const T* grad = static_cast<const T*>(work.grad) + first * work.channels;
    sum_rows(rows, sums, [&](i64 row, int n, Pack (&values)[2]) __attribute__((always_inline)) {
      const i64 place = row * work.channels + at[n];
      const Pack deviation = load_pack<Pack>(x + place) - normal.mean[n];
      values[0] = passed<Pack>(load_pack<Pack>(grad + place), normal.of(deviation, n));
      values[1] = values[0] * deviation;
    });
    for (int n = 0; n < N; ++n) {
      store_pack(partial + at[n], sums[0][n]);
      store_pack(partial + work.channels + at[n], sums[1][n]);
    }
  }
};

template <class T, bool Constants>
struct Backward {
  using A = Accumulator<T>;
  const BatchNormRelu& work;
  i64 first, rows;
  template <class Pack, int N>
  __attribute__((always_inline)) void run(const i64* at) const {
    const Normalisation<Pack, N, A> normal(work, at);
    Pack constant[N], slope[N];
    if (!Constants) {
      load_channels<Pack, N, A>(work.constant, at, constant);
      load_channels<Pack, N, A>(work.slope, at, slope);
    }
    const T* x = static_cast<const T*>(work.x);
    const T* grad = static_cast<const T*>(work.grad);
    T* grad_x = static_cast<T*>(work.grad_x);
    for (i64 row = first; row < first + rows; ++row) {
      for (int n = 0; n < N; ++n) {
        const i64 place = row * work.channels + at[n];
        const Pack deviation = load_pack<Pack>(x + place) - normal.mean[n];
        Pack found = passed<Pack>(load_pack<Pack>(grad + place), normal.of(deviation, n)) * normal.scale[n];
        if (!Constants) found -= constant[n] + deviation * slope[n];
        store_pack(grad_x + place, found);
      }
    }
  }
};

template <class T>
void forward_of(const BatchNormRelu& work, i64 begin, i64 end) {
  for (i64 chunk = begin; chunk < end; ++chunk) {
    for_tiles<Accumulator<T>>(work.channels, Forward<T>{work, chunk * work.chunk, rows_of(work, chunk)});
  }
}

template <class T>
void gradient_sums_of(const BatchNormRelu& work, i64 begin, i64 end) {
  using A = Accumulator<T>;
  for (i64 chunk = begin; chunk < end; ++chunk) {
    A* partial = static_cast<A*>(work.partial) + chunk * 2 * work.channels;
    for_tiles<A>(work.channels, GradientSums<T>{work, chunk * work.chunk, rows_of(work, chunk), partial});
  }
}

template <class T>
void backward_of(const BatchNormRelu& work, i64 begin, i64 end) {
  using A = Accumulator<T>;
  for (i64 chunk = begin; chunk < end; ++chunk) {
    const i64 first = chunk * work.chunk, rows = rows_of(work, chunk);
    if (work.slope == nullptr) {
      for_tiles<A>(work.channels, Backward<T, true>{work, first, rows});
    } else {
      for_tiles<A>(work.channels, Backward<T, false>{work, first, rows});
    }
  }
}

void statistics(const BatchNormRelu& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, statistics_of<T>(work, begin, end))
}
void forward(const BatchNormRelu& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, forward_of<T>(work, begin, end))
}
void gradient_sums(const BatchNormRelu& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, gradient_sums_of<T>(work, begin, end))
}
void backward(const BatchNormRelu& work, i64 begin, i64 end) {
  BDCORE_FLOATS(work.type, T, backward_of<T>(work, begin, end))
}

}  // namespace

extern const BatchNormReluTable batch_norm_relu_kernels = {statistics, forward, gradient_sums, backward};

}  // namespace BDCORE_ISA
}  // namespace bdcore
