#include "gemm_rows.h"

#include <algorithm>
#include <numeric>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "parallel.h"

namespace gdlib {
namespace {

// Rows of C are read and written in order, and their vectors wait for no tile's begin and end, which is what tiles of panels cost most
// where there are few steps (1.1 to 1.8 times the time of up to 16, 1.0 to 1.2 of up to 64; AVX2). So many rows visit B three times,
// however deep it is, which neither copies of it pay for, nor a C that is visited every 16 steps (up to 8 rows: 1.2 to 2.3 times the time).
constexpr std::size_t few_rows = 12;
// The same of a B whose rows fall on one set of L1 (12: 0.7 to 1.2 times).
constexpr std::size_t few_rows_on_a_set = 8;
// Steps whose lines are in L1 together wherever they lie: as many as a set holds.
constexpr std::size_t few_steps = l1_ways;
// Steps of a block of depth: beyond, tiles of panels are as fast, and the lines of a column of B or A, one for each step, crowd out rows.
constexpr std::size_t most_steps = 64;
// The same of a B that comes from beyond L2: prefetchers follow about as many sequences.
constexpr std::size_t most_streams = 16;
// Of the rows of C that are visited together, and of one of them.
constexpr std::size_t visit_bytes = l1_bytes / 2;

template <class T>
std::size_t most_rows(const Product<T>& p) {
  return p.b.row_stride * sizeof(T) % l1_way_bytes == 0 ? few_rows_on_a_set : few_rows;
}

// Bytes of a small B, which up to most_steps steps read for each four rows of C: from L2, next to C, or where that is too slow from L1 (16
// to 64 rows through 784 -> 512 and 1000 -> 1000 by tiles there: gradients of the weights 1.2 to 1.35 times as fast).
template <class T>
std::size_t small_bytes() {
  constexpr std::size_t line_bytes = 64;
  return table<T>().lanes * sizeof(T) == line_bytes && outruns_l2() ? l1_bytes : l2_bytes() / 4;
}

}  // namespace

template <class T>
bool goes_by_rows(const Product<T>& p) {
  if (p.packed || p.b.col_stride != 1) return false;
  if (p.depth <= few_steps) return true;
  if (p.a.col_stride != 1 && p.a.col_stride * sizeof(T) >= l1_way_bytes) return false;
  return p.rows <= most_rows(p) || (p.depth <= most_steps && p.depth * p.cols * sizeof(T) <= small_bytes<T>());
}

template <class T>
void gemm_by_rows(const Product<T>& p) {
  const KernelTable<T>& kernel = table<T>();
  const std::size_t fours = ceil_divide(p.rows, 4), vectors = ceil_divide(p.cols, kernel.lanes);
  const auto visits = static_cast<double>(p.rows) * static_cast<double>(vectors), steps = static_cast<double>(p.depth);
  const auto read = static_cast<double>(p.rows + p.cols);
  const int threads = threads_for(steps * (visits / 2 + cycles_to_read * read));
  // By columns, no two parts read the same of B, which is most of the work of few rows and many steps.
  const bool by_rows = p.depth <= few_steps ? fours >= static_cast<std::size_t>(threads) : p.rows > most_rows(p);
  const std::size_t parts = std::min(static_cast<std::size_t>(threads), by_rows ? fours : vectors);
  // A B within half of L2 stays there next to rows of A and C, and needs no prefetcher.
  const std::size_t in_l2 = p.depth * p.cols * sizeof(T) <= l2_bytes() / 2 ? most_steps : most_streams;
  // Steps whose lines are in L1 together, 32 where rows are 1 KiB apart: up to 1.4 times as fast as by 64 (256 features). With rows 4 KiB
  // apart, 8 of a small B are as fast as 64 (0.97 to 1.01 times; AVX2).
  const std::size_t in_l1 = few_steps * (l1_way_bytes / std::gcd(p.b.row_stride * sizeof(T), l1_way_bytes));
  const std::size_t depth = std::min(in_l1, in_l2);

  // Blocks of C in a cache: of few rows some columns, else some rows, so that whole ones are written in order.
  const std::size_t visit_elements = visit_bytes / sizeof(T);
  const std::size_t some_cols = std::max<std::size_t>(1, visit_elements / p.rows / kernel.lanes) * kernel.lanes;
  const std::size_t visit_cols = std::min(p.cols, by_rows ? visit_elements : some_cols);
  const std::size_t visit_rows = std::min(p.rows, by_rows ? std::max<std::size_t>(4, visit_elements / visit_cols / 4 * 4) : p.rows);

  const auto visit = [&](std::size_t row, std::size_t rows, std::size_t col, std::size_t cols, T* kept) {
    GemmTile<T> t{};
    t.a_row_stride = p.a.row_stride;
    t.a_depth_stride = p.a.col_stride;
    t.b_stride = p.b.row_stride;
    t.c = p.updated ? kept : p.c + row * p.c_stride + col;
    t.c_stride = p.updated ? cols : p.c_stride;
    t.columns = cols;
    std::size_t d = 0;
    do {  // once even when depth is 0: c still gets its start
      const bool from_c = d > 0 || p.accumulate;
      t.start = from_c ? t.c : p.bias ? p.bias + col : nullptr;
      t.start_stride = from_c ? t.c_stride : 0;
      t.a = p.a.at(row, d);
      t.b = p.b.at(d, col);
      t.depth = std::min(depth, p.depth - d);
      kernel.gemm_rows(rows, t);
      d += t.depth;
    } while (d < p.depth);
    if (p.finish) p.finish({row, rows, col, cols, t.c, t.c_stride});
  };
  parallel_for(parts, threads, [&](std::size_t part, std::size_t) {
    T* const kept = p.updated ? own_scratch<T>(visit_rows * visit_cols) : nullptr;
    const auto cut = [&](std::size_t i) { return (by_rows ? fours : vectors) * i / parts * (by_rows ? 4 : kernel.lanes); };
    const std::size_t begin = cut(part), last_row = by_rows ? std::min(p.rows, cut(part + 1)) : p.rows;
    const std::size_t last_col = by_rows ? p.cols : std::min(p.cols, cut(part + 1));
    for (std::size_t row = by_rows ? begin : 0; row < last_row; row += visit_rows)
      for (std::size_t col = by_rows ? 0 : begin; col < last_col; col += visit_cols)
        visit(row, std::min(visit_rows, last_row - row), col, std::min(visit_cols, last_col - col), kept);
  });
}

#define GDLIB_INSTANTIATE(T)                     \
  template bool goes_by_rows(const Product<T>&); \
  template void gemm_by_rows(const Product<T>&);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
