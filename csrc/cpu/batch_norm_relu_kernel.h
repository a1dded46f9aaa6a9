// The loops of batch_norm_relu; bdcore/ops/batch_norm_relu.py has the equations.
#pragma once

#include "level.h"
#include "scalar.h"

namespace bdcore {

// Tensors are [rows, channels], a row being one pixel of one image. All numbers that belong to channels are float, or
// double where the tensors are. Rows are taken in chunks, whose sums are added up by themselves.
struct BatchNormRelu {
  Scalar type;  // of x, y, grad and grad_x
  const void* x;
  i64 rows;
  i64 channels;
  i64 chunk;          // rows in a chunk; the last one may be shorter
  void* partial;      // [chunks, 2, channels]: of the statistics mean and sum of squared deviations, of the gradient
                      // the sums of what passes and of its product with the deviation
  const void* mean;   // [channels], as all below
  const void* scale;  // weight / standard deviation
  const void* bias;
  void* y;
  const void* grad;     // of y
  const void* constant; // what every gradient is lowered by,
  const void* slope;    // and how much for each unit of the deviation; null where the statistics are constants
  void* grad_x;
};

struct BatchNormReluTable {
  // Each over chunks begin to end.
  void (*statistics)(const BatchNormRelu& work, i64 begin, i64 end);
  void (*forward)(const BatchNormRelu& work, i64 begin, i64 end);
  void (*gradient_sums)(const BatchNormRelu& work, i64 begin, i64 end);
  void (*backward)(const BatchNormRelu& work, i64 begin, i64 end);
};

BDCORE_DECLARE_TABLES(BatchNormReluTable, batch_norm_relu_kernels)

}  // namespace bdcore
