// A linear layer with few outputs, forward. An output is one accumulator vector along its row, whose lanes are added in one tree: whichever
// way below computes it, from however many rows, its bits are the same.

namespace gdlib {
namespace {

// The sums that stay in registers next to what is multiplied.
constexpr int most_dots = (int)vector_registers / 2;

// dot[r, o] = row[r] . weight[o], the chains and trees of group_dot: Outputs at a time, so that a row is read once for all of them.
template <int Outputs, class T>
inline void dots(const T* const* row, size_t in_features, const T* weight, T (&dot)[most_dots]) {
  constexpr int w = (int)lanes<T>, rows = most_dots / Outputs;
  Vector<T> sum[most_dots];
#pragma GCC unroll 16
  for (int i = 0; i < most_dots; ++i) sum[i] = zero<T>();
  const auto visit = [&](size_t j, const auto& read) __attribute__((always_inline)) {
    Vector<T> wj[Outputs];
#pragma GCC unroll 16
    for (int o = 0; o < Outputs; ++o) wj[o] = read(weight + o * in_features + j);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vector<T> x = read(row[r] + j);
#pragma GCC unroll 16
      for (int o = 0; o < Outputs; ++o) sum[r * Outputs + o] = fma(x, wj[o], sum[r * Outputs + o]);
    }
  };
  size_t j = 0;
  for (; j + w <= in_features; j += w) visit(j, load<T>);
  if (j < in_features) visit(j, [&](const T* p) { return load_partial(p, in_features - j); });
#pragma GCC unroll 8
  for (int i = 0; i < most_dots; i += w) store(dot + i, sum_each<0, w>([&](int l) { return sum[i + l]; }));
}

// y[rows, Outputs], y_stride apart, = x weight^T + bias
template <int Outputs, class T>
void forward_together(size_t rows, size_t in_features, const T* x, size_t x_stride, const T* weight, const T* bias, T* y, size_t y_stride) {
  constexpr size_t most = most_dots / Outputs;
  for (size_t first = 0; first < rows; first += most) {
    const size_t present = rows - first < most ? rows - first : most;
    const T* row[most];
    for (size_t r = 0; r < most; ++r) row[r] = x + (first + (r < present ? r : 0)) * x_stride;
    T dot[most_dots];
    dots<Outputs>(row, in_features, weight, dot);
    for (size_t r = 0; r < present; ++r)
      for (int o = 0; o < Outputs; ++o) {
        const T output = dot[r * Outputs + o];
        y[(first + r) * y_stride + o] = bias ? output + bias[o] : output;  // without one, -0 stays
      }
  }
}

// The same for as many outputs as there are to take together; returns how many. Not inlined, as what follows: the loop over groups of few
// features would lose registers.
template <class T>
__attribute__((noinline)) size_t forward_of_long_rows(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride,
                                                      const T* weight, const T* bias, T* y) {
  size_t o = 0;
  for (; o + 4 <= out_features; o += 4)
    forward_together<4>(rows, in_features, x, x_stride, weight + o * in_features, bias ? bias + o : nullptr, y + o, out_features);
  for (; o + 2 <= out_features; o += 2)
    forward_together<2>(rows, in_features, x, x_stride, weight + o * in_features, bias ? bias + o : nullptr, y + o, out_features);
  return o;
}

// One row's accumulator vector. Level: of the cache into which it asks for what lies `ahead` elements further on, as __builtin_prefetch
// counts; 0 asks for nothing.
template <int Level, class T>
inline Vector<T> products_of_row(const T* row, size_t in_features, size_t ahead, const T* weight) {
  Vector<T> sum = zero<T>();
  each_vector<T>(in_features, [&](size_t j, size_t count) __attribute__((always_inline)) {
    if constexpr (Level > 0) __builtin_prefetch(row + j + ahead, 0, Level);
    sum = fma(load_up_to(row + j, count), load_up_to(weight + j, count), sum);
  });
  return sum;
}

// The same row by row.
template <class T>
__attribute__((noinline)) void forward_of_few_rows(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride,
                                                   const T* weight, const T* bias, T* y) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t o = 0; o < out_features; ++o) {
      const T output = sum_lanes<T>(products_of_row<0>(x + r * x_stride, in_features, 0, weight + o * in_features));
      y[r * out_features + o] = bias ? output + bias[o] : output;
    }
}

// Rows from memory, one behind the other, of at least two lines, which are read in order all the same, and of less than a page, from which
// on each is a sequence that prefetchers follow: a core reads them one by one at 17 to 23 GB/s and side by side at 9 to 16, two cores at 25
// to 33 and 17 to 27. By requests, up to two pages: rows of just one or two fall on one set of L1 side by side (34 to 38 GB/s in order for
// 27 to 30, others as fast).
template <class T>
inline bool better_in_order(size_t in_features, bool by_requests) {
  constexpr size_t least = 128, page = 4096;
  const size_t bytes = in_features * sizeof(T);
  return bytes >= least && (by_requests ? bytes <= 2 * page : bytes < page);
}

// The same as group_dot, row by row.
template <int Level, class T>
__attribute__((noinline)) Vector<T> dots_in_order(const T* const* row, size_t in_features, size_t ahead, const T* weight) {
  constexpr int w = (int)lanes<T>;
  Vector<T> sum[w];
  for (int l = 0; l < w; ++l) sum[l] = products_of_row<Level>(row[l], in_features, ahead, weight);
  return sum_each<0, w>([&](int l) { return sum[l]; });
}

// The same of a group of rows from memory. By requests into L1 a core of Zen 5 reads in order 5 to 10 % faster than into L2, and side by
// side rows of 16 to 127 bytes at 12 to 34 GB/s for 5 to 27 (10 features 29 for 6).
template <class T>
inline Vector<T> dots_from_memory(const T* const* row, size_t in_features, size_t ahead, const T* weight, bool by_requests) {
  const bool in_order = better_in_order<T>(in_features, by_requests);
  if (!by_requests) return in_order ? dots_in_order<2>(row, in_features, ahead, weight) : group_dot(row, in_features, weight);
  return in_order ? dots_in_order<3>(row, in_features, ahead, weight) : group_dot<true>(row, in_features, weight, ahead);
}

// y[rows, out] = x[rows, in] weight^T + bias
template <class T>
void linear_forward(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride, const T* weight, const T* bias,
                    T* y, bool from_memory, bool by_requests) {
  constexpr size_t w = lanes<T>;
  // A group would be filled up with at least seven times as many rows.
  if (8 * rows <= w) return forward_of_few_rows(rows, in_features, out_features, x, x_stride, weight, bias, y);
  // One that leaves L1 is better read once for several outputs.
  const bool is_long = w * in_features * sizeof(T) > Block<T>::most_bytes;
  const size_t made = is_long ? forward_of_long_rows(rows, in_features, out_features, x, x_stride, weight, bias, y) : 0;
  if (made == out_features) return;
  const size_t ahead = elements_ahead<T>(in_features, x_stride);
  Block<T> group;
  for (size_t first = 0; first < rows; first += w) {
    const size_t present = rows - first < w ? rows - first : w;
    group.gather(x, x_stride, nullptr, first, present);
    for (size_t o = made; o < out_features; ++o) {
      const T* const weights = weight + o * in_features;
      Vector<T> output = from_memory && o == 0 ? dots_from_memory(group.row, in_features, ahead, weights, by_requests)
                                               : group_dot(group.row, in_features, weights);
      if (bias) output += broadcast(bias[o]);
      if (out_features == 1)
        store_up_to(y + first, output, present);
      else
        for (size_t l = 0; l < present; ++l) y[(first + l) * out_features + o] = output[l];
    }
  }
}

}  // namespace
}  // namespace gdlib
