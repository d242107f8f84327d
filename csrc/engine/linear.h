// The linear layer y = x W^T + b: forward and backward.
#pragma once

#include <cstddef>

#include "../kernels/kernels.h"
#include "gemm.h"

namespace gdlib {

// As few_outputs, of gradients: their products have rows and depths of outputs, not vectors.
constexpr std::size_t few_output_gradients = 4;

// Up to this, vectors of inputs would be: their gradients are computed transposed, with vectors of outputs and of rows.
constexpr std::size_t few_inputs = 4;

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

struct OutputRange {
  std::size_t begin, count;
};

// The same for an update of `weight` at once: `finish` visits each block of the weight gradient, on the thread that computed it, and what
// weight_gradient[out, in] holds afterwards is unspecified. Only the outputs of one of some parts, which may be asked for at the same time;
// returns which these were. Few outputs are all in the last part. `rows` is at most most_chain.
template <class T>
OutputRange visit_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                                  std::size_t x_stride, const T* weight, BlockVisitor<T> finish, T* weight_gradient, T* bias_gradient,
                                  std::size_t part, std::size_t parts);

}  // namespace gdlib
