// The loops of model_contrastive_loss; see bdcore/ops/model_contrastive_loss.py for the formulas.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

// The inputs of one call. Strides are in elements; a row's own elements lie side by side.
struct ContrastiveRows {
  Scalar scalar;
  i64 width, count;  // count: negatives of a row
  double temperature;
  const void* anchor;
  const void* positive;
  const void* negatives;
  i64 anchor_stride, positive_stride, negatives_stride, negative_stride;
};

// What the backward pass takes besides the inputs, and where it writes.
struct ContrastiveGradients {
  const void* grad;  // of the losses, one for each `grad_stride` elements, to be multiplied by `scale`
  i64 grad_stride;
  double scale;
  const void* norms;
  const void* cosines;
  void* anchor;  // contiguous, of the inputs' type; null where not asked for
  void* positive;
  void* negatives;
  bool streamed;  // written past the caches
};

constexpr i64 kContrastiveRows = 32;

struct ModelContrastiveLoss {
  // Of rows [begin, end): writes losses [B], norms [B, 2 + K] and cosines [B, 1 + K], all in the accumulator's type.
  void (*forward)(const ContrastiveRows& rows, i64 begin, i64 end, void* losses, void* norms, void* cosines);
  // Of rows [begin, end). `room` is memory for this call alone: 2 * (1 + K) * kContrastiveRows doubles.
  void (*backward)(const ContrastiveRows& rows, i64 begin, i64 end, const ContrastiveGradients& grads, void* room);
};

BDCORE_DECLARE_TABLES(ModelContrastiveLoss, model_contrastive_loss)

}  // namespace bdcore
