#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "gemm.h"
#include "random.h"

namespace gdlib {
namespace {

// The longest chain of additions in T over the rows of a gradient: more would lose small terms in a large sum, so that the sums of
// shorter chains meet in double.
constexpr std::size_t most_chain = 1 << 14;

// Rows of one task: about 512 KiB, so that handing it out (under 1 us) does not count and its gradient stays in cache; at least 64 for
// each output, so that the tasks' gradients together stay under 1/64 of x.
std::size_t rows_per_task(std::size_t in_features, std::size_t out_features, std::size_t element_bytes) {
  constexpr std::size_t task_bytes = 512 << 10;
  const std::size_t rows = task_bytes / std::max<std::size_t>(1, in_features * element_bytes);
  if (out_features < few_outputs) return std::max<std::size_t>(64, rows / 64 * 64);
  return std::min(most_chain, std::max<std::size_t>(64 * out_features, rows / 64 * 64));
}

// Gradients of at most so many elements are computed by each task for itself, and added: 256 KiB in float32 stay in L2 next to the rows.
constexpr std::size_t most_partial = 1 << 16;

std::size_t ceil_divide(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

// total[n] (+)= the partial vectors in order, carried in double.
template <class T>
void sum_partials(std::size_t count, std::size_t n, const T* partials, bool accumulate, T* total) {
  for (std::size_t i = 0; i < n; ++i) {
    double sum = accumulate ? static_cast<double>(total[i]) : 0.0;
    for (std::size_t k = 0; k < count; ++k) sum += static_cast<double>(partials[k * n + i]);
    total[i] = static_cast<T>(sum);
  }
}

// weight_gradient[out, in] = g[rows, out]^T x[rows, in], one chain over the rows for each element.
template <class T>
Product<T> weight_product(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                          std::size_t x_stride, T* weight_gradient) {
  Product<T> p{out_features, in_features, rows, {g, 1, out_features}, {x, x_stride, 1}};
  p.c = weight_gradient;
  p.c_stride = in_features;
  return p;
}

// The same in parts whose chains are not too long: on one thread each, where a part's gradient is small, else one after the other.
template <class T>
void weight_product_in_parts(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                             std::size_t x_stride, T* weight_gradient) {
  const std::size_t n = in_features * out_features, parts = ceil_divide(rows, most_chain);
  const auto part = [&](std::size_t i, T* into) {
    const std::size_t begin = i * most_chain;
    gemm(weight_product(std::min(most_chain, rows - begin), in_features, out_features, g + begin * out_features, x + begin * x_stride,
                        x_stride, into));
  };
  if (n <= most_partial / 4) {
    AlignedVector<T> partials(parts * n);
    parallel_for(parts, [&](std::size_t i, std::size_t) { part(i, partials.data() + i * n); });
    return sum_partials(parts, n, partials.data(), true, weight_gradient);
  }
  std::vector<double> sums(weight_gradient, weight_gradient + n);
  AlignedVector<T> one(n);
  for (std::size_t i = 0; i < parts; ++i) {
    part(i, one.data());
    for (std::size_t k = 0; k < n; ++k) sums[k] += static_cast<double>(one[k]);
  }
  for (std::size_t k = 0; k < n; ++k) weight_gradient[k] = static_cast<T>(sums[k]);
}

// total[cols] += column sums of g[rows, cols]: in T over some rows, the rest in double.
template <class T>
void add_column_sums(std::size_t rows, std::size_t cols, const T* g, T* total) {
  constexpr std::size_t block = 512;
  if (rows <= block) return table<T>().column_sums(rows, cols, g, total);
  std::vector<double> sums(total, total + cols);
  std::vector<T> part(cols);
  for (std::size_t begin = 0; begin < rows; begin += block) {
    std::fill(part.begin(), part.end(), T(0));
    table<T>().column_sums(std::min(block, rows - begin), cols, g + begin * cols, part.data());
    for (std::size_t c = 0; c < cols; ++c) sums[c] += static_cast<double>(part[c]);
  }
  for (std::size_t c = 0; c < cols; ++c) total[c] = static_cast<T>(sums[c]);
}

}  // namespace

template <class T>
bool linear_forward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* x, std::size_t x_stride,
                    const T* weight, const T* bias, T* y, Activation activation, bool check, const PackedMatrix<T>* packed) {
  const KernelTable<T>& kernel = table<T>();
  std::atomic<bool> finite{true};  // relaxed: a flag alone, which the threads' barrier publishes
  const auto finish = [&](const Block<T>& block) {
    if (check) {
      const bool whole = block.cols == out_features;
      for (std::size_t r = 0; r < (whole ? 1 : block.rows); ++r)
        if (!kernel.all_finite(whole ? block.rows * block.cols : block.cols, block.data + r * out_features))
          finite.store(false, std::memory_order_relaxed);
    }
    kernel.activation_forward(activation, block.rows, block.cols, block.data, out_features);
  };
  const bool to_finish = check || activation != Activation::none;
  if (out_features >= few_outputs) {
    Product<T> p{rows, out_features, in_features, {x, x_stride, 1}, {weight, 1, in_features}};
    p.packed = packed;
    p.bias = bias;
    p.c = y;
    p.c_stride = out_features;
    if (to_finish) p.finish = finish;
    gemm(p);
  } else {
    const std::size_t task_rows = rows_per_task(in_features, out_features, sizeof(T));
    parallel_for(ceil_divide(rows, task_rows), [&](std::size_t task, std::size_t) {
      const std::size_t begin = task * task_rows, count = std::min(task_rows, rows - begin);
      kernel.linear_forward(count, in_features, out_features, x + begin * x_stride, x_stride, weight, bias, y + begin * out_features);
      if (to_finish) finish(Block<T>{begin, count, 0, out_features, y + begin * out_features, out_features});
    });
  }
  return finite.load(std::memory_order_relaxed);
}

template <class T>
void linear_input_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* weight,
                           T* input_gradient, Activation activation, const T* input) {
  const KernelTable<T>& kernel = table<T>();
  const auto chain = [&](const Block<T>& block) {
    const std::size_t at = block.row * in_features + block.col;
    kernel.activation_backward(activation, block.rows, block.cols, input + at, in_features, block.data, in_features);
  };
  if (out_features >= few_outputs || out_features == 0) {
    Product<T> p{rows, in_features, out_features, {g, out_features, 1}, {weight, in_features, 1}};
    p.c = input_gradient;
    p.c_stride = in_features;
    if (activation != Activation::none) p.finish = chain;
    return gemm(p);
  }
  const std::size_t task_rows = rows_per_task(in_features, out_features, sizeof(T));
  parallel_for(ceil_divide(rows, task_rows), [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * task_rows, count = std::min(task_rows, rows - begin);
    kernel.linear_input_gradient(count, in_features, out_features, g + begin * out_features, weight, input_gradient + begin * in_features);
    if (activation != Activation::none) chain(Block<T>{begin, count, 0, in_features, input_gradient + begin * in_features, in_features});
  });
}

template <class T>
void linear_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                            std::size_t x_stride, bool accumulate, T* weight_gradient, T* bias_gradient) {
  if (bias_gradient && !accumulate) std::fill_n(bias_gradient, out_features, T(0));
  const std::size_t weights = in_features * out_features;
  if (out_features >= few_outputs) {
    if (bias_gradient) add_column_sums(rows, out_features, g, bias_gradient);
    if (rows <= most_chain) {
      Product<T> p = weight_product(rows, in_features, out_features, g, x, x_stride, weight_gradient);
      p.accumulate = accumulate;
      return gemm(p);
    }
    if (!accumulate) std::fill_n(weight_gradient, weights, T(0));
    weight_product_in_parts(rows, in_features, out_features, g, x, x_stride, weight_gradient);
  } else {
    if (!accumulate) std::fill_n(weight_gradient, weights, T(0));
    const KernelTable<T>& kernel = table<T>();
    const std::size_t task_rows = rows_per_task(in_features, out_features, sizeof(T));
    const std::size_t tasks = ceil_divide(rows, task_rows);
    if (tasks <= 1) {
      kernel.linear_gradient(rows, in_features, out_features, g, x, x_stride, weight_gradient, bias_gradient);
    } else {
      const std::size_t n = weights + out_features;
      AlignedVector<T> partials(tasks * n, T(0));
      parallel_for(tasks, [&](std::size_t task, std::size_t) {
        const std::size_t begin = task * task_rows;
        T* const partial = partials.data() + task * n;
        kernel.linear_gradient(std::min(task_rows, rows - begin), in_features, out_features, g + begin * out_features,
                               x + begin * x_stride, x_stride, partial, bias_gradient ? partial + weights : nullptr);
      });
      AlignedVector<T> total(n);
      sum_partials(tasks, n, partials.data(), false, total.data());
      for (std::size_t i = 0; i < weights; ++i) weight_gradient[i] += total[i];
      if (bias_gradient)
        for (std::size_t o = 0; o < out_features; ++o) bias_gradient[o] += total[weights + o];
    }
  }
}

template <class T>
void visit_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                           std::size_t x_stride, const T* weight, BlockVisitor<T> finish, T* weight_gradient, T* bias_gradient) {
  if (out_features < few_outputs || rows > most_chain) {
    linear_weight_gradient(rows, in_features, out_features, g, x, x_stride, false, weight_gradient, bias_gradient);
    return finish({0, out_features, 0, in_features, weight_gradient, in_features});
  }
  if (bias_gradient) {
    std::fill_n(bias_gradient, out_features, T(0));
    add_column_sums(rows, out_features, g, bias_gradient);
  }
  Product<T> p = weight_product(rows, in_features, out_features, g, x, x_stride, weight_gradient);
  p.finish = finish;
  p.updated = weight;
  gemm(p);
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

  const std::size_t task_rows = rows_per_task(shape.in_features, shape.out_features, sizeof(T));
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
  sum_partials(tasks, n, scratch.partials.data(), false, gradient);
  double loss = 0.0;
  for (double part : scratch.losses) loss += part;
  return loss;
}

// Rows [begin, end) of a batch, for many outputs: into[parameters] += their gradient; returns the sum of squared errors. `block_rows` at a
// time, so that the gradient of a block finds its rows in the cache; those that an index scatters are gathered into `memory` first.
template <class T>
double add_rows_gradient(const LinearShape& shape, const Batch<T>& batch, std::size_t begin, std::size_t end, std::size_t block_rows,
                         const T* parameters, const PackedMatrix<T>* packed, T* into, T* memory) {
  const std::size_t in = shape.in_features, out = shape.out_features, weights = in * out;
  const KernelTable<T>& kernel = table<T>();
  T* const outputs = memory;
  T* const targets = outputs + block_rows * out;
  T* const gathered = targets + block_rows * out;
  double loss = 0.0;
  for (; begin < end; begin += block_rows) {
    const std::size_t rows = std::min(block_rows, end - begin);
    const T* x = batch.x + (batch.index ? 0 : begin * batch.x_stride);
    const T* target = batch.target ? batch.target + (batch.index ? 0 : begin * out) : nullptr;
    std::size_t x_stride = batch.x_stride;
    if (batch.index) {
      for (std::size_t r = 0; r < rows; ++r) {
        std::copy_n(batch.x + batch.index[begin + r] * batch.x_stride, in, gathered + r * in);
        if (target) std::copy_n(batch.target + batch.index[begin + r] * out, out, targets + r * out);
      }
      x = gathered;
      x_stride = in;
      if (target) target = targets;
    }
    if (!target) {
      std::fill_n(targets, rows * out, T(0));
      target = targets;
    }
    Product<T> p{rows, out, in, {x, x_stride, 1}, {parameters, 1, in}};
    p.packed = packed;
    p.bias = shape.has_bias ? parameters + weights : nullptr;
    p.c = outputs;
    p.c_stride = out;
    gemm(p);
    loss += kernel.squared_error_sum(rows * out, outputs, target);
    kernel.squared_error_gradient(rows * out, outputs, target, T(1), outputs);
    Product<T> gradient = weight_product(rows, in, out, outputs, x, x_stride, into);
    gradient.accumulate = true;
    gemm(gradient);
    if (shape.has_bias) {  // by blocks: fewer additions stand in one chain
      std::fill_n(targets, out, T(0));
      kernel.column_sums(rows, out, outputs, targets);
      for (std::size_t o = 0; o < out; ++o) into[weights + o] += targets[o];
    }
  }
  return loss;
}

// Many outputs: tasks of rows with gradients of their own where these are small, else blocks of rows one after the other, whose products
// share the threads.
template <class T>
double many_outputs_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient, LinearScratch<T>& scratch,
                             Interrupt& interrupt) {
  const std::size_t in = shape.in_features, out = shape.out_features, n = shape.parameters();
  const bool in_tasks = n <= most_partial;
  // Rows of a block: with outputs and targets a fourth of L2, or for large layers enough to share out among threads.
  const std::size_t fitting = cache_sizes().l2 / 4 / ((in + 2 * out) * sizeof(T)) / 8 * 8;
  const std::size_t block_rows = std::min(batch.rows, in_tasks ? std::clamp<std::size_t>(fitting, 32, 256) : std::size_t{512});
  const std::size_t memory = block_rows * (2 * out + (batch.index ? in : 0));
  const std::size_t task_rows = in_tasks ? rows_per_task(in, out, sizeof(T)) : batch.rows;
  const std::size_t tasks = ceil_divide(batch.rows, task_rows);
  PackedMatrix<T> packed;  // laid out once for all blocks
  if (batch.rows > block_rows) packed = PackedMatrix<T>(in, out, {parameters, 1, in});
  const PackedMatrix<T>* const weights = batch.rows > block_rows ? &packed : nullptr;
  if (tasks == 1) {
    scratch.rows.resize(memory);
    std::fill_n(gradient, n, T(0));
    const bool long_chain = batch.rows > most_chain;
    if (long_chain) scratch.sums.assign(n, 0.0);
    double loss = 0.0;
    // Large layers look for an interrupt after each block.
    const std::size_t stretch = in_tasks ? batch.rows : block_rows;
    for (std::size_t begin = 0, chain = 0; begin < batch.rows && !interrupt.check(); begin += stretch) {
      const std::size_t end = std::min(batch.rows, begin + stretch);
      loss += add_rows_gradient(shape, batch, begin, end, block_rows, parameters, weights, gradient, scratch.rows.data());
      chain += end - begin;
      if (!long_chain || (chain < most_chain && end < batch.rows)) continue;
      for (std::size_t i = 0; i < n; ++i) scratch.sums[i] += static_cast<double>(gradient[i]);
      std::fill_n(gradient, n, T(0));
      chain = 0;
    }
    if (long_chain)
      for (std::size_t i = 0; i < n; ++i) gradient[i] = static_cast<T>(scratch.sums[i]);
    return loss;
  }
  const int workers = thread_count();
  scratch.rows.resize(memory * static_cast<std::size_t>(workers));
  scratch.partials.assign(tasks * n, T(0));
  scratch.losses.assign(tasks, 0.0);
  parallel_for(tasks, [&](std::size_t task, std::size_t worker) {
    if (interrupt.check()) return;
    const std::size_t begin = task * task_rows;
    scratch.losses[task] = add_rows_gradient(shape, batch, begin, std::min(batch.rows, begin + task_rows), block_rows, parameters, weights,
                                             scratch.partials.data() + task * n, scratch.rows.data() + worker * memory);
  }, workers);
  if (interrupt.requested()) return 0.0;
  sum_partials(tasks, n, scratch.partials.data(), false, gradient);
  double loss = 0.0;
  for (double part : scratch.losses) loss += part;
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
  template bool linear_forward(std::size_t, std::size_t, std::size_t, const T*, std::size_t, const T*, const T*, T*, Activation, bool, \
                               const PackedMatrix<T>*);                                                                               \
  template void linear_input_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, T*, Activation, const T*);           \
  template void linear_weight_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, std::size_t, bool, T*, T*);         \
  template void visit_weight_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, std::size_t, const T*,               \
                                      BlockVisitor<T>, T*, T*);                                                                       \
  template double linear_squared_error_gradient(const LinearShape&, const Batch<T>&, const T*, T*, LinearScratch<T>&, Interrupt&);                       \
  template double linear_hessian_eigenvalue(std::size_t, std::size_t, const T*, std::size_t, bool, Interrupt&);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
