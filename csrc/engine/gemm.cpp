#include "gemm.h"

#include <algorithm>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "gemm_rows.h"
#include "parallel.h"

namespace gdlib {
namespace {

// Most bytes of one row of A in a block of depth. A tile then does 512 or 256 (float64) times as many multiply-adds as loads or stores of
// C, and its 8 rows of A fill no more than a 32 KiB L1 cache. Measured on 2,048^3: 1 KiB reaches 88 %, 2 KiB 91 %, 4 KiB 94 % of the peak.
constexpr std::size_t depth_bytes = 4096;
// B read where it lies, for few rows: so many of its rows are read side by side. Prefetchers follow about as many streams.
constexpr std::size_t depth_unpacked = 16;
// Strips of A that are laid out together, where they have to be: 32 or 64 neighbours of a row of memory are read at once.
constexpr std::size_t tiles_of_group = 8;
// Panels that must share them for that to pay: one reads each strip once, as a copy of it would.
constexpr std::size_t panels_to_pack_a = 2;
// A step of a tile that has fewer multiply-adds of vectors, as with AVX2 and scalar kernels (12, in 6 cycles of a Zen 3), waits for data
// where a longer one (AVX-512: 24, in 24 cycles of a Zen 4) hides that. Only for short ones the choices below were measured.
constexpr std::size_t short_step = 24;
// Strips of A that are read where they lie take turns at each panel of B: so many bytes of elements, half of the smallest L1. Rows of 64
// floats are 3 to 5 % faster so than one strip after the other. With short steps as many as are copied together, which is 2 to 6 % faster:
// they are read from L2 as the panel is, which only the first of them may find farther away.
constexpr std::size_t turn_bytes = l1_bytes / 2;
// A block of B that groups of strips read from the cache which cores share. Next to strips that are copied, which are copied again for each
// block, a weight gradient of 2,048^3 reaches 230 GFLOP/s by 3 MiB and 238 by 6 on a core of Zen 5 (Zen 4: as fast by 4 and 8). With short
// steps half of that, and a fourth for so many strips that lie (1,024 rows of AVX2: as fast as a block in L2 to 12 % faster; for half of
// them 1 to 2 % slower).
constexpr std::size_t shared_bytes = 6 << 20, strips_to_share_b = 256;
// Steps of depth that are copied for all panels or strips before the next ones: so many pages of memory are in use at a time, and so many
// lines, which fall on one set of the caches where steps are a power of two apart.
constexpr std::size_t depth_copied = 8;
// B is copied where no transposition is needed for at least so many tiles of rows: copies cost 12 % of 32 rows, 3 % of 128. One
// within a fourth of L2 is read where it lies for up to 64: a copy would take up to 5 % longer, beyond either is as fast. With short steps,
// if its rows do not begin with lines, so that vectors lie in two, it is for up to 8: with copies gradients of 180 random layers are 1.03
// times as fast, up to 1.25 times (Zen 4). One whose rows fall on one set of L1 is for 2, as a small one whose rows fall on two (9 to 64
// rows 1.05 times as fast in the mean, 0.9 to 1.33 times, 128 as fast), but for one beyond an eighth of L3 (0.7 to 1.0 times; Zen 5).
constexpr std::size_t tiles_to_pack_b = 3, tiles_to_pack_split_b = 9, tiles_to_pack_small_b = 65, tiles_to_pack_b_on_sets = 2;
// Cycles for each element packed, a transposition (from L2), next to 2 multiply-adds of a vector in a cycle; and into a block beyond L2.
constexpr double cycles_to_pack = 0.25, cycles_to_pack_shared = 0.5;
// From tasks of so many cycles on, about 2 ms, each is cut in two, so that a core which is shared with others takes fewer of them. More
// pieces cost: at 2,048^3 on a Zen 5, 4 for each thread reach 460 GFLOP/s, 2 reach 500 and 1 reaches 510.
constexpr double cycles_of_task = 8'000'000;

// Panels whose blocks of C stand together where C is not kept, so that its visitor reads them from L2 in rows of several lines: with
// AVX-512 of 768 bytes, 48 KiB in all.
constexpr std::size_t panels_to_finish = 4;

constexpr std::size_t most_panels = 64;  // of a block: their descriptions lie on the stack

// Part i of `size`, cut into `parts` as equal as they can be.
std::size_t cut(std::size_t size, std::size_t parts, std::size_t i) { return size * i / parts; }

// Columns of B are cut into panels of one to tile_vectors vectors of nearly equal widths, in an even number that threads can share.
struct Panels {
  std::size_t cols, lanes, vectors, count;

  Panels(std::size_t columns, std::size_t vector_lanes, std::size_t most_vectors)
      : cols(columns), lanes(vector_lanes), vectors(ceil_divide(columns, vector_lanes)), count(ceil_divide(vectors, most_vectors)) {
    const std::size_t multiple = count > 8 ? 4 : count > 1 ? 2 : 1;
    count = std::min(vectors, ceil_divide(count, multiple) * multiple);
  }
  std::size_t begin(std::size_t panel) const { return cut(vectors, count, panel) * lanes; }
  std::size_t width(std::size_t panel) const { return begin(panel + 1) - begin(panel); }  // whole vectors
  std::size_t present(std::size_t panel) const { return std::min(cols, begin(panel + 1)) - begin(panel); }
};

// What a worker has in its cache at a time.
struct Blocking {
  std::size_t depth;       // steps of a block of depth
  std::size_t panels;      // of a block of columns
  std::size_t group_size;   // elements of scratch for strips of A
  std::size_t block_size;   // and for panels of B
  std::size_t result_size;  // and for blocks of C that is not kept
};

struct Tasks {
  std::size_t rows, cols;
};

template <class T>
class Multiplication {
 public:
  Multiplication(const Product<T>& product)
      : p_(product),
        kernel_(table<T>()),
        panels_(product.cols, kernel_.lanes, few_rows() ? 1 : kernel_.tile_vectors),  // few rows are shared by single vectors
        row_tiles_(ceil_divide(product.rows, kernel_.tile_rows)),
        small_b_(product.depth * product.cols * sizeof(T) <= l2_bytes() / 4),
        short_steps_(kernel_.tile_rows * kernel_.tile_vectors < short_step),
        unpacked_(!product.packed && product.b.col_stride == 1 && row_tiles_ < tiles_to_pack()) {
    const std::size_t panel_width = kernel_.tile_vectors * kernel_.lanes;
    // Panels stay in three fourths of L2, two of them at least in half; the rest is left to A and C, which only pass through. Where A stays
    // too, to be read again, one fourth, which may be a single panel: 13 to 50 rows 1.00 to 1.1 times as fast, more 0.99 to 1.03 (Zen 5).
    // At least 64 steps: however small L2 is, a tile's begin and end, a load and a store of C, are to be little beside them.
    const std::size_t l2_depth = l2_bytes() / 4 / (panel_width * sizeof(T));
    const std::size_t most_depth = unpacked_ && !small_b_ ? depth_unpacked : std::clamp<std::size_t>(l2_depth, 64, depth_bytes / sizeof(T));
    blocking_.depth = std::max<std::size_t>(1, ceil_divide(p_.depth, std::max<std::size_t>(1, ceil_divide(p_.depth, most_depth))));
    const bool a_stays = p_.a.col_stride == 1 && p_.rows * p_.depth * sizeof(T) <= l2_bytes() / 2;
    const std::size_t panel_bytes = blocking_.depth * panel_width * sizeof(T), block_in_l2 = l2_bytes() / 4 * (a_stays ? 1 : 3);
    const auto set_block = [&](std::size_t bytes) {
      blocking_.panels = std::clamp<std::size_t>(bytes / panel_bytes, 1, std::min(most_panels, panels_.count));
    };
    const auto set_shared_block = [&](std::size_t bytes) {
      set_block(std::max(block_in_l2, std::min(bytes, l3_bytes() / static_cast<std::size_t>(thread_count()))));
    };
    set_block(block_in_l2);
    pack_a_ = must_pack();
    if (pack_a_) set_shared_block(short_steps_ ? shared_bytes / 2 : shared_bytes);
    share();
    if (!pack_a_ && short_steps_ && row_tiles_ / tasks_.rows >= strips_to_share_b) set_shared_block(shared_bytes / 4);
    blocking_.group_size = pack_a_ ? tiles_of_group * kernel_.tile_rows * blocking_.depth : 0;
    blocking_.block_size = product.packed ? 0 : blocking_.panels * panel_width * blocking_.depth;
    const bool kept = !product.updated || blocking_.depth < p_.depth;
    blocking_.result_size = kept ? 0 : tiles_of_group * kernel_.tile_rows * panels_to_finish * panel_width;
    fetch_ = product.rows * product.cols * sizeof(T) > l2_bytes() / 2;  // a smaller C is found in L2 next to the panels
  }

  void run() {
    const std::size_t count = tasks_.rows * tasks_.cols;
    parallel_for(count, threads_, [&](std::size_t task, std::size_t) { run_task(task / tasks_.cols, task % tasks_.cols); });
  }

 private:
  static constexpr std::size_t line = 64 / sizeof(T);  // elements of a line of a cache

  // Whether A is better copied than read where it lies. Columns of a matrix are if each step is on another page, or if its rows are so far
  // apart that they fall on few sets of a cache (up to 14 % faster so, and up to 10 % slower for others), with short steps also if several
  // blocks of B read them from beyond L2 (1.05 to 1.8 times as fast). Rows are not, even if all of a tile's fall on one set: copying them
  // took 5 to 13 % longer on an L1 of 8 ways.
  bool must_pack() const {
    if (p_.a.col_stride == 1) return false;
    if (short_steps_ && blocking_.panels < panels_.count && p_.rows * p_.depth * sizeof(T) > l2_bytes()) return true;
    const std::size_t step = p_.a.col_stride * sizeof(T);
    return step >= l1_way_bytes || step % (l1_way_bytes / 4) == 0;
  }

  // How many parts of rows and of columns take the least time: each part packs what it needs, and the largest one ends last.
  void share() {
    const double lanes = static_cast<double>(kernel_.lanes), tile_rows = static_cast<double>(kernel_.tile_rows);
    const double depth = static_cast<double>(p_.depth);
    const auto cycles = [&](std::size_t row_parts, std::size_t col_parts) {
      const double rows = tile_rows * static_cast<double>(ceil_divide(row_tiles_, row_parts));
      const double vectors = static_cast<double>(ceil_divide(panels_.vectors, col_parts));
      const double blocks = static_cast<double>(ceil_divide(ceil_divide(panels_.count, col_parts), blocking_.panels));
      const double packed_b = p_.packed || unpacked_ ? 0.0 : vectors * lanes;
      const double packed_a = pack_a_ ? rows * blocks : 0.0;
      const double packing = cycles_to_pack * packed_a + (pack_a_ ? cycles_to_pack_shared : cycles_to_pack) * packed_b;
      return depth * (rows * vectors / 2 + packing + cycles_to_read * (rows + vectors * lanes));
    };
    const double whole = cycles(1, 1);
    tasks_ = {1, 1};
    threads_ = threads_for(whole);
    if (threads_ == 1) return;
    const auto threads = static_cast<std::size_t>(threads_);
    const std::size_t pieces = whole / static_cast<double>(threads) < cycles_of_task ? threads : 2 * threads;
    // The columns of a layer's product are its outputs, as the rows of its weight gradient are: cut alike, the weights of an output are
    // updated by the thread that reads them in the next forward product, and stay in its cache. Where they do not fit, what is packed
    // decides: gradients of 0.5 to 17 million weights are 1.00 to 1.08 times as fast so (up to 1.18 in float64). A cut into columns is
    // preferred where it takes 3 % less by this count, which leaves out where weights come from.
    const bool stays = p_.rows * p_.cols * sizeof(T) <= threads * l2_bytes();
    const double cut_in_rows = p_.a.col_stride == 1 || !stays ? 1.0 : 0.97;
    double least = whole;
    for (std::size_t row_parts = 1; row_parts <= std::min(pieces, row_tiles_); ++row_parts) {
      const std::size_t col_parts = std::min(ceil_divide(pieces, row_parts), panels_.count);
      const double rounds = static_cast<double>(ceil_divide(row_parts * col_parts, threads));
      const double time = rounds * cycles(row_parts, col_parts) * (col_parts == 1 ? cut_in_rows : 1.0);
      if (time < least) {
        least = time;
        tasks_ = {row_parts, col_parts};
      }
    }
  }

  // Tiles of rows from which on B is copied.
  std::size_t tiles_to_pack() const {
    const std::size_t apart = p_.b.row_stride * sizeof(T), bytes = p_.depth * p_.cols * sizeof(T);
    if (small_b_ ? apart % (l1_way_bytes / 2) == 0 : apart % l1_way_bytes == 0 && bytes <= l3_bytes() / 8) return tiles_to_pack_b_on_sets;
    if (!small_b_) return tiles_to_pack_b;
    return short_steps_ && p_.b.row_stride % line != 0 ? tiles_to_pack_split_b : tiles_to_pack_small_b;
  }

  std::size_t row_begin(std::size_t tile) const { return cut(p_.rows, row_tiles_, tile); }

  // Few rows, to which each element of B is of little use: it is not copied first.
  bool few_rows() const {
    const bool transposed = p_.b.row_stride == 1 && p_.b.col_stride != 1;
    return p_.rows <= kernel_.transposed_rows && transposed && !p_.packed && !p_.updated;
  }

  void run_few_rows(std::size_t col, std::size_t end) const {
    GemmTile<T> t{};
    t.depth = p_.depth;
    t.a = p_.a.data;
    t.a_row_stride = p_.a.row_stride;
    t.a_depth_stride = p_.a.col_stride;
    t.b = p_.b.at(0, col);
    t.b_stride = p_.b.col_stride;
    // Not less than L3: a Zen 5 gains 1.1 to 1.5 by what it still finds there, and loses 0.7 to 0.9 by what it does not.
    t.b_in_cache = p_.depth * p_.cols * sizeof(T) <= l3_bytes();
    t.c = p_.c + col;
    t.c_stride = p_.c_stride;
    t.start = p_.accumulate ? t.c : p_.bias ? p_.bias + col : nullptr;
    t.start_stride = p_.accumulate ? p_.c_stride : 0;
    t.columns = end - col;
    kernel_.gemm_transposed[p_.rows - 1](t);
    if (p_.finish) p_.finish({0, p_.rows, col, t.columns, t.c, p_.c_stride});
  }

  // Tiles of rows that take turns, where A is read where it lies.
  std::size_t tiles_in_turn(std::size_t depth) const {
    if (short_steps_) return tiles_of_group;
    return std::clamp<std::size_t>(turn_bytes / (kernel_.tile_rows * std::max<std::size_t>(1, depth) * sizeof(T)), 1, tiles_of_group);
  }

  void run_task(std::size_t row_part, std::size_t col_part) const {
    if (few_rows())
      return run_few_rows(panels_.begin(cut(panels_.count, tasks_.cols, col_part)),
                          std::min(p_.cols, panels_.begin(cut(panels_.count, tasks_.cols, col_part + 1))));
    // For each thread and type at most shared_bytes or three fourths of L2, and strips and results under 1 MiB.
    T* const scratch = own_scratch<T>(blocking_.group_size + blocking_.block_size + blocking_.result_size);
    const std::size_t first_tile = cut(row_tiles_, tasks_.rows, row_part), last_tile = cut(row_tiles_, tasks_.rows, row_part + 1);
    const std::size_t last_panel = cut(panels_.count, tasks_.cols, col_part + 1);
    for (std::size_t panel = cut(panels_.count, tasks_.cols, col_part); panel < last_panel;) {
      const std::size_t end = panel + std::min(blocking_.panels, last_panel - panel);
      std::size_t d = 0;
      do {  // once even when depth is 0: c still gets its start
        const std::size_t depth = std::min(blocking_.depth, p_.depth - d);
        run_block(first_tile, last_tile, panel, end, d, depth, scratch);
        d += depth;
      } while (d < p_.depth);
      panel = end;
    }
  }

  // Where a panel's elements of a block lie.
  struct PanelBlock {
    const T* b;
    std::size_t b_stride, col, present, vectors;
  };

  // Tiles of rows from first_tile to last_tile, panels from first to end, `depth` steps from d on.
  void run_block(std::size_t first_tile, std::size_t last_tile, std::size_t first, std::size_t end, std::size_t d, std::size_t depth,
                 T* scratch) const {
    T* block = scratch + blocking_.group_size;
    PanelBlock panels[most_panels];
    const bool transposed = p_.b.row_stride == 1;
    for (std::size_t panel = first; panel < end; ++panel) {
      const std::size_t col = panels_.begin(panel), width = panels_.width(panel), present = panels_.present(panel);
      PanelBlock& now = panels[panel - first];
      now = {nullptr, width, col, present, width / kernel_.lanes};
      if (p_.packed) {
        now.b = p_.packed->at(d, col, width);
      } else if (unpacked_ && present == width) {  // a tile reads whole vectors, which may not lie past the end of B
        now.b = p_.b.at(d, col);
        now.b_stride = p_.b.row_stride;
      } else {
        now.b = block;
        block += depth * width;
      }
    }
    if (!p_.packed && block != scratch + blocking_.group_size) {
      const std::size_t step = transposed ? depth : depth_copied;
      for (std::size_t from = 0; from < depth; from += step)
        for (std::size_t i = 0; i < end - first; ++i) {
          const PanelBlock& now = panels[i];
          if (now.b >= scratch && now.b < block)
            kernel_.gemm_pack_columns(std::min(step, depth - from), now.present, p_.b.at(d + from, now.col), p_.b.row_stride,
                                      p_.b.col_stride, const_cast<T*>(now.b) + from * now.b_stride, now.b_stride);
        }
    }
    const bool pack_a = pack_a_ && end - first >= panels_to_pack_a;
    const bool last = d + depth == p_.depth;
    const bool kept = blocking_.result_size == 0;
    T* const result = scratch + blocking_.group_size + blocking_.block_size;
    GemmTile<T> t;
    t.depth = depth;
    t.a_row_stride = pack_a ? 1 : p_.a.row_stride;
    t.a_depth_stride = pack_a ? kernel_.tile_rows : p_.a.col_stride;
    const bool from_c = d > 0 || p_.accumulate;
    t.start_stride = from_c ? p_.c_stride : 0;
    t.fetch = nullptr;
    t.fetch_stride = p_.c_stride;
    const std::size_t group_tiles = pack_a ? tiles_of_group : tiles_in_turn(depth), most_together = kept ? end - first : panels_to_finish;
    for (std::size_t group = first_tile; group < last_tile; group += group_tiles) {
      const std::size_t group_end = std::min(last_tile, group + group_tiles);
      const std::size_t group_row = row_begin(group), group_rows = row_begin(group_end) - group_row;
      if (pack_a) pack_group(group, group_end, d, depth, scratch);
      // Where C is kept: its tile after this one.
      const auto c_after = [&](std::size_t tile, std::size_t i) -> const T* {
        if (tile + 1 < group_end) return p_.c + row_begin(tile + 1) * p_.c_stride + panels[i].col;
        if (first + i + 1 < end) return p_.c + group_row * p_.c_stride + panels[i + 1].col;
        return group_end < last_tile ? p_.c + row_begin(group_end) * p_.c_stride + panels[0].col : nullptr;
      };
      for (std::size_t together = 0; together < end - first; together += most_together) {
        const std::size_t last_together = std::min(end - first, together + most_together) - 1;
        const std::size_t col = panels[together].col, cols = panels[last_together].col + panels[last_together].present - col;
        T* const c = kept ? p_.c + group_row * p_.c_stride + col : result;
        t.c_stride = kept ? p_.c_stride : cols;
        for (std::size_t i = together; i <= last_together; ++i) {
          const PanelBlock& now = panels[i];
          t.b = now.b;
          t.b_stride = now.b_stride;
          t.columns = now.present;
          for (std::size_t tile = group; tile < group_end; ++tile) {
            const std::size_t row = row_begin(tile), rows = row_begin(tile + 1) - row;
            t.a = pack_a ? scratch + (tile - group) * kernel_.tile_rows * depth : p_.a.at(row, d);
            t.c = c + (row - group_row) * t.c_stride + (now.col - col);
            t.start = from_c ? t.c : p_.bias ? p_.bias + now.col : nullptr;
            if (fetch_) t.fetch = kept ? c_after(tile, i) : p_.updated + row * p_.c_stride + now.col;
            kernel_.gemm_tile[rows - 1][now.vectors - 1](t);
          }
        }
        if (last && p_.finish) p_.finish({group_row, group_rows, col, cols, c, t.c_stride});
      }
    }
  }

  // Lays out the strips of A of some tiles, one behind the other.
  void pack_group(std::size_t first_tile, std::size_t last_tile, std::size_t d, std::size_t depth, T* group) const {
    for (std::size_t from = 0; from < depth; from += depth_copied)
      for (std::size_t tile = first_tile; tile < last_tile; ++tile) {
        const std::size_t row = row_begin(tile);
        kernel_.gemm_pack_rows(std::min(depth_copied, depth - from), row_begin(tile + 1) - row, p_.a.at(row, d + from), p_.a.col_stride,
                               group + ((tile - first_tile) * depth + from) * kernel_.tile_rows);
      }
  }

  const Product<T>& p_;
  const KernelTable<T>& kernel_;
  Panels panels_;
  std::size_t row_tiles_;
  bool small_b_;
  bool short_steps_;
  bool unpacked_;
  bool pack_a_;
  bool fetch_;
  Blocking blocking_;
  Tasks tasks_;
  int threads_;
};

}  // namespace

template <class T>
PackedMatrix<T>::PackedMatrix(std::size_t depth, std::size_t cols, MatrixView<T> b) : depth_(depth), cols_(cols) {
  const KernelTable<T>& kernel = table<T>();
  const Panels panels(cols, kernel.lanes, kernel.tile_vectors);
  data_.resize(panels.vectors * kernel.lanes * depth);
  const double elements = static_cast<double>(depth) * static_cast<double>(cols);
  parallel_for(panels.count, threads_for(cycles_to_pack * elements), [&](std::size_t panel, std::size_t) {
    const std::size_t col = panels.begin(panel);
    kernel.gemm_pack_columns(depth, panels.present(panel), b.at(0, col), b.row_stride, b.col_stride, data_.data() + col * depth,
                             panels.width(panel));
  });
}

template <class T>
void gemm(const Product<T>& product) {
  if (product.rows == 0 || product.cols == 0) return;
  if (goes_by_rows(product)) return gemm_by_rows(product);
  Multiplication<T>(product).run();
}

template class PackedMatrix<float>;
template class PackedMatrix<double>;
template void gemm(const Product<float>&);
template void gemm(const Product<double>&);

}  // namespace gdlib
