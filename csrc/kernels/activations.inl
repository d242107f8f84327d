// Activations: each is one body of its value, and of its derivative, which the output alone gives. NaN stays NaN.
//
// tanh and sigmoid share one exponential of numbers at or below zero, which cannot overflow. Largest errors, in units of the last place
// of the result, on every table: relu 0, tanh 3, sigmoid 3, over all inputs, subnormal results included.

namespace gdlib {
namespace {

// Of T: z = n ln 2 + r. `high` ends in zeros, so that n * high is exact without fma; `round` added and taken away rounds to an integer;
// the series of e^r - 1 up to r^terms / terms! is off by less than a tenth of the last place for |r| <= ln 2 / 2.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  typedef uint32_t Bits;
  static constexpr int mantissa = 23, bias = 127, terms = 8;
  static constexpr float high = 0x1.63p-1f, low = -0x1.bd0106p-13f, round = 0x1.8p23f;
  static constexpr float vanishing = -104.5f;  // e^z is below half of the smallest subnormal
};
template <>
struct Exponential<double> {
  typedef uint64_t Bits;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr double high = 0x1.62e42feep-1, low = 0x1.a39ef35793c76p-33, round = 0x1.8p52;
  static constexpr double vanishing = -746.0;
};

template <class T>
using Bits = typename VectorOf<typename Exponential<T>::Bits>::type;

constexpr double factorial(int k) { return k < 2 ? 1.0 : k * factorial(k - 1); }

// 1/K! + r/(K + 1)! + ... + r^(terms - K)/terms!, by Horner's rule.
template <class T, int K>
inline Vector<T> series(Vector<T> r) {
  const Vector<T> constant = broadcast((T)(1.0 / factorial(K)));
  if constexpr (K == Exponential<T>::terms)
    return constant;
  else
    return fma(series<T, K + 1>(r), r, constant);
}

// e^z = (1 + part) * scale * scale_again, for z <= 0 not below `vanishing`: two factors, because 2^n itself may be no normal number.
template <class T>
struct Power {
  Vector<T> part, scale, scale_again;

  explicit Power(Vector<T> z) {
    using E = Exponential<T>;
    const Vector<T> rounded = z * broadcast((T)1.44269504088896340736) + broadcast(E::round);  // log2(e)
    const Vector<T> n = rounded - broadcast(E::round);
    const Vector<T> r = (z - n * broadcast(E::high)) - n * broadcast(E::low);
    part = fma(r * r, series<T, 2>(r), r);
    const Bits<T> minus_n = (Bits<T>)broadcast(E::round) - (Bits<T>)rounded;
    const Bits<T> half = minus_n >> 1;
    scale = power_of_two(half);
    scale_again = power_of_two(minus_n - half);
  }

 private:
  static Vector<T> power_of_two(Bits<T> minus_n) {
    return (Vector<T>)(((typename Exponential<T>::Bits)Exponential<T>::bias - minus_n) << Exponential<T>::mantissa);
  }
};

// |x|, and x with the sign of another.
template <class T>
inline Bits<T> sign_of(Vector<T> x) {
  return (Bits<T>)x & (Bits<T>)broadcast((T)-0.0);
}
template <class T>
inline Vector<T> magnitude(Vector<T> x) {
  return (Vector<T>)((Bits<T>)x ^ sign_of<T>(x));
}

template <class T>
inline Vector<T> at_least(Vector<T> x, T least) {
  return x < broadcast(least) ? broadcast(least) : x;  // NaN compares false and stays
}

// Both ways a comparison that NaN fails keeps it, as in PyTorch.
struct Relu {
  template <class T>
  static Vector<T> value(Vector<T> x) {
    return x <= zero<T>() ? zero<T>() : x;
  }
  template <class T>
  static Vector<T> chain(Vector<T> y, Vector<T> g) {
    return y <= zero<T>() ? zero<T>() : g;
  }
};

// tanh |x| = -t / (2 + t) with t = e^(-2 |x|) - 1, which is as accurate near 0 as anywhere: there t is the series itself.
struct Tanh {
  template <class T>
  static Vector<T> value(Vector<T> x) {
    constexpr T settled = -40;  // t is -1 to the last bit
    const Power<T> power(at_least<T>(broadcast((T)-2) * magnitude<T>(x), settled));
    const Vector<T> scale = power.scale * power.scale_again;
    const Vector<T> t = fma(scale, power.part, scale - broadcast((T)1));
    return (Vector<T>)((Bits<T>)magnitude<T>(t / (broadcast((T)2) + t)) | sign_of<T>(x));
  }
  template <class T>
  static Vector<T> chain(Vector<T> y, Vector<T> g) {
    return g * fma(-y, y, broadcast((T)1));
  }
};

// 1 / (1 + e), for negative x e / (1 + e), with e = e^(-|x|): down to the smallest subnormal without cancellation.
struct Sigmoid {
  template <class T>
  static Vector<T> value(Vector<T> x) {
    const Power<T> power(at_least<T>(-magnitude<T>(x), Exponential<T>::vanishing));
    const Vector<T> one = broadcast((T)1);
    const Vector<T> nearly = fma(power.part, power.scale, power.scale);  // a normal number
    const Vector<T> e = nearly * power.scale_again;
    return x < zero<T>() ? nearly / (one + e) * power.scale_again : one / (one + e);
  }
  template <class T>
  static Vector<T> chain(Vector<T> y, Vector<T> g) {
    return g * (y * (broadcast((T)1) - y));
  }
};

// y[rows, cols], `stride` apart, becomes the activation of itself. Rows that touch are one long row: an element's bits are the same in
// every lane.
template <class Body, class T>
void activate(size_t rows, size_t cols, T* y, size_t stride) {
  if (stride == cols) {
    cols *= rows;
    rows = cols ? 1 : 0;
  }
  for (size_t r = 0; r < rows; ++r, y += stride)
    each_vector<T>(cols, [&](size_t c, size_t count) __attribute__((always_inline)) {
      store_up_to(y + c, Body::template value<T>(load_up_to(y + c, count)), count);
    });
}

template <class Body, class T>
void chain(size_t rows, size_t cols, const T* y, size_t y_stride, T* g, size_t g_stride) {
  if (y_stride == cols && g_stride == cols) {
    cols *= rows;
    rows = cols ? 1 : 0;
  }
  for (size_t r = 0; r < rows; ++r, y += y_stride, g += g_stride)
    each_vector<T>(cols, [&](size_t c, size_t count) __attribute__((always_inline)) {
      store_up_to(g + c, Body::template chain<T>(load_up_to(y + c, count), load_up_to(g + c, count)), count);
    });
}

template <class T>
void activation_forward(Activation kind, size_t rows, size_t cols, T* y, size_t stride) {
  switch (kind) {
    case Activation::none: return;
    case Activation::relu: return activate<Relu>(rows, cols, y, stride);
    case Activation::tanh: return activate<Tanh>(rows, cols, y, stride);
    case Activation::sigmoid: return activate<Sigmoid>(rows, cols, y, stride);
  }
}

template <class T>
void activation_backward(Activation kind, size_t rows, size_t cols, const T* y, size_t y_stride, T* g, size_t g_stride) {
  switch (kind) {
    case Activation::none: return;
    case Activation::relu: return chain<Relu>(rows, cols, y, y_stride, g, g_stride);
    case Activation::tanh: return chain<Tanh>(rows, cols, y, y_stride, g, g_stride);
    case Activation::sigmoid: return chain<Sigmoid>(rows, cols, y, y_stride, g, g_stride);
  }
}

}  // namespace
}  // namespace gdlib
