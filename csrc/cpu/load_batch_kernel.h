// The loops of load_batch on the CPU.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

// One call of the operator. `keep` and `add` hold, for every trigger in use and every pixel of its window (channels
// last), the two numbers by which a pixel is blended; `scale` and `shift`, for a row of an image, those by which a
// pixel outside of a window is converted. They are float or double, as `accumulator` says.
struct LoadBatch {
  const u8* images;
  i64 image_stride, channel_stride, row_stride, column_stride;
  i64 channels, height, width;
  i64 strip, strips;            // an image is made in so many strips of so many rows
  i64 count;                    // of images in the batch
  i64 ahead;                    // rows are fetched so many before they are needed: samples lie anywhere in memory
  const i64* index;
  unsigned long long seed;
  i64 crop;
  bool flip;
  i64 cutout;

  bool triggers;                // whether there are any
  const i64* trigger;           // each image's, -1: none; null: the first for all
  const i64* offset;            // top and left of each image's window; null: 0, 0
  i64 rows, columns;            // of the windows
  bool by_image;                // keep and add hold one trigger an image rather than each trigger
  const void* keep;
  const void* add;

  const void* scale;
  const void* shift;
  bool divide;                  // by 255 before all else: x / 255 is exact only so
  Scalar accumulator, type;
  void* out;
};

// What `keep` and `add` are made of: the patterns and masks, contiguous, [T, C, h, w] and [T, 1 or C, h, w].
struct LoadBatchTriggers {
  const void* pattern;
  const void* mask;
  bool shared_mask;             // one for all channels
  const double* mean;           // null: not normalised
  const double* std;
  void* keep;
  void* add;
};

struct LoadBatchKernel {
  // Strips [begin, end) of [count, strips]. `line` has room for a row of an image in uint8.
  void (*load)(const LoadBatch& batch, u8* line, i64 begin, i64 end);
  // Rows [begin, end) of all rows of all windows in `keep` and `add`.
  void (*prepare)(const LoadBatch& batch, const LoadBatchTriggers& triggers, i64 begin, i64 end);
};

BDCORE_DECLARE_TABLES(LoadBatchKernel, load_batch_kernel)

}  // namespace bdcore
