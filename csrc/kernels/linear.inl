// A linear layer with few outputs, and its fused training step.
//
// Rows are visited in blocks that stay in the L1 cache, each block twice: dot products first, then the gradient. A dot product keeps one
// accumulator vector per row and folds those of a group (one row for each lane) by one tree, so that lane l holds row l's sum; a gradient
// keeps several chains per vector of features, because one chain would wait for each addition. Accumulates in T; sums of losses are
// returned in double. Rows are read where they lie: shuffled rows are not copied.

namespace gdlib {
namespace {

// A block of rows, padded to whole groups: past the last row the first one stands in, and its results are dropped or weighed with zero.
template <class T>
struct Block {
  static constexpr size_t most = 64;  // rows: enough to pay for touching the gradient once a block
  static_assert(most % lanes<T> == 0, "a block holds whole groups");

  size_t present;
  size_t padded;
  const T* row[most];
  T factor[most] __attribute__((aligned(lane_bytes)));  // of each row in the gradient

  // Rows first, first + 1, ... of x, by way of the index where there is one.
  void gather(const T* x, size_t x_stride, const uint32_t* index, size_t first, size_t count) {
    present = count;
    padded = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
    if (index)
      for (size_t l = 0; l < count; ++l) row[l] = x + index[first + l] * x_stride;
    else
      for (size_t l = 0; l < count; ++l) row[l] = x + (first + l) * x_stride;
    for (size_t l = count; l < padded; ++l) row[l] = row[0];
  }

  static constexpr size_t most_bytes = 16 << 10;  // half of the smallest L1 in use

  // Rows that fit most_bytes; at least one group.
  static size_t rows_for(size_t in_features) {
    const size_t fitting = most_bytes / (in_features * sizeof(T) + 1) / lanes<T> * lanes<T>;
    return fitting < lanes<T> ? lanes<T> : fitting > most ? most : fitting;
  }
};

// Lane l of the result: row[l] . weight, for so many rows at a time; their number does not show in the bits.
template <int Together, class T>
inline Vector<T> group_dot(const T* const* row, size_t in_features, const T* weight) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[w];
  for (size_t first = 0; first < w; first += Together) {
#pragma GCC unroll 16
    for (size_t l = first; l < first + Together; ++l) sum[l] = zero<T>();
    size_t j = 0;
    for (; j + w <= in_features; j += w) {
      const Vector<T> wj = load(weight + j);
#pragma GCC unroll 16
      for (size_t l = first; l < first + Together; ++l) sum[l] = fma(load(row[l] + j), wj, sum[l]);
    }
    if (j < in_features) {
      const size_t tail = in_features - j;
      const Vector<T> wj = load_partial(weight + j, tail);
#pragma GCC unroll 16
      for (size_t l = first; l < first + Together; ++l) sum[l] = fma(load_partial(row[l] + j, tail), wj, sum[l]);
    }
  }
  return sum_each<0, (int)w>([&](int l) { return sum[l]; });
}

// What the gradient of a block asks the memory for.
enum class Ahead {
  nothing,
  rows,   // all of the next block
  trace,  // a line of every four vectors in the first half of the block behind this one, to keep the processor's own prefetching on its way
};

// gradient[Vectors * lanes] (+)= sum over the block of factor * row, for Vectors whole vectors of features or, with a tail, part of one.
// Ahead::rows: asks for the same features of the next block meanwhile, so that the memory is busy while the arithmetic is in the cache.
template <int Vectors, int Chains, bool Tail, Ahead Asked, class T>
inline void block_gradient_part(const Block<T>& block, const Block<T>& next, size_t j, size_t tail, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[Vectors][Chains];
  for (int v = 0; v < Vectors; ++v)
    for (int c = 0; c < Chains; ++c) sum[v][c] = zero<T>();
  for (size_t l = 0; l < block.padded; l += Chains)
#pragma GCC unroll 8
    for (int c = 0; c < Chains; ++c) {
      const Vector<T> factor = broadcast(block.factor[l + c]);
      const T* const row = block.row[l + c] + j;
      if (Asked == Ahead::rows)  // into L2: past it, a core of Zen 4 reads 10 instead of 15 GB/s
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) __builtin_prefetch(next.row[l + c] + j + v * w, 0, 2);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v][c] = fma(Tail ? load_partial(row, tail) : load(row + v * w), factor, sum[v][c]);
    }
  for (int v = 0; v < Vectors; ++v) {
    T* const out = gradient + j + v * w;
    Vector<T> total = !accumulate ? zero<T>() : Tail ? load_partial(out, tail) : load(out);
    for (int c = 0; c < Chains; c += 2) total += sum[v][c] + sum[v][c + 1];
    Tail ? store_partial(out, total, tail) : store(out, total);
  }
}

// gradient[in_features] (+)= sum over the block of factor[l] * row[l]
template <Ahead Asked, class T>
inline void block_gradient(const Block<T>& block, const Block<T>& next, size_t in_features, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  // Vectors x chains is 8 or fewer: the latency (4) times the ports (2) of a fused multiply-add. A group has 2 rows at least.
  constexpr int chains = w < 4 ? 2 : 4;
  const T* behind = block.row[block.present - 1] + in_features;
  size_t j = 0;
  for (; j + 4 * w <= in_features; j += 4 * w) {
    if (Asked == Ahead::trace)
      for (size_t l = 0; l < block.padded; l += 2, behind += 4 * w) __builtin_prefetch(behind, 0, 2);
    block_gradient_part<4, 2, false, Asked>(block, next, j, 0, accumulate, gradient);
  }
  for (; j + w <= in_features; j += w) block_gradient_part<1, chains, false, Asked>(block, next, j, 0, accumulate, gradient);
  if (j < in_features) block_gradient_part<1, chains, true, Asked>(block, next, j, in_features - j, accumulate, gradient);
}

// y[rows, out] = x[rows, in] weight^T + bias
template <class T>
void linear_forward(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride, const T* weight, const T* bias,
                    T* y) {
  constexpr size_t w = lanes<T>;
  Block<T> group;
  for (size_t first = 0; first < rows; first += w) {
    const size_t present = rows - first < w ? rows - first : w;
    group.gather(x, x_stride, nullptr, first, present);
    for (size_t o = 0; o < out_features; ++o) {
      Vector<T> output = group_dot<(int)w>(group.row, in_features, weight + o * in_features);
      if (bias) output += broadcast(bias[o]);
      if (out_features == 1)
        store_up_to(y + first, output, present);
      else
        for (size_t l = 0; l < present; ++l) y[(first + l) * out_features + o] = output[l];
    }
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
      block_gradient<Ahead::nothing>(block, block, in_features, true, weight_gradient + o * in_features);
      if (bias_gradient) bias_gradient[o] += sum_lanes<T>(sum);
    }
  }
}

// input_gradient[rows, in] = g[rows, out] weight[out, in]
template <class T>
void linear_input_gradient(size_t rows, size_t in_features, size_t out_features, const T* g, const T* weight, T* input_gradient) {
  for (size_t j = 0; j < in_features; j += lanes<T>) {
    const size_t count = in_features - j;
    for (size_t r = 0; r < rows; ++r) {
      Vector<T> sum = broadcast(g[r * out_features]) * load_up_to(weight + j, count);
      for (size_t o = 1; o < out_features; ++o)
        sum = fma(broadcast(g[r * out_features + o]), load_up_to(weight + o * in_features + j, count), sum);
      store_up_to(input_gradient + r * in_features + j, sum, count);
    }
  }
}

// The residuals of a block for one output become its factors, 2 r; returns the sum of r^2 and adds that of 2 r to the bias gradient.
template <bool InOrder, class T>
inline double block_residuals(const LinearStep<T>& s, size_t first, size_t o, Block<T>& block) {
  constexpr size_t w = lanes<T>;
  if (s.target)
    for (size_t l = 0; l < block.padded; ++l) {
      const size_t r = first + (l < block.present ? l : 0);
      block.factor[l] = s.target[(s.index ? s.index[r] : r) * s.out_features + o];
    }
  Vector<T> bias_sum = zero<T>(), loss_sum = zero<T>();
  for (size_t l = 0; l < block.padded; l += w) {
    Vector<T> residual = group_dot<InOrder ? 1 : (int)w>(block.row + l, s.in_features, s.weight + o * s.in_features);
    if (s.bias) residual += broadcast(s.bias[o]);
    if (s.target) residual -= load(block.factor + l);
    if (block.present - l < w) {
      store(block.factor + l, residual);
      residual = load_partial(block.factor + l, block.present - l);
    }
    const Vector<T> gradient = SquaredError::gradient(residual);
    store(block.factor + l, gradient);
    bias_sum += gradient;
    loss_sum += SquaredError::term(residual);
  }
  if (s.bias_gradient) s.bias_gradient[o] = (first ? s.bias_gradient[o] : T(0)) + sum_lanes<T>(bias_sum);
  return (double)sum_lanes<T>(loss_sum);
}

// One pass: residual r = x weight^T + bias - target, gradient 2 r^T x; returns the sum of r^2.
template <class T>
double linear_step(const LinearStep<T>& s) {
  const size_t in = s.in_features, known = s.rows + s.rows_ahead;
  const size_t block_rows = Block<T>::rows_for(in);
  const auto count_from = [&](size_t first, size_t end) { return end - first < block_rows ? end - first : block_rows; };
  // Rows from memory, one behind the other: read just so, the processor's own prefetching keeps more of them on their way than it takes
  // requests for single lines (20 against 16 GB/s for a core of AMD's Zen 4); a trace of requests keeps it on its way during the gradient
  // of a block beyond L1, which waits for L2. The gradient of longer rows lasts too long for that; shuffled ones are nowhere to be guessed.
  constexpr size_t most_in_order = 8 << 10;
  const bool in_order = s.prefetch && !s.index && in * sizeof(T) <= most_in_order;
  const bool trace = in_order && block_rows * in * sizeof(T) > Block<T>::most_bytes;
  Block<T> blocks[2];
  Block<T>*block = &blocks[0], *next = &blocks[1];
  block->gather(s.x, s.x_stride, s.index, 0, count_from(0, s.rows));
  double loss = 0;
  for (size_t first = 0; first < s.rows; first += block_rows) {
    const size_t following = first + block->present;
    const bool ahead = s.prefetch && !in_order && following < known;
    if (ahead || following < s.rows)
      next->gather(s.x, s.x_stride, s.index, following, count_from(following, following < s.rows ? s.rows : known));
    for (size_t o = 0; o < s.out_features; ++o) {
      loss += in_order ? block_residuals<true>(s, first, o, *block) : block_residuals<false>(s, first, o, *block);
      T* const gradient = s.weight_gradient + o * in;
      if (ahead && o == 0 && next->padded >= block->padded)
        block_gradient<Ahead::rows>(*block, *next, in, first != 0, gradient);
      else if (trace && o == 0)
        block_gradient<Ahead::trace>(*block, *block, in, first != 0, gradient);
      else
        block_gradient<Ahead::nothing>(*block, *block, in, first != 0, gradient);
    }
    Block<T>* const done = block;
    block = next;
    next = done;
  }
  return loss;
}

}  // namespace
}  // namespace gdlib
