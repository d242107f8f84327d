// GEMM on the ground floor: the register tile, and the copies that lay its operands out in its order.
// Accumulates in T. Blocking, edges between tasks and threads are the engine's.

namespace gdlib {
namespace {

// c[Rows, columns] = start + a b for Rows rows and Vectors vectors of columns from row and column on, of which the last one has `last`
// elements: Rows x Vectors accumulators, one broadcast of a per row and step of depth. Each element is one chain of multiply-adds in the
// order of depth. Padded: b may be read past the last column.
template <class T, int Rows, int Vectors, bool Padded>
inline __attribute__((always_inline)) void multiply_tile(const GemmTile<T>& t, size_t first_row, size_t column, size_t last) {
  constexpr size_t w = lanes<T>;
  const bool whole = last == w;
  Vector<T> sum[Rows][Vectors];  // stays in registers because every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const T* const from = t.start ? t.start + (first_row + r) * t.start_stride + column : nullptr;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = !from ? zero<T>() : whole || v < Vectors - 1 ? load(from + v * w) : load_partial(from + v * w, last);
  }
  if (t.fetch) {
    constexpr size_t line = 64 / sizeof(T), lines = (Vectors * w + line - 1) / line + 1;  // of a row, which may begin within one
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (size_t l = 0; l < lines; ++l) prefetch_to_write(t.fetch + (first_row + r) * t.fetch_stride + column + l * line);
  }
  const T* row[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) row[r] = t.a + (first_row + r) * t.a_row_stride;
  const T* b = t.b + column;
  const size_t a_step = t.a_depth_stride, b_step = t.b_stride;
  size_t at = 0;
  // Two steps at a time: on a core whose host gives it another thread too, the loop's own instructions cost 10 to 13 % of a tile of AVX2
  // (alone nothing). Four gain no more.
#pragma GCC unroll 2
  for (size_t d = 0; d < t.depth; ++d, at += a_step, b += b_step) {
    Vector<T> columns[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) columns[v] = Padded || v < Vectors - 1 ? load(b + v * w) : load_partial(b + v * w, last);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> factor = broadcast(row[r][at]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(factor, columns[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    T* const c = t.c + (first_row + r) * t.c_stride + column;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) whole || v < Vectors - 1 ? store(c + v * w, sum[r][v]) : store_partial(c + v * w, sum[r][v], last);
  }
}

// Columns from (Vectors - 1) whole vectors and one more element to Vectors whole ones.
template <class T, int Rows, int Vectors>
void gemm_tile(const GemmTile<T>& t) {
  multiply_tile<T, Rows, Vectors, true>(t, 0, 0, t.columns - (Vectors - 1) * lanes<T>);
}

// All columns of Rows rows.
template <class T, int Rows>
inline void whole_rows(const GemmTile<T>& t, size_t row) {
  constexpr size_t w = lanes<T>;
  size_t k = 0;
  // Not three and one, which would wait for its chains of additions.
  for (; t.columns - k > 4 * w; k += 3 * w) multiply_tile<T, Rows, 3, true>(t, row, k, w);
  if (t.columns - k > 3 * w) {
    multiply_tile<T, Rows, 2, true>(t, row, k, w);
    k += 2 * w;
  }
  const size_t left = t.columns - k;
  if (left > 2 * w)
    multiply_tile<T, Rows, 3, false>(t, row, k, left - 2 * w);
  else if (left > w)
    multiply_tile<T, Rows, 2, false>(t, row, k, left - w);
  else if (left > 0)
    multiply_tile<T, Rows, 1, false>(t, row, k, left);
}

// The same for any rows, four at a time, which read and write as many sequences in order.
template <class T>
void gemm_rows(size_t rows, const GemmTile<T>& t) {
  for (size_t row = 0, count; row < rows; row += count) {
    const size_t left = rows - row;
    count = left <= 4 ? left : left < 7 ? 3 : 4;
    if (count == 4)
      whole_rows<T, 4>(t, row);
    else if (count == 3)
      whole_rows<T, 3>(t, row);
    else if (count == 2)
      whole_rows<T, 2>(t, row);
    else
      whole_rows<T, 1>(t, row);
  }
}

// A vector of N elements: what a panel's rows are made of, which may be narrower than a register.
template <class T, int N>
struct Strip {
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <int Stride, class V, int... L>
inline void exchange(V& a, V& b, Sequence<L...>) {
  constexpr int n = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & Stride) ? L - Stride + n : L)...);
  b = __builtin_shufflevector(a, b, ((L & Stride) ? L + n : L + Stride)...);
  a = low;
}

// In each four lanes: a0 b0 a1 b1, and a2 b2 a3 b3.
template <class V, int... L>
inline void interleave(V& a, V& b, Sequence<L...>) {
  constexpr int n = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & 1) * n + (L & ~3) + (L & 3) / 2)...);
  b = __builtin_shufflevector(a, b, ((L & 1) * n + (L & ~3) + (L & 3) / 2 + 2)...);
  a = low;
}

// Of vectors of four quarters, 16 bytes each: those of four of them change places as in a transposition. To exchange neighbours takes x86
// an instruction for arbitrary lanes, with which one row through a wide layer took 1.06 times as long (Zen 4).
template <class V, int... L>
inline void transpose_quarters(V& a, V& b, V& c, V& d, Sequence<L...> all) {
  constexpr int n = sizeof...(L), quarter = n / 4;
  exchange<n / 2>(a, b, all);
  exchange<n / 2>(c, d, all);
  const auto evens = [](const V& from, const V& with) __attribute__((always_inline)) {
    return __builtin_shufflevector(from, with, (L / quarter * 2 * quarter + L % quarter)...);
  };
  const auto odds = [](const V& from, const V& with) __attribute__((always_inline)) {
    return __builtin_shufflevector(from, with, (L / quarter * 2 * quarter + quarter + L % quarter)...);
  };
  const V of_b = b;
  b = odds(a, c);
  a = evens(a, c);
  c = evens(of_b, d);
  d = odds(of_b, d);
}

// Transposes N vectors of N elements: bit by bit, the number of a vector and that of a lane change places.
template <int Stride, int N, class V>
inline void transpose(V (&v)[N]) {
  constexpr typename MakeSequence<N>::type all{};
  if constexpr (Stride == 1 && N >= 4 && sizeof(v[0][0]) == 4) {
    // Two bits at once: to exchange single floats takes x86 two instructions, to interleave them one.
#pragma GCC unroll 16
    for (int i = 0; i < N; i += 4) {
      interleave(v[i], v[i + 1], all);
      interleave(v[i + 2], v[i + 3], all);
      exchange<2>(v[i], v[i + 2], all);
      exchange<2>(v[i + 1], v[i + 3], all);
      const V second = v[i + 2];
      v[i + 2] = v[i + 1];
      v[i + 1] = second;
    }
    transpose<4>(v);
  } else if constexpr (Stride * sizeof(v[0][0]) == 16 && N == 4 * Stride) {
#pragma GCC unroll 4
    for (int i = 0; i < Stride; ++i) transpose_quarters(v[i], v[i + Stride], v[i + 2 * Stride], v[i + 3 * Stride], all);
  } else if constexpr (Stride < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & Stride)) exchange<Stride>(v[i], v[i + Stride], all);
    transpose<2 * Stride>(v);
  }
}

// v[i] = step i of `count` steps of a vector's columns, each a sequence of elements, of which `present` exist. All: as many steps and
// columns as a vector has lanes. Fetch: asks for what lies further on.
template <bool All, bool Fetch, class T>
inline void read_transposed(const T* source, size_t stride, size_t present, size_t count, Vector<T> (&v)[lanes<T>]) {
  constexpr int n = (int)lanes<T>;
  const T* first_of_four = source;  // an address for four rows: with one for each, one row through a layer takes 1.07 times as long (Zen 4)
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i > 0 && i % 4 == 0) first_of_four = as_computed(first_of_four + 4 * stride);
    const T* const from = first_of_four + i % 4 * stride;
    v[i] = !All && (size_t)i >= present ? zero<T>() : All ? load(from) : load_first(from, count);
    // Sequences whose starts are a power of two apart are too many for the prefetchers: 20 % of a matrix read once from memory.
    if (Fetch) __builtin_prefetch(from + 8 * n, 0, 2);
  }
  transpose<1>(v);
}

// For gemm_transposed: Together vectors of columns from k on, one or two, which take turns; a single one may be there in part. Neighbours:
// the elements of a row of a are. The second vector follows some steps behind: its sequences fall on other sets of L1 then, where those of
// both are a multiple of 4 KiB apart (with lines 1.2 times as fast so, else as fast; shorter vectors lose as often as they gain).
template <class T, int Rows, int Together, bool Neighbours>
inline void transposed_columns(const GemmTile<T>& t, size_t k) {
  constexpr size_t w = lanes<T>, most_behind = Together > 1 && lane_bytes == 64 ? 8 * w : 0;
  const size_t present = Together > 1 || k + w <= t.columns ? w : t.columns - k;
  Vector<T> sum[Together][Rows];
  for (int c = 0; c < Together; ++c)
    for (int r = 0; r < Rows; ++r) sum[c][r] = t.start ? load_up_to(t.start + r * t.start_stride + k + c * w, present) : zero<T>();
  const auto steps = [&](int c, size_t d, size_t count, auto all) __attribute__((always_inline)) {
    Vector<T> column[w];
    read_transposed<all.value, all.value && Together == 1>(t.b + (k + c * w) * t.b_stride + d, t.b_stride, present, count, column);
#pragma GCC unroll 16
    for (size_t i = 0; i < w; ++i)
      if (all.value || i < count)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const T factor = t.a[r * t.a_row_stride + (d + i) * (Neighbours ? 1 : t.a_depth_stride)];
          sum[c][r] = fma(broadcast(factor), column[i], sum[c][r]);
        }
  };
  const size_t whole = present == w ? t.depth / w * w : 0, behind = most_behind < whole ? most_behind : whole;
#pragma GCC unroll 1
  for (size_t d = 0; d < whole + behind; d += w) {
    if (behind == 0 || d < whole) steps(0, d, w, Constant<true>{});
    if (Together > 1 && d >= behind) steps(Together - 1, d - behind, w, Constant<true>{});
  }
#pragma GCC unroll 2
  for (int c = 0; c < Together; ++c)
    for (size_t d = whole; d < t.depth; d += w) steps(c, d, t.depth - d < w ? t.depth - d : w, Constant<false>{});
  for (int c = 0; c < Together; ++c)
    for (int r = 0; r < Rows; ++r) store_up_to(t.c + r * t.c_stride + k + c * w, sum[c][r], present);
}

// c[Rows, columns] = start + a b for few rows and a b whose columns are sequences of `depth` elements, b_stride apart: each vector of
// columns is transposed in registers, and used once. The chains of gemm_tile.
template <class T, int Rows>
void gemm_transposed(const GemmTile<T>& t) {
  constexpr size_t w = lanes<T>, ways = 8, way_bytes = 4096;  // of the smallest L1 in use
  // Two vectors take turns where one alone waits for its chain of additions most of the time. Vectors shorter than a line: 1.2 to 1.9 times
  // as fast, but for sequences that fall on one set of L1, and are more than it has ways; requests would cost them up to a third in the
  // cache, and gain nothing (Zen 3). Lines: 1.1 to 1.5 times as fast from a cache, from memory 0.7 to 0.9, whose prefetchers cannot follow
  // so many (Zen 5; to transpose them takes a Zen 4 as long as to add them, so that it gains nothing).
  constexpr bool lines = lane_bytes == 64;
  constexpr int together = Rows <= (lines ? 4 : 2) ? 2 : 1;
  const bool neighbours = t.a_depth_stride == 1, one_set = together * w > ways && t.b_stride * sizeof(T) % way_bytes == 0;
  size_t k = 0;
  if (together > 1 && neighbours && (lines ? t.b_in_cache : !one_set))
    for (; k + together * w <= t.columns; k += together * w) transposed_columns<T, Rows, together, true>(t, k);
  for (; k < t.columns; k += w)
    neighbours ? transposed_columns<T, Rows, 1, true>(t, k) : transposed_columns<T, Rows, 1, false>(t, k);
}

// A vector's columns of a panel from as many sequences of `depth` elements, of which `present` exist: N steps at a time, of which the last
// may repeat some of those before.
template <class T>
inline void pack_transposed(size_t depth, size_t present, const T* source, size_t stride, T* panel, size_t panel_width) {
  constexpr int n = (int)lanes<T>;
  const auto steps = [&](size_t d, size_t count, auto all) __attribute__((always_inline)) {
    Vector<T> v[n];
    read_transposed<all.value, all.value>(source + d, stride, present, count, v);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (all.value || (size_t)i < count) store(panel + (d + i) * panel_width, v[i]);
  };
  for (size_t d = 0; d < depth;) {
    const size_t left = depth - d, count = left < (size_t)n ? left : (size_t)n;
    if (present < (size_t)n || depth < (size_t)n)
      steps(d, count, Constant<false>{});
    else
      steps(d + count - n, n, Constant<true>{});
    d += count;
  }
}

// The same where each step's elements are neighbours, and the steps `stride` apart.
template <class T, int N>
inline void pack_straight(size_t depth, size_t present, const T* source, size_t stride, T* panel, size_t panel_width) {
  typedef typename Strip<T, N>::unaligned U;
  if (present >= N)
    for (size_t d = 0; d < depth; ++d) *reinterpret_cast<U*>(panel + d * panel_width) = *reinterpret_cast<const U*>(source + d * stride);
  else if constexpr (N == (int)lanes<T>)
    for (size_t d = 0; d < depth; ++d) store(panel + d * panel_width, load_first(source + d * stride, present));
  else
    for (size_t d = 0; d < depth; ++d)
      for (size_t i = 0; i < N; ++i) panel[d * panel_width + i] = i < present ? source[d * stride + i] : T(0);
}

template <class T>
void gemm_pack_columns(size_t depth, size_t width, const T* source, size_t depth_stride, size_t width_stride, T* panel,
                       size_t panel_width) {
  constexpr int n = (int)lanes<T>;
  for (size_t k = 0; k < panel_width; k += n) {
    const size_t present = width > k ? width - k : 0;
    if (width_stride != 1)
      pack_transposed(depth, present, source + k * width_stride, width_stride, panel + k, panel_width);
    else
      pack_straight<T, n>(depth, present, source + k, depth_stride, panel + k, panel_width);
  }
}

template <class T, int Rows>
void gemm_pack_rows(size_t depth, size_t width, const T* source, size_t depth_stride, T* panel) {
  constexpr int n = Rows < (int)lanes<T> ? Rows : (int)lanes<T>;
  for (size_t k = 0; k < Rows; k += n) pack_straight<T, n>(depth, width > k ? width - k : 0, source + k, depth_stride, panel + k, Rows);
}

// The table's kernels for up to Rows rows.
template <class T, int Rows>
constexpr void fill_transposed(KernelTable<T>& table) {
  if (table.transposed_rows < (size_t)Rows) table.transposed_rows = Rows;
  table.gemm_transposed[Rows - 1] = gemm_transposed<T, Rows>;
  if constexpr (Rows > 1) fill_transposed<T, Rows - 1>(table);
}

// The table's tiles of every height up to Rows and every width up to Vectors.
template <class T, int Rows, int Vectors, int Widest = Vectors>
constexpr void fill_tiles(KernelTable<T>& table) {
  table.gemm_tile[Rows - 1][Vectors - 1] = gemm_tile<T, Rows, Vectors>;
  if constexpr (Vectors > 1)
    fill_tiles<T, Rows, Vectors - 1, Widest>(table);
  else if constexpr (Rows > 1)
    fill_tiles<T, Rows - 1, Widest>(table);
}

}  // namespace
}  // namespace gdlib
