// Losses: each is one elementwise body of the residual, its term and its derivative; the loops below serve the readable API.
// Sums are carried in double.

namespace gdlib {
namespace {

struct SquaredError {
  template <class V>
  static V term(V residual) {
    return residual * residual;
  }
  template <class V>
  static V gradient(V residual) {
    return residual + residual;
  }
};

template <class T>
double squared_error_sum(size_t n, const T* output, const T* target) {
  constexpr size_t w = lanes<T>;
  constexpr size_t block = 64 * w;  // terms folded in T, 64 in a chain, before they enter the double sum: it is little beside them
  double total = 0;
  for (size_t start = 0; start < n; start += block) {
    const size_t end = n - start < block ? n : start + block;
    Vector<T> sum = zero<T>();
    for (size_t i = start; i < end; i += w)
      sum += SquaredError::term(load_up_to(output + i, end - i) - load_up_to(target + i, end - i));
    total += (double)sum_lanes<T>(sum);
  }
  return total;
}

template <class T>
void squared_error_terms(size_t n, const T* output, const T* target, T* terms) {
  fill_vectors(n, terms, false, [&](size_t i, size_t count) __attribute__((always_inline)) {
    return SquaredError::term(load_up_to(output + i, count) - load_up_to(target + i, count));
  });
}

template <class T>
void squared_error_gradient(size_t n, const T* output, const T* target, T scale, T* gradient, bool nontemporal) {
  const Vector<T> factor = broadcast(scale);
  fill_vectors(n, gradient, nontemporal, [&](size_t i, size_t count) __attribute__((always_inline)) {
    return factor * SquaredError::gradient(load_up_to(output + i, count) - load_up_to(target + i, count));
  });
}

}  // namespace
}  // namespace gdlib
