// A linear layer with few outputs: its gradients, and its fused training step.
//
// Rows are visited in blocks that stay in the L1 cache. Rows that the registers can hold are read once: dot product and gradient, then the
// next row; longer ones in order from memory too, the dot product of one together with the gradient of the one before. The others are
// visited twice: dot products of the block first, one accumulator vector for each row, then its gradient, some features at a time. All ways
// make the same additions. Accumulates in T; sums of losses are returned in double. Rows are read where they lie, not copied.

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

// Lane l of the result: row[l] . weight, one accumulator vector for each row.
template <class T>
inline Vector<T> group_dot(const T* const* row, size_t in_features, const T* weight) {
  constexpr int w = (int)lanes<T>;
  Vector<T> sum[w];
#pragma GCC unroll 16
  for (int l = 0; l < w; ++l) sum[l] = zero<T>();
  size_t j = 0;
  for (; j + w <= in_features; j += w) {
    const Vector<T> wj = load(weight + j);
#pragma GCC unroll 16
    for (int l = 0; l < w; ++l) sum[l] = fma(load(row[l] + j), wj, sum[l]);
  }
  if (j < in_features) {
    const size_t tail = in_features - j;
    const Vector<T> wj = load_partial(weight + j, tail);
#pragma GCC unroll 16
    for (int l = 0; l < w; ++l) sum[l] = fma(load_partial(row[l] + j, tail), wj, sum[l]);
  }
  return sum_each<0, w>([&](int l) { return sum[l]; });
}

// Rows up to so many bytes are read in turns: two of them, the weights and the sums of the gradient fill the smallest L1 in use, 32 KiB.
constexpr size_t most_turn_bytes = 8 << 10;

// Rows up to so many vectors are held in the registers (where there are 16, the compiler reads some again from L1).
constexpr size_t most_row_vectors = 16;

// The sums over which the gradient of rows of so many vectors is spread, so that an addition does not wait for the last one. From 4
// vectors on these are enough, and rows that are read once leave room for no more. A group has 2 rows at least.
template <class T>
constexpr int chains_for(size_t vectors) {
  return vectors == 1 && lanes<T> >= 4 ? 4 : vectors < 4 ? 2 : 1;
}

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

// gradient[Vectors vectors] (+)= sum over the block of factor * row, from feature j on; of the last vector `tail` lanes.
// Ahead: asks for the same features of the next block meanwhile, so that the memory is busy while the arithmetic is in the cache.
template <int Vectors, int Chains, bool Tail, bool Ahead, class T>
inline void block_gradient_part(const Block<T>& block, const Block<T>& next, size_t j, size_t tail, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[Chains][Vectors];
  for (int c = 0; c < Chains; ++c)
    for (int v = 0; v < Vectors; ++v) sum[c][v] = zero<T>();
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
  add_chains<Tail>(sum, tail, accumulate, gradient + j);
}

// The same for a number of vectors that is known only now.
template <int Most, int Chains, bool Ahead, class T>
inline void block_gradient_part_of(size_t vectors, const Block<T>& block, const Block<T>& next, size_t j, size_t tail, bool accumulate,
                                   T* gradient) {
  if (vectors == Most)
    return tail < lanes<T> ? block_gradient_part<Most, Chains, true, Ahead>(block, next, j, tail, accumulate, gradient)
                           : block_gradient_part<Most, Chains, false, Ahead>(block, next, j, tail, accumulate, gradient);
  if constexpr (Most > 1) block_gradient_part_of<Most - 1, Chains, Ahead>(vectors, block, next, j, tail, accumulate, gradient);
}

// gradient[in_features] (+)= sum over the block of factor[l] * row[l]
template <bool Ahead, class T>
inline void block_gradient(const Block<T>& block, const Block<T>& next, size_t in_features, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  constexpr size_t most = 4;
  const size_t vectors = (in_features + w - 1) / w;
  const int chains = chains_for<T>(vectors);
  for (size_t first = 0, count; first < vectors; first += count) {
    const size_t left = vectors - first, j = first * w;
    count = left <= most ? left : left == most + 1 ? most - 1 : most;  // a single vector would wait for its sums
    const size_t tail = count < left ? w : in_features - j - (count - 1) * w;
    if (chains == 1)
      block_gradient_part_of<(int)most, 1, Ahead>(count, block, next, j, tail, accumulate, gradient);
    else if (chains == 2)
      block_gradient_part_of<(int)most, 2, Ahead>(count, block, next, j, tail, accumulate, gradient);
    else
      block_gradient_part_of<1, 4, Ahead>(count, block, next, j, tail, accumulate, gradient);
  }
}

// weight_gradient[out, in] += g[rows, out]^T x[rows, in]; bias_gradient[out] += column sums of g
template <class T>
void linear_gradient(size_t rows, size_t in_features, size_t out_features, const T* g, const T* x, size_t x_stride, T* weight_gradient,
                     T* bias_gradient) {
  Block<T> block;
  const size_t block_rows = Block<T>::rows_for(in_features);
  for (size_t first = 0; first < rows; first += block_rows) {
    block.gather(x, x_stride, nullptr, first, rows - first < block_rows ? rows - first : block_rows);
    for (size_t o = 0; o < out_features; ++o) {
      Vector<T> sum = zero<T>();
      for (size_t l = 0; l < block.padded; ++l) block.factor[l] = l < block.present ? g[(first + l) * out_features + o] : T(0);
      for (size_t l = 0; l < block.padded; l += lanes<T>) sum += load(block.factor + l);
      block_gradient<false>(block, block, in_features, true, weight_gradient + o * in_features);
      if (bias_gradient) bias_gradient[o] += sum_lanes<T>(sum);
    }
  }
}

// input_gradient[rows, in] = g[rows, out] weight[out, in]
template <class T>
void linear_input_gradient(size_t rows, size_t in_features, size_t out_features, const T* g, const T* weight, T* input_gradient) {
  each_vector<T>(in_features, [&](size_t j, size_t count) __attribute__((always_inline)) {
    for (size_t r = 0; r < rows; ++r) {
      Vector<T> sum = broadcast(g[r * out_features]) * load_up_to(weight + j, count);
      for (size_t o = 1; o < out_features; ++o)
        sum = fma(broadcast(g[r * out_features + o]), load_up_to(weight + o * in_features + j, count), sum);
      store_up_to(input_gradient + r * in_features + j, sum, count);
    }
  });
}

// The targets of a block for one output come where its factors will be.
template <class T>
inline void block_targets(const LinearStep<T>& s, size_t first, size_t o, Block<T>& block) {
  if (!s.target)
    for (size_t l = 0; l < block.present; ++l) block.factor[l] = T(0);
  else if (!s.index && s.out_features == 1)
    __builtin_memcpy(block.factor, s.target + first, block.present * sizeof(T));
  else
    for (size_t l = 0; l < block.present; ++l) block.factor[l] = s.target[(s.index ? s.index[first + l] : first + l) * s.out_features + o];
  for (size_t l = block.present; l < block.padded; ++l) block.factor[l] = T(0);
}

// The residuals r of a block, residual_of(l) those of a group, become its factors, 2 r; returns the sum of r^2 and adds that of 2 r to the
// bias gradient.
template <class T, class Residuals>
inline double block_factors(Block<T>& block, const Residuals& residual_of, bool accumulate, T* bias_gradient) {
  Vector<T> bias_sum = zero<T>(), loss_sum = zero<T>();
  for (size_t l = 0; l < block.padded; l += lanes<T>) {
    Vector<T> residual = residual_of(l);
    if (block.present - l < lanes<T>) {
      store(block.factor + l, residual);
      residual = load_partial(block.factor + l, block.present - l);
    }
    const Vector<T> gradient = SquaredError::gradient(residual);
    store(block.factor + l, gradient);
    bias_sum += gradient;
    loss_sum += SquaredError::term(residual);
  }
  if (bias_gradient) *bias_gradient = (accumulate ? *bias_gradient : T(0)) + sum_lanes<T>(bias_sum);
  return (double)sum_lanes<T>(loss_sum);
}

// One visit to each row, which stays in the registers between its dot product and its share of the gradient, whose sums stay there too:
// group_dot and block_gradient, bit by bit. factor[l] holds the target and becomes the residual. Ahead: asks for lines `ahead` elements
// further on. Not inline: each number of vectors is to have all registers, and as part of linear_step rows of 200 features took up to 1.3
// times as long.
template <int Vectors, bool Ahead, class T>
__attribute__((noinline)) void block_in_registers(Block<T>& block, size_t in_features, size_t ahead, const T* weight, T bias,
                                                  bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  constexpr int chains = chains_for<T>(Vectors);
  const size_t tail = in_features - (Vectors - 1) * w;
  Vector<T> weights[Vectors], sum[chains][Vectors];
  for (int v = 0; v < Vectors; ++v) {
    weights[v] = load_up_to(weight + v * w, in_features - v * w);
    for (int c = 0; c < chains; ++c) sum[c][v] = zero<T>();
  }
  for (size_t l = 0; l < block.present; l += chains)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const T* const row = block.row[l + c];
      Vector<T> x[Vectors], products = zero<T>();
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        x[v] = v + 1 < Vectors ? load(row + v * w) : load_up_to(row + v * w, tail);
        if (Ahead && v * lane_bytes % 64 == 0) __builtin_prefetch(row + ahead + v * w, 0, 2);
        products = fma(x[v], weights[v], products);
      }
      T residual = sum_lanes<T>(products) + bias - block.factor[l + c];
      if (chains > 1 && l + c >= block.present) residual = T(0);
      block.factor[l + c] = residual;
      const Vector<T> factor = broadcast(SquaredError::gradient(residual));
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[c][v] = fma(x[v], factor, sum[c][v]);
    }
  tail < w ? add_chains<true>(sum, tail, accumulate, gradient) : add_chains<false>(sum, tail, accumulate, gradient);
}

// The same for rows of one vector, a group at a time, so that its sums over lanes are made together: 1.05 to 1.2 times as fast in the
// cache, 1.4 to 1.7 from memory. Groups of 8 rows of two vectors gain nothing.
template <bool Ahead, class T>
__attribute__((noinline)) void block_of_short_rows(Block<T>& block, size_t in_features, size_t ahead, const T* weight, T bias,
                                                   bool accumulate, T* gradient) {
  constexpr int w = (int)lanes<T>, chains = chains_for<T>(1);
  const Vector<T> weights = load_up_to(weight, in_features);
  Vector<T> sum[chains][1];
  for (int c = 0; c < chains; ++c) sum[c][0] = zero<T>();
  const auto visit = [&](size_t l, size_t present) __attribute__((always_inline)) {
    Vector<T> x[w];
#pragma GCC unroll 16
    for (int r = 0; r < w; ++r) {
      x[r] = load_up_to(block.row[l + r], in_features);
      if (Ahead) __builtin_prefetch(block.row[l + r] + ahead, 0, 2);
    }
    // With zero, from which the others' chains of additions begin: where all products are -0, the sum is 0.
    const Vector<T> products = sum_each<0, w>([&](int r) { return x[r] * weights; }) + zero<T>();
    const Vector<T> residual = products + broadcast(bias) - load(block.factor + l);
    store(block.factor + l, residual);
    T factor[w] __attribute__((aligned(lane_bytes)));
    store(factor, SquaredError::gradient(residual));
    for (size_t r = present; r < w; ++r) factor[r] = T(0);
    keep_in_memory(factor);  // as in linear_run
#pragma GCC unroll 16
    for (int r = 0; r < w; ++r)
      if (r - r % chains < (int)present) sum[r % chains][0] = fma(x[r], broadcast(factor[r]), sum[r % chains][0]);
  };
  size_t l = 0;
  for (; l + w <= block.present; l += w) visit(l, (size_t)w);
  if (l < block.present) visit(l, block.present - l);
  add_chains<true>(sum, in_features, accumulate, gradient);
}

// The same for a number of vectors that is known only now.
template <int Most, bool Ahead, class T>
inline void block_in_registers_of(size_t vectors, Block<T>& block, size_t in_features, size_t ahead, const T* weight, T bias,
                                  bool accumulate, T* gradient) {
  if constexpr (Most == 1)
    block_of_short_rows<Ahead>(block, in_features, ahead, weight, bias, accumulate, gradient);
  else if (vectors == Most)
    block_in_registers<Most, Ahead>(block, in_features, ahead, weight, bias, accumulate, gradient);
  else
    block_in_registers_of<Most - 1, Ahead>(vectors, block, in_features, ahead, weight, bias, accumulate, gradient);
}

// The same for longer rows from memory: the dot product of a row together with the gradient of the row before it, which is in L1 then, so
// that reading from memory does not pause. Asks for what lies `ahead` elements further on.
template <class T>
inline void block_in_turns(Block<T>& block, size_t in_features, size_t ahead, const T* weight, T bias, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  T sums[most_turn_bytes / sizeof(T)] __attribute__((aligned(lane_bytes)));
  Vector<T> factor = zero<T>();  // of the row before
  const auto turn = [&](size_t l, auto dot, auto gradient_before) __attribute__((always_inline)) {
    const T *const row = block.row[dot.value ? l : l - 1], *const before = block.row[gradient_before.value ? l - 1 : l];
    Vector<T> products = zero<T>();
    const auto visit = [&](size_t j, const auto& read) __attribute__((always_inline)) {
      if (dot.value) {
        __builtin_prefetch(row + j + ahead, 0, 2);
        products = fma(read(row + j), read(weight + j), products);
      }
      store(sums + j, gradient_before.value ? fma(read(before + j), factor, load(sums + j)) : zero<T>());
    };
    size_t j = 0;
    for (; j + w <= in_features; j += w) visit(j, load<T>);
    if (j < in_features) visit(j, [&](const T* p) { return load_partial(p, in_features - j); });
    if (!dot.value) return;
    block.factor[l] = sum_lanes<T>(products) + bias - block.factor[l];
    factor = broadcast(SquaredError::gradient(block.factor[l]));
  };
  turn(0, Constant<true>{}, Constant<false>{});
  for (size_t l = 1; l < block.present; ++l) turn(l, Constant<true>{}, Constant<true>{});
  turn(block.present, Constant<false>{}, Constant<true>{});
  for (size_t j = 0; j < in_features; j += w) {
    const size_t count = in_features - j;
    const Vector<T> sum = load(sums + j);
    store_up_to(gradient + j, accumulate ? load_up_to(gradient + j, count) + sum : sum, count);
  }
}

// Asks for the rows of a block from `first` on: those for which the block before it has none to do so along with.
template <class T>
inline void fetch_rows(const Block<T>& block, size_t first, size_t in_features) {
  for (size_t l = first; l < block.present; ++l) {
    for (size_t j = 0; j < in_features; j += lanes<T>) __builtin_prefetch(block.row[l] + j, 0, 2);
    __builtin_prefetch(block.row[l] + in_features - 1, 0, 2);
  }
}

// One pass: residual r = x weight^T + bias - target, gradient 2 r^T x; returns the sum of r^2.
template <class T>
double linear_step(const LinearStep<T>& s) {
  const size_t in = s.in_features;
  const size_t block_rows = Block<T>::rows_for(in);
  const auto count_from = [&](size_t first, size_t end) { return end - first < block_rows ? end - first : block_rows; };
  // Rows from memory, one behind the other: to read them once and just so keeps more lines on their way, by the processor's prefetching,
  // than it takes requests for single ones (25 to 28 GB/s for a core of AMD's Zen 4, before 20). Shuffled rows are better asked for a block
  // at a time. In the cache one visit gains where the sums find room in the registers too, and a sum over lanes has enough products, or
  // those of a group are made together.
  const size_t vectors = (in + lanes<T> - 1) / lanes<T>;
  const bool in_order = s.prefetch && !s.index && in > 0 && in * sizeof(T) <= most_turn_bytes;
  const bool gains = vectors == 1 || (vectors >= 4 && 2 * vectors <= vector_registers);
  const bool in_registers = in_order ? vectors <= most_row_vectors : !s.prefetch && gains;
  const bool in_turns = in_order && !in_registers;
  // That prefetching ends with each page: lines of later ones are asked for, 16 KiB ahead and more (4 KiB ahead gives 18 GB/s, 2 KiB 15).
  // Rows in registers gain nothing by it on Zen 4, and 6 % (100 features, two threads) to 40 % (8 features) on Zen 3; from L3 there up to
  // 8 % are lost.
  const size_t ahead_in_order = in_order ? (2 * most_turn_bytes / (in * sizeof(T)) + 1) * s.x_stride : 0;
  Block<T> blocks[2];
  Block<T>*block = &blocks[0], *next = &blocks[1];
  block->gather(s.x, s.x_stride, s.index, 0, count_from(0, s.rows));
  double loss = 0;
  for (size_t first = 0; first < s.rows; first += block_rows) {
    const bool last = first + block->present == s.rows;
    const size_t following = last ? s.next : first + block->present, end = last ? s.next + s.rows_ahead : s.rows;
    const bool ahead = s.prefetch && in > 0 && !in_order && following < end;
    if (ahead || !last) next->gather(s.x, s.x_stride, s.index, following, count_from(following, end), block->padded);
    if (ahead) fetch_rows(*next, block->padded, in);
    if (ahead && s.index && s.target)  // the targets lie as scattered (without, 10 % slower)
      for (size_t l = 0; l < next->present; ++l) __builtin_prefetch(s.target + s.index[following + l] * s.out_features, 0, 2);
    for (size_t o = 0; o < s.out_features; ++o) {
      const T* const weight = s.weight + o * in;
      const T bias = s.bias ? s.bias[o] : T(0);
      T* const gradient = s.weight_gradient + o * in;
      block_targets(s, first, o, *block);
      const bool accumulate = first != 0;
      T* const bias_gradient = s.bias_gradient ? s.bias_gradient + o : nullptr;
      if (in_registers || in_turns) {
        if (in_turns)
          block_in_turns(*block, in, o == 0 ? ahead_in_order : 0, weight, bias, accumulate, gradient);
        else if (in_order && o == 0)
          block_in_registers_of<(int)most_row_vectors, true>(vectors, *block, in, ahead_in_order, weight, bias, accumulate, gradient);
        else
          block_in_registers_of<(int)most_row_vectors, false>(vectors, *block, in, 0, weight, bias, accumulate, gradient);
        loss += block_factors(*block, [&](size_t l) { return load(block->factor + l); }, accumulate, bias_gradient);
        continue;
      }
      const auto residual_of = [&](size_t l) __attribute__((always_inline)) {
        return group_dot(block->row + l, in, weight) + broadcast(bias) - load(block->factor + l);
      };
      loss += block_factors(*block, residual_of, accumulate, bias_gradient);
      if (ahead && o == 0)
        block_gradient<true>(*block, *next, in, accumulate, gradient);
      else
        block_gradient<false>(*block, *block, in, accumulate, gradient);
    }
    Block<T>* const done = block;
    block = next;
    next = done;
  }
  return loss;
}

}  // namespace
}  // namespace gdlib
