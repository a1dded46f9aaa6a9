// The loops of isolation_loss; bdcore/ops/isolation_loss.py has the equations.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

struct IsolationLossForward {
  Scalar type;         // of the logits; all other numbers are float, or double where the logits are
  const void* logits;  // [rows, classes]
  const i64* labels;   // [rows]
  i64 rows;
  i64 classes;
  i64 mode;       // ce, ascent, lga, flood
  i64 reduction;  // none, mean, sum, batch
  i64 ignore;
  double gamma;
  double smoothing;
  void* losses;  // [rows]
  void* saved;   // [4, rows] of maximum, 1 / sum, slope, p_y - 1; then the factor that the reduction gives all slopes
};

struct IsolationLossBackward {
  Scalar type;
  const void* grad;  // of the result
  i64 grad_stride;   // from row to row; 0 where one number serves all rows
  const void* logits;
  const i64* labels;
  const void* saved;
  i64 rows;
  i64 classes;
  double smoothing;
  void* grad_logits;  // [rows, classes]
};

struct LabelRange {
  i64 lowest, highest;  // 0 and -1 where there is none
  i64 used;             // not ignored
};

struct IsolationLoss {
  LabelRange (*range)(const i64* labels, i64 rows, i64 ignore);
  // A row's results do not depend on the range in which it is computed.
  void (*forward)(const IsolationLossForward& work, i64 begin, i64 end);
  // Reduces the losses of all rows to the one number `result`, unless the reduction is none; writes the factor.
  void (*reduce)(const IsolationLossForward& work, i64 used, void* result);
  void (*backward)(const IsolationLossBackward& work, i64 begin, i64 end);
};

BDCORE_DECLARE_TABLES(IsolationLoss, isolation_loss_kernels)

}  // namespace bdcore
