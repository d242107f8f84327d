#include "linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "gemm.h"
#include "parallel.h"
#include "tasks.h"

namespace gdlib {
namespace {

// Whether rows are read from memory. Others use L3 too: those within a quarter of it are still there when they are read again.
template <class T>
bool come_from_memory(std::size_t rows, std::size_t in_features) {
  return rows * in_features * sizeof(T) > l3_bytes() / 4;
}

// c[rows, cols] (+)= a product of few columns, computed as the transposed one, of few rows: its vectors are full.
template <class T>
void gemm_of_few_columns(std::size_t rows, std::size_t cols, std::size_t depth, MatrixView<T> a, MatrixView<T> b, bool accumulate, T* c) {
  Product<T> p{cols, rows, depth, {b.data, b.col_stride, b.row_stride}, {a.data, a.col_stride, a.row_stride}};
  p.accumulate = accumulate;
  p.c_stride = rows;
  if (cols == 1) {  // the same memory either way
    p.c = c;
    return gemm(p);
  }
  AlignedVector<T> memory(rows * cols);
  p.c = memory.data();
  for (std::size_t r = 0; accumulate && r < rows; ++r)
    for (std::size_t k = 0; k < cols; ++k) p.c[k * rows + r] = c[r * cols + k];
  gemm(p);
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t k = 0; k < cols; ++k) c[r * cols + k] = p.c[k * rows + r];
}

// weight_gradient[out, in] = g[rows, out]^T x[rows, in], one chain over the rows for each element.
template <class T>
Product<T> weight_product(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, std::size_t g_stride, const T* x,
                          std::size_t x_stride, T* weight_gradient) {
  Product<T> p{out_features, in_features, rows, {g, 1, g_stride}, {x, x_stride, 1}};
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
    gemm(weight_product(std::min(most_chain, rows - begin), in_features, out_features, g + begin * out_features, out_features,
                        x + begin * x_stride, x_stride, into));
  };
  if (n <= most_partial / 4) {  // a part's blocks of A and B take the rest of L2
    AlignedVector<T> partials(parts * n);
    parallel_for(parts, threads_for(cycles_of(rows, in_features, out_features)),
                 [&](std::size_t i, std::size_t) { part(i, partials.data() + i * n); });
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

// total[cols] += column sums of g[rows, cols]: in T over some rows, the rest in double. Threads share the columns.
template <class T>
void add_column_sums(std::size_t rows, std::size_t cols, const T* g, std::size_t g_stride, T* total) {
  // Rows of a chain in T, so that the sums in double are few beside them; columns: whole lines.
  constexpr std::size_t block = 512, unit = 64;
  const double cycles = static_cast<double>(rows) * static_cast<double>(cols * sizeof(T)) / 16.0;  // from L3
  const int threads = threads_for(cycles);
  const std::size_t parts = std::min(ceil_divide(cols, unit), static_cast<std::size_t>(threads));
  parallel_for(parts, threads, [&](std::size_t part, std::size_t) {
    const std::size_t first = ceil_divide(cols, unit) * part / parts * unit;
    const std::size_t count = std::min(cols, ceil_divide(cols, unit) * (part + 1) / parts * unit) - first;
    if (rows <= block) return table<T>().column_sums(rows, count, g + first, g_stride, total + first);
    std::vector<double> sums(total + first, total + first + count);
    std::vector<T> of_block(count);
    for (std::size_t begin = 0; begin < rows; begin += block) {
      std::fill(of_block.begin(), of_block.end(), T(0));
      table<T>().column_sums(std::min(block, rows - begin), count, g + begin * g_stride + first, g_stride, of_block.data());
      for (std::size_t c = 0; c < count; ++c) sums[c] += static_cast<double>(of_block[c]);
    }
    for (std::size_t c = 0; c < count; ++c) total[first + c] = static_cast<T>(sums[c]);
  });
}

}  // namespace

template <class T>
bool linear_forward(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* x, std::size_t x_stride,
                    const T* weight, const T* bias, T* y, Activation activation, bool check, const PackedMatrix<T>* packed) {
  const KernelTable<T>& kernel = table<T>();
  std::atomic<bool> finite{true};  // relaxed: a flag alone, which the loop's end publishes
  const auto finish = [&](const Block<T>& block) {
    if (check) {
      const bool whole = block.cols == out_features;
      for (std::size_t r = 0; r < (whole ? 1 : block.rows); ++r)
        if (!kernel.all_finite(whole ? block.rows * block.cols : block.cols, block.data + r * out_features))
          finite.store(false, std::memory_order_relaxed);
    }
    kernel.activation_forward(activation, block.rows, block.cols, {block.data, out_features}, {block.data, out_features}, false);
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
    const bool from_memory = come_from_memory<T>(rows, in_features);
    parallel_for(ceil_divide(rows, task_rows), threads_for(cycles_of(rows, in_features, out_features)), [&](std::size_t task, std::size_t) {
      const std::size_t begin = task * task_rows, count = std::min(task_rows, rows - begin);
      kernel.linear_forward(count, in_features, out_features, x + begin * x_stride, x_stride, weight, bias, y + begin * out_features,
                            from_memory, gains_by_requests());
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
    kernel.activation_backward(activation, block.rows, block.cols, {input + at, in_features}, {block.data, in_features},
                               {block.data, in_features}, false);
  };
  if (in_features <= few_inputs && out_features >= few_outputs) {
    gemm_of_few_columns<T>(rows, in_features, out_features, {g, out_features, 1}, {weight, in_features, 1}, false, input_gradient);
    if (activation != Activation::none) chain(Block<T>{0, rows, 0, in_features, input_gradient, in_features});
    return;
  }
  if (out_features >= few_output_gradients || out_features == 0) {
    Product<T> p{rows, in_features, out_features, {g, out_features, 1}, {weight, in_features, 1}};
    p.c = input_gradient;
    p.c_stride = in_features;
    if (activation != Activation::none) p.finish = chain;
    return gemm(p);
  }
  const std::size_t task_rows = rows_per_task(in_features, out_features, sizeof(T));
  parallel_for(ceil_divide(rows, task_rows), threads_for(cycles_of(rows, in_features, out_features)), [&](std::size_t task, std::size_t) {
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
  if (out_features >= few_output_gradients) {
    if (bias_gradient) add_column_sums(rows, out_features, g, out_features, bias_gradient);
    if (rows <= most_chain && in_features <= few_inputs && out_features >= few_outputs)
      return gemm_of_few_columns<T>(out_features, in_features, rows, {g, 1, out_features}, {x, x_stride, 1}, accumulate, weight_gradient);
    if (rows <= most_chain) {
      Product<T> p = weight_product(rows, in_features, out_features, g, out_features, x, x_stride, weight_gradient);
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
    const bool by_requests = gains_by_requests() && come_from_memory<T>(rows, in_features);
    if (tasks <= 1) {
      kernel.linear_gradient(rows, in_features, out_features, g, x, x_stride, weight_gradient, bias_gradient, by_requests);
    } else {
      const std::size_t n = weights + out_features;
      AlignedVector<T> partials(tasks * n, T(0));
      parallel_for(tasks, threads_for(cycles_of(rows, in_features, out_features)), [&](std::size_t task, std::size_t) {
        const std::size_t begin = task * task_rows;
        T* const partial = partials.data() + task * n;
        kernel.linear_gradient(std::min(task_rows, rows - begin), in_features, out_features, g + begin * out_features,
                               x + begin * x_stride, x_stride, partial, bias_gradient ? partial + weights : nullptr,
                               by_requests);
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
OutputRange visit_weight_gradient(std::size_t rows, std::size_t in_features, std::size_t out_features, const T* g, const T* x,
                                  std::size_t x_stride, const T* weight, BlockVisitor<T> finish, T* weight_gradient, T* bias_gradient,
                                  std::size_t part, std::size_t parts) {
  if (out_features < few_outputs) {
    if (part + 1 < parts) return {0, 0};
    linear_weight_gradient(rows, in_features, out_features, g, x, x_stride, false, weight_gradient, bias_gradient);
    finish({0, out_features, 0, in_features, weight_gradient, in_features});
    return {0, out_features};
  }
  const std::size_t begin = out_features * part / parts, end = out_features * (part + 1) / parts;
  if (bias_gradient) {
    std::fill(bias_gradient + begin, bias_gradient + end, T(0));
    add_column_sums(rows, end - begin, g + begin, out_features, bias_gradient + begin);
  }
  const std::size_t skipped = begin * in_features;
  Product<T> p = weight_product(rows, in_features, end - begin, g + begin, out_features, x, x_stride, weight_gradient + skipped);
  const auto finish_here = [&](const Block<T>& block) {
    finish({begin + block.row, block.rows, block.col, block.cols, block.data, block.stride});
  };
  p.finish = finish_here;
  p.updated = weight + skipped;
  gemm(p);
  return {begin, end - begin};
}

#define GDLIB_INSTANTIATE(T)                                                                                                          \
  template bool linear_forward(std::size_t, std::size_t, std::size_t, const T*, std::size_t, const T*, const T*, T*, Activation, bool, \
                               const PackedMatrix<T>*);                                                                               \
  template void linear_input_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, T*, Activation, const T*);           \
  template void linear_weight_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, std::size_t, bool, T*, T*);         \
  template OutputRange visit_weight_gradient(std::size_t, std::size_t, std::size_t, const T*, const T*, std::size_t, const T*,        \
                                             BlockVisitor<T>, T*, T*, std::size_t, std::size_t);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
