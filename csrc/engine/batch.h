// The rows of one step of training, and how they are brought together where an index scatters them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace gdlib {

// Row r is at x + (index ? index[r] : r) * x_stride; targets likewise, dense (for the kernel of few outputs, null: zeros).
template <class T>
struct Batch {
  const T* x;
  std::size_t x_stride;
  const T* target;
  const std::uint32_t* index;
  std::size_t rows;
  std::size_t rows_ahead;  // further rows behind these
  bool prefetch;             // the data set is larger than a core's caches
  bool from_memory;          // and than the one that cores share
  bool by_requests = false;  // in order too, and by whole lines where vectors are lines: gains_by_requests()

  bool scattered() const { return index && prefetch; }  // over memory
};

// Cycles of a thread, roughly, to read rows that are scattered over memory: 2 bytes in each (in order 6).
inline double cycles_of_scattered(std::size_t rows, std::size_t row_bytes) {
  return static_cast<double>(rows) * static_cast<double>(row_bytes) / 2.0;
}

// What gather_rows does on one thread.
template <class T>
void gather_part(const Batch<T>& batch, std::size_t begin, std::size_t rows, std::size_t next, std::size_t in_features,
                 std::size_t out_features, T* x, T* target) {
  constexpr std::size_t ahead_bytes = 64 << 10;  // some microseconds before; a small part of L2
  const std::size_t ahead = std::min(rows, 1 + ahead_bytes / std::max<std::size_t>(1, in_features * sizeof(T)));
  const std::size_t known = batch.prefetch ? batch.rows + batch.rows_ahead : 0;
  const auto ask_for = [](const T* row, std::size_t size) {
    for (std::size_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 2);
    if (size > 0) __builtin_prefetch(row + size - 1, 0, 2);
  };
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t later = r + ahead < rows ? begin + r + ahead : next + (r + ahead - rows);
    if (later < known) {
      ask_for(batch.x + batch.index[later] * batch.x_stride, in_features);
      ask_for(batch.target + batch.index[later] * out_features, out_features);
    }
    const std::size_t row = batch.index[begin + r];
    std::copy_n(batch.x + row * batch.x_stride, in_features, x + r * in_features);
    std::copy_n(batch.target + row * out_features, out_features, target + r * out_features);
  }
}

// x[rows, in_features], target[rows, out_features] = the rows from `begin` on of a batch that has an index. Asks for those that
// are likely to be gathered after them, from number `next` on, so that many of their lines are on their way at once.
template <class T>
void gather_rows(const Batch<T>& batch, std::size_t begin, std::size_t rows, std::size_t next, std::size_t in_features,
                 std::size_t out_features, T* x, T* target) {
  const int threads = threads_for(cycles_of_scattered(rows, in_features * sizeof(T)));
  const auto parts = static_cast<std::size_t>(threads);
  parallel_for(parts, threads, [&](std::size_t i, std::size_t) {
    const std::size_t first = rows * i / parts, end = rows * (i + 1) / parts;
    gather_part(batch, begin + first, end - first, next + first, in_features, out_features, x + first * in_features,
                target + first * out_features);
  });
}

}  // namespace gdlib
