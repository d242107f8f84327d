#include "linear.h"

#include <algorithm>
#include <cmath>

#include "../dispatch/dispatch.h"
#include "gemm.h"

namespace gdlib {
namespace {

// Below this, a vector of outputs would be mostly empty: rows are folded by the kernels for few outputs instead.
constexpr std::size_t few_outputs = 8;

// Rows of one task: about 512 KiB, so that handing it out (under 1 us) does not count and its gradient stays in cache; at least 64, so that
// the tasks' gradients together stay under 1/64 of x.
std::size_t rows_per_task(std::size_t in_features, std::size_t element_bytes) {
  constexpr std::size_t task_bytes = 512 << 10;
  const std::size_t rows = task_bytes / std::max<std::size_t>(1, in_features * element_bytes);
  return std::max<std::size_t>(64, rows / 64 * 64);
}

// total[n] = the partial vectors in order, carried in double.
template <class T>
void sum_partials(std::size_t count, std::size_t n, const T* partials, T* total) {
  for (std::size_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (std::size_t k = 0; k < count; ++k) sum += static_cast<double>(partials[k * n + i]);
    total[i] = static_cast<T>(sum);
  }
}

}  // namespace

template <class T>
void linear_forward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* x, std::size_t x_stride,
                    const T* weight, const T* bias, T* y) {
  if (out_features >= few_outputs) {
    gemm<T>(rows, out_features, in_features, {x, x_stride, 1}, {weight, 1, in_features}, bias, false, y, out_features);
    return;
  }
  const std::size_t task_rows = rows_per_task(in_features, sizeof(T));
  parallel_for((rows + task_rows - 1) / task_rows, [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * task_rows;
    table<T>().linear_forward(std::min(task_rows, rows - begin), in_features, out_features, x + begin * x_stride, x_stride, weight, bias,
                              y + begin * out_features);
  });
}

template <class T>
void linear_backward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x, std::size_t x_stride,
                     const T* weight, T* weight_gradient, T* bias_gradient, T* input_gradient) {
  const KernelTable<T>& kernel = table<T>();
  if (input_gradient)
    gemm<T>(rows, in_features, out_features, {g, out_features, 1}, {weight, in_features, 1}, nullptr, false, input_gradient, in_features);
  if (out_features >= few_outputs) {
    gemm<T>(out_features, in_features, rows, {g, 1, out_features}, {x, x_stride, 1}, nullptr, true, weight_gradient, in_features);
    if (bias_gradient)
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t o = 0; o < out_features; ++o) bias_gradient[o] += g[r * out_features + o];
    return;
  }
  const std::size_t task_rows = rows_per_task(in_features, sizeof(T));
  const std::size_t tasks = (rows + task_rows - 1) / task_rows;
  if (tasks <= 1) {
    kernel.linear_gradient(rows, in_features, out_features, g, x, x_stride, weight_gradient, bias_gradient);
    return;
  }
  const std::size_t weights = in_features * out_features, n = weights + out_features;
  AlignedVector<T> partials(tasks * n);
  parallel_for(tasks, [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * task_rows;
    T* const partial = partials.data() + task * n;
    std::fill_n(partial, n, T(0));
    kernel.linear_gradient(std::min(task_rows, rows - begin), in_features, out_features, g + begin * out_features, x + begin * x_stride,
                           x_stride, partial, bias_gradient ? partial + weights : nullptr);
  });
  AlignedVector<T> total(n);
  sum_partials(tasks, n, partials.data(), total.data());
  for (std::size_t i = 0; i < weights; ++i) weight_gradient[i] += total[i];
  if (bias_gradient)
    for (std::size_t o = 0; o < out_features; ++o) bias_gradient[o] += total[weights + o];
}

template <class T>
double linear_squared_error_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient,
                                     LinearScratch<T>& scratch, Interrupt& interrupt) {
  const std::size_t weights = shape.in_features * shape.out_features, n = shape.parameters();
  const KernelTable<T>& kernel = table<T>();
  const auto step = [&](std::size_t begin, std::size_t rows, T* into) {
    LinearStep<T> s;
    // Rows are numbered from `begin` by moving the index, or x and the target where there is none.
    const std::size_t shift = batch.index ? 0 : begin;
    s.x = batch.x + shift * batch.x_stride;
    s.x_stride = batch.x_stride;
    s.index = batch.index ? batch.index + begin : nullptr;
    s.rows = rows;
    s.rows_ahead = batch.rows - begin - rows + batch.rows_ahead;
    s.prefetch = batch.prefetch;
    s.in_features = shape.in_features;
    s.out_features = shape.out_features;
    s.weight = parameters;
    s.bias = shape.has_bias ? parameters + weights : nullptr;
    s.target = batch.target ? batch.target + shift * shape.out_features : nullptr;
    s.weight_gradient = into;
    s.bias_gradient = shape.has_bias ? into + weights : nullptr;
    return kernel.linear_step(s);
  };

  if (batch.rows == 0) {
    std::fill_n(gradient, n, T(0));
    return 0.0;
  }
  const std::size_t task_rows = rows_per_task(shape.in_features, sizeof(T));
  if (batch.rows <= task_rows) return step(0, batch.rows, gradient);

  const std::size_t tasks = (batch.rows + task_rows - 1) / task_rows;
  scratch.partials.resize(tasks * n);
  scratch.losses.resize(tasks);
  parallel_for(tasks, [&](std::size_t task, std::size_t) {
    if (interrupt.check()) return;
    const std::size_t begin = task * task_rows;
    scratch.losses[task] = step(begin, std::min(task_rows, batch.rows - begin), scratch.partials.data() + task * n);
  });
  if (interrupt.requested()) return 0.0;
  sum_partials(tasks, n, scratch.partials.data(), gradient);
  double loss = 0.0;
  for (double part : scratch.losses) loss += part;
  return loss;
}

template <class T>
double linear_hessian_eigenvalue(std::size_t rows, std::size_t in_features, const T* x, std::size_t x_stride, bool has_bias,
                                 Interrupt& interrupt) {
  const LinearShape shape{in_features, 1, has_bias};
  const std::size_t n = shape.parameters();
  const Batch<T> all{x, x_stride, nullptr, nullptr, rows, 0, true};
  AlignedVector<T> direction(n), image(n);
  LinearScratch<T> scratch;
  // Unequal components, so that the start is not orthogonal to the wanted direction by some symmetry of the data.
  for (std::size_t i = 0; i < n; ++i) direction[i] = static_cast<T>(1.0 + 0.5 * std::sin(static_cast<double>(i) + 1.0));
  double eigenvalue = 0.0;
  for (int pass = 0; pass < 300; ++pass) {
    double norm = 0.0;
    for (T value : direction) norm += static_cast<double>(value) * static_cast<double>(value);
    norm = std::sqrt(norm);
    if (norm == 0.0) return 0.0;
    for (T& value : direction) value = static_cast<T>(static_cast<double>(value) / norm);
    linear_squared_error_gradient(shape, all, direction.data(), image.data(), scratch, interrupt);
    if (interrupt.requested() || interrupt.check()) return std::nan("");
    double quotient = 0.0;  // Rayleigh: direction . H direction
    for (std::size_t i = 0; i < n; ++i) quotient += static_cast<double>(direction[i]) * static_cast<double>(image[i]);
    const bool settled = std::abs(quotient - eigenvalue) <= 1e-4 * quotient;
    eigenvalue = quotient;
    if (settled || !std::isfinite(quotient)) break;
    direction.swap(image);
  }
  return eigenvalue;
}

#define GDLIB_INSTANTIATE(T)                                                                                                          \
  template void linear_forward(std::size_t, std::size_t, std::size_t, const T*, std::size_t, const T*, const T*, T*);                 \
  template void linear_backward(std::size_t, std::size_t, std::size_t, const T*, const T*, std::size_t, const T*, T*, T*, T*);        \
  template double linear_squared_error_gradient(const LinearShape&, const Batch<T>&, const T*, T*, LinearScratch<T>&, Interrupt&);                       \
  template double linear_hessian_eigenvalue(std::size_t, std::size_t, const T*, std::size_t, bool, Interrupt&);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
