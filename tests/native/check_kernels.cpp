#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/dispatch/dispatch.h"
#include "../../csrc/engine/gemm.h"
#include "../../csrc/engine/linear.h"
#include "../../csrc/engine/squared_error.h"
#include "check.h"

namespace {

// |got - wanted| is at most k + 2 roundings of the terms' magnitude.
template <class T>
bool close(T got, double wanted, double magnitude, std::size_t k) {
  return std::abs(static_cast<double>(got) - wanted) <= (static_cast<double>(k) + 2.0) * std::numeric_limits<T>::epsilon() * magnitude;
}

// Whether c[rows, cols] = bias[cols] + a[rows, depth] b[depth, cols].
template <class T>
bool is_product(const std::vector<T>& c, std::size_t rows, std::size_t cols, std::size_t depth, gdlib::MatrixView<T> a,
                gdlib::MatrixView<T> b, const T* bias = nullptr) {
  bool good = true;
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t k = 0; k < cols; ++k) {
      double sum = bias ? bias[k] : T(0), size = std::abs(sum);
      for (std::size_t d = 0; d < depth; ++d) {
        const double term = static_cast<double>(*a.at(r, d)) * *b.at(d, k);
        sum += term;
        size += std::abs(term);
      }
      good = good && close(c[r * cols + k], sum, size, depth);
    }
  return good;
}

template <class T>
void check_layer(std::size_t rows, std::size_t in, std::size_t out) {
  const auto x = numbers<T>(rows * in, 1), w = numbers<T>(out * in, 2), b = numbers<T>(out, 3), g = numbers<T>(rows * out, 4);
  std::vector<T> y(rows * out), gw(out * in), gb(out), gx(rows * in);
  gdlib::linear_forward<T>(rows, in, out, x.data(), in, w.data(), b.data(), y.data());
  for (const bool by_requests : {false, true}) {
    if (out >= gdlib::few_outputs) break;
    std::vector<T> from_memory(rows * out);
    gdlib::table<T>().linear_forward(rows, in, out, x.data(), in, w.data(), b.data(), from_memory.data(), true, by_requests);
    const bool same = std::memcmp(y.data(), from_memory.data(), y.size() * sizeof(T)) == 0;
    expect(same, std::string(by_requests ? "by requests " : "from memory ") + std::to_string(rows) + " x " + std::to_string(in));
  }
  if (out < gdlib::few_outputs) {
    std::vector<T> weights[2], biases[2];
    for (const bool by_requests : {false, true}) {
      weights[by_requests].assign(out * in, T(0));
      biases[by_requests].assign(out, T(0));
      gdlib::table<T>().linear_gradient(rows, in, out, g.data(), x.data(), in, weights[by_requests].data(), biases[by_requests].data(),
                                        by_requests);
    }
    const bool same = weights[0] == weights[1] && biases[0] == biases[1];
    expect(same, "gradient by requests " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));
  }
  for (const bool in_cache : {false, true}) {
    if (out < gdlib::few_outputs || rows > std::min(gdlib::most_tile_rows, gdlib::table<T>().transposed_rows)) break;
    std::vector<T> transposed(rows * out);
    gdlib::GemmTile<T> tile{};
    tile.depth = in;
    tile.a = x.data();
    tile.a_row_stride = in;
    tile.a_depth_stride = 1;
    tile.b = w.data();
    tile.b_stride = in;
    tile.b_in_cache = in_cache;
    tile.start = b.data();
    tile.c = transposed.data();
    tile.c_stride = tile.columns = out;
    gdlib::table<T>().gemm_transposed[rows - 1](tile);
    const bool same = std::memcmp(y.data(), transposed.data(), y.size() * sizeof(T)) == 0;
    expect(same, "transposed " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));
  }
  gdlib::linear_input_gradient<T>(rows, in, out, g.data(), w.data(), gx.data());
  gdlib::linear_weight_gradient<T>(rows, in, out, g.data(), x.data(), in, true, gw.data(), gb.data());
  const bool good = is_product<T>(y, rows, out, in, {x.data(), in, 1}, {w.data(), 1, in}, b.data()) &&
                    is_product<T>(gw, out, in, rows, {g.data(), 1, out}, {x.data(), in, 1}) &&
                    is_product<T>(gx, rows, in, out, {g.data(), out, 1}, {w.data(), in, 1});
  expect(good, "layer " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));
}

template <class T>
void check_step(std::size_t rows, std::size_t in, std::size_t out) {
  const gdlib::LinearShape shape{in, out, true};
  const auto x = numbers<T>(rows * in, 5), y = numbers<T>(rows * out, 6), p = numbers<T>(shape.parameters(), 7);
  std::vector<T> gradient(shape.parameters());
  gdlib::AlignedVector<std::uint32_t> order;
  gdlib::Interrupt interrupt(nullptr);
  gdlib::shuffle_order(9, static_cast<std::uint32_t>(rows), order, interrupt);
  gdlib::LinearScratch<T> scratch;
  const gdlib::Batch<T> batch{x.data(), in, y.data(), order.data(), rows, 0, true, false};
  const double loss = gdlib::linear_squared_error_gradient(shape, batch, p.data(), gradient.data(), scratch, interrupt);
  std::vector<double> wanted(shape.parameters()), size(shape.parameters());
  double wanted_loss = 0, loss_size = 0;
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t o = 0; o < out; ++o) {
      const double bias = p[out * in + o], target = y[r * out + o];
      double residual = bias - target, magnitude = std::abs(bias) + std::abs(target);
      for (std::size_t j = 0; j < in; ++j) {
        residual += static_cast<double>(x[r * in + j]) * p[o * in + j];
        magnitude += std::abs(static_cast<double>(x[r * in + j]) * p[o * in + j]);
      }
      wanted_loss += residual * residual;
      loss_size += magnitude * magnitude;
      for (std::size_t j = 0; j <= in; ++j) {
        const double factor = j < in ? static_cast<double>(x[r * in + j]) : 1.0;
        const std::size_t place = j < in ? o * in + j : out * in + o;
        wanted[place] += 2 * residual * factor;
        size[place] += 2 * magnitude * std::abs(factor);
      }
    }
  bool good = close(static_cast<T>(loss), wanted_loss, loss_size, 2 * in + rows + 3);
  for (std::size_t i = 0; i < wanted.size(); ++i) good = good && close(gradient[i], wanted[i], size[i], in + rows);
  expect(good, "step " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));

  // Neither an index nor where the rows come from shows in the bits, but for the order in which it puts them.
  const std::size_t stride = in + 3;
  std::vector<T> x_there(rows * stride), y_there(y.size());
  for (std::size_t r = 0; r < rows; ++r) {
    std::copy_n(x.data() + order[r] * in, in, x_there.data() + r * stride);
    std::copy_n(y.data() + order[r] * out, out, y_there.data() + r * out);
  }
  good = true;
  for (const bool indexed : {false, true})
    for (const int past_caches : {0, 1, 2, 3}) {  // none, those of a core, all, all by requests
      const gdlib::Batch<T> same{indexed ? x.data() : x_there.data(),
                                 indexed ? in : stride,
                                 indexed ? y.data() : y_there.data(),
                                 indexed ? order.data() : nullptr,
                                 rows,
                                 0,
                                 past_caches > 0,
                                 past_caches > 1,
                                 past_caches > 2};
      std::vector<T> other(shape.parameters());
      good = good && gdlib::linear_squared_error_gradient(shape, same, p.data(), other.data(), scratch, interrupt) == loss;
      good = good && std::equal(other.begin(), other.end(), gradient.begin());
    }
  expect(good, "same bits of step " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));
}

template <class T>
void check_vectors(std::size_t n) {
  const auto o = numbers<T>(n, 10), t = numbers<T>(n, 11);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += (static_cast<double>(o[i]) - t[i]) * (static_cast<double>(o[i]) - t[i]);
  expect(std::abs(gdlib::table<T>().squared_error_sum(n, o.data(), t.data()) - sum) <= 1e-5 * sum, "squared error " + std::to_string(n));
  for (std::size_t i = 0; i < n; ++i) {
    auto bad = o;
    bad[i] = std::numeric_limits<T>::infinity();
    expect(!gdlib::table<T>().all_finite(n, bad.data()), "finite " + std::to_string(n));
  }
}

// A plain SGD step in double, with every option.
void plain_update(double& p, double& buffer, double gradient, const gdlib::SgdOptions<double>& o, bool has_momentum, bool first) {
  double d = (o.maximize ? -gradient : gradient) + o.weight_decay * p;
  if (has_momentum) {
    buffer = first ? d : o.momentum * buffer + (1 - o.dampening) * d;
    d = o.nesterov ? d + o.momentum * buffer : buffer;
  }
  p -= o.lr * d;
}

template <class T>
void check_updates(std::size_t n) {
  for (int bits = 0; bits < 16; ++bits) {
    const bool has_momentum = bits & 1, nesterov = bits & 2, maximize = bits & 4, first = bits & 8;
    const gdlib::SgdOptions<double> o{0.1, has_momentum ? 0.9 : 0.0, nesterov ? 0.0 : 0.2, 0.3, nesterov && has_momentum, maximize};
    const gdlib::SgdOptions<T> typed{T(o.lr), T(o.momentum), T(o.dampening), T(o.weight_decay), o.nesterov, o.maximize};
    constexpr std::size_t rows = 3;
    const std::size_t stride = n + bits % 3, gradient_stride = n + bits % 2;
    auto p = numbers<T>(rows * stride, 12), buffer = numbers<T>(rows * stride, 13);
    const auto g = numbers<T>(rows * gradient_stride, 14);
    std::vector<double> wanted(p.begin(), p.end()), wanted_buffer(buffer.begin(), buffer.end());
    gdlib::SgdUpdate<T> update{rows,     n,        typed, T(0.5), first, g.data(), gradient_stride,
                               p.data(), has_momentum ? buffer.data() : nullptr, stride};
    bool good = gdlib::table<T>().sgd_update(update);
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t i = 0; i < n; ++i)
        plain_update(wanted[r * stride + i], wanted_buffer[r * stride + i], 0.5 * g[r * gradient_stride + i], o, has_momentum, first);
    for (std::size_t i = 0; i < rows * stride; ++i)  // what lies between rows is left alone
      good = good && close(p[i], wanted[i], 4.0, 10) && close(buffer[i], wanted_buffer[i], 4.0, 10);
    for (const T bad : {std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
      p[(n * 7 + static_cast<std::size_t>(bits)) % rows * stride + n - 1] = bad;
      good = good && !gdlib::table<T>().sgd_update(update);
    }
    expect(good, "update " + std::to_string(n) + " with options " + std::to_string(bits));
  }
}

// Nontemporal results have the same bits wherever they begin, and nothing before or after them is written.
template <class T, class Kernel>
void same_past_caches(const std::vector<T>& wanted, const Kernel& kernel) {
  const std::size_t n = wanted.size();
  for (const std::size_t begin : {0, 1, 5, 16}) {
    std::vector<T> into(begin + n, T(-1));
    kernel(into.data() + begin);
    expect(std::memcmp(into.data() + begin, wanted.data(), n * sizeof(T)) == 0, "nontemporal " + std::to_string(n));
    for (std::size_t i = 0; i < begin; ++i) expect(into[i] == T(-1), "before nontemporal " + std::to_string(n));
  }
}

template <class T>
void check_elementwise(std::size_t n) {
  const auto o = numbers<T>(n, 15), t = numbers<T>(n, 16), u = numbers<T>(n, 17);
  std::vector<T> terms(n), gradient(n), mean(n), sources(o);
  sources.insert(sources.end(), t.begin(), t.end());
  sources.insert(sources.end(), u.begin(), u.end());
  gdlib::table<T>().squared_error_terms(n, o.data(), t.data(), terms.data());
  gdlib::table<T>().squared_error_gradient(n, o.data(), t.data(), T(3), gradient.data(), false);
  gdlib::table<T>().average(n, 3, sources.data(), n, mean.data());
  bool good = true;
  for (std::size_t i = 0; i < n; ++i) {
    const double r = static_cast<double>(o[i]) - t[i];
    good = good && close(terms[i], r * r, 4.0, 3) && close(gradient[i], 6 * r, 12.0, 3) &&
           close(mean[i], (static_cast<double>(o[i]) + t[i] + u[i]) / 3, 1.0, 4);
  }
  expect(good, "elementwise " + std::to_string(n));
  same_past_caches<T>(gradient, [&](T* into) { gdlib::table<T>().squared_error_gradient(n, o.data(), t.data(), T(3), into, true); });
}

double plain_activation(gdlib::Activation kind, double x) {
  if (kind == gdlib::Activation::relu) return x > 0 ? x : 0.0;
  if (kind == gdlib::Activation::tanh) return std::tanh(x);
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

// The derivative where the output is y.
double plain_derivative(gdlib::Activation kind, double y) {
  if (kind == gdlib::Activation::relu) return y > 0 ? 1.0 : 0.0;
  return kind == gdlib::Activation::tanh ? 1 - y * y : y * (1 - y);
}

template <class T>
void check_activations(std::size_t n) {
  using gdlib::Activation;
  for (const Activation kind : {Activation::relu, Activation::tanh, Activation::sigmoid}) {
    auto x = numbers<T>(n, 21);
    for (std::size_t i = 0; i < n; ++i) x[i] *= static_cast<T>(i % 3 == 0 ? 60 : i % 3);  // saturated, small, and zero
    const auto g = numbers<T>(n, 22);
    auto y = x, chained = g;
    const auto forward = [&](const T* from, T* into, bool nontemporal) {
      gdlib::table<T>().activation_forward(kind, 1, n, {from, n}, {into, n}, nontemporal);
    };
    const auto backward = [&](const T* from, T* into, bool nontemporal) {
      gdlib::table<T>().activation_backward(kind, 1, n, {y.data(), n}, {from, n}, {into, n}, nontemporal);
    };
    forward(y.data(), y.data(), false);
    backward(chained.data(), chained.data(), false);
    same_past_caches<T>(y, [&](T* into) { forward(x.data(), into, true); });
    same_past_caches<T>(chained, [&](T* into) { backward(g.data(), into, true); });
    bool good = true;
    for (std::size_t i = 0; i < n; ++i) {
      const double value = plain_activation(kind, x[i]);
      good = good && close(y[i], value, std::abs(value), 4) && close(chained[i], g[i] * plain_derivative(kind, y[i]), 1.0, 2);
    }
    expect(good, "activation " + std::to_string(static_cast<int>(kind)) + " of " + std::to_string(n));
    std::vector<T> bad(n, std::numeric_limits<T>::quiet_NaN());
    forward(bad.data(), bad.data(), false);
    for (const T value : bad) expect(value != value, "activation of NaN");
  }
}

// Strips of A in memory that ends where they end: step after step, zeros for rows that are not there.
template <class T>
void check_packed_rows(std::size_t depth) {
  const gdlib::KernelTable<T>& kernel = gdlib::table<T>();
  const std::size_t strip = kernel.tile_rows;
  for (std::size_t rows = 1; rows <= strip; ++rows) {
    const auto source = numbers<T>(rows * depth, 26);
    std::vector<T> panel(strip * depth, T(7));
    kernel.gemm_pack_rows(depth, rows, source.data(), rows, panel.data());
    bool good = true;
    for (std::size_t d = 0; d < depth; ++d)
      for (std::size_t r = 0; r < strip; ++r) good = good && panel[d * strip + r] == (r < rows ? source[d * rows + r] : T(0));
    expect(good, "packed rows " + std::to_string(rows) + " of depth " + std::to_string(depth));
  }
}

// A product whose left operand lies in columns 4 KiB apart, in memory that ends where they end: its strips are laid out anew.
template <class T>
void check_copied_strips(std::size_t rows, std::size_t cols, std::size_t depth) {
  const std::size_t apart = 4096 / sizeof(T);
  const auto a = numbers<T>((depth - 1) * apart + rows, 27), b = numbers<T>(depth * cols, 28);
  std::vector<T> c(rows * cols);
  gdlib::Product<T> product{rows, cols, depth, {a.data(), 1, apart}, {b.data(), cols, 1}};
  product.c = c.data();
  product.c_stride = cols;
  gdlib::gemm(product);
  const bool good = is_product<T>(c, rows, cols, depth, product.a, product.b);
  expect(good, "copied strips of " + std::to_string(rows) + " rows");
}

}  // namespace

template <class T>
void check_kernels() {
  for (std::size_t rows : {1, 2, 5, 16, 17, 67})
    for (std::size_t in : {1, 2, 3, 4, 5, 10, 16, 31, 67})
      for (std::size_t out : {1, 2, 7, 8, 9, 25, 67}) {
        check_layer<T>(rows, in, out);
        check_step<T>(rows, in, out);
      }
  for (std::size_t in : {33, 65, 100, 128, 129, 131, 255, 256, 257, 300, 512, 513}) check_step<T>(67, in, 2);
  for (std::size_t in : {300, 600, 1024, 1025, 2048, 2049})  // several blocks of a section, and several sections, up to 8 KiB
    for (std::size_t out : {1, 2, 5}) check_step<T>(150, in, out);
  for (std::size_t out : {1, 3, 9}) {  // in pieces, equal and not
    check_step<T>(300, 70, out);
    check_step<T>(530, 100, out);
  }
  for (std::size_t rows : {3, 4, 6, 7, 8}) check_layer<T>(rows, 37, 45);  // weights that are transposed in registers, or laid out anew
  for (std::size_t rows : {1, 2, 3, 4}) check_layer<T>(rows, 201, 91);    // by two vectors, one and a part of one, and steps that are left
  for (std::size_t in : {5, 40, 100, 512})
    for (std::size_t out : {1, 2, 3}) check_layer<T>(500, in, out);  // several blocks, of which the first are followed by as many rows
  for (std::size_t in : {100, 512, 1023, 1024}) check_layer<T>(37, in, 1);  // from memory in order, by requests the longest too
  check_layer<T>(130, 300, 100);  // several blocks of depth and rows
  check_layer<T>(7, 1100, 75);    // by whole rows in blocks of columns and depth
  check_layer<T>(5, 1024, 20);    // the same of rows that fall on one set of L1
  for (std::size_t rows : {1, 9, 27, 67}) check_copied_strips<T>(rows, 100, 43);
  for (std::size_t n = 1; n < 40; ++n) {
    check_packed_rows<T>(n);
    check_vectors<T>(n);
    check_updates<T>(n);
    check_elementwise<T>(n);
    check_activations<T>(n);
  }
}

template void check_kernels<float>();
template void check_kernels<double>();
