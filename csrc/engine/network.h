// A network: layers one after the other, whose parameters lie in one vector. Forward, and the gradient of a squared error.
//
// Rows go through it some at a time, so that what a pass needs stays bounded, and an interrupt is looked for between layers.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../kernels/kernels.h"
#include "aligned.h"
#include "parallel.h"
#include "squared_error.h"
#include "visitor.h"

namespace gdlib {

// A linear layer, or an activation of as many features as it gets.
struct Layer {
  Activation activation;  // none: a linear layer
  std::size_t in_features;
  std::size_t out_features;
  bool has_bias;             // of a linear layer
  std::size_t begin_weight;  // where its parameters begin: weight[out, in], then bias[out] if any
  bool is_linear() const { return activation == Activation::none; }
  std::size_t weights() const { return is_linear() ? in_features * out_features : 0; }
  std::size_t parameters() const { return weights() + (is_linear() && has_bias ? out_features : 0); }
};

// By the name of a layer's kind, "linear" being none. Throws std::invalid_argument for another.
Activation activation_named(const std::string& kind);

class Network {
 public:
  // Adds a layer behind the others. Throws std::invalid_argument for sizes that do not chain or exist.
  void add(Activation activation, std::size_t in_features, std::size_t out_features, bool has_bias);

  const std::vector<Layer>& layers() const { return layers_; }
  std::size_t in_features() const { return layers_.front().in_features; }
  std::size_t out_features() const { return layers_.back().out_features; }
  std::size_t parameters() const { return layers_.empty() ? 0 : layers_.back().begin_weight + layers_.back().parameters(); }

  // An activation works in place on a linear layer's output, which that layer does not need again. Elsewhere its input has another reader.
  bool works_in_place(std::size_t layer) const { return layer > 0 && !layers_[layer].is_linear() && layers_[layer - 1].is_linear(); }

  bool is_lone_linear() const { return layers_.size() == 1 && layers_.front().is_linear(); }
  LinearShape linear_shape() const { return {in_features(), out_features(), layers_.front().has_bias}; }
  // A lone linear layer that is not too large has a pass of its own, which forms no outputs in memory.
  bool has_one_pass() const { return is_lone_linear() && gdlib::has_one_pass(linear_shape()); }

 private:
  std::vector<Layer> layers_;
};

enum class Need { outputs, gradient };

// What passes need besides their result, taken once and kept from step to step; of one pass, its own.
template <class T>
struct NetworkScratch {
  // For calls with at most `batch_rows` rows, scattered by an index or not.
  NetworkScratch(const Network& network, std::size_t batch_rows, bool scattered, Need need);

  std::size_t rows = 0;                // of one pass
  std::size_t capacity = 0;            // of a call
  std::vector<std::size_t> outputs;    // of each layer: where they begin in the arena, and so on
  std::vector<std::size_t> gradients;  // at each layer's output; an activation's becomes its input's in place
  std::size_t gathered = 0;            // the rows of x that an index scatters, and their targets
  std::size_t targets = 0;
  AlignedVector<T> arena;
  AlignedVector<double> sums;    // of gradients, where a batch has more rows than most_chain
  AlignedVector<T> partials;     // gradients of pieces of a batch
  AlignedVector<double> losses;  // by task or piece
  LinearScratch<T> linear;
};

// y[rows, out] of x[rows, in]; false when a linear layer's output is not finite, or after an interrupt. A row's bits do not depend on the
// other rows. `packed`: the weights of layers laid out before, by layer, empty where they are not.
template <class T>
bool network_forward(const Network& network, std::size_t rows, const T* x, std::size_t x_stride, const T* parameters, T* y,
                     NetworkScratch<T>& scratch, Interrupt& interrupt, const std::vector<PackedMatrix<T>>* packed = nullptr);

// The sum of squared errors over the batch. Meaningless once `interrupt` has been requested.
template <class T>
double network_squared_error(const Network& network, const Batch<T>& batch, const T* parameters, NetworkScratch<T>& scratch,
                             Interrupt& interrupt);

// A block of the gradient is complete, and the parameters that it belongs to are not read again in this call.
template <class T>
struct Segment {
  std::size_t begin;  // of the first row's parameters
  std::size_t rows;
  std::size_t cols;
  std::size_t stride;  // parameters between the starts of two rows
  const T* gradient;   // [rows, cols], rows gradient_stride apart
  std::size_t gradient_stride;
};

template <class T>
using SegmentVisitor = Visitor<const Segment<T>&>;

// The same, and gradient[parameters] = its gradient. `finished` visits every parameter once, in segments and on several threads, where it
// can while the gradient is in the cache; not at all when the loss is not finite, or after an interrupt. With it, `gradient` is memory for
// those that have to wait, and what it holds afterwards is unspecified.
template <class T>
double network_squared_error_gradient(const Network& network, const Batch<T>& batch, const T* parameters, T* gradient,
                                      NetworkScratch<T>& scratch, Interrupt& interrupt, SegmentVisitor<T> finished = {});

}  // namespace gdlib
