// Compares every kernel table that this machine can run with plain loops in double: the check for a machine without Python, such as one
// that an emulator provides. Built and run by tests/native/cross_check.sh; ends with a line "N passed, M failed".
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/dispatch/dispatch.h"
#include "../../csrc/engine/linear.h"
#include "../../csrc/engine/network.h"
#include "../../csrc/engine/parallel.h"
#include "../../csrc/engine/random.h"
#include "../../csrc/engine/training.h"

namespace {

int passed = 0, failed = 0;

void expect(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::printf("failed: %s, on %s\n", what.c_str(), gdlib::kernels().isa);
}

template <class T>
std::vector<T> numbers(std::size_t n, std::uint64_t seed) {
  std::vector<T> values(n);
  gdlib::fill_uniform(seed, 1.0, n, values.data());
  return values;
}

// |got - wanted| is at most k + 2 roundings of the terms' magnitude.
template <class T>
bool close(T got, double wanted, double magnitude, std::size_t k) {
  return std::abs(static_cast<double>(got) - wanted) <= (static_cast<double>(k) + 2.0) * std::numeric_limits<T>::epsilon() * magnitude;
}

template <class T>
void check_layer(std::size_t rows, std::size_t in, std::size_t out) {
  const auto x = numbers<T>(rows * in, 1), w = numbers<T>(out * in, 2), b = numbers<T>(out, 3), g = numbers<T>(rows * out, 4);
  std::vector<T> y(rows * out), gw(out * in), gb(out), gx(rows * in);
  gdlib::linear_forward<T>(rows, in, out, x.data(), in, w.data(), b.data(), y.data());
  gdlib::linear_input_gradient<T>(rows, in, out, g.data(), w.data(), gx.data());
  gdlib::linear_weight_gradient<T>(rows, in, out, g.data(), x.data(), in, true, gw.data(), gb.data());
  bool good = true;
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t o = 0; o < out; ++o) {
      double sum = b[o], size = std::abs(static_cast<double>(b[o]));
      for (std::size_t j = 0; j < in; ++j) {
        const double term = static_cast<double>(x[r * in + j]) * w[o * in + j];
        sum += term;
        size += std::abs(term);
      }
      good = good && close(y[r * out + o], sum, size, in);
    }
  for (std::size_t o = 0; o < out; ++o)
    for (std::size_t j = 0; j < in; ++j) {
      double sum = 0, size = 0;
      for (std::size_t r = 0; r < rows; ++r) {
        const double term = static_cast<double>(g[r * out + o]) * x[r * in + j];
        sum += term;
        size += std::abs(term);
      }
      good = good && close(gw[o * in + j], sum, size, rows);
    }
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t j = 0; j < in; ++j) {
      double sum = 0, size = 0;
      for (std::size_t o = 0; o < out; ++o) {
        const double term = static_cast<double>(g[r * out + o]) * w[o * in + j];
        sum += term;
        size += std::abs(term);
      }
      good = good && close(gx[r * in + j], sum, size, out);
    }
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
  const gdlib::Batch<T> batch{x.data(), in, y.data(), order.data(), rows, 0, true};
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
  std::vector<T> x_there(x.size()), y_there(y.size());
  for (std::size_t r = 0; r < rows; ++r) {
    std::copy_n(x.data() + order[r] * in, in, x_there.data() + r * in);
    std::copy_n(y.data() + order[r] * out, out, y_there.data() + r * out);
  }
  good = true;
  for (const bool indexed : {false, true})
    for (const bool from_memory : {false, true}) {
      const gdlib::Batch<T> same{indexed ? x.data() : x_there.data(),   in,   indexed ? y.data() : y_there.data(),
                                 indexed ? order.data() : nullptr, rows, 0, from_memory};
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

template <class T>
void check_elementwise(std::size_t n) {
  const auto o = numbers<T>(n, 15), t = numbers<T>(n, 16), u = numbers<T>(n, 17);
  std::vector<T> terms(n), gradient(n), mean(n);
  gdlib::table<T>().squared_error_terms(n, o.data(), t.data(), terms.data());
  gdlib::table<T>().squared_error_gradient(n, o.data(), t.data(), T(3), gradient.data());
  const T* sources[3] = {o.data(), t.data(), u.data()};
  gdlib::table<T>().average(n, 3, sources, mean.data());
  bool good = true;
  for (std::size_t i = 0; i < n; ++i) {
    const double r = static_cast<double>(o[i]) - t[i];
    good = good && close(terms[i], r * r, 4.0, 3) && close(gradient[i], 6 * r, 12.0, 3) &&
           close(mean[i], (static_cast<double>(o[i]) + t[i] + u[i]) / 3, 1.0, 4);
  }
  expect(good, "elementwise " + std::to_string(n));
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
    gdlib::table<T>().activation_forward(kind, 1, n, y.data(), n);
    gdlib::table<T>().activation_backward(kind, 1, n, y.data(), n, chained.data(), n);
    bool good = true;
    for (std::size_t i = 0; i < n; ++i) {
      const double value = plain_activation(kind, x[i]);
      good = good && close(y[i], value, std::abs(value), 4) && close(chained[i], g[i] * plain_derivative(kind, y[i]), 1.0, 2);
    }
    expect(good, "activation " + std::to_string(static_cast<int>(kind)) + " of " + std::to_string(n));
    std::vector<T> bad(n, std::numeric_limits<T>::quiet_NaN());
    gdlib::table<T>().activation_forward(kind, 1, n, bad.data(), n);
    for (const T value : bad) expect(value != value, "activation of NaN");
  }
}

// An activation first, two in a row, and two linear layers in a row.
gdlib::Network a_network(std::size_t in, std::size_t out) {
  using gdlib::Activation;
  gdlib::Network network;
  network.add(Activation::sigmoid, in, in, false);
  network.add(Activation::none, in, 12, true);
  network.add(Activation::tanh, 12, 12, false);
  network.add(Activation::relu, 12, 12, false);
  network.add(Activation::none, 12, 5, false);
  network.add(Activation::none, 5, out, true);
  return network;
}

// The gradient of the squared error over scattered rows against central differences in double, and the error and the outputs against it.
template <class T>
void check_network(std::size_t rows, std::size_t in, std::size_t out) {
  const gdlib::Network network = a_network(in, out);
  const std::size_t n = network.parameters();
  const auto x = numbers<T>(rows * in, 23), y = numbers<T>(rows * out, 24), p = numbers<T>(n, 25);
  const std::vector<double> x_double(x.begin(), x.end()), y_double(y.begin(), y.end()), p_double(p.begin(), p.end());
  gdlib::AlignedVector<std::uint32_t> order;
  gdlib::Interrupt interrupt(nullptr);
  gdlib::shuffle_order(9, static_cast<std::uint32_t>(rows), order, interrupt);
  gdlib::NetworkScratch<T> scratch(network, rows, true, gdlib::Need::gradient);
  const gdlib::Batch<T> batch{x.data(), in, y.data(), order.data(), rows, 0, false};
  std::vector<T> gradient(n);
  const double loss = gdlib::network_squared_error_gradient(network, batch, p.data(), gradient.data(), scratch, interrupt);

  gdlib::NetworkScratch<double> plain_scratch(network, rows, false, gdlib::Need::outputs);
  const gdlib::Batch<double> plain{x_double.data(), in, y_double.data(), nullptr, rows, 0, false};
  const auto error = [&](const std::vector<double>& at) {
    return gdlib::network_squared_error(network, plain, at.data(), plain_scratch, interrupt);
  };
  std::vector<T> outputs(rows * out);
  gdlib::NetworkScratch<T> forward_scratch(network, rows, false, gdlib::Need::outputs);
  bool good = gdlib::network_forward(network, rows, x.data(), in, p.data(), outputs.data(), forward_scratch, interrupt);
  double by_outputs = 0;
  for (std::size_t i = 0; i < rows * out; ++i) by_outputs += (outputs[i] - y_double[i]) * (outputs[i] - y_double[i]);
  const double tolerance = 200 * std::numeric_limits<T>::epsilon() * static_cast<double>(rows) * 50;
  good = good && std::abs(loss - error(p_double)) <= tolerance && std::abs(by_outputs - loss) <= tolerance;
  for (std::size_t i = 0; i < n; ++i) {
    auto above = p_double, below = p_double;
    above[i] += 1e-5;
    below[i] -= 1e-5;
    good = good && std::abs(gradient[i] - (error(above) - error(below)) / 2e-5) <= tolerance + 1e-6 * static_cast<double>(rows);
  }
  const gdlib::NetworkScratch<T> large(network, std::size_t{1} << 40, true, gdlib::Need::gradient);
  good = good && large.arena.size() * sizeof(T) <= std::size_t{64} << 20;
  expect(good, "network " + std::to_string(rows) + " x " + std::to_string(in) + " x " + std::to_string(out));
}

gdlib::Network lone_linear(std::size_t in, std::size_t out) {
  gdlib::Network network;
  network.add(gdlib::Activation::none, in, out, true);
  return network;
}

// Small enough that each thread takes its rows through all layers, then its outputs of every weight gradient (with 127 rows, the layer of 9
// outputs has a loop of its own), or, of larger batches, whole pieces.
gdlib::Network small_network() {
  gdlib::Network network;
  network.add(gdlib::Activation::none, 20, 64, true);
  network.add(gdlib::Activation::tanh, 64, 64, false);
  network.add(gdlib::Activation::none, 64, 33, true);
  network.add(gdlib::Activation::tanh, 33, 33, false);
  network.add(gdlib::Activation::none, 33, 9, false);
  network.add(gdlib::Activation::none, 9, 1, true);
  return network;
}

// Whole rounds: every loss is finite and falls, and several tasks and threads give the bits of one thread.
template <class T>
void check_rounds(const gdlib::Network& network, std::size_t rows, std::size_t batch) {
  const std::size_t in = network.in_features(), out = network.out_features();
  const auto x = numbers<T>(rows * in, 18), y = numbers<T>(rows * out, 19);
  const std::vector<std::uint64_t> seeds{1, 1, 2};
  std::vector<T> first_run;
  for (const int threads : {1, 2, 3}) {
    gdlib::set_thread_count(threads);
    gdlib::Round<T> round{};
    round.network = network;
    const std::size_t n = network.parameters();
    auto parameters = numbers<T>(n, 20);
    std::vector<T> gradient(n), momentum(n);
    std::vector<double> losses(3);
    round.x = x.data();
    round.x_stride = in;
    round.target = y.data();
    round.rows = rows;
    round.batch_size = batch;
    round.epoch_seeds = batch < rows ? seeds.data() : nullptr;
    round.last_step = 3 * ((rows + batch - 1) / batch);
    round.mean = true;
    const gdlib::SgdOptions<T> options{T(0.02), T(0.5), T(0), T(0), true, false};
    round.ranges = {{0, n, options, true, true}};
    if (!network.is_lone_linear()) round.ranges = {{0, n / 3, options, true, true}, {n / 3, n, options, true, true}};
    round.parameters = parameters.data();
    round.gradient = gradient.data();
    round.momentum = momentum.data();
    round.losses = losses.data();
    gdlib::Interrupt interrupt(nullptr);
    const gdlib::RoundResult result = gdlib::train_round(round, interrupt, [](std::uint64_t) {});
    expect(result.stop == gdlib::Stop::finished && losses[2] < losses[0], "round " + std::to_string(rows));
    if (first_run.empty()) first_run = parameters;
    expect(parameters == first_run, "round on threads " + std::to_string(threads));
  }
  gdlib::Interrupt interrupt(nullptr);
  const double eigenvalue = gdlib::linear_hessian_eigenvalue<T>(rows, in, x.data(), in, true, interrupt);
  expect(eigenvalue >= 1.99 * static_cast<double>(rows), "eigenvalue");  // that of the column of ones alone is 2 * rows
}

// A step whose loss is not finite changes nothing, and a network without parameters has none to change.
template <class T>
void check_steps_without_update(std::size_t rows) {
  gdlib::Network activation_alone;
  activation_alone.add(gdlib::Activation::tanh, 5, 5, false);
  for (const gdlib::Network& network : {small_network(), a_network(20, 9), activation_alone}) {
    const std::size_t n = network.parameters(), in = network.in_features(), out = network.out_features();
    const auto x = numbers<T>(rows * in, 18), p = numbers<T>(n, 20);
    auto y = numbers<T>(rows * out, 19);
    y[rows * out - 1] = std::numeric_limits<T>::infinity();
    std::vector<T> gradient(n);
    gdlib::NetworkScratch<T> scratch(network, rows, false, gdlib::Need::gradient);
    gdlib::Interrupt interrupt(nullptr);
    std::atomic<int> visited{0};
    const auto visit = [&](const gdlib::Segment<T>&) { ++visited; };
    const gdlib::Batch<T> batch{x.data(), in, y.data(), nullptr, rows, 0, false};
    const double loss = gdlib::network_squared_error_gradient(network, batch, p.data(), gradient.data(), scratch, interrupt,
                                                              gdlib::SegmentVisitor<T>(visit));
    expect(!std::isfinite(loss) && visited == 0, "loss that is not finite, rows " + std::to_string(rows));
  }
}

// Every task of a loop runs once, and what it writes is seen, also after rests in which threads fall asleep, and from several callers at
// once; loops inside tasks run on their thread.
bool run_loops(int threads) {
  bool good = gdlib::thread_count() == threads;
  for (std::size_t loop = 0; loop < 300; ++loop) {
    std::vector<std::size_t> out(2 + loop % 40);  // no atomics: the loop's end publishes
    gdlib::parallel_for(out.size(), threads, [&](std::size_t i, std::size_t worker) {
      const std::size_t alone = gdlib::thread_count() == 1;
      gdlib::parallel_for(3, gdlib::thread_count(), [&](std::size_t k, std::size_t) { out[i] += alone * (loop + i + k); });
      if (worker >= static_cast<std::size_t>(threads)) out[i] = 0;
    });
    for (std::size_t i = 0; i < out.size(); ++i) good = good && out[i] == 3 * (loop + i) + 3;
    if (loop % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return good && gdlib::thread_count() == threads;
}

void check_loops(int threads) {
  const std::string name = "loops on threads " + std::to_string(threads);
  gdlib::set_thread_count(threads);
  expect(run_loops(threads), name);
  bool other_good = false;
  std::thread other([&] { other_good = run_loops(threads); });
  expect(run_loops(threads), name + " beside another caller's");
  other.join();
  expect(other_good, name + " of that other caller");

  bool thrown = false;
  for (int loop = 0; loop < 20; ++loop) {
    std::atomic<int> tasks{0};
    try {
      gdlib::parallel_for(10, threads, [&](std::size_t i, std::size_t) {
        ++tasks;
        if (i % 3 == 1) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = tasks == 10;
    }
  }
  expect(thrown && run_loops(threads), name + " after one that throws");

  // Short steps are tried both ways.
  bool good = true, shared = false, alone = false;
  {
    gdlib::StepPacer pacer(threads);
    for (std::size_t step = 0; step < 10'000'000 && !(shared && alone); ++step) {
      (gdlib::thread_count() == 1 ? alone : shared) = true;
      std::atomic<int> tasks{0};
      gdlib::parallel_for(2, gdlib::thread_count(), [&](std::size_t, std::size_t) { ++tasks; });
      good = good && tasks == 2;
      pacer.step_done();
    }
  }
  expect(good && shared && alone && gdlib::thread_count() == threads, name + " whose steps are paced");
}

template <class T>
void check_all() {
  check_rounds<T>(lone_linear(10, 1), 300, 32);
  check_rounds<T>(lone_linear(20, 2), 30000, 30000);
  check_rounds<T>(lone_linear(10, 9), 300, 64);
  check_rounds<T>(a_network(10, 1), 300, 32);
  check_rounds<T>(small_network(), 1000, 127);
  check_rounds<T>(small_network(), 1000, 300);
  check_rounds<T>(a_network(20, 9), 9000, 9000);  // several passes for each step
  for (std::size_t rows : {20, 300, 5000}) check_steps_without_update<T>(rows);
  for (std::size_t rows : {1, 17, 67, 130})
    for (std::size_t in : {1, 9})
      for (std::size_t out : {1, 8}) check_network<T>(rows, in, out);
  for (std::size_t rows : {1, 2, 5, 16, 17, 67})
    for (std::size_t in : {1, 2, 3, 4, 5, 10, 16, 31, 67})
      for (std::size_t out : {1, 2, 7, 8, 9, 25, 67}) {
        check_layer<T>(rows, in, out);
        check_step<T>(rows, in, out);
      }
  for (std::size_t in : {33, 65, 100, 128, 129, 131, 255, 256, 257, 300, 512, 513}) check_step<T>(67, in, 2);
  check_layer<T>(130, 300, 100);  // several blocks of depth and rows
  for (std::size_t n = 1; n < 40; ++n) {
    check_vectors<T>(n);
    check_updates<T>(n);
    check_elementwise<T>(n);
    check_activations<T>(n);
  }
}

}  // namespace

int main() {
  gdlib::initialize_threads();
  if (gdlib::openmp_enabled())
    for (const int threads : {2, 3, 8, 2}) check_loops(threads);
  std::vector<gdlib::AlignedVector<std::uint32_t>> orders;
  for (const std::string& isa : gdlib::available_isas()) {
    gdlib::select_isa(isa);
    check_all<float>();
    check_all<double>();
    orders.emplace_back();
    gdlib::Interrupt interrupt(nullptr);
    gdlib::shuffle_order(1, 1000, orders.back(), interrupt);
    expect(std::equal(orders.back().begin(), orders.back().end(), orders.front().begin()), "order");
    std::printf("%s checked\n", isa.c_str());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
