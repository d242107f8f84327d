#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "../dispatch/dispatch.h"
#include "aligned.h"
#include "parallel.h"

namespace gdlib {
namespace {

// A panel of b (depth_block x tile_cols) stays in L1 (32 KiB and more) while the tiles of a block of a run over it.
constexpr std::size_t depth_block = 256;
// A packed block of a (rows_block x depth_block) stays in L2: 96 KiB in float32.
constexpr std::size_t rows_block = 96;
// Columns of one task: enough tiles to pay for packing a again, few enough to share out.
constexpr std::size_t cols_block = 768;

std::size_t blocks(std::size_t size, std::size_t block) { return (size + block - 1) / block; }

// panel[depth][width] <- the elements (d, k) of a source with the given strides, k < present; missing ones are zero.
template <class T>
void pack_panel(std::size_t depth, std::size_t width, std::size_t present, const T* source, std::size_t depth_stride,
                std::size_t width_stride, T* panel) {
  if (present < width) std::fill_n(panel, depth * width, T(0));
  if (width_stride == 1) {
    for (std::size_t d = 0; d < depth; ++d) std::memcpy(panel + d * width, source + d * depth_stride, present * sizeof(T));
  } else {
    // A transposition, in strips of a cache line of the source: the part of the panel that a strip fills stays in L1.
    constexpr std::size_t strip = 64 / sizeof(T);
    for (std::size_t begin = 0; begin < depth; begin += strip) {
      const std::size_t end = std::min(depth, begin + strip);
      for (std::size_t k = 0; k < present; ++k)
        for (std::size_t d = begin; d < end; ++d) panel[d * width + k] = source[d * depth_stride + k * width_stride];
    }
  }
}

}  // namespace

template <class T>
void gemm(std::size_t rows, std::size_t cols, std::size_t depth, MatrixView<T> a, MatrixView<T> b, const T* bias, bool accumulate, T* c,
          std::size_t c_stride) {
  if (rows == 0 || cols == 0) return;
  const KernelTable<T>& kernel = table<T>();
  const std::size_t tile_rows = kernel.tile_rows, tile_cols = kernel.tile_cols;
  const std::size_t col_panels = blocks(cols, tile_cols);
  const std::size_t depth_first = std::min(depth, depth_block);

  // Kept between calls: a step of training asks for the same sizes again. One block of a per thread; a tile's height may overhang it.
  static thread_local AlignedVector<T> packed_a, packed_b;
  const std::size_t a_block = (std::min(rows, rows_block) + tile_rows) * depth_first;
  const std::size_t panels_per_task = std::max<std::size_t>(1, cols_block / tile_cols);
  const std::size_t col_tasks = blocks(col_panels, panels_per_task);
  const std::size_t row_tasks = blocks(rows, rows_block);
  const std::size_t tasks = row_tasks * col_tasks;
  // Waking threads costs about 5 us: half a million multiply-adds.
  const bool serial = rows * cols * depth_first < (1u << 19);
  const int threads = serial ? 1 : static_cast<int>(std::min<std::size_t>(tasks, static_cast<std::size_t>(thread_count())));
  packed_a.resize(a_block * static_cast<std::size_t>(threads));
  packed_b.resize(col_panels * tile_cols * depth_first);
  T* const a_blocks = packed_a.data();
  T* const b_panels = packed_b.data();

  std::size_t d = 0;
  do {  // once even when depth is 0: c still gets its bias
    const std::size_t depth_now = std::min(depth_block, depth - d);
    const bool first = d == 0, last = d + depth_now >= depth;
    // Few columns are not worth waking threads for: 64 Ki elements take about 20 us to pack.
    const auto pack_b = [&](std::size_t panel, std::size_t) {
      const std::size_t col = panel * tile_cols;
      pack_panel(depth_now, tile_cols, std::min(tile_cols, cols - col), b.at(d, col), b.row_stride, b.col_stride,
                 b_panels + col * depth_now);
    };
    if (col_panels * tile_cols * depth_now < (1u << 16))
      for (std::size_t panel = 0; panel < col_panels; ++panel) pack_b(panel, 0);
    else
      parallel_for(col_panels, pack_b);

    const auto block = [&](std::size_t task, std::size_t worker) {
      T* const a_panels = a_blocks + worker * a_block;
      const std::size_t row_begin = task / col_tasks * rows_block;
      const std::size_t row_end = std::min(rows, row_begin + rows_block);
      const std::size_t row_tiles = blocks(row_end - row_begin, tile_rows);
      for (std::size_t t = 0; t < row_tiles; ++t) {
        const std::size_t row = row_begin + t * tile_rows;
        pack_panel(depth_now, tile_rows, std::min(tile_rows, row_end - row), a.at(row, d), a.col_stride, a.row_stride,
                   a_panels + t * tile_rows * depth_now);
      }
      const std::size_t panel_begin = task % col_tasks * panels_per_task;
      const std::size_t panel_end = std::min(col_panels, panel_begin + panels_per_task);
      for (std::size_t panel = panel_begin; panel < panel_end; ++panel)
        for (std::size_t t = 0; t < row_tiles; ++t) {
          const std::size_t row = row_begin + t * tile_rows, col = panel * tile_cols;
          const std::size_t height = std::min(tile_rows, row_end - row), width = std::min(tile_cols, cols - col);
          const T* const a_panel = a_panels + t * tile_rows * depth_now;
          const T* const b_panel = b_panels + col * depth_now;
          T* const out = c + row * c_stride + col;
          const bool add = accumulate || !first;
          const T* const bias_now = last && bias ? bias + col : nullptr;
          if (height == tile_rows && width == tile_cols) {
            kernel.gemm_tile(depth_now, a_panel, b_panel, bias_now, add, out, c_stride);
            continue;
          }
          // An edge: a whole tile into scratch, and the part that exists from there. The same operations in the same order.
          alignas(64) T edge[largest_tile];
          alignas(64) T edge_bias[largest_tile];
          if (add) std::fill_n(edge, tile_rows * tile_cols, T(0));
          if (bias_now) std::fill_n(edge_bias, tile_cols, T(0));
          for (std::size_t r = 0; r < height && add; ++r) std::memcpy(edge + r * tile_cols, out + r * c_stride, width * sizeof(T));
          if (bias_now) std::memcpy(edge_bias, bias_now, width * sizeof(T));
          kernel.gemm_tile(depth_now, a_panel, b_panel, bias_now ? edge_bias : nullptr, add, edge, tile_cols);
          for (std::size_t r = 0; r < height; ++r) std::memcpy(out + r * c_stride, edge + r * tile_cols, width * sizeof(T));
        }
    };
    parallel_for(tasks, block, threads);
    d += depth_now;
  } while (d < depth);
}

template void gemm(std::size_t, std::size_t, std::size_t, MatrixView<float>, MatrixView<float>, const float*, bool, float*, std::size_t);
template void gemm(std::size_t, std::size_t, std::size_t, MatrixView<double>, MatrixView<double>, const double*, bool, double*,
                   std::size_t);

}  // namespace gdlib
