// A linear layer with few outputs, and its fused training step: rows are visited in groups of one vector's lanes.
//
// A dot product keeps one accumulator vector per row and folds all of a group's accumulators by one tree, so that lane l holds row l's
// sum; a gradient keeps several chains per vector of features, because one chain would wait for each addition. Accumulates in T; sums of
// losses are returned in double. Rows are read where they lie: shuffled rows are not copied.

namespace gdlib {
namespace {

// Pointers to the rows of one group. Past the last row the first one stands in: its results are dropped.
template <class T>
struct Group {
  const T* row[lanes<T>];
};

// outputs[l] = row[l] . weight
template <class T>
inline Vector<T> group_dot(const Group<T>& group, size_t in_features, const T* weight) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[w];
#pragma GCC unroll 16
  for (size_t l = 0; l < w; ++l) sum[l] = zero<T>();
  size_t j = 0;
  for (; j + w <= in_features; j += w) {
    const Vector<T> wj = load(weight + j);
#pragma GCC unroll 16
    for (size_t l = 0; l < w; ++l) sum[l] = fma(load(group.row[l] + j), wj, sum[l]);
  }
  if (j < in_features) {
    const size_t tail = in_features - j;
    const Vector<T> wj = load_partial(weight + j, tail);
#pragma GCC unroll 16
    for (size_t l = 0; l < w; ++l) sum[l] = fma(load_partial(group.row[l] + j, tail), wj, sum[l]);
  }
  return sum_each<T>(sum);
}

// gradient[in_features] (+)= sum over the group of factor[l] * row[l]; factor is zero for absent rows.
template <class T>
inline void group_gradient(const Group<T>& group, size_t in_features, const T* factor, bool accumulate, T* gradient) {
  constexpr size_t w = lanes<T>;
  constexpr size_t chains = w < 4 ? w : 4;  // x 2 vectors of features below: 8, the latency (4) times the ports (2) of an FMA
  size_t j = 0;
  for (; j + 2 * w <= in_features; j += 2 * w) {
    Vector<T> sum[2][chains];
    for (size_t c = 0; c < chains; ++c) sum[0][c] = sum[1][c] = zero<T>();
#pragma GCC unroll 16
    for (size_t l = 0; l < w; ++l) {
      const Vector<T> f = broadcast(factor[l]);
      sum[0][l % chains] = fma(load(group.row[l] + j), f, sum[0][l % chains]);
      sum[1][l % chains] = fma(load(group.row[l] + j + w), f, sum[1][l % chains]);
    }
    for (size_t k = 0; k < 2; ++k) {
      Vector<T> total = accumulate ? load(gradient + j + k * w) : zero<T>();
      for (size_t c = 0; c < chains; c += 2) total += sum[k][c] + sum[k][c + 1];
      store(gradient + j + k * w, total);
    }
  }
  for (; j < in_features; j += w) {
    const size_t count = in_features - j;
    Vector<T> sum[chains];
    for (size_t c = 0; c < chains; ++c) sum[c] = zero<T>();
    if (count >= w) {
#pragma GCC unroll 16
      for (size_t l = 0; l < w; ++l) sum[l % chains] = fma(load(group.row[l] + j), broadcast(factor[l]), sum[l % chains]);
    } else {
#pragma GCC unroll 16
      for (size_t l = 0; l < w; ++l)
        sum[l % chains] = fma(load_partial(group.row[l] + j, count), broadcast(factor[l]), sum[l % chains]);
    }
    Vector<T> total = accumulate ? load_up_to(gradient + j, count) : zero<T>();
    for (size_t c = 0; c < chains; c += 2) total += sum[c] + sum[c + 1];
    store_up_to(gradient + j, total, count);
  }
}

template <class T>
inline Group<T> group_at(const T* x, size_t x_stride, size_t first, size_t present) {
  Group<T> group;
  for (size_t l = 0; l < lanes<T>; ++l) group.row[l] = x + (first + (l < present ? l : 0)) * x_stride;
  return group;
}

// y[rows, out] = x[rows, in] weight^T + bias
template <class T>
void linear_forward(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride, const T* weight, const T* bias,
                    T* y) {
  constexpr size_t w = lanes<T>;
  for (size_t first = 0; first < rows; first += w) {
    const size_t present = rows - first < w ? rows - first : w;
    const Group<T> group = group_at(x, x_stride, first, present);
    for (size_t o = 0; o < out_features; ++o) {
      Vector<T> output = group_dot(group, in_features, weight + o * in_features);
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
  constexpr size_t w = lanes<T>;
  for (size_t first = 0; first < rows; first += w) {
    const size_t present = rows - first < w ? rows - first : w;
    const Group<T> group = group_at(x, x_stride, first, present);
    for (size_t o = 0; o < out_features; ++o) {
      T factor[w] = {};
      for (size_t l = 0; l < present; ++l) factor[l] = g[(first + l) * out_features + o];
      group_gradient(group, in_features, factor, true, weight_gradient + o * in_features);
      if (bias_gradient) bias_gradient[o] += sum_lanes<T>(load(factor));
    }
  }
}

// One pass: residual r = x weight^T + bias - target, gradient 2 r^T x; returns the sum of r^2.
template <class T>
double linear_step(const LinearStep<T>& s) {
  constexpr size_t w = lanes<T>;
  constexpr size_t line_elements = 64 / sizeof(T);  // one cache line
  const size_t in = s.in_features, out = s.out_features;
  double loss = 0;
  for (size_t first = 0; first < s.rows; first += w) {
    const size_t present = s.rows - first < w ? s.rows - first : w;
    size_t number[w];
    Group<T> group;
    for (size_t l = 0; l < w; ++l) {
      const size_t r = first + (l < present ? l : 0);
      number[l] = s.index ? s.index[r] : r;
      group.row[l] = s.x + number[l] * s.x_stride;
    }
    // The next group's rows are asked for while this one computes: shuffled rows have no pattern that the hardware could follow.
    if (first + w < s.rows + s.rows_ahead) {
      const size_t end = first + 2 * w < s.rows + s.rows_ahead ? first + 2 * w : s.rows + s.rows_ahead;
      for (size_t r = first + w; r < end; ++r) {
        const T* row = s.x + (s.index ? s.index[r] : r) * s.x_stride;
        for (size_t j = 0; j < in; j += line_elements) __builtin_prefetch(row + j);
        __builtin_prefetch(row + in - 1);
      }
    }
    for (size_t o = 0; o < out; ++o) {
      Vector<T> residual = group_dot(group, in, s.weight + o * in);
      if (s.bias) residual += broadcast(s.bias[o]);
      T factor[w] __attribute__((aligned(lane_bytes)));
      if (s.target) {
        for (size_t l = 0; l < w; ++l) factor[l] = s.target[number[l] * out + o];
        residual -= load(factor);
      }
      if (present < w) {
        store(factor, residual);
        residual = load_partial(factor, present);
      }
      const Vector<T> gradient = SquaredError::gradient(residual);
      store(factor, gradient);
      group_gradient(group, in, factor, first != 0, s.weight_gradient + o * in);
      if (s.bias_gradient) s.bias_gradient[o] = (first ? s.bias_gradient[o] : T(0)) + sum_lanes<T>(gradient);
      loss += (double)sum_lanes<T>(SquaredError::term(residual));
    }
  }
  return loss;
}

}  // namespace
}  // namespace gdlib
