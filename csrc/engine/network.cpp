#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../dispatch/dispatch.h"
#include "caches.h"
#include "pass.h"
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

// Rows of one pass: as many as fit 64 MiB, so that memory stays bounded for any batch, and as 5 * 10^9 multiply-adds of a layer allow in
// float32, half in float64 (a tenth of a second on one core with AVX-512), so that Ctrl-C is answered; by 10^9, as each pass reads and
// writes the whole gradient, a step of 4096-4096-1000, 256 rows, took twice as long. At most 1024, whose inputs and outputs are in a cache
// when they are used again: 4096 took 2 to 12 % longer. At least 64: each pass reads all weights and adds to all of the gradient, and that
// many uses of each element are to pay for it.
constexpr std::size_t least_rows = 64, most_rows = 1024, most_bytes = 64 << 20;
static_assert(most_rows <= most_chain);  // which visit_weight_gradient asks for
constexpr std::uint64_t most_work = 20'000'000'000;  // multiply-adds times bytes of an element, as the next

// Of the weight gradients that update their weights at once, which nothing interrupts: 1.6 times the work of such a layer.
constexpr std::uint64_t most_work_of_update = 32'000'000'000;

}  // namespace

template <class T>
NetworkScratch<T>::NetworkScratch(const Network& network, std::size_t batch_rows, bool scattered, Need need) {
  capacity = batch_rows;
  if (network.has_one_pass() && need == Need::gradient) return;
  constexpr std::size_t line = 64 / sizeof(T);
  const std::vector<Layer>& layers = network.layers();
  std::size_t per_row = 0, most_weights = 1;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    per_row += network.works_in_place(i) ? 0 : layers[i].out_features;
    if (need == Need::gradient && (layers[i].is_linear() || i == 0)) per_row += layers[i].out_features;
    most_weights = std::max(most_weights, layers[i].weights());
  }
  if (scattered) per_row += network.in_features() + network.out_features();
  const std::uint64_t working = most_work / sizeof(T) / most_weights;
  rows = static_cast<std::size_t>(std::min<std::uint64_t>(working, std::min(most_rows, most_bytes / (per_row * sizeof(T)))));
  rows = std::min(batch_rows, std::max(least_rows, rows / 64 * 64));
  if (rows > 0) {  // passes of a whole batch are about equal
    const std::size_t passes = ceil_divide(batch_rows, rows);
    rows = std::min(rows, ceil_divide(ceil_divide(batch_rows, passes), 64) * 64);
  }
  std::size_t size = 0;
  const auto take = [&](std::size_t features) {
    const std::size_t at = size;
    size += (rows * features + line - 1) / line * line;
    return at;
  };
  for (std::size_t i = 0; i < layers.size(); ++i)
    outputs.push_back(network.works_in_place(i) ? outputs.back() : take(layers[i].out_features));
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

template <class T>
bool network_forward(const Network& network, std::size_t rows, const T* x, std::size_t x_stride, const T* parameters, T* y,
                     NetworkScratch<T>& scratch, Interrupt& interrupt, const std::vector<PackedMatrix<T>>* packed) {
  if (rows == 0) return true;
  const std::size_t out = network.out_features();
  const Batch<T> batch{x, x_stride, y, nullptr, rows, 0, false, false};  // its targets are not read
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
  if (network.has_one_pass()) {
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

namespace {

// Threads worth a pass, there and back, of a network that each takes some rows of through all its layers.
int threads_of_pass(const Network& network, std::size_t rows) {  // three products, about 12 multiply-adds a cycle
  return threads_for(static_cast<double>(rows) * static_cast<double>(network.parameters()) / 4.0);
}

// Into how many pieces of rows the batch of a small network is cut, each with a gradient of its own: this is what then goes from the cache
// of one core to that of another, and not the outputs and gradients of all layers, of which a piece has several times as much (13-64-64-1,
// 256 rows, two threads: 52 us without pieces, 44 with them). Of 64 rows at least, so that there are some in batches of 128, and of 128
// where that leaves 4: one thread loses 4 % to pieces of 64 rows, 2.5 % to those of 128. All their gradients are kept: 16 at most. Each
// is added to the others, which a row pays for up to 256 parameters of it: by smaller pieces one thread loses up to 8 % (128-128-128-10),
// with larger ones two threads take 1.1 to 1.3 times as long (64-128-64-10, 200-200-100-1).
std::size_t pieces_of(const Network& network, std::size_t rows) {
  constexpr std::size_t least_piece = 64, whole_piece = 128, parameters_of_row = 256, most_pieces = 16;
  const std::size_t n = network.parameters();
  if (n == 0 || n > most_partial) return 1;
  const std::size_t piece = std::max(n / parameters_of_row, std::clamp(rows / 4, least_piece, whole_piece));
  std::size_t pieces = 1;
  while (pieces < most_pieces && rows / (2 * pieces) >= piece) pieces *= 2;
  return pieces;
}

// Into how many parts, of rows each, a step without pieces is cut: one for each thread where every core's cache has room for all weights,
// next to rows. Each part lays the weights out for itself, a fourth of the time of 16 rows. Larger weights are cut by each product instead.
template <class T>
std::size_t parts_of(const Network& network, std::size_t rows) {
  constexpr std::size_t least_part = 16, most_work_of_step = 50'000'000;  // multiply-adds: parts are not interrupted
  if (network.parameters() * sizeof(T) > l2_bytes() / 4 || rows * network.parameters() > most_work_of_step) return 1;
  return std::max<std::size_t>(1, std::min<std::size_t>(threads_of_pass(network, rows), rows / least_part));
}

// Shows `finished` the whole gradient, on all threads.
template <class T>
void visit_all(std::size_t n, const T* gradient, SegmentVisitor<T> finished) {
  in_stretches(n, [&](std::size_t at, std::size_t size) { finished({at, 1, size, size, gradient + at, size}); });
}

// The gradient of the squared error of a batch. Its sums are cut by sizes alone; the threads only decide who computes which.
template <class T>
class BatchGradient {
 public:
  BatchGradient(const Network& network, const Batch<T>& batch, const T* parameters, T* gradient, NetworkScratch<T>& scratch,
                Interrupt& interrupt)
      : network_(network), batch_(batch), parameters_(parameters), gradient_(gradient), scratch_(scratch), interrupt_(interrupt) {}

  double run(SegmentVisitor<T> finished) const {
    if (batch_.rows <= scratch_.rows) return of_rows(0, batch_.rows, false, finished);
    const std::size_t n = network_.parameters();
    const bool long_chain = batch_.rows > most_chain;  // then sums of shorter ones are carried in double
    if (long_chain) scratch_.sums.assign(n, 0.0);
    double loss = 0.0;
    std::size_t chain = 0;  // rows whose sum the gradient holds
    for (std::size_t begin = 0; begin < batch_.rows;) {
      const std::size_t rows = std::min(scratch_.rows, batch_.rows - begin);
      loss += of_rows(begin, rows, chain > 0, {});
      if (interrupt_.requested()) return loss;
      begin += rows;
      chain += rows;
      if (!long_chain || (chain + scratch_.rows <= most_chain && begin < batch_.rows)) continue;
      for (std::size_t i = 0; i < n; ++i) scratch_.sums[i] += static_cast<double>(gradient_[i]);
      chain = 0;
    }
    if (long_chain)
      for (std::size_t i = 0; i < n; ++i) gradient_[i] = static_cast<T>(scratch_.sums[i]);
    if (finished && std::isfinite(loss)) visit_all(n, gradient_, finished);
    return loss;
  }

 private:
  // The same for some rows, which one pass can take. Without `finished`: gradient (+)= theirs.
  double of_rows(std::size_t begin, std::size_t rows, bool accumulate, SegmentVisitor<T> finished) const {
    if (const std::size_t pieces = pieces_of(network_, rows); pieces > 1) return in_pieces(begin, rows, pieces, accumulate, finished);
    const std::size_t n = network_.parameters(), parts = parts_of<T>(network_, rows);
    Pass<T> pass(network_, parameters_, scratch_, &interrupt_);
    pass.take(batch_, begin, rows, 0, parts == 1);
    if (parts > 1) {  // a thread's rows stay in its cache
      parallel_for(parts, static_cast<int>(parts), [&](std::size_t i, std::size_t) {
        const std::size_t first = rows * i / parts, end = rows * (i + 1) / parts;
        Pass<T> part(network_, parameters_, scratch_, nullptr);
        part.take(batch_, begin + first, end - first, first, true);
        part.forward(false);
        part.backward();
      });
    } else if (!pass.forward(false)) {
      return 0.0;
    }
    const double loss = pass.squared_error();
    if (finished && !std::isfinite(loss)) return loss;
    if (parts == 1 && !pass.backward()) return loss;
    if (!finished || rows > most_work_of_update / sizeof(T) / std::max<std::size_t>(1, n)) {
      pass.parameter_gradients(gradient_, accumulate);
      if (finished && !interrupt_.requested()) visit_all(n, gradient_, finished);
    } else if (parts > 1) {
      pass.update_in_parts(parts, gradient_, finished);
    } else if (!interrupt_.check_after(rows * n)) {
      pass.update_all(gradient_, finished);
    }
    return loss;
  }

  double in_pieces(std::size_t begin, std::size_t rows, std::size_t pieces, bool accumulate, SegmentVisitor<T> finished) const {
    constexpr std::size_t line = 64 / sizeof(T);
    const std::size_t n = network_.parameters(), stride = ceil_divide(n, line) * line;
    const int threads = threads_of_pass(network_, rows);
    scratch_.partials.resize(pieces * stride);
    scratch_.losses.assign(pieces, 0.0);
    T* const partials = scratch_.partials.data();
    // A part takes the rows of its pieces through the layers together: one layout of the weights, for as many rows as a cache has room for.
    constexpr std::size_t rows_of_part = 256;
    const std::size_t shares = static_cast<std::size_t>(threads), fitting = rows_of_part * pieces / rows;
    const auto most_of_a_thread = [&](std::size_t of_part) { return ceil_divide(pieces / of_part, shares) * of_part; };
    std::size_t together = 1;  // as `pieces`, a power of two
    for (std::size_t more = 2; more <= std::min(pieces, fitting); more *= 2)
      if (most_of_a_thread(more) <= most_of_a_thread(together)) together = more;
    const std::size_t parts = pieces / together;
    parallel_for(parts, threads, [&](std::size_t part, std::size_t worker) {
      if (interrupt_.requested()) return;
      const auto pass_of = [&](std::size_t first_piece, std::size_t end_piece, bool gather) {
        Pass<T> pass(network_, parameters_, scratch_, worker == 0 ? &interrupt_ : nullptr);
        const std::size_t first = rows * first_piece / pieces, end = rows * end_piece / pieces;
        pass.take(batch_, begin + first, end - first, first, gather);
        return pass;
      };
      const std::size_t first_piece = part * together, end_piece = first_piece + together;
      Pass<T> all = pass_of(first_piece, end_piece, true);
      if (!all.forward(false) || !all.backward()) return;
      for (std::size_t i = first_piece; i < end_piece; ++i) {
        const Pass<T> piece = pass_of(i, i + 1, false);
        scratch_.losses[i] = piece.squared_error_of_task();
        piece.parameter_gradients(partials + i * stride, false);
      }
      add_in_pairs(together, 1, n, partials + first_piece * stride, stride);  // of a part, one gradient goes from core to core
    });
    double loss = 0.0;
    for (const double of_piece : scratch_.losses) loss += of_piece;
    if (interrupt_.requested() || (finished && !std::isfinite(loss))) return loss;
    // They meet in the gradient of the first piece, in stretches whose sum stays in L1 until the update: as many for each thread.
    constexpr std::size_t most_stretch = l1_bytes / 2 / sizeof(T);
    const std::size_t stretches = ceil_divide(n, shares * most_stretch) * shares;
    const std::size_t stretch = ceil_divide(n, stretches * line) * line;
    parallel_for(ceil_divide(n, stretch), threads, [&](std::size_t i, std::size_t) {
      const std::size_t at = i * stretch, size = std::min(stretch, n - at);
      T* const sum = partials + at;
      add_in_pairs(pieces, together, size, sum, stride);
      if (finished)
        finished({at, 1, size, size, sum, size});
      else if (accumulate)
        table<T>().column_sums(1, size, sum, size, gradient_ + at);
      else
        std::copy_n(sum, size, gradient_ + at);
    });
    return loss;
  }

  // Of gradients of n elements, `stride` apart, every `step`th is the sum of those before the next such one: adds neighbours until the
  // first is the sum of all `count`. Both are powers of two: whoever adds which, the pairs are the same.
  static void add_in_pairs(std::size_t count, std::size_t step, std::size_t n, T* gradients, std::size_t stride) {
    for (; step < count; step *= 2)
      for (std::size_t i = 0; i < count; i += 2 * step)
        table<T>().column_sums(1, n, gradients + (i + step) * stride, stride, gradients + i * stride);
  }

  const Network& network_;
  const Batch<T>& batch_;
  const T* parameters_;
  T* gradient_;
  NetworkScratch<T>& scratch_;
  Interrupt& interrupt_;
};

}  // namespace

template <class T>
double network_squared_error_gradient(const Network& network, const Batch<T>& batch, const T* parameters, T* gradient,
                                      NetworkScratch<T>& scratch, Interrupt& interrupt, SegmentVisitor<T> finished) {
  const std::size_t n = network.parameters();
  if (network.has_one_pass()) {
    const double loss = linear_squared_error_gradient(network.linear_shape(), batch, parameters, gradient, scratch.linear, interrupt);
    if (finished && std::isfinite(loss) && !interrupt.requested()) visit_all(n, gradient, finished);
    return loss;
  }
  return BatchGradient<T>(network, batch, parameters, gradient, scratch, interrupt).run(finished);
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
