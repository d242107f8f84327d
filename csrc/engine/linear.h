// The linear layer y = x W^T + b: forward, backward, and the one-pass gradient of a squared error that training uses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/kernels.h"
#include "aligned.h"
#include "gemm.h"
#include "parallel.h"

namespace gdlib {

// Below this, a vector of outputs would be mostly empty: rows are folded by kernels of their own instead of products of panels.
constexpr std::size_t few_outputs = 8;

// y[rows, out] = activation(x[rows, in] weight[out, in]^T + bias[out]); bias may be null, `packed` is weight^T laid out before, or null.
// A row's bits do not depend on the other rows. With `check`, false when a number that the activation gets is not finite.
template <class T>
bool linear_forward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* x, std::size_t x_stride,
                    const T* weight, const T* bias, T* y, Activation activation = Activation::none, bool check = false,
                    const PackedMatrix<T>* packed = nullptr);

// input_gradient[rows, in] = g[rows, out] weight[out, in], times the derivative of the activation whose outputs are `input`, if any.
template <class T>
void linear_input_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* weight,
                           T* input_gradient, Activation activation = Activation::none, const T* input = nullptr);

// weight_gradient[out, in] (+)= g^T x, bias_gradient[out] (+)= column sums of g (null: skipped).
template <class T>
void linear_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                            std::size_t x_stride, bool accumulate, T* weight_gradient, T* bias_gradient);

// The same for an update of `weight` at once: `finish` visits each block of the weight gradient, on the thread that computed it, and what
// weight_gradient[out, in] holds afterwards is unspecified.
template <class T>
void visit_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                           std::size_t x_stride, const T* weight, BlockVisitor<T> finish, T* weight_gradient, T* bias_gradient);

// Rows for one step of training. Row r is at x + (index ? index[r] : r) * x_stride; targets likewise, dense, null for zeros.
template <class T>
struct Batch {
  const T* x;
  std::size_t x_stride;
  const T* target;
  const std::uint32_t* index;
  std::size_t rows;
  std::size_t rows_ahead;  // further rows behind these
  bool prefetch;           // the data set is larger than the caches
};

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
  AlignedVector<double> losses, sums;
};

// gradient[parameters] = the gradient of the sum of squared errors over the batch; returns that sum. One pass over x. The result is
// meaningless once `interrupt` has been requested.
template <class T>
double linear_squared_error_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient,
                                     LinearScratch<T>& scratch, Interrupt& interrupt);

// The largest eigenvalue of the Hessian of sum (x w + b - y)^2, that is of 2 [x 1]^T [x 1] (without bias, 2 x^T x), by power iteration:
// 10 to 300 passes, until it changes by less than 1e-4 of itself. Approached from below. 0 for a zero matrix, NaN after an interrupt.
template <class T>
double linear_hessian_eigenvalue(std::size_t rows, std::size_t in_features, const T* x, std::size_t x_stride, bool has_bias,
                                 Interrupt& interrupt);

}  // namespace gdlib
