#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "linear.h"
#include "tasks.h"

namespace gdlib {

Activation activation_named(const std::string& kind) {
  if (kind == "linear") return Activation::none;
  if (kind == "relu") return Activation::relu;
  if (kind == "tanh") return Activation::tanh;
  if (kind == "sigmoid") return Activation::sigmoid;
  throw std::invalid_argument("the layer kind '" + kind + "' is unknown; linear, relu, tanh or sigmoid is wanted.");
}

void Network::add(Activation activation, std::size_t in_features, std::size_t out_features, bool has_bias) {
  if (!layers_.empty() && in_features != this->out_features())
    throw std::invalid_argument("layer " + std::to_string(layers_.size()) + " takes " + std::to_string(in_features) +
                                " features, and the one before it gives " + std::to_string(this->out_features()) + ".");
  if (activation != Activation::none && in_features != out_features)
    throw std::invalid_argument("an activation gives as many features as it takes.");
  if (out_features == 0) throw std::invalid_argument("a layer gives no features; at least 1 is wanted.");
  constexpr std::size_t most = SIZE_MAX / sizeof(double) / 4;  // parameters of a network: their bytes can be counted
  if (in_features >= most / out_features || in_features * out_features + out_features >= most - parameters())
    throw std::invalid_argument("the network has more weights than memory can hold.");
  layers_.push_back({activation, in_features, out_features, has_bias, parameters()});
}

namespace {

// Rows of one pass: as many as fit 64 MiB, so that memory stays bounded for any batch, and as 10^9 multiply-adds of a layer allow (20 to
// 50 ms on two cores), so that Ctrl-C is answered; at most 4096, beyond which products gain nothing.
constexpr std::size_t least_rows = 64, most_rows = 4096, most_bytes = 64 << 20, most_work = 1'000'000'000;

// Into how many parts, of rows each, a step is cut: one for each thread where every core's cache has room for all weights, next to rows.
// Each part lays the weights out for itself, a fourth of the time of 16 rows. Larger weights are cut by each product instead.
template <class T>
std::size_t row_parts(const Network& network, std::size_t rows) {
  constexpr std::size_t least_part = 16, most_work_of_step = 50'000'000;  // multiply-adds: parts are not interrupted
  if (network.parameters() * sizeof(T) > l2_bytes() / 4 || rows * network.parameters() > most_work_of_step) return 1;
  const double cycles = static_cast<double>(rows) * static_cast<double>(network.parameters()) / 4.0;  // there and back
  return std::max<std::size_t>(1, std::min<std::size_t>(threads_for(cycles), rows / least_part));
}

constexpr std::size_t elements_per_task = 1 << 14;  // of elementwise work: some microseconds, ten times what handing it out costs

// An activation works in place on a linear layer's output, which that layer does not need again. Elsewhere its input has another reader.
bool works_in_place(const Network& network, std::size_t layer) {
  return layer > 0 && !network.layers()[layer].is_linear() && network.layers()[layer - 1].is_linear();
}

}  // namespace

template <class T>
NetworkScratch<T>::NetworkScratch(const Network& network, std::size_t batch_rows, bool scattered, Need need) {
  capacity = batch_rows;
  if (network.is_lone_linear() && need == Need::gradient) return;
  constexpr std::size_t line = 64 / sizeof(T);
  const std::vector<Layer>& layers = network.layers();
  std::size_t per_row = 0, most_weights = 1;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    per_row += works_in_place(network, i) ? 0 : layers[i].out_features;
    if (need == Need::gradient && (layers[i].is_linear() || i == 0)) per_row += layers[i].out_features;
    most_weights = std::max(most_weights, layers[i].weights());
  }
  if (scattered) per_row += network.in_features() + network.out_features();
  rows = std::min({most_rows, most_bytes / (per_row * sizeof(T)), most_work / most_weights});
  rows = std::min(batch_rows, std::max(least_rows, rows / 64 * 64));
  std::size_t size = 0;
  const auto take = [&](std::size_t features) {
    const std::size_t at = size;
    size += (rows * features + line - 1) / line * line;
    return at;
  };
  for (std::size_t i = 0; i < layers.size(); ++i)
    outputs.push_back(works_in_place(network, i) ? outputs.back() : take(layers[i].out_features));
  if (need == Need::gradient)
    for (const Layer& layer : layers) {
      const bool own = layer.is_linear() || gradients.empty();
      gradients.push_back(own ? take(layer.out_features) : gradients.back());
    }
  if (scattered) {
    gathered = take(network.in_features());
    targets = take(network.out_features());
  }
  arena.resize(size);
}

namespace {

// One pass of some rows, forward and back.
template <class T>
class Pass {
 public:
  // `interrupt` is asked between layers; none within a task.
  Pass(const Network& network, const T* parameters, NetworkScratch<T>& scratch, Interrupt* interrupt,
       const std::vector<PackedMatrix<T>>* packed = nullptr)
      : network_(network), parameters_(parameters), scratch_(scratch), interrupt_(interrupt), packed_(packed) {}

  // Rows `begin` and on of a batch, which stay the input of the pass: where they lie, or, where an index scatters them, in the scratch from
  // its row `place` on, where `gather` brings them.
  void take(const Batch<T>& batch, std::size_t begin, std::size_t rows, std::size_t place, bool gather) {
    const std::size_t in = network_.in_features(), out = network_.out_features();
    rows_ = rows;
    place_ = place;
    if (!batch.index) {
      x_ = batch.x + begin * batch.x_stride;
      x_stride_ = batch.x_stride;
      target_ = batch.target + begin * out;
      return;
    }
    T* const x = at(scratch_.gathered, in);
    T* const target = at(scratch_.targets, out);
    for (std::size_t r = 0; gather && r < rows; ++r) {
      const std::size_t row = batch.index[begin + r];
      std::copy_n(batch.x + row * batch.x_stride, in, x + r * in);
      std::copy_n(batch.target + row * out, out, target + r * out);
    }
    x_ = x;
    x_stride_ = in;
    target_ = target;
  }

  // Every layer's output. False after an interrupt; where `finite` is asked for, also when a linear layer's output is not.
  bool forward(bool finite) {
    const std::vector<Layer>& layers = network_.layers();
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = layers[i];
      if (interrupted(rows_ * layer.weights())) return false;
      T* const y = output(i);
      if (layer.is_linear()) {
        // An activation is taken along while the product's rows are in the cache.
        const bool fused = i + 1 < layers.size() && works_in_place(network_, i + 1);
        const bool good =
            linear_forward<T>(rows_, layer.in_features, layer.out_features, input(i), input_stride(i), weight(layer), bias(layer), y,
                              fused ? layers[i + 1].activation : Activation::none, finite, packed(i));
        if (!good) return false;
        i += fused;
      } else {
        if (!works_in_place(network_, i))
          for (std::size_t r = 0; r < rows_; ++r)
            std::copy_n(input(i) + r * input_stride(i), layer.out_features, y + r * layer.out_features);
        // Infinity would come out of the first layer as a number.
        if (finite && i == 0 && !table<T>().all_finite(rows_ * layer.out_features, y)) return false;
        in_tasks(layer.out_features, [&](std::size_t begin, std::size_t rows, std::size_t) {
          table<T>().activation_forward(layer.activation, rows, layer.out_features, y + begin * layer.out_features, layer.out_features);
        });
      }
    }
    return true;
  }

  const T* output() const { return output(network_.layers().size() - 1); }

  double squared_error() {
    const std::size_t out = network_.out_features();
    scratch_.losses.assign(task_count(out), 0.0);
    in_tasks(out, [&](std::size_t begin, std::size_t rows, std::size_t task) {
      scratch_.losses[task] = table<T>().squared_error_sum(rows * out, output() + begin * out, target_ + begin * out);
    });
    double sum = 0.0;
    for (const double loss : scratch_.losses) sum += loss;
    return sum;
  }

  // The gradient of the squared error at the output of every linear layer. False after an interrupt.
  bool backward() {
    const std::vector<Layer>& layers = network_.layers();
    const std::size_t out = network_.out_features(), first = first_linear();
    T* const last = gradient(layers.size() - 1);
    in_tasks(out, [&](std::size_t begin, std::size_t rows, std::size_t) {
      table<T>().squared_error_gradient(rows * out, output() + begin * out, target_ + begin * out, T(1), last + begin * out);
    });
    for (std::size_t i = layers.size(); i-- > first;) {
      const Layer& layer = layers[i];
      T* const g = gradient(i);
      if (!layer.is_linear()) {
        const std::size_t cols = layer.out_features;
        const T* const y = output(i);
        in_tasks(cols, [&](std::size_t begin, std::size_t rows, std::size_t) {
          table<T>().activation_backward(layer.activation, rows, cols, y + begin * cols, cols, g + begin * cols, cols);
        });
      } else if (i > first) {
        if (interrupted(rows_ * layer.weights())) return false;
        const bool fused = !layers[i - 1].is_linear();
        linear_input_gradient<T>(rows_, layer.in_features, layer.out_features, g, weight(layer), gradient(i - 1),
                                 fused ? layers[i - 1].activation : Activation::none, input(i));
        i -= fused;
      }
    }
    return true;
  }

  // What follows `backward`: into[parameters] = their gradient, or, with `finished`, memory for what that visits. Stops early after an
  // interrupt, except with `finished`: a step is made whole.
  void parameter_gradients(T* into, SegmentVisitor<T> finished) const {
    for (std::size_t i = network_.layers().size(); i-- > 0;) {
      const Layer& layer = network_.layers()[i];
      if (!layer.is_linear()) continue;
      T* const weights = into + layer.begin_weight;
      if (finished) {
        update(i, weights, finished, 0, 1);
        continue;
      }
      if (interrupted(rows_ * layer.weights())) return;
      linear_weight_gradient<T>(rows_, layer.in_features, layer.out_features, gradient(i), input(i), input_stride(i), false, weights,
                                layer.has_bias ? weights + layer.weights() : nullptr);
    }
  }

  // The same with `finished`, for a small network: one loop, whose `parts` take their outputs of every layer. Only a layer with too few
  // outputs for that, but enough work to be shared, has a loop of its own.
  void parameter_gradients_in_parts(std::size_t parts, T* memory, SegmentVisitor<T> finished) const {
    const auto on_its_own = [&](const Layer& layer) {
      return layer.out_features < parts * few_outputs && cycles_of(rows_, layer.in_features, layer.out_features) >= least_shared_cycles;
    };
    const auto update_each = [&](bool own, std::size_t part, std::size_t of_parts) {
      for (std::size_t i = network_.layers().size(); i-- > 0;) {
        const Layer& layer = network_.layers()[i];
        if (layer.is_linear() && on_its_own(layer) == own) update(i, memory + layer.begin_weight, finished, part, of_parts);
      }
    };
    update_each(true, 0, 1);
    parallel_for(parts, static_cast<int>(parts), [&](std::size_t part, std::size_t) { update_each(false, part, parts); });
  }

 private:
  // `finished` visits the gradient of the parameters of a part of linear layer i; `memory` has room for that of the layer.
  void update(std::size_t i, T* memory, SegmentVisitor<T> finished, std::size_t part, std::size_t parts) const {
    const Layer& layer = network_.layers()[i];
    const std::size_t in = layer.in_features;
    const auto visit = [&](const Block<T>& block) {
      const std::size_t begin = layer.begin_weight + block.row * in + block.col;
      if (block.cols == in && block.stride == in) return finished(Segment<T>{begin, 1, block.rows * in, in, block.data, in});
      finished(Segment<T>{begin, block.rows, block.cols, in, block.data, block.stride});
    };
    T* const biases = layer.has_bias ? memory + layer.weights() : nullptr;
    const auto [begin, count] =
        visit_weight_gradient<T>(rows_, in, layer.out_features, gradient(i), input(i), input_stride(i), weight(layer), visit, memory,
                                 biases, part, parts);
    if (biases && count) finished({layer.begin_weight + layer.weights() + begin, 1, count, count, biases + begin, count});
  }

  bool interrupted(std::size_t multiply_adds) const { return interrupt_ && interrupt_->check_after(multiply_adds); }

  T* at(std::size_t begin, std::size_t features) const { return scratch_.arena.data() + begin + place_ * features; }
  T* output(std::size_t layer) const { return at(scratch_.outputs[layer], network_.layers()[layer].out_features); }
  T* gradient(std::size_t layer) const { return at(scratch_.gradients[layer], network_.layers()[layer].out_features); }
  const T* input(std::size_t layer) const { return layer ? output(layer - 1) : x_; }
  std::size_t input_stride(std::size_t layer) const { return layer ? network_.layers()[layer].in_features : x_stride_; }
  const PackedMatrix<T>* packed(std::size_t layer) const { return packed_ && (*packed_)[layer].cols() ? &(*packed_)[layer] : nullptr; }
  const T* weight(const Layer& layer) const { return parameters_ + layer.begin_weight; }
  const T* bias(const Layer& layer) const { return layer.has_bias ? weight(layer) + layer.weights() : nullptr; }

  // Nothing before it has parameters, so that no gradient is wanted there.
  std::size_t first_linear() const {
    std::size_t i = 0;
    while (i < network_.layers().size() && !network_.layers()[i].is_linear()) ++i;
    return i;
  }

  static std::size_t task_rows(std::size_t cols) { return std::max<std::size_t>(1, elements_per_task / cols); }
  std::size_t task_count(std::size_t cols) const { return ceil_divide(rows_, task_rows(cols)); }

  // body(begin, rows, task): elementwise work on rows of `cols`, on all threads.
  template <class Body>
  void in_tasks(std::size_t cols, const Body& body) {
    const std::size_t step = task_rows(cols);
    const double cycles = static_cast<double>(rows_) * static_cast<double>(cols);  // one or two for each element
    parallel_for(task_count(cols), threads_for(cycles), [&](std::size_t task, std::size_t) {
      body(task * step, std::min(step, rows_ - task * step), task);
    });
  }

  const Network& network_;
  const T* parameters_;
  NetworkScratch<T>& scratch_;
  Interrupt* interrupt_;
  const std::vector<PackedMatrix<T>>* packed_;
  std::size_t rows_ = 0, place_ = 0, x_stride_ = 0;
  const T* x_ = nullptr;
  const T* target_ = nullptr;
};

}  // namespace

template <class T>
bool network_forward(const Network& network, std::size_t rows, const T* x, std::size_t x_stride, const T* parameters, T* y,
                     NetworkScratch<T>& scratch, Interrupt& interrupt, const std::vector<PackedMatrix<T>>* packed) {
  if (rows == 0) return true;
  const std::size_t out = network.out_features();
  const Batch<T> batch{x, x_stride, y, nullptr, rows, 0, false};  // its targets are not read
  Pass<T> pass(network, parameters, scratch, &interrupt, packed);
  for (std::size_t begin = 0; begin < rows; begin += scratch.rows) {
    const std::size_t count = std::min(scratch.rows, rows - begin);
    pass.take(batch, begin, count, 0, true);
    if (!pass.forward(true)) return false;
    std::copy_n(pass.output(), count * out, y + begin * out);
  }
  return true;
}

template <class T>
double network_squared_error(const Network& network, const Batch<T>& batch, const T* parameters, NetworkScratch<T>& scratch,
                             Interrupt& interrupt) {
  if (network.is_lone_linear()) {
    AlignedVector<T> gradient(network.parameters());
    return linear_squared_error_gradient(network.linear_shape(), batch, parameters, gradient.data(), scratch.linear, interrupt);
  }
  Pass<T> pass(network, parameters, scratch, &interrupt);
  double loss = 0.0;
  for (std::size_t begin = 0; begin < batch.rows; begin += scratch.rows) {
    pass.take(batch, begin, std::min(scratch.rows, batch.rows - begin), 0, true);
    if (!pass.forward(false)) break;
    loss += pass.squared_error();
  }
  return loss;
}

template <class T>
double network_squared_error_gradient(const Network& network, const Batch<T>& batch, const T* parameters, T* gradient,
                                      NetworkScratch<T>& scratch, Interrupt& interrupt, SegmentVisitor<T> finished) {
  const std::size_t n = network.parameters();
  if (network.is_lone_linear()) {
    const double loss = linear_squared_error_gradient(network.linear_shape(), batch, parameters, gradient, scratch.linear, interrupt);
    if (finished && std::isfinite(loss) && !interrupt.requested()) finished({0, 1, n, n, gradient, n});
    return loss;
  }
  Pass<T> pass(network, parameters, scratch, &interrupt);
  if (batch.rows <= scratch.rows) {
    const std::size_t parts = row_parts<T>(network, batch.rows);
    pass.take(batch, 0, batch.rows, 0, parts == 1);
    if (parts > 1) {  // a thread's rows stay in its cache
      parallel_for(parts, static_cast<int>(parts), [&](std::size_t i, std::size_t) {
        const std::size_t begin = batch.rows * i / parts, end = batch.rows * (i + 1) / parts;
        Pass<T> part(network, parameters, scratch, nullptr);
        part.take(batch, begin, end - begin, begin, true);
        part.forward(false);
        part.backward();
      });
    } else if (!pass.forward(false)) {
      return 0.0;
    }
    const double loss = pass.squared_error();
    if (finished && !std::isfinite(loss)) return loss;
    if (parts == 1 && !pass.backward()) return loss;
    if (parts > 1 && finished)
      pass.parameter_gradients_in_parts(parts, gradient, finished);
    else
      pass.parameter_gradients(gradient, finished);
    return loss;
  }
  scratch.sums.assign(n, 0.0);  // sums of many passes are carried in double
  double loss = 0.0;
  for (std::size_t begin = 0; begin < batch.rows; begin += scratch.rows) {
    pass.take(batch, begin, std::min(scratch.rows, batch.rows - begin), 0, true);
    if (!pass.forward(false)) return loss;
    loss += pass.squared_error();
    if (!pass.backward()) return loss;
    pass.parameter_gradients(gradient, {});
    if (interrupt.requested()) return loss;
    for (std::size_t i = 0; i < n; ++i) scratch.sums[i] += static_cast<double>(gradient[i]);
  }
  for (std::size_t i = 0; i < n; ++i) gradient[i] = static_cast<T>(scratch.sums[i]);
  if (finished && std::isfinite(loss)) finished({0, 1, n, n, gradient, n});
  return loss;
}

#define GDLIB_INSTANTIATE(T)                                                                                                             \
  template struct NetworkScratch<T>;                                                                                                     \
  template bool network_forward(const Network&, std::size_t, const T*, std::size_t, const T*, T*, NetworkScratch<T>&, Interrupt&,         \
                                const std::vector<PackedMatrix<T>>*);                                                                    \
  template double network_squared_error(const Network&, const Batch<T>&, const T*, NetworkScratch<T>&, Interrupt&);                      \
  template double network_squared_error_gradient(const Network&, const Batch<T>&, const T*, T*, NetworkScratch<T>&, Interrupt&,  \
                                                 SegmentVisitor<T>);
GDLIB_INSTANTIATE(float)
GDLIB_INSTANTIATE(double)
#undef GDLIB_INSTANTIATE

}  // namespace gdlib
