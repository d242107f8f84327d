// Many steps of mini-batch SGD on one output with few features, without leaving the registers: more than twice as quick on 10 features in
// batches of 32 as a visit to each batch (linear_step), an update and the calls between them.
//
// A row is extended to [x, 1, target] and the parameters to [weight, bias, -1], so that one dot product is the residual, and the sum of
// residual * row holds the gradient of weight and bias in the order in which they lie in memory. Accumulates in T; losses leave in double.

namespace gdlib {
namespace {

// Of an extended row: with the parameters and four chains of sums of the gradient they take 24 of 32 registers.
constexpr int most_run_vectors = 4;

// How the extended row lies over `Vectors` vectors: the features, a one (without bias: left out), and in the last vector the target.
template <class T, int Vectors>
struct ExtendedRow {
  static constexpr size_t w = lanes<T>;
  size_t present[Vectors];  // features in each vector
  Vector<T> ones[Vectors];  // 1 at the place of the bias
  Lane<T> target_lane;

  ExtendedRow(size_t in_features, bool has_bias) : target_lane((in_features + has_bias) % w) {
    for (size_t v = 0; v < Vectors; ++v) {
      present[v] = in_features < v * w ? 0 : in_features - v * w < w ? in_features - v * w : w;
      ones[v] = zero<T>();
    }
    if (has_bias) ones[in_features / w][in_features % w] = T(1);
  }

  void read(const T* x, T target, Vector<T>* row) const {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load_first(x + v * w, present[v]) + ones[v];
    row[Vectors - 1] = target_lane.replaced(row[Vectors - 1], target);
  }
};

// Many epochs read rows that were extended once: a third fewer instructions a row, and one place of memory for a row and its target.
template <class T, int Vectors>
void extend_rows_of(const LinearRun<T>& run, T* extended) {
  const ExtendedRow<T, Vectors> form(run.in_features, run.has_bias);
  for (size_t r = 0; r < run.rows; ++r) {
    Vector<T> row[Vectors];
    form.read(run.x + r * run.x_stride, run.target[r], row);
    for (int v = 0; v < Vectors; ++v) store(extended + (r * Vectors + v) * lanes<T>, row[v]);
  }
}

template <class T, int Vectors, bool Indexed, bool Extended>
size_t linear_run_of(const LinearRun<T>& run) {
  constexpr int w = (int)lanes<T>;
  // Rows by an index are asked for so many rows before, one or two microseconds from memory. Rows in order are better left to a Zen 4's
  // own prefetching, 25 instead of 14 GB/s; a Zen 5 reads 10 by it, and 24 to 44 of up to 40 features that are asked for. Extended rows of
  // less than a line lie close together (0.8 times the time without).
  constexpr size_t ahead = 64;
  constexpr bool asks = Indexed && (!Extended || Vectors * lane_bytes >= 64);
  const size_t rows_asked_ahead = elements_ahead<T>(run.in_features, 1);
  const size_t known = run.rows + run.rows_ahead, last = run.in_features > 0 ? run.in_features - 1 : 0;
  // Of additions to the gradient: latency (4) over their number hides behind the loads. Four of two vectors are more than 16 registers hold
  // (3 to 7 % slower).
  constexpr int chains = w < 4 || (Vectors > 1 && vector_registers == 16) ? 2 : 4;
  const ExtendedRow<T, Vectors> form(run.in_features, run.has_bias);
  const size_t parameters = run.in_features + (run.has_bias ? 1 : 0);

  const SgdOptions<T>& options = run.options;
  Vector<T> theta[Vectors], buffer[Vectors], decay[Vectors], lr[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    theta[v] = buffer[v] = decay[v] = lr[v] = zero<T>();
    for (int l = 0; l < w; ++l) {
      const size_t place = (size_t)(v * w + l);
      if (place == parameters) theta[v][l] = T(-1);  // takes the target off
      if (place >= parameters) continue;             // lanes without a parameter never move
      theta[v][l] = run.parameters[place];
      if (run.momentum) buffer[v][l] = run.momentum[place];
      decay[v][l] = options.weight_decay;
      lr[v][l] = -options.lr;
    }
  }
  const SgdMomentum<T> with_momentum(options);
  bool first_step = run.first_step;

  size_t steps = 0;
  for (size_t begin = 0; begin < run.rows; begin += run.batch_size) {
    const size_t rows = run.rows - begin < run.batch_size ? run.rows - begin : run.batch_size;
    Vector<T> gradient[chains][Vectors], loss = zero<T>();
    for (int c = 0; c < chains; ++c)
      for (int v = 0; v < Vectors; ++v) gradient[c][v] = zero<T>();

    const auto group = [&](size_t first, size_t present, auto whole) {
      if (asks && first + ahead + w <= known) {
#pragma GCC unroll 16
        for (int l = 0; l < w; ++l) {
          if (!whole.value && (size_t)l >= present) break;
          const size_t number = run.index[first + ahead + l];
          if constexpr (Extended) {
            const T* const row = run.extended + number * (Vectors * w);
#pragma GCC unroll 4
            for (size_t i = 0; i < Vectors * w; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 2);
          } else {
            const T* const x = run.x + number * run.x_stride;
#pragma GCC unroll 4
            for (int v = 0; v + 1 < Vectors; ++v) __builtin_prefetch(x + v * w, 0, 2);
            // The last vector may hold no feature, and its last one may lie in a line of its own.
            __builtin_prefetch(x + (last < (Vectors - 1) * w ? last : (Vectors - 1) * w), 0, 2);
            __builtin_prefetch(x + last, 0, 2);
            __builtin_prefetch(run.target + number, 0, 2);
          }
        }
      }
      if (!Indexed && !Extended && run.by_requests) {
        const size_t from = first + rows_asked_ahead;
        __builtin_prefetch(run.target + from, 0, 3);
#pragma GCC unroll 16
        for (int l = 0; l < w; ++l) {
          if (!whole.value && (size_t)l >= present) break;
          const T* const x = run.x + (from + l) * run.x_stride;
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v)
            if (v == 0 || (size_t)(v * w) <= last) __builtin_prefetch(x + v * w, 0, 3);
        }
      }
      Vector<T> row[w][Vectors];
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) {
        if (whole.value || (size_t)l < present) {
          const size_t number = Indexed ? run.index[first + l] : first + l;
          if constexpr (Extended) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) row[l][v] = load(run.extended + (number * Vectors + v) * w);
          } else {
            form.read(run.x + number * run.x_stride, run.target[number], row[l]);
          }
        } else {
          for (int v = 0; v < Vectors; ++v) row[l][v] = zero<T>();
        }
      }
      const Vector<T> residual = sum_each<0, w>([&](int l) {
        Vector<T> products = row[l][0] * theta[0];
#pragma GCC unroll 4
        for (int v = 1; v < Vectors; ++v) products = fma(row[l][v], theta[v], products);
        return products;
      });
      loss += SquaredError::term(residual);
      T factor[w] __attribute__((aligned(lane_bytes)));
      store(factor, residual);
      keep_in_memory(factor);  // a broadcast from memory costs nothing beside the multiply-add; from a register it is a permutation
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) gradient[l % chains][v] = fma(broadcast(factor[l]), row[l][v], gradient[l % chains][v]);
    };
    size_t r = 0;
    for (; r + w <= rows; r += w) group(begin + r, (size_t)w, Constant<true>{});
    if (r < rows) group(begin + r, rows - r, Constant<false>{});

    const T sum = sum_lanes<T>(loss);
    if (!(sum - sum == T(0))) break;  // NaN or infinite: this step is not made
    *run.loss += (double)sum;
    const Vector<T> scale = broadcast(SquaredError::gradient(options.maximize ? T(-1) : T(1)) * (run.mean ? T(1.0 / (double)rows) : T(1)));
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Vector<T> total = zero<T>();
#pragma GCC unroll 4
      for (int c = 0; c < chains; c += 2) total += gradient[c][v] + gradient[c + 1][v];
      Vector<T> d = fma(decay[v], theta[v], scale * total);
      if (run.momentum) d = with_momentum(d, first_step, buffer[v]);
      theta[v] = lr[v] != zero<T>() ? fma(lr[v], d, theta[v]) : theta[v];  // d of the others need not be finite
    }
    first_step = false;
    ++steps;
  }
  for (size_t place = 0; place < parameters; ++place) {
    run.parameters[place] = theta[place / w][place % w];
    if (run.momentum) run.momentum[place] = buffer[place / w][place % w];
  }
  return steps;
}

template <class T, int Vectors = 1>
void extend_rows(const LinearRun<T>& run, T* extended) {
  if constexpr (Vectors < most_run_vectors)
    if (extended_vectors(run.in_features, run.has_bias, lanes<T>) > Vectors) return extend_rows<T, Vectors + 1>(run, extended);
  extend_rows_of<T, Vectors>(run, extended);
}

template <class T, int Vectors = 1>
size_t linear_run(const LinearRun<T>& run) {
  if constexpr (Vectors < most_run_vectors)
    if (extended_vectors(run.in_features, run.has_bias, lanes<T>) > Vectors) return linear_run<T, Vectors + 1>(run);
  if (run.extended) return run.index ? linear_run_of<T, Vectors, true, true>(run) : linear_run_of<T, Vectors, false, true>(run);
  return run.index ? linear_run_of<T, Vectors, true, false>(run) : linear_run_of<T, Vectors, false, false>(run);
}

}  // namespace
}  // namespace gdlib
