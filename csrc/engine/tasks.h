// How the rows of a linear layer are cut into tasks, whose sums meet in an order that the sizes alone settle.
#pragma once

#include <algorithm>
#include <cstddef>

#include "gemm.h"
#include "linear.h"
#include "parallel.h"

namespace gdlib {

// The longest chain of additions in T over the rows of a gradient: more would lose small terms in a large sum, so that the sums of
// shorter chains meet in double.
constexpr std::size_t most_chain = 1 << 14;

// Rows of one task: about 512 KiB, so that handing it out (under 1 us) does not count and its gradient stays in cache; at least 64 for
// each output, so that the tasks' gradients together stay under 1/64 of x.
inline std::size_t rows_per_task(std::size_t in_features, std::size_t out_features, std::size_t element_bytes) {
  constexpr std::size_t task_bytes = 512 << 10;
  const std::size_t rows = task_bytes / std::max<std::size_t>(1, in_features * element_bytes);
  if (out_features < few_outputs) return std::max<std::size_t>(64, rows / 64 * 64);
  return std::min(most_chain, std::max<std::size_t>(64 * out_features, rows / 64 * 64));
}

// Gradients of at most so many elements are computed by each task for itself, and added: 256 KiB in float32 stay in L2 next to the rows.
constexpr std::size_t most_partial = 1 << 16;

// Roughly, of one thread: what is read from L2 or memory takes longer than 8 multiply-adds a cycle.
inline double cycles_of(std::size_t rows, std::size_t in_features, std::size_t out_features) {
  return static_cast<double>(rows) * static_cast<double>(in_features) * static_cast<double>(out_features) / 8.0;
}

// total[n] (+)= the partial vectors in order, carried in double. They are read as they lie, a stretch of each at a time.
template <class T>
void sum_partials(std::size_t count, std::size_t n, const T* partials, bool accumulate, T* total) {
  constexpr std::size_t stretch = 256;
  const auto cycles = static_cast<double>(count * n);
  parallel_for(ceil_divide(n, stretch), threads_for(cycles), [&](std::size_t part, std::size_t) {
    const std::size_t begin = part * stretch, size = std::min(stretch, n - begin);
    double sum[stretch] = {};
    if (accumulate) std::copy_n(total + begin, size, sum);
    for (std::size_t k = 0; k < count; ++k)
      for (std::size_t i = 0; i < size; ++i) sum[i] += static_cast<double>(partials[k * n + begin + i]);
    for (std::size_t i = 0; i < size; ++i) total[begin + i] = static_cast<T>(sum[i]);
  });
}

}  // namespace gdlib
