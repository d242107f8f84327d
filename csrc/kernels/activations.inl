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

// 1/K! + r^2/(K + 2)! + r^4/(K + 4)! + ..., up to r^(terms - K), by Horner's rule.
template <class T, int K>
inline Vector<T> every_second(Vector<T> r2) {
  const Vector<T> constant = broadcast((T)(1.0 / factorial(K)));
  if constexpr (K + 2 > Exponential<T>::terms)
    return constant;
  else
    return fma(every_second<T, K + 2>(r2), r2, constant);
}

// e^z = (1 + part) 2^-minus_n, for z <= 0 not below `vanishing`. The even and the odd powers are two chains, so that none is waited for.
template <class T>
struct Power {
  Vector<T> part;
  Bits<T> minus_n;

  explicit Power(Vector<T> z) {
    using E = Exponential<T>;
    const Vector<T> rounded = fma(z, broadcast((T)1.44269504088896340736), broadcast(E::round));  // log2(e)
    const Vector<T> n = rounded - broadcast(E::round);
    const Vector<T> r = fma(n, broadcast(-E::low), fma(n, broadcast(-E::high), z)), r2 = r * r;
    part = fma(r2, fma(every_second<T, 3>(r2), r, every_second<T, 2>(r2)), r);
    minus_n = (Bits<T>)broadcast(E::round) - (Bits<T>)rounded;
  }
};

// 2^-n, a normal number.
template <class T>
inline Vector<T> power_of_half(Bits<T> n) {
  return (Vector<T>)(((typename Exponential<T>::Bits)Exponential<T>::bias - n) << Exponential<T>::mantissa);
}

// -|x|, and |x| with the sign of another.
template <class T>
inline Vector<T> minus_magnitude(Vector<T> x) {
  return (Vector<T>)((Bits<T>)x | (Bits<T>)broadcast((T)-0.0));
}
template <class T>
inline Vector<T> with_sign_of(Vector<T> x, Vector<T> other) {
  const auto sign = (Bits<T>)broadcast((T)-0.0);
  return (Vector<T>)(((Bits<T>)x & ~sign) | ((Bits<T>)other & sign));
}

template <class T>
inline Vector<T> at_least(Vector<T> x, T least) {
  return broadcast(least) > x ? broadcast(least) : x;  // NaN compares false and stays
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
    constexpr T settled = -40;  // t is -1 to the last bit, and 2^n a normal number
    const Power<T> power(at_least<T>(broadcast((T)2) * minus_magnitude<T>(x), settled));
    const Vector<T> scale = power_of_half<T>(power.minus_n);
    const Vector<T> t = fma(scale, power.part, scale - broadcast((T)1));
    return with_sign_of<T>(t / (broadcast((T)2) + t), x);
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
    const Power<T> power(at_least<T>(minus_magnitude<T>(x), Exponential<T>::vanishing));
    // Two factors, because 2^n itself may be no normal number.
    const Bits<T> half = power.minus_n >> 1;
    const Vector<T> one = broadcast((T)1), scale = power_of_half<T>(half), scale_again = power_of_half<T>(power.minus_n - half);
    const Vector<T> nearly = fma(power.part, scale, scale);
    const Vector<T> quotient = (x < zero<T>() ? nearly : one) / fma(nearly, scale_again, one);
    return x < zero<T>() ? quotient * scale_again : quotient;
  }
  template <class T>
  static Vector<T> chain(Vector<T> y, Vector<T> g) {
    return g * (y * (broadcast((T)1) - y));
  }
};

// Rows that touch are one long row: an element's bits are the same in every lane.
template <class Body, class T>
void activate(size_t rows, size_t cols, Strided<const T> x, Strided<T> y, bool nontemporal) {
  if (x.stride == cols && y.stride == cols) {
    cols *= rows;
    rows = cols ? 1 : 0;
  }
  for (size_t r = 0; r < rows; ++r, x.data += x.stride, y.data += y.stride)
    fill_vectors(cols, y.data, nontemporal, [&](size_t c, size_t count) __attribute__((always_inline)) {
      return Body::template value<T>(load_up_to(x.data + c, count));
    });
}

template <class Body, class T>
void chain(size_t rows, size_t cols, Strided<const T> y, Strided<const T> g, Strided<T> into, bool nontemporal) {
  if (y.stride == cols && g.stride == cols && into.stride == cols) {
    cols *= rows;
    rows = cols ? 1 : 0;
  }
  for (size_t r = 0; r < rows; ++r, y.data += y.stride, g.data += g.stride, into.data += into.stride)
    fill_vectors(cols, into.data, nontemporal, [&](size_t c, size_t count) __attribute__((always_inline)) {
      return Body::template chain<T>(load_up_to(y.data + c, count), load_up_to(g.data + c, count));
    });
}

template <class T>
void activation_forward(Activation kind, size_t rows, size_t cols, Strided<const T> x, Strided<T> y, bool nontemporal) {
  switch (kind) {
    case Activation::none: return;
    case Activation::relu: return activate<Relu>(rows, cols, x, y, nontemporal);
    case Activation::tanh: return activate<Tanh>(rows, cols, x, y, nontemporal);
    case Activation::sigmoid: return activate<Sigmoid>(rows, cols, x, y, nontemporal);
  }
}

template <class T>
void activation_backward(Activation kind, size_t rows, size_t cols, Strided<const T> y, Strided<const T> g, Strided<T> into,
                         bool nontemporal) {
  switch (kind) {
    case Activation::none: return;
    case Activation::relu: return chain<Relu>(rows, cols, y, g, into, nontemporal);
    case Activation::tanh: return chain<Tanh>(rows, cols, y, g, into, nontemporal);
    case Activation::sigmoid: return chain<Sigmoid>(rows, cols, y, g, into, nontemporal);
  }
}

}  // namespace
}  // namespace gdlib
