// The squared error of a linear layer and its gradient in one pass over the data; outputs are formed for a block of rows at most.
#pragma once

#include <cstddef>

#include "../kernels/kernels.h"
#include "aligned.h"
#include "batch.h"
#include "gemm.h"
#include "parallel.h"

namespace gdlib {

// A linear layer whose parameters lie in one vector: weight[out, in], then bias[out] if any.
struct LinearShape {
  std::size_t in_features;
  std::size_t out_features;
  bool has_bias;
  std::size_t parameters() const { return out_features * (in_features + (has_bias ? 1 : 0)); }
};

// What a pass needs besides its result, kept from step to step.
template <class T>
struct LinearScratch {
  AlignedVector<T> rows;  // blocks of outputs, targets and gathered rows, where outputs are many
  AlignedVector<T> partials;
  AlignedVector<double> losses;
};

// Whether it has few outputs, or a gradient small enough for each task to have its own. Others are computed as a network is.
bool has_one_pass(const LinearShape& shape);

// gradient[parameters] = the gradient of the sum of squared errors over the batch; returns that sum. One pass over x, for shapes that have
// one. The result is meaningless once `interrupt` has been requested.
template <class T>
double linear_squared_error_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient,
                                     LinearScratch<T>& scratch, Interrupt& interrupt);

// The largest eigenvalue of the Hessian of sum (x w + b - y)^2, that is of 2 [x 1]^T [x 1] (without bias, 2 x^T x), by power iteration:
// 10 to 300 passes, until it changes by less than 1e-4 of itself. Approached from below. 0 for a zero matrix, NaN after an interrupt.
template <class T>
double linear_hessian_eigenvalue(std::size_t rows, std::size_t in_features, const T* x, std::size_t x_stride, bool has_bias,
                                 Interrupt& interrupt);

}  // namespace gdlib
