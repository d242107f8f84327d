// The fused training step of a linear layer with few outputs.
//
// Rows that the registers can hold are read once: dot product and gradient, then the next row; longer ones in order from memory too, the
// dot product of one together with the gradient of the one before, or rows of two steps so. The others are visited twice: dot products of a
// block first, one accumulator vector for each row, then its gradient, some features at a time. All ways make the same additions.
// Accumulates in T; sums of losses are returned in double.

namespace gdlib {
namespace {

// Rows up to so many bytes are read in turns: two of them, the weights and the sums of the gradient fill the smallest L1 in use, 32 KiB.
// (Of two steps at once part of that lies in L2, and they gain all the same.)
constexpr size_t most_turn_bytes = 8 << 10;

// Rows up to so many vectors are held in the registers (where there are 16, the compiler reads some again from L1). By lines those of more
// than 8 are as fast in turns, and of more than 12 faster (100 features in float64 34 GB/s for 31, a core of Zen 5).
constexpr size_t most_row_vectors = 16, most_row_vectors_by_lines = 8;

constexpr size_t most_outputs = few_outputs - 1, most_outputs_together = 3;  // of one step, and of two that take turns

// Rows of a section: those of a block or, of rows that are always read in turns, of as many blocks as make up 64 rows at most. One output
// reads such rows from memory once, they do not have to stay in L1, and what a section costs at its ends, a turn that reads no row and a
// pass over the gradient, is rare. Sections show in the bits, so that the processor must not decide on them.
template <class T>
inline size_t rows_of_section(size_t in_features) {
  const size_t block = Block<T>::rows_for(in_features);
  const bool several = in_features > most_row_vectors * lanes<T> && in_features * sizeof(T) <= most_turn_bytes;
  return several ? Block<T>::most / block * block : block;
}

// What the blocks of a section hand on for one output.
template <class T>
struct Sums {
  Vector<T> bias, loss;
  T gradient[most_turn_bytes / sizeof(T)] __attribute__((aligned(lane_bytes)));
};

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

// The residuals r of a block, residual_of(l) those of a group, become its factors, 2 r. At the end of its section, returns the sum of r^2
// and adds that of 2 r to the bias gradient.
template <class T, class Residuals>
inline double block_factors(Block<T>& block, const Residuals& residual_of, const Section<T>& section, Sums<T>& sums, T* bias_gradient) {
  Vector<T> bias_sum = section.begins ? zero<T>() : sums.bias, loss_sum = section.begins ? zero<T>() : sums.loss;
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
  if (!section.ends) {
    sums.bias = bias_sum;
    sums.loss = loss_sum;
    return 0;
  }
  if (bias_gradient) *bias_gradient = (section.accumulate ? *bias_gradient : T(0)) + sum_lanes<T>(bias_sum);
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
  constexpr int level = lane_bytes == 64 && Vectors >= 4 ? 3 : 2;  // L1, by which a core of Zen 5 reads 1.06 to 1.13 times as fast, or L2
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
        if (Ahead && v * lane_bytes % 64 == 0) __builtin_prefetch(row + ahead + v * w, 0, level);
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

// Asks for the rows of a block from `first` on: those for which the block before it has none to do so along with.
template <class T>
inline void fetch_rows(const Block<T>& block, size_t first, size_t in_features) {
  for (size_t l = first; l < block.present; ++l) {
    for (size_t j = 0; j < in_features; j += lanes<T>) __builtin_prefetch(block.row[l] + j, 0, 2);
    __builtin_prefetch(block.row[l] + in_features - 1, 0, 2);
  }
}

template <class T>
inline size_t vectors_of(const LinearStep<T>& s) {
  return (s.in_features + lanes<T> - 1) / lanes<T>;
}

// Rows from memory, one behind the other, that are read once: just so the processor's prefetching keeps more lines on their way than
// requests for single ones do (25 to 28 GB/s for a core of AMD's Zen 4, with requests 20). Shuffled rows are better asked for a block at a
// time.
template <class T>
inline bool reads_in_order(const LinearStep<T>& s) {
  return s.prefetch && !s.index && s.in_features > 0 && s.in_features * sizeof(T) <= most_turn_bytes;
}

// Whether rows in order are read by whole lines.
template <class T>
inline bool reads_by_lines(const LinearStep<T>& s) {
  return lane_bytes == 64 && s.by_requests;
}

// Whether rows that are held in registers are better asked for ahead: with AVX-512 a core of Zen 4 reads those of several whole lines 1.05
// to 1.25 times as fast without (100 features 22 GB/s for 18.5, 256 25 for 20) and shorter ones as fast either way; one of Zen 5 gains by
// it (100 features 36 GB/s for 21), as one of Zen 3 does (elements_ahead).
template <class T>
inline bool asks_in_order(const LinearStep<T>& s) {
  return lane_bytes < 64 || vectors_of(s) < 4 || s.by_requests;
}

// Visits in turns from row `first` on, of N steps with the same weights at once, while all have equally many rows left for a section. Adds
// to their losses; returns the first row that is left. One output reads a section once; several do so block by block, as these stay in L1.
// `sums` has a place for each output.
template <int N, class T>
size_t visit_in_turns(const LinearStep<T>* const (&s)[N], size_t first, double* losses, Sums<T>* const (&sums)[N]) {
  const bool by_lines = reads_by_lines(*s[0]);
  const size_t in = s[0]->in_features, out = s[0]->out_features;
  const size_t ahead = by_lines ? elements_ahead_by_lines<T>(in, s[0]->x_stride) : elements_ahead<T>(in, s[0]->x_stride);
  const size_t section_rows = rows_of_section<T>(in), block_rows = out == 1 ? section_rows : Block<T>::rows_for(in);
  Block<T> block[N];
  for (;; first += section_rows) {
    size_t rows = 0;
    for (int n = 0; n < N; ++n) {
      const size_t left = first < s[n]->rows ? s[n]->rows - first : 0, count = left < section_rows ? left : section_rows;
      if (count == 0 || (n > 0 && count != rows)) return first;
      rows = count;
    }
    for (size_t begin = 0; begin < rows; begin += block_rows) {
      const bool ends = rows - begin <= block_rows;
      for (int n = 0; n < N; ++n) block[n].gather(s[n]->x, s[n]->x_stride, nullptr, first + begin, ends ? rows - begin : block_rows);
      for (size_t o = 0; o < out; ++o) {
        Section<T> section[N];
        for (int n = 0; n < N; ++n) {
          block_targets(*s[n], first + begin, o, block[n]);
          section[n] = {begin == 0, ends, first != 0, sums[n][o].gradient, s[n]->weight_gradient + o * in};
        }
        const auto visit = [&](auto lines) {
          blocks_in_turns<lines.value>(block, in, o == 0 ? ahead : 0, s[0]->weight + o * in, s[0]->bias ? s[0]->bias[o] : T(0), section);
        };
        by_lines ? visit(Constant<N == 1 && lane_bytes == 64>{}) : visit(Constant<false>{});
        for (int n = 0; n < N; ++n) {
          T* const bias_gradient = s[n]->bias_gradient ? s[n]->bias_gradient + o : nullptr;
          const auto residual_of = [&](size_t l) { return load(block[n].factor + l); };
          losses[n] += block_factors(block[n], residual_of, section[n], sums[n][o], bias_gradient);
        }
      }
    }
  }
}

// One pass: residual r = x weight^T + bias - target, gradient 2 r^T x; returns the sum of r^2.
template <class T>
double linear_step(const LinearStep<T>& s) {
  const size_t in = s.in_features;
  const size_t block_rows = Block<T>::rows_for(in), section_rows = rows_of_section<T>(in);
  const auto count_from = [&](size_t first, size_t end) { return end - first < block_rows ? end - first : block_rows; };
  // In the cache one visit gains where the sums find room in the registers too, and a sum over lanes has enough products, or those of a
  // group are made together.
  const size_t vectors = vectors_of(s);
  const bool in_order = reads_in_order(s);
  const bool gains = vectors == 1 || (vectors >= 4 && 2 * vectors <= vector_registers);
  const size_t most_held = reads_by_lines(s) ? most_row_vectors_by_lines : most_row_vectors;
  const bool in_registers = in_order ? vectors <= most_held : !s.prefetch && gains;
  const bool asks = in_order && asks_in_order(s);
  double loss = 0;
  Sums<T> sums[most_outputs];
  if (in_order && !in_registers) {
    visit_in_turns({&s}, 0, &loss, {&sums[0]});
    return loss;
  }
  const size_t ahead_in_order = in_order ? elements_ahead<T>(in, s.x_stride) : 0;
  Block<T> blocks[2];
  Block<T>*block = &blocks[0], *next = &blocks[1];
  block->gather(s.x, s.x_stride, s.index, 0, count_from(0, s.rows));
  size_t section_begin = 0;
  for (size_t first = 0; first < s.rows; first += block_rows) {
    const bool last = first + block->present == s.rows;
    const size_t following = last ? s.next : first + block->present, end = last ? s.next + s.rows_ahead : s.rows;
    const bool ahead = s.prefetch && in > 0 && !in_order && following < end;
    if (ahead || !last) next->gather(s.x, s.x_stride, s.index, following, count_from(following, end), block->padded);
    if (ahead) fetch_rows(*next, block->padded, in);
    if (ahead && s.index && s.target)  // the targets lie as scattered (without, 10 % slower)
      for (size_t l = 0; l < next->present; ++l) __builtin_prefetch(s.target + s.index[following + l] * s.out_features, 0, 2);
    const bool ends = last || following == section_begin + section_rows;  // the section
    for (size_t o = 0; o < s.out_features; ++o) {
      const T* const weight = s.weight + o * in;
      const T bias = s.bias ? s.bias[o] : T(0);
      T* const gradient = s.weight_gradient + o * in;
      block_targets(s, first, o, *block);
      const bool accumulate = section_begin != 0;
      const Section<T> section{first == section_begin, ends, accumulate, sums[o].gradient, gradient};
      T* const bias_gradient = s.bias_gradient ? s.bias_gradient + o : nullptr;
      if (in_registers) {
        if (asks && o == 0)
          block_in_registers_of<(int)most_row_vectors, true>(vectors, *block, in, ahead_in_order, weight, bias, accumulate, gradient);
        else
          block_in_registers_of<(int)most_row_vectors, false>(vectors, *block, in, 0, weight, bias, accumulate, gradient);
        loss += block_factors(*block, [&](size_t l) { return load(block->factor + l); }, section, sums[o], bias_gradient);
        continue;
      }
      const auto residual_of = [&](size_t l) __attribute__((always_inline)) {
        return group_dot(block->row + l, in, weight) + broadcast(bias) - load(block->factor + l);
      };
      loss += block_factors(*block, residual_of, section, sums[o], bias_gradient);
      if (ahead && o == 0)
        block_gradient<true>(*block, *next, in, section);
      else
        block_gradient<false>(*block, *block, in, section);
    }
    if (ends) section_begin = following;
    Block<T>* const done = block;
    block = next;
    next = done;
  }
  return loss;
}

// Whether two steps whose rows lie apart gain by taking turns row by row. From memory in order a core of Zen 3 reads two streams at 20 GB/s
// and one at 15, and the chains of additions of two rows overlap: 1.1 to 1.3 times as fast. From L3, rows that the registers hold lose up
// to 28 %; 5 and 7 outputs lost 15 to 25 % (2,000 features), as blocks of two steps are too much for L1, 1 to 3 nothing. With vectors of a
// line each one stream comes near the bandwidth of a core (Zen 4; two were not measured there).
template <class T>
bool gain_together(const LinearStep<T>& s) {
  constexpr size_t least_vectors = 8;  // rows of 4 and 5 lost up to a fourth
  const size_t vectors = vectors_of(s);
  const bool gains = vectors > most_row_vectors || (vectors >= least_vectors && s.from_memory);
  return lane_bytes < 64 && reads_in_order(s) && s.out_features <= most_outputs_together && gains;
}

template <class T>
void linear_steps(const LinearStep<T>* s, double* losses) {
  losses[0] = losses[1] = 0;
  Sums<T> sums[2][most_outputs_together];
  const size_t first = visit_in_turns({&s[0], &s[1]}, 0, losses, {sums[0], sums[1]});
  for (int n = 0; n < 2; ++n) visit_in_turns({&s[n]}, first, losses + n, {sums[n]});
}

}  // namespace
}  // namespace gdlib
