// The loops of blend_trigger. An image is P planes of contiguous elements: a plane is a channel (NCHW, 1 lane) or the
// whole image (channels-last, a lane a channel). Sizes are numbers of elements; scale, shift and sums are float, or
// double where the job is wide.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

// Where the trigger's window lies in a batch of images.
struct Window {
  i64 batch, planes, plane, row;  // images; planes in each, elements in a plane, in a row of it
  i64 rows, columns;              // of the window, in each plane; rows = 1, columns = plane: it covers all
  i64 lanes;
  const i64* offset;  // [batch, 2] (top, left); nullptr: (0, 0)
};

// What the trigger makes of an element x inside the window is scale * x + shift, for every trigger and element.
struct CoefficientsJob {
  const void *pattern, *mask;  // [T, C, h * w] (nullptr: zeros), [T, 1 or C, h * w]
  i64 channels, mask_channels, pixels, lanes;
  double pattern_unit;
  const double *image_factor, *pattern_factor, *constant;  // [C]: x's, m p's, and what is added
  void *scale, *shift;                                     // [T, planes, window's elements in a plane]
  bool wide;
};

struct BlendJob {
  Window window;
  const void* images;
  void* out;
  Scalar from, to;
  bool fraction;     // uint8 images stand for x / 255
  const i64* index;  // [batch]; nullptr: trigger 0
  const void *scale, *shift;
  const void *outside_scale, *outside_shift;  // [planes, period], for images' other elements,
  i64 period;                                 // a multiple of lanes; 0: those are copied
  bool streamed;  // the result is larger than the caches, and whole lines of them make up each plane
  bool wide;
};

// Sums over the images of a trigger: of g, and of x g where `products`.
struct SumJob {
  Window window;
  const void *images, *grad;
  Scalar images_type, grad_type;
  const i64* order;   // the images, those of a trigger together; nullptr: as they are
  const i64* starts;  // [pieces + 1] into `order`
  i64 block, blocks;  // of the window's elements
  bool products, wide;
  void* sums;  // [pieces, 1 or 2, planes * rows * columns]
};

// Gradients of T triggers out of those sums, over each trigger's pieces.
struct GradientsJob {
  const void *pattern, *mask;  // as above
  i64 channels, mask_channels, pixels, lanes;
  const void* sums;
  bool products, wide;
  const i64* pieces;  // [T + 1]
  double image_unit;
  const double* factor;            // [C]: 1 / std
  void *grad_pattern, *grad_mask;  // [T, C, pixels], [T, 1 or C, pixels]; nullptr: not asked for
  i64 blocks;                      // items are [T, blocks]
};

constexpr i64 kTogether = 4;  // images that take turns: for the coefficients or sums, and for more streams of memory
constexpr i64 kBlock = 1024;  // pixels in a block of GradientsJob

struct BlendTrigger {
  void (*coefficients)(const CoefficientsJob&, i64 begin, i64 end);  // of items: [T, C]
  void (*blend)(const BlendJob&, i64 begin, i64 end);                // of items: [groups of kTogether images, planes]
  void (*sum)(const SumJob&, i64 begin, i64 end);                    // of items: [pieces, blocks]
  void (*gradients)(const GradientsJob&, i64 begin, i64 end);        // of items
};
BDCORE_DECLARE_TABLES(BlendTrigger, blend_trigger)

}  // namespace bdcore
