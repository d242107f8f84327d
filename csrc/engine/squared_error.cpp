#include "squared_error.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "gemm.h"
#include "random.h"
#include "tasks.h"

namespace gdlib {
namespace {

template <class T>
double cycles_of_batch(const LinearShape& shape, const Batch<T>& batch) {
  const double work = cycles_of(batch.rows, shape.in_features, shape.out_features);
  return batch.scattered() ? std::max(work, cycles_of_scattered(batch.rows, shape.in_features * sizeof(T))) : work;
}

// Few outputs: the fused kernel, tasks of rows on all threads.
template <class T>
double few_outputs_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient, LinearScratch<T>& scratch,
                            Interrupt& interrupt) {
  const std::size_t weights = shape.in_features * shape.out_features, n = shape.parameters();
  const KernelTable<T>& kernel = table<T>();
  const auto step_of = [&](std::size_t begin, std::size_t rows, std::size_t next, T* into) {
    LinearStep<T> s;
    // Rows are numbered from `begin` by moving the index, or x and the target where there is none.
    const std::size_t shift = batch.index ? 0 : begin;
    s.x = batch.x + shift * batch.x_stride;
    s.x_stride = batch.x_stride;
    s.index = batch.index ? batch.index + begin : nullptr;
    s.rows = rows;
    const std::size_t known = batch.rows - begin + batch.rows_ahead;
    s.next = std::min(next, known);
    s.rows_ahead = known - s.next;
    s.prefetch = batch.prefetch;
    s.from_memory = batch.from_memory;
    s.by_requests = batch.by_requests;
    s.in_features = shape.in_features;
    s.out_features = shape.out_features;
    s.weight = parameters;
    s.bias = shape.has_bias ? parameters + weights : nullptr;
    s.target = batch.target ? batch.target + shift * shape.out_features : nullptr;
    s.weight_gradient = into;
    s.bias_gradient = shape.has_bias ? into + weights : nullptr;
    return s;
  };

  const std::size_t task_rows = rows_per_piece(batch.rows, shape.in_features, shape.out_features, sizeof(T));
  const std::size_t tasks = ceil_divide(batch.rows, task_rows);
  if (tasks == 1) return kernel.linear_step(step_of(0, batch.rows, batch.rows, gradient));

  const double cycles = cycles_of_batch(shape, batch);
  const int threads = threads_for(cycles);
  // Where a thread has one task of each step, those rows of the next batch come next for it.
  const bool one_each = static_cast<std::size_t>(threads) >= tasks;
  const bool ask = cycles > 1e6;  // a fourth of a millisecond; else whoever makes the steps asks often enough, between them
  scratch.partials.resize(tasks * n);
  scratch.losses.resize(tasks);
  const auto task_step = [&](std::size_t task) {
    const std::size_t begin = task * task_rows, rows = std::min(task_rows, batch.rows - begin);
    return step_of(begin, rows, one_each ? batch.rows : rows, scratch.partials.data() + task * n);
  };
  // Two tasks at a time, unless the thread that has most of them then had more than a seventh more: turns gain 1.1 to 1.3 times.
  const auto rounds = [&](std::size_t parts) { return ceil_divide(parts, static_cast<std::size_t>(threads)); };
  const bool in_pairs = 8 * rounds(tasks) >= 7 * 2 * rounds(ceil_divide(tasks, 2)) && kernel.gain_together(task_step(0));
  const std::size_t together = in_pairs ? 2 : 1;
  parallel_for(ceil_divide(tasks, together), threads, [&](std::size_t part, std::size_t) {
    if (ask && interrupt.check()) return;
    const std::size_t task = part * together;
    if (in_pairs && task + 1 < tasks) {
      const LinearStep<T> steps[2] = {task_step(task), task_step(task + 1)};
      kernel.linear_steps(steps, scratch.losses.data() + task);
    } else {
      scratch.losses[task] = kernel.linear_step(task_step(task));
    }
  });
  if (interrupt.requested()) return 0.0;
  if (tasks <= most_pieces) {
    T* const first = scratch.partials.data();
    kernel.column_sums(tasks - 1, n, first + n, n, first);
    std::copy_n(first, n, gradient);
  } else {
    sum_partials(tasks, n, scratch.partials.data(), false, gradient);
  }
  double loss = 0.0;
  for (double part : scratch.losses) loss += part;
  return loss;
}

// Rows [begin, end) of a batch, for many outputs: into[parameters] += their gradient; returns the sum of squared errors. `block_rows` at a
// time, so that the gradient of a block finds its rows in the cache; those that an index scatters are gathered into `memory` first. `next`
// is where this thread goes on.
template <class T>
double add_rows_gradient(const LinearShape& shape, const Batch<T>& batch, std::size_t begin, std::size_t end, std::size_t next,
                         std::size_t block_rows, const T* parameters, const PackedMatrix<T>* packed, T* into, T* memory) {
  const std::size_t in = shape.in_features, out = shape.out_features, weights = in * out;
  const KernelTable<T>& kernel = table<T>();
  T* const outputs = memory;
  T* const targets = outputs + block_rows * out;
  T* const gathered = targets + block_rows * out;
  double loss = 0.0;
  for (; begin < end; begin += block_rows) {
    const std::size_t rows = std::min(block_rows, end - begin);
    const T* x = batch.x + (batch.index ? 0 : begin * batch.x_stride);
    const T* target = batch.target + (batch.index ? 0 : begin * out);
    std::size_t x_stride = batch.x_stride;
    if (batch.index) {
      gather_rows(batch, begin, rows, begin + rows < end ? begin + rows : next, in, out, gathered, targets);
      x = gathered;
      x_stride = in;
      target = targets;
    }
    Product<T> p{rows, out, in, {x, x_stride, 1}, {parameters, 1, in}};
    p.packed = packed;
    p.bias = shape.has_bias ? parameters + weights : nullptr;
    p.c = outputs;
    p.c_stride = out;
    gemm(p);
    loss += kernel.squared_error_sum(rows * out, outputs, target);
    kernel.squared_error_gradient(rows * out, outputs, target, T(1), outputs, false);
    linear_weight_gradient<T>(rows, in, out, outputs, x, x_stride, true, into, nullptr);
    if (shape.has_bias) {  // by blocks: fewer additions stand in one chain
      std::fill_n(targets, out, T(0));
      kernel.column_sums(rows, out, outputs, out, targets);
      for (std::size_t o = 0; o < out; ++o) into[weights + o] += targets[o];
    }
  }
  return loss;
}

// Many outputs: tasks of rows with gradients of their own.
template <class T>
double many_outputs_gradient(const LinearShape& shape, const Batch<T>& batch, const T* parameters, T* gradient, LinearScratch<T>& scratch,
                             Interrupt& interrupt) {
  const std::size_t in = shape.in_features, out = shape.out_features, n = shape.parameters();
  // Rows of a block: with outputs and targets a fourth of L2, where others use L2 too; 256 at most, as 64 take up to 1.13 times as long and
  // more are no faster (50,000 x 100 -> 8), and 32 at least, a few tiles of rows for each panel of wide ones.
  const std::size_t fitting = l2_bytes() / 4 / ((in + 2 * out) * sizeof(T)) / 8 * 8;
  const std::size_t block_rows = std::min(batch.rows, std::clamp<std::size_t>(fitting, 32, 256));
  const std::size_t memory = block_rows * (2 * out + (batch.index ? in : 0));
  const std::size_t task_rows = rows_per_piece(batch.rows, in, out, sizeof(T));
  const std::size_t tasks = ceil_divide(batch.rows, task_rows);
  PackedMatrix<T> packed;  // laid out once for all blocks
  const bool pack = batch.rows > block_rows || tasks > 1;
  if (pack) packed = PackedMatrix<T>(in, out, {parameters, 1, in});
  const PackedMatrix<T>* const weights = pack ? &packed : nullptr;
  if (tasks == 1) {
    scratch.rows.resize(memory);
    std::fill_n(gradient, n, T(0));
    return add_rows_gradient(shape, batch, 0, batch.rows, batch.rows, block_rows, parameters, weights, gradient, scratch.rows.data());
  }
  const int threads = threads_for(cycles_of_batch(shape, batch));
  const bool one_each = static_cast<std::size_t>(threads) >= tasks;
  scratch.rows.resize(memory * static_cast<std::size_t>(threads));
  scratch.partials.assign(tasks * n, T(0));
  scratch.losses.assign(tasks, 0.0);
  parallel_for(tasks, threads, [&](std::size_t task, std::size_t worker) {
    if (interrupt.check()) return;
    const std::size_t begin = task * task_rows, end = std::min(batch.rows, begin + task_rows), next = one_each ? begin + batch.rows : end;
    scratch.losses[task] = add_rows_gradient(shape, batch, begin, end, next, block_rows, parameters, weights,
                                             scratch.partials.data() + task * n, scratch.rows.data() + worker * memory);
  });
  if (interrupt.requested()) return 0.0;
  sum_partials(tasks, n, scratch.partials.data(), false, gradient);
  double loss = 0.0;
  for (double part : scratch.losses) loss += part;
  return loss;
}

}  // namespace

bool has_one_pass(const LinearShape& shape) { return shape.out_features < few_outputs || shape.parameters() <= most_partial; }

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
  const Batch<T> all{x, x_stride, nullptr, nullptr, rows, 0, true, rows * in_features * sizeof(T) > l3_bytes(), gains_by_requests()};
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

#define GDLIB_INSTANTIATE(T)                                                                                                             \
  template double linear_squared_error_gradient(const LinearShape&, const Batch<T>&, const T*, T*, LinearScratch<T>&, Interrupt&);        \
  template double linear_hessian_eigenvalue(std::size_t, std::size_t, const T*, std::size_t, bool, Interrupt&);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
