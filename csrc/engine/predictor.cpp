#include "predictor.h"

#include <algorithm>
#include <utility>

#include "../dispatch/dispatch.h"
#include "linear.h"

namespace gdlib {

template <class T>
Predictor<T>::Predictor(const Network& network, const T* parameters)
    : network_(network), kernels_(&kernels()), parameters_(network.parameters()), packed_(network.layers().size()) {
  for (std::size_t i = 0; i < packed_.size(); ++i) {
    const Layer& layer = network.layers()[i];
    const T* const weight = parameters + layer.begin_weight;
    std::size_t kept = 0;  // parameters in front of those to copy
    if (layer.is_linear() && layer.out_features >= few_outputs) {
      packed_[i] = PackedMatrix<T>(layer.in_features, layer.out_features, {weight, 1, layer.in_features});
      kept = layer.weights();
    }
    std::copy(weight + kept, weight + layer.parameters(), parameters_.data() + layer.begin_weight + kept);
  }
}

template <class T>
bool Predictor<T>::outdated() const {
  return kernels_ != &kernels();
}

template <class T>
std::unique_ptr<NetworkScratch<T>> Predictor<T>::take_scratch(std::size_t rows) {
  std::unique_ptr<NetworkScratch<T>> scratch;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      scratch = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!scratch || scratch->capacity < rows) scratch = std::make_unique<NetworkScratch<T>>(network_, rows, false, Need::outputs);
  return scratch;
}

template <class T>
bool Predictor<T>::forward(std::size_t rows, const T* x, std::size_t x_stride, T* y, Interrupt& interrupt) {
  std::unique_ptr<NetworkScratch<T>> scratch = take_scratch(rows);
  const bool finite = network_forward(network_, rows, x, x_stride, parameters_.data(), y, *scratch, interrupt, &packed_);
  constexpr std::size_t most_kept = 1 << 20;  // bytes: of small batches, where taking memory would be felt
  if (scratch->arena.size() * sizeof(T) <= most_kept) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(scratch));
  }
  return finite;
}

template class Predictor<float>;
template class Predictor<double>;

}  // namespace gdlib
