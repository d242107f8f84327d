#include <atomic>
#include <cmath>
#include <limits>

#include "../../csrc/engine/network.h"
#include "../../csrc/engine/training.h"
#include "check.h"

namespace {

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
  const gdlib::Batch<T> batch{x.data(), in, y.data(), order.data(), rows, 0, false, false};
  std::vector<T> gradient(n);
  const double loss = gdlib::network_squared_error_gradient(network, batch, p.data(), gradient.data(), scratch, interrupt);

  gdlib::NetworkScratch<double> plain_scratch(network, rows, false, gdlib::Need::outputs);
  const gdlib::Batch<double> plain{x_double.data(), in, y_double.data(), nullptr, rows, 0, false, false};
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

// A call of three epochs extends its rows once, calls of one epoch read them where they are: the same bits.
template <class T>
void check_extended_rows(std::size_t in, bool has_bias, bool shuffled) {
  constexpr std::size_t rows = 100, batch = 32, epochs = 3, steps_per_epoch = (rows + batch - 1) / batch;
  gdlib::Network network;
  network.add(gdlib::Activation::none, in, 1, has_bias);
  const std::size_t n = network.parameters();
  const auto x = numbers<T>(rows * in, 18), y = numbers<T>(rows, 19);
  const std::vector<std::uint64_t> seeds{1, 2, 3};
  const auto result = [&](std::size_t epochs_of_call) {
    auto state = numbers<T>(n, 20);  // parameters, then momentum
    state.resize(2 * n);
    std::vector<T> gradient(n);
    std::vector<double> losses(epochs);
    gdlib::Round<T> round{};
    round.network = network;
    round.x = x.data();
    round.x_stride = in;
    round.target = y.data();
    round.rows = rows;
    round.batch_size = batch;
    round.epoch_seeds = shuffled ? seeds.data() : nullptr;
    round.mean = true;
    round.ranges = {{0, n, gdlib::SgdOptions<T>{T(0.01), T(0.5), T(0), T(0), false, false}, true, true}};
    round.parameters = state.data();
    round.gradient = gradient.data();
    round.momentum = state.data() + n;
    round.losses = losses.data();
    gdlib::Interrupt interrupt(nullptr);
    for (std::size_t epoch = 0; epoch < epochs; epoch += epochs_of_call) {
      round.first_step = epoch * steps_per_epoch;
      round.last_step = (epoch + epochs_of_call) * steps_per_epoch;
      const bool finished = gdlib::train_round(round, interrupt, [](std::uint64_t) {}).stop == gdlib::Stop::finished;
      expect(finished, "round of few features, " + std::to_string(in));
    }
    return state;
  };
  expect(result(epochs) == result(1), "rows extended once, features " + std::to_string(in));
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
    const gdlib::Batch<T> batch{x.data(), in, y.data(), nullptr, rows, 0, false, false};
    const double loss = gdlib::network_squared_error_gradient(network, batch, p.data(), gradient.data(), scratch, interrupt,
                                                              gdlib::SegmentVisitor<T>(visit));
    expect(!std::isfinite(loss) && visited == 0, "loss that is not finite, rows " + std::to_string(rows));
  }
}

}  // namespace

template <class T>
void check_training() {
  check_rounds<T>(lone_linear(10, 1), 300, 32);
  check_rounds<T>(lone_linear(20, 2), 30000, 30000);
  check_rounds<T>(lone_linear(10, 9), 300, 64);
  check_rounds<T>(lone_linear(100, 1), 1500, 256);  // in pieces, of rows that lie scattered
  check_rounds<T>(lone_linear(60, 9), 2500, 300);
  check_rounds<T>(a_network(10, 1), 300, 32);
  check_rounds<T>(small_network(), 1000, 127);
  check_rounds<T>(small_network(), 1000, 300);
  check_rounds<T>(a_network(20, 9), 9000, 9000);  // several passes for each step
  for (std::size_t in : {1, 2, 3, 6, 7, 10, 14, 15, 30, 31, 62})
    for (const bool has_bias : {true, false})
      for (const bool shuffled : {true, false}) check_extended_rows<T>(in, has_bias, shuffled);
  for (std::size_t rows : {20, 300, 5000}) check_steps_without_update<T>(rows);
  for (std::size_t rows : {1, 17, 67, 130})
    for (std::size_t in : {1, 9})
      for (std::size_t out : {1, 8}) check_network<T>(rows, in, out);
}

template void check_training<float>();
template void check_training<double>();
