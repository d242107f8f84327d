// A linear layer with few outputs: its gradients. Rows are visited in blocks that stay in the L1 cache, and read where they lie.
// Accumulates in T.

namespace gdlib {
namespace {

// A block of rows, padded to whole groups and, where it is asked for along with another, to those of that one: past the last row the first
// one stands in, and its results are dropped or weighed with zero.
template <class T>
struct Block {
  static constexpr size_t most = 64;  // rows: enough to pay for touching the gradient once a block
  static_assert(most % lanes<T> == 0, "a block holds whole groups");

  size_t present;
  size_t padded;
  const T* row[most];
  T factor[most] __attribute__((aligned(lane_bytes)));  // of each row in the gradient

  // Rows first, first + 1, ... of x, by way of the index where there is one.
  void gather(const T* x, size_t x_stride, const uint32_t* index, size_t first, size_t count, size_t least = 0) {
    present = count;
    padded = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
    if (index)
      for (size_t l = 0; l < count; ++l) row[l] = x + index[first + l] * x_stride;
    else
      for (size_t l = 0; l < count; ++l) row[l] = x + (first + l) * x_stride;
    for (size_t l = count; l < padded || l < least; ++l) row[l] = row[0];
  }

  static constexpr size_t most_bytes = 16 << 10;  // half of the smallest L1 in use

  // Rows that fit most_bytes; at least one group.
  static size_t rows_for(size_t in_features) {
    const size_t fitting = most_bytes / (in_features * sizeof(T) + 1) / lanes<T> * lanes<T>;
    return fitting < lanes<T> ? lanes<T> : fitting > most ? most : fitting;
  }
};

// Where rows are read in order from memory, the processor's prefetching ends with each page: lines of later ones are asked for, 16 KiB
// ahead and more (4 KiB ahead gives 18 GB/s, 2 KiB 15). Rows in registers gain 6 % (100 features, two threads) to 40 % (8 features) by it
// on Zen 3; from L3 there up to 8 % are lost.
template <class T>
inline size_t elements_ahead(size_t in_features, size_t x_stride) {
  return ((16 << 10) / ((in_features > 0 ? in_features : 1) * sizeof(T)) + 1) * x_stride;
}

// Lane l of the result: row[l] . weight, one accumulator vector for each row. Ahead: asks for what lies `ahead` elements further on.
template <bool Ahead = false, class T>
inline Vector<T> group_dot(const T* const* row, size_t in_features, const T* weight, size_t ahead = 0) {
  constexpr int w = (int)lanes<T>;
  Vector<T> sum[w];
#pragma GCC unroll 16
  for (int l = 0; l < w; ++l) sum[l] = zero<T>();
  each_vector<T>(in_features, [&](size_t j, size_t count) __attribute__((always_inline)) {
    const Vector<T> wj = load_up_to(weight + j, count);
#pragma GCC unroll 16
    for (int l = 0; l < w; ++l) {
      if (Ahead) __builtin_prefetch(row[l] + j + ahead, 0, 3);
      sum[l] = fma(load_up_to(row[l] + j, count), wj, sum[l]);
    }
  });
  return sum_each<0, w>([&](int l) { return sum[l]; });
}

// The sums over which the gradient of rows of so many vectors is spread, so that an addition does not wait for the last one. From 4
// vectors on these are enough, and rows that are read once leave room for no more. A group has 2 rows at least.
template <class T>
constexpr int chains_for(size_t vectors) {
  return vectors == 1 && lanes<T> >= 4 ? 4 : vectors < 4 ? 2 : 1;
}

// The rows whose sums for one output begin at zero, and are added to its gradient in the end: a block, or several, which hand the sums on.
template <class T>
struct Section {
  bool begins, ends;  // with this block
  bool accumulate;    // else the gradient is overwritten
  T* sums;            // [in_features, in whole vectors] what blocks hand on; not touched by one that begins and ends
  T* gradient;
};

// gradient[vectors] (+)= the sums over their chains; of the last vector `tail` lanes.
template <bool Tail, int Vectors, int Chains, class T>
inline void add_chains(Vector<T> (&sum)[Chains][Vectors], size_t tail, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
    for (int c = 1; c < Chains; ++c) sum[0][v] += sum[c][v];
    T* const out = gradient + v * w;
    const bool part = Tail && v + 1 == Vectors;
    if (accumulate) sum[0][v] += part ? load_partial(out, tail) : load(out);
    part ? store_partial(out, sum[0][v], tail) : store(out, sum[0][v]);
  }
}

// gradient[Vectors vectors] (+)= sum over the section of factor * row, from feature j on; of the last vector `tail` lanes. One of several
// blocks has one chain.
// Ahead: asks for the same features of the next block meanwhile, so that the memory is busy while the arithmetic is in the cache.
template <int Vectors, int Chains, bool Tail, bool Ahead, class T>
inline void block_gradient_part(const Block<T>& block, const Block<T>& next, size_t j, size_t tail, const Section<T>& section) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[Chains][Vectors];
  for (int c = 0; c < Chains; ++c)
    for (int v = 0; v < Vectors; ++v) sum[c][v] = Chains > 1 || section.begins ? zero<T>() : load(section.sums + j + v * w);
  for (size_t l = 0; l < block.present; l += Chains)
#pragma GCC unroll 4
    for (int c = 0; c < Chains; ++c) {
      const Vector<T> factor = broadcast(block.factor[l + c]);
      const T* const row = block.row[l + c] + j;
      if (Ahead)  // into L2: past it, a core of Zen 4 reads 10 instead of 15 GB/s
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) __builtin_prefetch(next.row[l + c] + j + v * w, 0, 2);
      if (Ahead && Tail) __builtin_prefetch(next.row[l + c] + j + (Vectors - 1) * w + tail - 1, 0, 2);  // where no line begins a vector
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v)
        sum[c][v] = fma(Tail && v + 1 == Vectors ? load_partial(row + v * w, tail) : load(row + v * w), factor, sum[c][v]);
    }
  if (Chains > 1 || section.ends) return add_chains<Tail>(sum, tail, section.accumulate, section.gradient + j);
  for (int v = 0; v < Vectors; ++v) store(section.sums + j + v * w, sum[0][v]);
}

// The same for a number of vectors that is known only now.
template <int Most, int Chains, bool Ahead, class T>
inline void block_gradient_part_of(size_t vectors, const Block<T>& block, const Block<T>& next, size_t j, size_t tail,
                                   const Section<T>& section) {
  if (vectors == Most)
    return tail < lanes<T> ? block_gradient_part<Most, Chains, true, Ahead>(block, next, j, tail, section)
                           : block_gradient_part<Most, Chains, false, Ahead>(block, next, j, tail, section);
  if constexpr (Most > 1) block_gradient_part_of<Most - 1, Chains, Ahead>(vectors, block, next, j, tail, section);
}

// gradient[in_features] (+)= sum over the section of factor[l] * row[l]
template <bool Ahead, class T>
inline void block_gradient(const Block<T>& block, const Block<T>& next, size_t in_features, const Section<T>& section) {
  constexpr size_t w = lanes<T>;
  constexpr size_t most = 4;  // at a time: as many sums as an addition takes cycles
  const size_t vectors = (in_features + w - 1) / w;
  const int chains = chains_for<T>(vectors);
  for (size_t first = 0, count; first < vectors; first += count) {
    const size_t left = vectors - first, j = first * w;
    count = left <= most ? left : left == most + 1 ? most - 1 : most;  // a single vector would wait for its sums
    const size_t tail = count < left ? w : in_features - j - (count - 1) * w;
    if (chains == 1)
      block_gradient_part_of<(int)most, 1, Ahead>(count, block, next, j, tail, section);
    else if (chains == 2)
      block_gradient_part_of<(int)most, 2, Ahead>(count, block, next, j, tail, section);
    else
      block_gradient_part_of<1, 4, Ahead>(count, block, next, j, tail, section);
  }
}

// gradient[Outputs, in_features] += sum over the block of factor[Outputs] * row, bit by bit what block_gradient adds to rows of one chain.
// Four rows at a time: a core reads as many sequences in order, and their sums are loaded and stored once; a piece of the features at a
// time, so that the sums stay in L1. On Zen 3 1.0 to 1.4 times as fast for one output, and 1.2 to 2.3 times for two and three.
template <int Outputs, bool Ahead, class T>
inline void block_gradients(const Block<T>& block, const Block<T>& next, const T (*factor)[Block<T>::most], size_t in_features,
                            T* gradient) {
  constexpr size_t piece = 2048 / sizeof(T);  // of three outputs 6 KiB of sums, next to four rows' 8 KiB
  T sums[Outputs][piece] __attribute__((aligned(lane_bytes)));
  for (size_t begin = 0, end; begin < in_features; begin = end) {
    end = in_features - begin < piece ? in_features : begin + piece;
    const auto add_rows = [&](size_t l, auto rows, auto first, auto last) __attribute__((always_inline)) {
      const auto visit = [&](size_t j, size_t count) __attribute__((always_inline)) {
        Vector<T> x[rows.value];
#pragma GCC unroll 4
        for (int r = 0; r < rows.value; ++r) {
          if (Ahead) __builtin_prefetch(next.row[l + r] + j, 0, 3);
          x[r] = load_up_to(block.row[l + r] + j, count);
        }
#pragma GCC unroll 4
        for (int o = 0; o < Outputs; ++o) {
          T *const kept = sums[o] + (j - begin), *const out = gradient + o * in_features + j;
          Vector<T> sum = first.value ? zero<T>() : load(kept);
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r) sum = fma(x[r], broadcast(factor[o][l + r]), sum);
          last.value ? store_up_to(out, sum + load_up_to(out, count), count) : store(kept, sum);
        }
      };
      size_t j = begin;
      for (; j + lanes<T> <= end; j += lanes<T>) visit(j, lanes<T>);
      if (j < end) visit(j, end - j);
    };
    const auto add = [&](size_t l, auto rows) __attribute__((always_inline)) {
      const bool last = l + rows.value == block.present;
      if (l == 0)
        last ? add_rows(l, rows, Constant<true>{}, Constant<true>{}) : add_rows(l, rows, Constant<true>{}, Constant<false>{});
      else
        last ? add_rows(l, rows, Constant<false>{}, Constant<true>{}) : add_rows(l, rows, Constant<false>{}, Constant<false>{});
    };
    size_t l = 0;
    for (; l + 4 <= block.present; l += 4) add(l, Constant<4>{});
    for (; l < block.present; ++l) add(l, Constant<1>{});
  }
}

// weight_gradient[out, in] += g[rows, out]^T x[rows, in]; bias_gradient[out] += column sums of g
template <class T>
void linear_gradient(size_t rows, size_t in_features, size_t out_features, const T* g, const T* x, size_t x_stride, T* weight_gradient,
                     T* bias_gradient, bool by_requests) {
  constexpr size_t most = 3;  // outputs at a time: layers with more go through products
  // A core of Zen 5 reads rows of 40 to 400 bytes at 28 to 37 GB/s for 9 to 24 so, those of three outputs at 20 for 17; rows of a page and
  // more, which are sequences of their own, at 25 for 28.
  constexpr size_t page = 4096;
  const bool one_chain = chains_for<T>((in_features + lanes<T> - 1) / lanes<T>) == 1;
  Block<T> block, next;
  T factor[most][Block<T>::most] __attribute__((aligned(lane_bytes)));
  const size_t block_rows = Block<T>::rows_for(in_features), distance = elements_ahead<T>(in_features, 1);
  const size_t rows_ahead = distance < block_rows ? block_rows : distance;
  for (size_t first = 0; first < rows; first += block_rows) {
    block.gather(x, x_stride, nullptr, first, rows - first < block_rows ? rows - first : block_rows);
    const bool ahead = by_requests && in_features * sizeof(T) < page && rows_ahead + block_rows <= rows - first;
    if (ahead) next.gather(x, x_stride, nullptr, first + rows_ahead, block.present, block.padded);
    for (size_t o = 0, outputs; o < out_features; o += outputs) {
      outputs = !one_chain ? 1 : out_features - o < most ? out_features - o : most;
      for (size_t k = 0; k < outputs; ++k) {
        Vector<T> sum = zero<T>();
        T* const of_output = one_chain ? factor[k] : block.factor;
        for (size_t l = 0; l < block.padded; ++l) of_output[l] = l < block.present ? g[(first + l) * out_features + o + k] : T(0);
        for (size_t l = 0; l < block.padded; l += lanes<T>) sum += load(of_output + l);
        if (bias_gradient) bias_gradient[o + k] += sum_lanes<T>(sum);
      }
      T* const gradient = weight_gradient + o * in_features;
      const auto add = [&](auto asks) {
        if (!one_chain)
          block_gradient<asks.value>(block, next, in_features, {true, true, true, nullptr, gradient});
        else if (outputs == 1)
          block_gradients<1, asks.value>(block, next, factor, in_features, gradient);
        else if (outputs == 2)
          block_gradients<2, asks.value>(block, next, factor, in_features, gradient);
        else
          block_gradients<3, asks.value>(block, next, factor, in_features, gradient);
      };
      ahead && o == 0 ? add(Constant<true>{}) : add(Constant<false>{});
    }
  }
}

// The same of Rows rows: vectors of their columns in order, so that as many sequences are written, and a weight is loaded once for them.
template <int Rows, class T>
inline void input_gradient_of_rows(size_t in_features, size_t out_features, const T* g, const T* weight, T* input_gradient) {
  each_vector<T>(in_features, [&](size_t j, size_t count) __attribute__((always_inline)) {
    Vector<T> sum[Rows], weights = load_up_to(weight + j, count);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sum[r] = broadcast(g[r * out_features]) * weights;
    for (size_t o = 1; o < out_features; ++o) {
      weights = load_up_to(weight + o * in_features + j, count);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r] = fma(broadcast(g[r * out_features + o]), weights, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) store_up_to(input_gradient + r * in_features + j, sum[r], count);
  });
}

// input_gradient[rows, in] = g[rows, out] weight[out, in]
template <class T>
void linear_input_gradient(size_t rows, size_t in_features, size_t out_features, const T* g, const T* weight, T* input_gradient) {
  size_t r = 0;
  for (; r + 4 <= rows; r += 4)
    input_gradient_of_rows<4>(in_features, out_features, g + r * out_features, weight, input_gradient + r * in_features);
  for (; r < rows; ++r)
    input_gradient_of_rows<1>(in_features, out_features, g + r * out_features, weight, input_gradient + r * in_features);
}

}  // namespace
}  // namespace gdlib
