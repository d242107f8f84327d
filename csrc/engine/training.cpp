#include "training.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "../dispatch/dispatch.h"
#include "aligned.h"
#include "caches.h"
#include "random.h"
#include "tasks.h"

namespace gdlib {
namespace {

// Hands out the batches of an epoch: consecutive rows, or consecutive entries of the epoch's order.
template <class T>
class RowSource {
 public:
  explicit RowSource(const Round<T>& round) : round_(round), bytes_(round.rows * round.network.in_features() * sizeof(T)) {}

  bool scattered() const { return prefetch() && round_.epoch_seeds; }  // over memory

  void begin_epoch(std::uint64_t epoch, Interrupt& interrupt) {
    if (!round_.epoch_seeds) return;
    const std::uint64_t seed = round_.epoch_seeds[epoch];
    if (seed_ == seed) return;  // the same order again
    shuffle_order(seed, static_cast<std::uint32_t>(round_.rows), order_, interrupt);
    seed_ = seed;
  }

  // The batch with this number, and those behind it, `count` in all.
  Batch<T> batches(std::uint64_t number, std::uint64_t count) const {
    const std::size_t begin = number * round_.batch_size;
    const std::size_t rows = std::min<std::size_t>(count * round_.batch_size, round_.rows - begin);
    const std::size_t behind = round_.rows - begin - rows;
    Batch<T> batch{round_.x, round_.x_stride, round_.target, nullptr, rows, behind, prefetch(), bytes_ > l3_bytes(),
                   gains_by_requests()};
    if (round_.epoch_seeds) {
      batch.index = order_.data() + begin;
    } else {
      batch.x += begin * round_.x_stride;
      batch.target += begin * round_.network.out_features();
    }
    return batch;
  }

 private:
  // About an L2, within which to fetch ahead only costs. All reports were made with it, on cores with 512 KiB (Zen 3) and 1 MiB (Zen 4 and
  // 5).
  static constexpr std::size_t least_fetched = 512 << 10;

  bool prefetch() const { return bytes_ > least_fetched; }

  const Round<T>& round_;
  std::size_t bytes_;  // of x
  std::optional<std::uint64_t> seed_;
  AlignedVector<std::uint32_t> order_;
};

// Updates the parameters of a step, segment by segment, from several threads.
template <class T>
class StepUpdate {
 public:
  StepUpdate(Round<T>& round, T gradient_scale) : round_(round), scale_(gradient_scale) {}

  void operator()(const Segment<T>& segment) const {
    const std::size_t last_row = segment.begin + (segment.rows - 1) * segment.stride;
    for (const UpdateRange<T>& range : round_.ranges) {
      if (range.begin <= segment.begin && last_row + segment.cols <= range.end) return update(range, segment);
      for (std::size_t row = segment.begin, r = 0; r < segment.rows; row += segment.stride, ++r) {  // those of the row in this range
        const std::size_t from = std::max(row, range.begin), end = std::min(row + segment.cols, range.end);
        if (from < end)
          update(range, {from, 1, end - from, segment.stride, segment.gradient + r * segment.gradient_stride + (from - row), 0});
      }
    }
  }

  // Once every segment has been visited. The end of their loop has published what threads found.
  bool finite() const { return finite_.load(std::memory_order_relaxed); }

 private:
  void update(const UpdateRange<T>& range, const Segment<T>& segment) const {
    T* const momentum = range.has_momentum ? round_.momentum + segment.begin : nullptr;
    const bool finite =
        table<T>().sgd_update({segment.rows, segment.cols, range.options, scale_, range.first_step, segment.gradient,
                               segment.gradient_stride, round_.parameters + segment.begin, momentum, segment.stride});
    if (!finite) finite_.store(false, std::memory_order_relaxed);
  }

  Round<T>& round_;
  T scale_;
  mutable std::atomic<bool> finite_{true};
};

// Many steps in one call, where the kernel for few features can make them: one output, and one way to update every parameter.
template <class T>
class ManySteps {
 public:
  // A larger batch has the threads and the blocks of linear_squared_error_gradient. So has one that is cut into pieces: from rows of 200
  // bytes on the two ways are about as fast, and rows that are scattered over memory are read by two threads almost twice as fast. Rows of
  // less than a line are taken up to where threads begin to share their arithmetic: a visit takes one thread up to 1.8 times as long (2 and
  // 10 features, 1,500 to 6,400 rows), and two threads as long, but for rows that are scattered over memory (0.8 times). The batch and the
  // features alone decide, so that neither the size nor the order of the data shows in the bits.
  explicit ManySteps(Round<T>& round) : round_(round) {
    constexpr std::size_t most_batch = 1024, least_cut_row = 200, line = 64;
    const Network& network = round.network;
    const std::size_t in = network.in_features(), row_bytes = in * sizeof(T), rows = round.batch_size;
    const bool cut = row_bytes >= least_cut_row && rows_per_piece(rows, in, 1, sizeof(T)) < rows;
    const bool short_rows = row_bytes < line && rows <= most_chain && cycles_of(rows, in, 1) < least_shared_cycles;
    possible_ = network.is_lone_linear() && network.out_features() == 1 && in <= table<T>().run_features && !cut &&
                (rows <= most_batch || short_rows) && round.ranges.size() == 1 && round.ranges[0].begin == 0 &&
                round.ranges[0].end == network.parameters();
    if (possible_) extend_rows_read_often();
  }

  bool possible() const { return possible_; }

  // Makes the steps of these rows, the first of which has this number, and adds their losses; returns how many: it stops before one whose
  // loss is not finite.
  std::uint64_t make(const Batch<T>& batches, std::size_t first_row, double& loss) {
    UpdateRange<T>& range = round_.ranges[0];
    LinearRun<T> run = run_of(batches.x, batches.target, batches.rows);
    if (!extended_.empty()) run.extended = extended_.data() + (batches.index ? 0 : first_row * extended_width());
    run.index = batches.index;
    run.rows_ahead = batches.rows_ahead;
    run.by_requests = batches.prefetch && batches.by_requests;
    run.batch_size = round_.batch_size;
    run.mean = round_.mean;
    run.options = range.options;
    run.first_step = range.first_step;
    run.parameters = round_.parameters;
    run.momentum = range.has_momentum ? round_.momentum : nullptr;
    run.loss = &loss;
    const std::uint64_t steps = table<T>().linear_run(run);
    range.first_step = range.first_step && steps == 0;
    return steps;
  }

 private:
  LinearRun<T> run_of(const T* x, const T* target, std::size_t rows) const {
    const LinearShape shape = round_.network.linear_shape();
    LinearRun<T> run{};
    run.x = x;
    run.x_stride = round_.x_stride;
    run.target = target;
    run.rows = rows;
    run.in_features = shape.in_features;
    run.has_bias = shape.has_bias;
    return run;
  }

  std::size_t extended_width() const {
    const LinearShape shape = round_.network.linear_shape();
    return extended_vectors(shape.in_features, shape.has_bias, table<T>().lanes) * table<T>().lanes;
  }

  // What an epoch gains is about what it costs to extend the rows once, but nothing in batches of a group of rows, whose steps wait for
  // each other (3 epochs in order took 1.2 times as long). A copy beyond a core's share of the caches gains less, and memory is the user's.
  void extend_rows_read_often() {
    constexpr std::uint64_t least_epochs = 3;
    constexpr std::size_t most_bytes = 4 << 20;
    const std::uint64_t steps = round_.last_step - round_.first_step;
    const std::uint64_t steps_per_epoch = (round_.rows + round_.batch_size - 1) / round_.batch_size;
    const std::size_t elements = round_.rows * extended_width();
    if (round_.batch_size < 2 * table<T>().lanes || steps < least_epochs * steps_per_epoch || elements * sizeof(T) > most_bytes) return;
    try {
      extended_.resize(elements);
    } catch (const std::bad_alloc&) {
      return;  // the rows are there in any case
    }
    table<T>().extend_rows(run_of(round_.x, round_.target, round_.rows), extended_.data());
  }

  Round<T>& round_;
  bool possible_;
  AlignedVector<T> extended_;  // empty: rows are read where they are
};

}  // namespace

template <class T>
RoundResult train_round(Round<T>& round, Interrupt& interrupt, const std::function<void(std::uint64_t)>& on_epoch) {
  const std::uint64_t steps_per_epoch = (round.rows + round.batch_size - 1) / round.batch_size;
  const double outputs = static_cast<double>(round.network.out_features());
  const std::size_t parameters = round.network.parameters();
  // A squared error shows at once that the weights of a linear model are infinite. An activation may hide it: tanh is 1 of infinity.
  const bool check_each_step = !round.network.is_lone_linear();

  // Steps of a tiny model between two looks at the clock, about 100,000 multiply-adds (10 to 50 us).
  const std::uint64_t steps_at_once = 1 + 100'000 / (round.batch_size * std::max<std::size_t>(1, parameters));
  RowSource<T> source(round);
  ManySteps<T> many(round);
  NetworkScratch<T> scratch(round.network, round.batch_size, round.epoch_seeds != nullptr, Need::gradient);
  RoundResult result{Stop::finished, round.first_step};
  std::uint64_t epoch = round.first_step / steps_per_epoch;
  std::uint64_t in_epoch = round.first_step % steps_per_epoch;
  const double reading = source.scattered() ? cycles_of_scattered(round.batch_size, round.network.in_features() * sizeof(T)) : 0.0;
  StepPacer pacer(std::max(cycles_of(round.batch_size, parameters, 1), reading));
  while (result.steps_done < round.last_step) {
    source.begin_epoch(epoch, interrupt);
    if (interrupt.requested()) {
      result.stop = Stop::interrupted;
      return result;
    }
    while (in_epoch < steps_per_epoch && result.steps_done < round.last_step) {
      const std::uint64_t left = std::min(steps_per_epoch - in_epoch, round.last_step - result.steps_done);
      const std::uint64_t wanted = many.possible() ? std::min(left, steps_at_once) : 1;
      const Batch<T> batch = source.batches(in_epoch, wanted);
      std::uint64_t made = 0;
      bool finite = true;
      if (many.possible()) {
        made = many.make(batch, in_epoch * round.batch_size, round.losses[epoch]);
      } else {
        const double elements = static_cast<double>(batch.rows) * outputs;
        const StepUpdate<T> update(round, static_cast<T>(round.mean ? 1.0 / elements : 1.0));
        const double loss = network_squared_error_gradient(round.network, batch, round.parameters, round.gradient, scratch, interrupt,
                                                           SegmentVisitor<T>(update));
        if (!interrupt.requested() && std::isfinite(loss)) {  // then it has been updated
          made = 1;
          round.losses[epoch] += loss;
          for (UpdateRange<T>& range : round.ranges) range.first_step = false;
          finite = !check_each_step || update.finite();
          pacer.step_done();
        }
      }
      result.steps_done += made;
      in_epoch += made;
      if (interrupt.check_after(batch.rows * parameters)) {
        result.stop = Stop::interrupted;
        return result;
      }
      if (made < wanted || !finite) {
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
