// Long rows that are read once: the dot product of a row together with the gradient of the row before it, which is in L1 then, so that
// reading from memory does not pause. Accumulates in T.

namespace gdlib {
namespace {

// The vectors of a row of two at least, from the second on, by lines that are loaded whole: the row need not begin with one, and vectors
// that lie on two lines cost a core of Zen 5 more than permutations (1,000 features from memory 36 GB/s for 20 to 23).
template <class T>
class RowByLines {
 public:
  RowByLines(const T* row, size_t in_features) : RowByLines(row, in_features, (uintptr_t)row % lane_bytes / sizeof(T)) {}

  const size_t end;  // an element: for a vector that begins there, or behind it, `next` would load a line that the row does not fill

  // The vector from element j on: that of the second vector first, then the ones behind it.
  Vector<T> next(size_t j) {
    const Vector<T> line = load(second_line_ + j), vector = window_.of(last_, line);
    last_ = line;
    return vector;
  }

 private:
  static constexpr size_t w = lanes<T>;

  RowByLines(const T* row, size_t in_features, size_t lane)
      : end((lane + in_features) / w * w - w), second_line_(row + (w - lane)), window_(lane), last_(load(second_line_)) {}

  const T* second_line_;  // the one behind that of the row's first element
  Window<T> window_;
  Vector<T> last_;
};

// How far ahead rows by lines are asked for, into L1: the nearest to 8 KiB (4 and 16 KiB are 5 to 20 % slower).
template <class T>
inline size_t elements_ahead_by_lines(size_t in_features, size_t x_stride) {
  const size_t row_bytes = in_features * sizeof(T);  // up to 8 KiB
  return ((8 << 10) + row_bytes / 2) / row_bytes * x_stride;
}

// The residuals and the gradient of a block's rows, bit by bit those of group_dot and block_gradient. N blocks with equally many rows at
// once, each for a section of its own: factor[l] of a block holds a target and becomes the residual. Asks for what lies `ahead` elements
// further on. Lines: rows are read by whole lines, of one block, and asked for into L1.
template <bool Lines, int N, class T>
inline void blocks_in_turns(Block<T> (&block)[N], size_t in_features, size_t ahead, const T* weight, T bias,
                            const Section<T> (&section)[N]) {
  constexpr size_t w = lanes<T>;
  Vector<T> factor[N];  // of the row before
  for (int n = 0; n < N; ++n) {
    factor[n] = zero<T>();
    for (size_t j = 0; section[n].begins && j < in_features; j += w) store(section[n].sums + j, zero<T>());
  }
  const auto turn = [&](size_t l, auto dot, auto gradient_before) __attribute__((always_inline)) {
    const T *row[N], *before[N];
    Vector<T> products[N];
    for (int n = 0; n < N; ++n) {
      row[n] = block[n].row[dot.value ? l : l - 1];
      before[n] = block[n].row[gradient_before.value ? l - 1 : l];
      products[n] = zero<T>();
    }
    const auto visit = [&](size_t j, size_t count, const auto& of_row, const auto& of_before) __attribute__((always_inline)) {
      if (dot.value) {
        const Vector<T> weights = load_up_to(weight + j, count);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          __builtin_prefetch(row[n] + j + ahead, 0, Lines ? 3 : 2);
          products[n] = fma(of_row(n, j, count), weights, products[n]);
        }
      }
      if (!gradient_before.value) return;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        T* const sums = section[n].sums + j;
        store(sums, fma(of_before(n, j, count), factor[n], load(sums)));
      }
    };
    const auto as_they_lie = [&](size_t j, size_t count) __attribute__((always_inline)) {
      const auto of = [](const T* const* from) __attribute__((always_inline)) {
        return [from](int n, size_t i, size_t size) __attribute__((always_inline)) { return load_up_to(from[n] + i, size); };
      };
      visit(j, count, of(row), of(before));
    };
    size_t j = 0;
    if constexpr (Lines) {
      static_assert(N == 1);
      as_they_lie(0, w);
      RowByLines<T> row_lines(row[0], in_features), lines_before(before[0], in_features);
      const size_t end = row_lines.end < lines_before.end ? row_lines.end : lines_before.end;
      for (j = w; j < end; j += w)
        visit(
            j, w, [&](int, size_t i, size_t) __attribute__((always_inline)) { return row_lines.next(i); },
            [&](int, size_t i, size_t) __attribute__((always_inline)) { return lines_before.next(i); });
    }
    for (; j + w <= in_features; j += w) as_they_lie(j, w);
    if (j < in_features) as_they_lie(j, in_features - j);
    if (!dot.value) return;
    for (int n = 0; n < N; ++n) {
      T& residual = block[n].factor[l];
      residual = sum_lanes<T>(products[n]) + bias - residual;
      factor[n] = broadcast(SquaredError::gradient(residual));
    }
  };
  const size_t rows = block[0].present;
  turn(0, Constant<true>{}, Constant<false>{});
  for (size_t l = 1; l < rows; ++l) turn(l, Constant<true>{}, Constant<true>{});
  turn(rows, Constant<false>{}, Constant<true>{});
  for (int n = 0; n < N; ++n)
    for (size_t j = 0; section[n].ends && j < in_features; j += w) {
      const size_t count = in_features - j;
      T* const gradient = section[n].gradient + j;
      const Vector<T> sum = load(section[n].sums + j);
      store_up_to(gradient, section[n].accumulate ? sum + load_up_to(gradient, count) : sum, count);
    }
}

}  // namespace
}  // namespace gdlib
