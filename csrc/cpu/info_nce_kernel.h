// The loops of info_nce; see bdcore/ops/info_nce.py for the formulas. Three matrix products run over tiles of the
// B x M matrix: cosines (anchors times keys), and from them the gradients of the anchors and of the keys. A product of
// our own rather than torch's, because that one rounds to fewer bits under autocast and where the user allows it for
// layers, and because its order of additions depends on the number of threads.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

// Rows of a matrix whose elements lie side by side, and their norms.
struct NceRows {
  Scalar scalar;
  const void* data;
  i64 stride, width;
  void* norms;  // in the accumulator's type, as is all that follows
};

// Rows [first, first + count) of the anchors against keys [first, first + count).
struct NceTile {
  NceRows anchors, keys;
  i64 anchor_first, anchor_count, key_first, key_count;
  double temperature;
  const i64* positive;
  // A key is a column of the cosines, and `wide` (below) keys next to each other make a panel: [panel][D][wide].
  const void* key_panels;
};

// What is kept of a row while its keys go by.
struct NceState {
  void* largest;   // of s / t over the keys seen, the positive one excepted
  void* sums;      // of e^(s / t - largest) over them
  void* positive;  // s / t of the positive key
};

struct NceGradients {
  const void* grad;  // of the losses, one for each `grad_stride` elements, to be multiplied by `scale`
  i64 grad_stride;
  double scale;
  const void* log_sums;
  const void* misses;
  void* slopes;               // of the tile: dl/ds [anchor][kNceLine]
  const void* key_columns;    // panels of `wide` features: [panel][key][wide]
  const void* anchor_columns;  // the same of the anchors
  void* anchors;  // sums over the keys (anchors) of slope times unit key (anchor): [B, D], [keys of the tile, D]; null
  void* keys;     // where not asked for
};

constexpr i64 kNceTile = 512;  // anchors and keys of a tile, at most
constexpr i64 kNceLine = 528;  // from one row of slopes to the next: not a power of two, which caches dislike

struct InfoNce {
  i64 tall;                       // rows that are worked on together, a group
  i64 wide_float, wide_double;    // columns that are
  // Norms of rows [begin, end).
  void (*norms)(const NceRows& rows, i64 begin, i64 end);
  // Unit vectors of `count` rows from `first` on as panels [begin, end) of rows, [panel][D][wide], or of features,
  // [panel][row][wide]; zero beyond the last one.
  void (*row_panels)(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels);
  void (*column_panels)(const NceRows& rows, i64 first, i64 count, i64 begin, i64 end, void* panels);
  // Groups [begin, end) of a tile's anchors. `room`: tall * (D + kNceLine) numbers for this call alone.
  void (*forward)(const NceTile& tile, const NceState& state, i64 begin, i64 end, void* room);
  // After all keys, of rows [begin, end).
  void (*finish)(Scalar scalar, const NceState& state, i64 begin, i64 end, void* losses, void* log_sums, void* misses);
  // The slopes of groups [begin, end) of a tile's anchors, and with them the anchors' sums; `room`: tall * D numbers.
  void (*backward_anchors)(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end, void* room);
  // The sums of groups [begin, end) of a tile's keys, once all its slopes are there.
  void (*backward_keys)(const NceTile& tile, const NceGradients& grads, i64 begin, i64 end);
  // From sums [count, D] to gradients in the type of the rows, for rows [begin, end) of `count` from `first` on.
  void (*project)(const NceRows& rows, i64 first, i64 begin, i64 end, const void* sums, void* gradients);
};

BDCORE_DECLARE_TABLES(InfoNce, info_nce)

}  // namespace bdcore
