// A frozen copy of a network for predictions: weights laid out in panels once, and scratch kept between calls, so that one row costs about
// one reading of the weights.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "gemm.h"
#include "network.h"

namespace gdlib {

template <class T>
class Predictor {
 public:
  // For the kernel table in use. Throws std::bad_alloc.
  Predictor(const Network& network, const T* parameters);

  const Network& network() const { return network_; }

  // Whether the table has been changed since, so that the panels no longer fit it.
  bool outdated() const;

  // As network_forward, with the same bits. May be called from several threads at a time.
  bool forward(std::size_t rows, const T* x, std::size_t x_stride, T* y, Interrupt& interrupt);

 private:
  std::unique_ptr<NetworkScratch<T>> take_scratch(std::size_t rows);

  Network network_;
  const void* kernels_;
  AlignedVector<T> parameters_;          // places of packed weights stay untouched, and take no memory
  std::vector<PackedMatrix<T>> packed_;  // by layer; empty where a layer's weights are read as they are
  std::mutex mutex_;                     // of the following
  std::vector<std::unique_ptr<NetworkScratch<T>>> idle_;
};

}  // namespace gdlib
