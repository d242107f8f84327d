#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../dispatch/dispatch.h"
#include "gemm.h"
#include "random.h"

namespace gdlib {
namespace {

// Below this, a vector of outputs would be mostly empty: rows are folded by the kernels for few outputs instead.
constexpr std::size_t few_outputs = 8;

// Rows of one task of a layer with few outputs: about 512 KiB, so that handing it out (under 1 us) does not count and its gradient stays
// in cache; at least 64, so that the tasks' gradients together stay under 1/64 of x for each output.
std::size_t rows_per_task(std::size_t in_features, std::size_t element_bytes) {
  constexpr std::size_t task_bytes = 512 << 10;
  const std::size_t rows = task_bytes / std::max<std::size_t>(1, in_features * element_bytes);
  return std::max<std::size_t>(64, rows / 64 * 64);
}

// Rows that GEMM takes at a time where the outputs are many: about 512 KiB of outputs, at least 64.
std::size_t rows_per_product(std::size_t out_features, std::size_t element_bytes) {
  constexpr std::size_t product_bytes = 512 << 10;
  return std::max<std::size_t>(64, product_bytes / (out_features * element_bytes) / 64 * 64);
}

std::size_t ceil_divide(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

// total[n] = the partial vectors in order, carried in double.
template <class T>
void sum_partials(std::size_t count, std::size_t n, const T* partials, T* total) {
  for (std::size_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (std::size_t k = 0; k < count; ++k) sum += static_cast<double>(partials[k * n + i]);
    total[i] = static_cast<T>(sum);
  }
}

// total[cols] += column sums of g[rows, cols]: in T over some rows, the rest in double.
template <class T>
void add_column_sums(std::size_t rows, std::size_t cols, const T* g, T* total) {
  constexpr std::size_t block = 64;
  std::vector<double> sums(cols);
  std::vector<T> part(cols);
  for (std::size_t begin = 0; begin < rows; begin += block) {
    std::fill(part.begin(), part.end(), T(0));
    for (std::size_t r = begin; r < std::min(rows, begin + block); ++r)
      for (std::size_t c = 0; c < cols; ++c) part[c] += g[r * cols + c];
    for (std::size_t c = 0; c < cols; ++c) sums[c] += static_cast<double>(part[c]);
  }
  for (std::size_t c = 0; c < cols; ++c) total[c] = static_cast<T>(static_cast<double>(total[c]) + sums[c]);
}

// weight_gradient[out, in] += g[rows, out]^T x[rows, in]. A product over very many rows would lose small terms in a large sum: it is cut
// into products whose sums meet in double.
template <class T>
void weight_gradient_product(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                             std::size_t x_stride, T* weight_gradient) {
  constexpr std::size_t most_rows = 1 << 14;
  const auto product = [&](std::size_t begin, std::size_t count, bool accumulate, T* into) {
    Product<T> p{out_features, in_features, count, {g + begin * out_features, 1, out_features}, {x + begin * x_stride, x_stride, 1}};
    p.accumulate = accumulate;
    p.c = into;
    p.c_stride = in_features;
    gemm(p);
  };
  if (rows <= most_rows) return product(0, rows, true, weight_gradient);
  const std::size_t n = in_features * out_features;
  std::vector<double> sums(weight_gradient, weight_gradient + n);
  AlignedVector<T> part(n);
  for (std::size_t begin = 0; begin < rows; begin += most_rows) {
    product(begin, std::min(most_rows, rows - begin), false, part.data());
    for (std::size_t i = 0; i < n; ++i) sums[i] += static_cast<double>(part[i]);
  }
  for (std::size_t i = 0; i < n; ++i) weight_gradient[i] = static_cast<T>(sums[i]);
}

}  // namespace

template <class T>
void linear_forward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* x, std::size_t x_stride,
                    const T* weight, const T* bias, T* y) {
  if (out_features >= few_outputs) {
    Product<T> p{rows, out_features, in_features, {x, x_stride, 1}, {weight, 1, in_features}};
    p.bias = bias;
    p.c = y;
    p.c_stride = out_features;
    return gemm(p);
  }
  const std::size_t task_rows = rows_per_task(in_features, sizeof(T));
  parallel_for(ceil_divide(rows, task_rows), [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * task_rows;
    table<T>().linear_forward(std::min(task_rows, rows - begin), in_features, out_features, x + begin * x_stride, x_stride, weight, bias,
                              y + begin * out_features);
  });
}

template <class T>
void linear_backward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x, std::size_t x_stride,
                     const T* weight, T* weight_gradient, T* bias_gradient, T* input_gradient) {
  const KernelTable<T>& kernel = table<T>();
  if (input_gradient) {
    if (out_features >= few_outputs || out_features == 0) {
      Product<T> p{rows, in_features, out_features, {g, out_features, 1}, {weight, in_features, 1}};
      p.c = input_gradient;
      p.c_stride = in_features;
      gemm(p);
    } else {
      parallel_for(ceil_divide(rows, rows_per_task(in_features, sizeof(T))), [&](std::size_t task, std::size_t) {
        const std::size_t task_rows = rows_per_task(in_features, sizeof(T)), begin = task * task_rows;
        kernel.linear_input_gradient(std::min(task_rows, rows - begin), in_features, out_features, g + begin * out_features, weight,
                                     input_gradient + begin * in_features);
      });
    }
  }
  if (out_features >= few_outputs) {
    weight_gradient_product(rows, in_features, out_features, g, x, x_stride, weight_gradient);
    if (bias_gradient) add_column_sums(rows, out_features, g, bias_gradient);
    return;
  }
  const std::size_t task_rows = rows_per_task(in_features, sizeof(T));
  const std::size_t tasks = ceil_divide(rows, task_rows);
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

namespace {

// Few outputs: the fused kernel, tasks of rows on all threads.
template <class T>
double few_outputs_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient, LinearScratch<T>& scratch,
                            Interrupt& interrupt) {
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

  const std::size_t task_rows = rows_per_task(shape.in_features, sizeof(T));
  if (batch.rows <= task_rows) return step(0, batch.rows, gradient);

  const std::size_t tasks = ceil_divide(batch.rows, task_rows);
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

// Many outputs: products of blocks of rows, which are gathered first where an index scatters them.
template <class T>
double many_outputs_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient, LinearScratch<T>& scratch,
                             Interrupt& interrupt) {
  const std::size_t in = shape.in_features, out = shape.out_features, weights = in * out;
  const KernelTable<T>& kernel = table<T>();
  const std::size_t most_rows = std::min(batch.rows, rows_per_product(out, sizeof(T)));
  scratch.outputs.resize(most_rows * out);
  scratch.targets.resize(most_rows * out);
  if (batch.index) scratch.rows.resize(most_rows * in);
  std::fill_n(gradient, shape.parameters(), T(0));
  double loss = 0.0;
  for (std::size_t begin = 0; begin < batch.rows && !interrupt.check(); begin += most_rows) {
    const std::size_t rows = std::min(most_rows, batch.rows - begin);
    const T* x = batch.x + (batch.index ? 0 : begin * batch.x_stride);
    const T* target = batch.target ? batch.target + (batch.index ? 0 : begin * out) : nullptr;
    std::size_t x_stride = batch.x_stride;
    if (batch.index) {
      for (std::size_t r = 0; r < rows; ++r) {
        std::copy_n(batch.x + batch.index[begin + r] * batch.x_stride, in, scratch.rows.data() + r * in);
        if (target) std::copy_n(batch.target + batch.index[begin + r] * out, out, scratch.targets.data() + r * out);
      }
      x = scratch.rows.data();
      x_stride = in;
      if (target) target = scratch.targets.data();
    }
    if (!target) {
      std::fill_n(scratch.targets.data(), rows * out, T(0));
      target = scratch.targets.data();
    }
    T* const outputs = scratch.outputs.data();
    linear_forward<T>(rows, in, out, x, x_stride, parameters, shape.has_bias ? parameters + weights : nullptr, outputs);
    loss += kernel.squared_error_sum(rows * out, outputs, target);
    kernel.squared_error_gradient(rows * out, outputs, target, T(1), outputs);
    linear_backward<T>(rows, in, out, outputs, x, x_stride, parameters, gradient, shape.has_bias ? gradient + weights : nullptr, nullptr);
  }
  return loss;
}

}  // namespace

template <class T>
double linear_squared_error_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient,
                                     LinearScratch<T>& scratch, Interrupt& interrupt) {
  if (batch.rows == 0) {
    std::fill_n(gradient, shape.parameters(), T(0));
    return 0.0;
  }
  if (shape.out_features >= few_outputs) return many_outputs_gradient(shape, batch, parameters, gradient, scratch, interrupt);
  return few_outputs_gradient(shape, batch, parameters, gradient, scratch, interrupt);
}

template <class T>
double linear_hessian_eigenvalue(std::size_t rows, std::size_t in_features, const T* x, std::size_t x_stride, bool has_bias,
                                 Interrupt& interrupt) {
  const LinearShape shape{in_features, 1, has_bias};
  const std::size_t n = shape.parameters();
  const Batch<T> all{x, x_stride, nullptr, nullptr, rows, 0, true};
  AlignedVector<T> direction(n), image(n);
  LinearScratch<T> scratch;
  // A start without a pattern, which no symmetry of the data makes orthogonal to the wanted direction.
  fill_uniform(0, 1.0, n, direction.data());
  constexpr int least_passes = 10;
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
    // Not at once: where the start lies mostly along other directions, the wanted one needs some passes to show.
    const bool settled = pass >= least_passes && std::abs(quotient - eigenvalue) <= 1e-4 * quotient;
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
