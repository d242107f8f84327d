// How the rows of a linear layer are cut into tasks, whose sums meet in an order that the sizes alone settle.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "gemm.h"
#include "linear.h"
#include "parallel.h"

namespace gdlib {

// The longest chain of additions in T over the rows of a gradient: longer ones would lose small terms in a large sum, so that their sums
// meet in double. Rounding grows with the root of the length where errors are independent: 2^7 * 2^-24, 1e-5 of the sum.
constexpr std::size_t most_chain = 1 << 14;

// The pieces of a batch on few outputs, which are as many, meet in T.
constexpr std::size_t most_pieces = 8;

// Rows of one task: about 512 KiB, so that handing it out (under 1 us) does not count and its gradient stays in cache; at least 64, and
// where outputs are many 64 for each, so that the tasks' gradients together stay under 1/64 of x.
inline std::size_t rows_per_task(std::size_t in_features, std::size_t out_features, std::size_t element_bytes) {
  constexpr std::size_t task_bytes = 512 << 10;
  const std::size_t rows = task_bytes / std::max<std::size_t>(1, in_features * element_bytes);
  if (out_features < few_outputs) return std::max<std::size_t>(64, rows / 64 * 64);
  return std::min(most_chain, std::max<std::size_t>(64 * out_features, rows / 64 * 64));
}

// The same for a step of training, whose batch may be smaller than a task: up to 8 pieces, so that two, four or eight threads have as many
// each, of about 32 KiB and 64 rows at least. These take a core 0.7 us in its cache and 3 us where they are scattered over memory; one
// thread loses 2 % by them, and 5 % where it reads in order from memory. Long rows of few outputs make up pieces of up to 256 rows and 2
// MiB, if 32 pieces are left: a gradient is fetched to be written, written and read again, which for 64 rows takes a twentieth of the time
// to read them.
inline std::size_t rows_per_piece(std::size_t rows, std::size_t in_features, std::size_t out_features, std::size_t element_bytes) {
  constexpr std::size_t least_bytes = 32 << 10, least_rows = 64, group = 16, most_outputs = 16;
  constexpr std::size_t long_bytes = 2 << 20, long_rows = 256, least_long_pieces = 32;
  const std::size_t row_bytes = std::max<std::size_t>(1, in_features * element_bytes);
  std::size_t whole = rows_per_task(in_features, out_features, element_bytes);
  if (out_features > most_outputs) return whole;  // each element is used as often: its rows take longer to work on than to read
  const std::size_t long_piece = std::min({long_rows, long_bytes / row_bytes, rows / least_long_pieces}) / 64 * 64;
  if (out_features < few_outputs) whole = std::max(whole, long_piece);
  std::size_t pieces = 1;
  const std::size_t least = std::max(least_rows, least_bytes / row_bytes);
  while (pieces < most_pieces && rows / (2 * pieces) >= least) pieces *= 2;
  const std::size_t piece = ceil_divide(ceil_divide(rows, pieces), group) * group;  // whole groups: 16 floats of AVX-512
  return std::min(piece, whole);
}

// Gradients of at most so many elements are computed by each task for itself, and added: 256 KiB in float32 stay in L2 next to the rows.
constexpr std::size_t most_partial = 1 << 16;

// Roughly, of one thread: what is read from L2 or memory takes longer than 8 multiply-adds a cycle.
inline double cycles_of(std::size_t rows, std::size_t in_features, std::size_t out_features) {
  return static_cast<double>(rows) * static_cast<double>(in_features) * static_cast<double>(out_features) / 8.0;
}

// Work on so many elements takes some microseconds, ten times what handing it out costs.
constexpr std::size_t elements_of_stretch = 1 << 14;

// body(begin, size) for stretches of n elements that do not depend on each other, on all threads.
template <class Body>
void in_stretches(std::size_t n, const Body& body) {
  constexpr std::size_t stretch = elements_of_stretch;
  if (n <= stretch) return body(0, n);
  const auto cycles = static_cast<double>(n);  // one or two for each
  parallel_for(ceil_divide(n, stretch), threads_for(cycles),
               [&](std::size_t i, std::size_t) { body(i * stretch, std::min(stretch, n - i * stretch)); });
}

// The sum of body(begin, size) over the same stretches, added in their order.
template <class Body>
double sum_of_stretches(std::size_t n, const Body& body) {
  constexpr std::size_t stretch = elements_of_stretch;
  if (n <= stretch) return body(0, n);
  std::vector<double> sums(ceil_divide(n, stretch));
  in_stretches(n, [&](std::size_t begin, std::size_t size) { sums[begin / stretch] = body(begin, size); });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// total[n] (+)= the partial vectors in order, carried in double. They are read as they lie, a stretch of each at a time.
template <class T>
void sum_partials(std::size_t count, std::size_t n, const T* partials, bool accumulate, T* total) {
  constexpr std::size_t stretch = 256;  // 2 KiB of sums in L1, and 1 KiB of a partial: lines in order for the prefetchers
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
