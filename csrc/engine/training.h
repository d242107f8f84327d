// The training loop: a round of steps from one to another, over batches that a source hands out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "../kernels/kernels.h"
#include "network.h"
#include "parallel.h"

namespace gdlib {

// The parameters [begin, end) of the arena, updated with the same hyperparameters.
template <class T>
struct UpdateRange {
  std::size_t begin;
  std::size_t end;
  SgdOptions<T> options;
  bool has_momentum;
  bool first_step;  // its momentum buffer is not set yet
};

template <class T>
struct Round {
  Network network;
  const T* x;
  std::size_t x_stride;
  const T* target;  // [rows, out_features]
  std::size_t rows;
  std::size_t batch_size;
  const std::uint64_t* epoch_seeds;  // one per epoch: the order of its rows; null: in order
  std::uint64_t first_step;          // steps count from the start of the run; an epoch has ceil(rows / batch_size)
  std::uint64_t last_step;           // exclusive
  bool mean;                         // the loss is the mean over all elements of a batch, else the sum
  double loss_limit;                 // an epoch whose mean squared error exceeds it ends the round; 0: none
  std::vector<UpdateRange<T>> ranges;
  T* parameters;  // [network.parameters()], in place
  T* gradient;    // [network.parameters()], memory for gradients
  T* momentum;    // in place; null when no range has momentum
  double* losses; // [epochs], by epoch of the run: sum of squared errors of its steps so far
};

enum class Stop { finished, interrupted, non_finite, above_limit };

struct RoundResult {
  Stop stop;
  std::uint64_t steps_done;  // updates applied, counted from the start of the run
};

// Advances (parameters, momentum) from first_step to last_step. Pure: equal arguments give equal bits, whatever the threads. Stops before
// the update of a step whose loss is not finite, at the end of an epoch above the limit, or between two steps when interrupted.
// `on_epoch(epochs done)` is told after each epoch.
template <class T>
RoundResult train_round(Round<T>& round, Interrupt& interrupt, const std::function<void(std::uint64_t)>& on_epoch);

}  // namespace gdlib
