#include "training.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "../dispatch/dispatch.h"
#include "random.h"

namespace gdlib {
namespace {

// Hands out the batches of an epoch: consecutive rows, or consecutive entries of the epoch's order.
template <class T>
class RowSource {
 public:
  explicit RowSource(const Round<T>& round)
      : round_(round), prefetch_(round.rows * round.network.in_features() * sizeof(T) > half_of_l2) {}

  void begin_epoch(std::uint64_t epoch, Interrupt& interrupt) {
    if (!round_.epoch_seeds) return;
    const std::uint64_t seed = round_.epoch_seeds[epoch];
    if (seed_ == seed) return;  // the same order again
    shuffle_order(seed, static_cast<std::uint32_t>(round_.rows), order_, interrupt);
    seed_ = seed;
  }

  Batch<T> batch(std::uint64_t number) const {
    const std::size_t begin = number * round_.batch_size;
    const std::size_t rows = std::min(round_.batch_size, round_.rows - begin);
    Batch<T> batch{round_.x, round_.x_stride, round_.target, nullptr, rows, round_.rows - begin - rows, prefetch_};
    if (round_.epoch_seeds) {
      batch.index = order_.data() + begin;
    } else {
      batch.x += begin * round_.x_stride;
      batch.target += begin * round_.network.out_features();
    }
    return batch;
  }

 private:
  static constexpr std::size_t half_of_l2 = 512 << 10;  // of the smallest L2 in use, 1 MiB: prefetching within it only costs

  const Round<T>& round_;
  bool prefetch_;
  std::optional<std::uint64_t> seed_;
  AlignedVector<std::uint32_t> order_;
};

template <class T>
void apply_update(Round<T>& round, T gradient_scale) {
  for (UpdateRange<T>& range : round.ranges) {
    table<T>().sgd_update(range.end - range.begin, range.options, gradient_scale, range.first_step, round.gradient + range.begin,
                          round.parameters + range.begin, range.has_momentum ? round.momentum + range.begin : nullptr);
    range.first_step = false;
  }
}

}  // namespace

template <class T>
RoundResult train_round(Round<T>& round, Interrupt& interrupt, const std::function<void(std::uint64_t)>& on_epoch) {
  const std::uint64_t steps_per_epoch = (round.rows + round.batch_size - 1) / round.batch_size;
  const double outputs = static_cast<double>(round.network.out_features());
  const std::size_t parameters = round.network.parameters();
  // A squared error shows at once that the weights of a linear model are infinite. An activation may hide it: tanh is 1 of infinity.
  const bool check_each_step = !round.network.is_lone_linear();

  RowSource<T> source(round);
  NetworkScratch<T> scratch(round.network, round.batch_size, round.epoch_seeds != nullptr, Need::gradient);
  RoundResult result{Stop::finished, round.first_step};
  std::uint64_t epoch = round.first_step / steps_per_epoch;
  std::uint64_t in_epoch = round.first_step % steps_per_epoch;
  while (result.steps_done < round.last_step) {
    source.begin_epoch(epoch, interrupt);
    if (interrupt.requested()) {
      result.stop = Stop::interrupted;
      return result;
    }
    for (; in_epoch < steps_per_epoch && result.steps_done < round.last_step; ++in_epoch) {
      const Batch<T> batch = source.batch(in_epoch);
      const double loss = network_squared_error_gradient(round.network, batch, round.parameters, round.gradient, scratch, interrupt);
      if (interrupt.check_after(batch.rows * parameters)) {
        result.stop = Stop::interrupted;
        return result;
      }
      if (!std::isfinite(loss)) {
        result.stop = Stop::non_finite;
        return result;
      }
      const double elements = static_cast<double>(batch.rows) * outputs;
      apply_update(round, static_cast<T>(round.mean ? 1.0 / elements : 1.0));
      round.losses[epoch] += loss;
      ++result.steps_done;
      if (check_each_step && !table<T>().all_finite(parameters, round.parameters)) {
        result.stop = Stop::non_finite;
        return result;
      }
    }
    if (in_epoch < steps_per_epoch) break;  // the round ends inside an epoch
    if (!table<T>().all_finite(parameters, round.parameters)) {
      result.stop = Stop::non_finite;
      return result;
    }
    in_epoch = 0;
    ++epoch;
    on_epoch(epoch);
    const double mean = round.losses[epoch - 1] / (static_cast<double>(round.rows) * outputs);
    if (round.loss_limit > 0.0 && mean > round.loss_limit) {
      result.stop = Stop::above_limit;
      return result;
    }
  }
  return result;
}

template RoundResult train_round(Round<float>&, Interrupt&, const std::function<void(std::uint64_t)>&);
template RoundResult train_round(Round<double>&, Interrupt&, const std::function<void(std::uint64_t)>&);

}  // namespace gdlib
