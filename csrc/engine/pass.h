// One pass of some rows through a network: forward, back, and the gradients of its parameters. For network.cpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../dispatch/dispatch.h"
#include "linear.h"
#include "network.h"
#include "tasks.h"

namespace gdlib {

// One pass of some rows, forward and back.
template <class T>
class Pass {
 public:
  // `interrupt` is asked between layers: given on the calling thread only.
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
    const std::size_t next = begin + std::min(batch.rows, scratch_.rows);  // the same place in the next pass
    if (gather) gather_rows(batch, begin, rows, next, in, out, x, target);
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
        const bool fused = i + 1 < layers.size() && network_.works_in_place(i + 1);
        const bool good =
            linear_forward<T>(rows_, layer.in_features, layer.out_features, input(i), input_stride(i), weight(layer), bias(layer), y,
                              fused ? layers[i + 1].activation : Activation::none, finite, packed(i));
        if (!good) return false;
        i += fused;
      } else {
        const std::size_t cols = layer.out_features;
        const bool in_place = network_.works_in_place(i);
        const T* const x = in_place ? y : input(i);
        const std::size_t stride = in_place ? cols : input_stride(i);
        // Infinity would come out of the first layer as a number.
        if (finite && i == 0)
          for (std::size_t r = 0; r < rows_; ++r)
            if (!table<T>().all_finite(cols, x + r * stride)) return false;
        in_tasks(cols, [&](std::size_t begin, std::size_t rows, std::size_t) {
          table<T>().activation_forward(layer.activation, rows, cols, {x + begin * stride, stride}, {y + begin * cols, cols}, false);
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

  // The same where one task takes all rows of the pass.
  double squared_error_of_task() const { return table<T>().squared_error_sum(rows_ * network_.out_features(), output(), target_); }

  // The gradient of the squared error at the output of every linear layer. False after an interrupt.
  bool backward() {
    const std::vector<Layer>& layers = network_.layers();
    const std::size_t out = network_.out_features(), first = first_linear();
    T* const last = gradient(layers.size() - 1);
    in_tasks(out, [&](std::size_t begin, std::size_t rows, std::size_t) {
      table<T>().squared_error_gradient(rows * out, output() + begin * out, target_ + begin * out, T(1), last + begin * out, false);
    });
    for (std::size_t i = layers.size(); i-- > first;) {
      const Layer& layer = layers[i];
      T* const g = gradient(i);
      if (!layer.is_linear()) {
        const std::size_t cols = layer.out_features;
        const T* const y = output(i);
        in_tasks(cols, [&](std::size_t begin, std::size_t rows, std::size_t) {
          T* const part = g + begin * cols;
          table<T>().activation_backward(layer.activation, rows, cols, {y + begin * cols, cols}, {part, cols}, {part, cols}, false);
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

  // What follows `backward`: into[parameters] (+)= their gradient. Stops early after an interrupt.
  void parameter_gradients(T* into, bool accumulate) const {
    for (std::size_t i = network_.layers().size(); i-- > 0;) {
      const Layer& layer = network_.layers()[i];
      if (!layer.is_linear()) continue;
      if (interrupted(rows_ * layer.weights())) return;
      T* const weights = into + layer.begin_weight;
      linear_weight_gradient<T>(rows_, layer.in_features, layer.out_features, gradient(i), input(i), input_stride(i), accumulate, weights,
                                layer.has_bias ? weights + layer.weights() : nullptr);
    }
  }

  // Instead of that: `finished` visits it block by block; memory[parameters] is for blocks that have to wait. A step is made whole: no
  // interrupt ends it.
  void update_all(T* memory, SegmentVisitor<T> finished) const {
    for (std::size_t i = network_.layers().size(); i-- > 0;) {
      const Layer& layer = network_.layers()[i];
      if (layer.is_linear()) update(i, memory + layer.begin_weight, finished, 0, 1);
    }
  }

  // The same for a small network: one loop, whose `parts` take their outputs of every layer. Only a layer with too few
  // outputs for that, but enough work to be shared, has a loop of its own.
  void update_in_parts(std::size_t parts, T* memory, SegmentVisitor<T> finished) const {
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

  static std::size_t task_rows(std::size_t cols) { return std::max<std::size_t>(1, elements_of_stretch / cols); }
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

}  // namespace gdlib
