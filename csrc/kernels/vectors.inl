// Operations on flat vectors of parameters: the update, the average, the check for NaN and infinity.

namespace gdlib {
namespace {

// PyTorch's rule, the scaled gradient negated to maximize:
//
// d = scale * gradient + weight_decay * parameter
// buffer = d on the first step, else momentum * buffer + (1 - dampening) * d
// parameter -= lr * (nesterov ? d + momentum * buffer : buffer), without momentum lr * d
template <class T>
struct SgdMomentum {
  Vector<T> momentum, fresh;
  bool nesterov;

  explicit SgdMomentum(const SgdOptions<T>& options)
      : momentum(broadcast(options.momentum)), fresh(broadcast(T(1) - options.dampening)), nesterov(options.nesterov) {}

  // What lr is multiplied by; the buffer takes its step.
  Vector<T> operator()(Vector<T> d, bool first_step, Vector<T>& buffer) const {
    buffer = first_step ? d : fma(momentum, buffer, fresh * d);
    return nesterov ? fma(momentum, buffer, d) : buffer;
  }
};

template <class T, bool HasMomentum>
bool sgd_update_with(const SgdUpdate<T>& u) {
  const SgdOptions<T>& options = u.options;
  const Vector<T> scale = broadcast(options.maximize ? -u.gradient_scale : u.gradient_scale);
  const Vector<T> decay = broadcast(options.weight_decay), lr = broadcast(-options.lr);
  const SgdMomentum<T> with_momentum(options);
  // 0 times each updated parameter: NaN from the first that is not finite on. Two chains, so that an addition is not waited for.
  Vector<T> zeros[2] = {zero<T>(), zero<T>()};
  for (size_t r = 0; r < u.rows; ++r) {
    const T* const gradient = u.gradient + r * u.gradient_stride;
    T* const parameter = u.parameter + r * u.stride;
    T* const buffer = HasMomentum ? u.momentum + r * u.stride : nullptr;
    // The vector from i on, whole or up to the row's end.
    const auto update = [&](size_t i, size_t count, int chain) __attribute__((always_inline)) {
      const Vector<T> p = load_up_to(parameter + i, count);
      Vector<T> d = fma(decay, p, scale * load_up_to(gradient + i, count));
      if constexpr (HasMomentum) {
        Vector<T> moved = load_up_to(buffer + i, count);
        d = with_momentum(d, u.first_step, moved);
        store_up_to(buffer + i, moved, count);
      }
      const Vector<T> updated = fma(lr, d, p);
      store_up_to(parameter + i, updated, count);
      zeros[chain] = fma(zero<T>(), updated, zeros[chain]);
    };
    constexpr size_t w = lanes<T>;
    size_t i = 0;
    for (; i + 2 * w <= u.cols; i += 2 * w) {
      update(i, w, 0);
      update(i + w, w, 1);
    }
    for (; i < u.cols; i += w) update(i, u.cols - i, 0);
  }
  return sum_lanes<T>(zeros[0] + zeros[1]) == T(0);
}

template <class T>
bool sgd_update(const SgdUpdate<T>& u) {
  return u.momentum ? sgd_update_with<T, true>(u) : sgd_update_with<T, false>(u);
}

// sums[cols] += column sums of g[rows, cols], rows g_stride apart: four vectors of columns at a time, as many as an addition takes cycles,
// so that none waits for another.
template <class T>
void column_sums(size_t rows, size_t cols, const T* g, size_t g_stride, T* sums) {
  constexpr size_t w = lanes<T>;
  constexpr int vectors = 4;
  // Long rows are read whole, eight side by side: as many sequences in order, for one that jumps from row to row. From memory that is 1.3
  // to 2.1 times as fast, from L2 1 to 1.6 (rows of 2 to 16 KiB, Zen 4); short rows have their sums stay in registers.
  constexpr size_t long_bytes = 1024, together = 8;
  const size_t group = cols * sizeof(T) > long_bytes ? together : rows;
  for (size_t first = 0; first < rows; first += group) {
    const size_t end = rows - first < group ? rows : first + group;
    size_t c = 0;
    for (; c + vectors * w <= cols; c += vectors * w) {
      Vector<T> sum[vectors];
      for (int v = 0; v < vectors; ++v) sum[v] = load(sums + c + v * w);
      for (size_t r = first; r < end; ++r)
        for (int v = 0; v < vectors; ++v) sum[v] += load(g + r * g_stride + c + v * w);
      for (int v = 0; v < vectors; ++v) store(sums + c + v * w, sum[v]);
    }
    for (; c < cols; c += w) {
      Vector<T> sum = load_up_to(sums + c, cols - c);
      for (size_t r = first; r < end; ++r) sum += load_up_to(g + r * g_stride + c, cols - c);
      store_up_to(sums + c, sum, cols - c);
    }
  }
}

// 0 * x is 0 for every finite x, and NaN for the others.
template <class T>
bool all_finite(size_t n, const T* x) {
  Vector<T> sum = zero<T>();
  each_vector<T>(n, [&](size_t i, size_t count) __attribute__((always_inline)) { sum += zero<T>() * load_up_to(x + i, count); });
  return sum_lanes<T>(sum) == T(0);
}

template <class T>
void average(size_t n, size_t count, const T* sources, size_t stride, T* mean) {
  const Vector<T> divisor = broadcast(T(count));
  each_vector<T>(n, [&](size_t i, size_t present) __attribute__((always_inline)) {
    Vector<T> sum = load_up_to(sources + i, present);
    for (size_t k = 1; k < count; ++k) sum += load_up_to(sources + k * stride + i, present);
    store_up_to(mean + i, sum / divisor, present);
  });
}

}  // namespace
}  // namespace gdlib
