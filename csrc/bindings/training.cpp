// Whole rounds of training, the orders that they follow, and what is estimated from the data before one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include "../engine/caches.h"
#include "../engine/network.h"
#include "../engine/random.h"
#include "../engine/squared_error.h"
#include "../engine/training.h"
#include "arrays.h"
#include "direct.h"
#include "interruptible.h"
#include "layers.h"
#include "module.h"

namespace gdlib::bindings {
namespace {

// (begin, end, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step)
using RangeTuple = std::tuple<std::size_t, std::size_t, double, double, double, double, bool, bool, bool>;

// Returns (stop, steps_done).
std::tuple<const char*, std::uint64_t> train(const Array& x, const Array& target, const Array& parameters, const OptionalArray& momentum,
                                                     const Layers& layers, const std::vector<RangeTuple>& ranges, std::size_t batch_size,
                                                     const OptionalArray& epoch_seeds, std::uint64_t first_step, std::uint64_t last_step,
                                                     bool mean, double loss_limit, const Array& losses, const Progress& progress) {
  return with_dtype(x, "x", [&](auto zero) -> std::tuple<const char*, std::uint64_t> {
    using T = decltype(zero);
    const Rows<T> rows = read_rows<T>(x, "x");
    const Flat<const T> y = read_flat<T>(target, "y");
    const Flat<T> p = write_flat<T>(parameters, "the parameters");
    const Flat<double> loss = write_flat<double>(losses, "losses");
    if (rows.rows == 0 || batch_size == 0 || y.size == 0 || y.size % rows.rows)
      throw py::value_error("x, y and batch_size do not fit together.");

    Round<T> round{};
    round.network = as_network(layers, rows.cols, y.size / rows.rows, p.size);
    round.x = rows.data;
    round.x_stride = rows.stride;
    round.target = y.data;
    round.rows = rows.rows;
    round.batch_size = std::min(batch_size, rows.rows);
    const std::uint64_t steps_per_epoch = (round.rows + round.batch_size - 1) / round.batch_size;
    round.first_step = first_step;
    round.last_step = last_step;
    if (first_step > last_step || last_step > steps_per_epoch * loss.size)
      throw py::value_error("the steps do not lie inside the epochs of losses.");
    if (!epoch_seeds.is_none()) {
      const Flat<const std::uint64_t> seeds = read_flat<std::uint64_t>(epoch_seeds, "epoch_seeds");
      require_size(seeds.size, loss.size, "epoch_seeds");
      if (rows.rows > UINT32_MAX) throw py::value_error("more than 4,294,967,295 rows cannot be shuffled.");
      round.epoch_seeds = seeds.data;
    }
    round.mean = mean;
    round.loss_limit = loss_limit;
    round.parameters = p.data;
    round.losses = loss.data;
    for (const auto& [begin, end, lr, decay, dampening, weight_decay, nesterov, maximize, first] : ranges) {
      if (begin > end || end > p.size) throw py::value_error("a range of parameters does not lie inside the parameters.");
      const SgdOptions<T> options{static_cast<T>(lr),           static_cast<T>(decay), static_cast<T>(dampening),
                                  static_cast<T>(weight_decay), nesterov,              maximize};
      round.ranges.push_back({begin, end, options, decay != 0.0, first});
      if (decay != 0.0 && momentum.is_none()) throw py::value_error("momentum needs a buffer.");
    }
    if (!momentum.is_none()) {
      const Flat<T> buffer = write_flat<T>(momentum, "the momentum buffer");
      require_size(buffer.size, p.size, "the momentum buffer");
      round.momentum = buffer.data;
    }
    AlignedVector<T> gradient(p.size);
    round.gradient = gradient.data();

    std::uint64_t epochs_done = 0;  // written between two steps on the thread that reads it for `progress`
    const RoundResult result = interruptible(progress, &epochs_done, [&](Interrupt& interrupt) {
      return train_round(round, interrupt, [&](std::uint64_t epochs) { epochs_done = epochs; });
    });
    const char* const stop = result.stop == Stop::non_finite ? "non_finite" : result.stop == Stop::above_limit ? "above_limit" : "finished";
    return {stop, result.steps_done};
  });
}

double squared_error(const Array& x, const Array& target, const Array& parameters, const Layers& layers) {
  return with_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = read_rows<T>(x, "x");
    const Flat<const T> y = read_flat<T>(target, "y"), p = read_flat<T>(parameters, "the parameters");
    if (rows.rows == 0 || y.size % rows.rows) throw py::value_error("x and y do not fit together.");
    const Network network = as_network(layers, rows.cols, y.size / rows.rows, p.size);
    NetworkScratch<T> scratch(network, rows.rows, false, Need::outputs);
    const Batch<T> batch{rows.data, rows.stride, y.data, nullptr, rows.rows, 0, true, false};
    return interruptible([&](Interrupt& interrupt) {
      return network_squared_error(network, batch, p.data, scratch, interrupt);
    });
  });
}

double hessian_eigenvalue(const Array& x, bool has_bias) {
  return with_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = read_rows<T>(x, "x");
    return interruptible([&](Interrupt& interrupt) {
      return linear_hessian_eigenvalue<T>(rows.rows, rows.cols, rows.data, rows.stride, has_bias, interrupt);
    });
  });
}

Array order_of(std::uint64_t seed, std::uint32_t rows) {
  AlignedVector<std::uint32_t> order;
  interruptible([&](Interrupt& interrupt) {
    shuffle_order(seed, rows, order, interrupt);
    return true;
  });
  return py::array_t<std::uint32_t>(static_cast<py::ssize_t>(rows), order.data());
}

using Arrays = py::typing::Tuple<Array, py::ellipsis>;

// Iterates over batches of rows in a given order: for each array a new one of its rows order[0], ..., order[batch_size - 1], and so on up
// to order[end - 1]. Any dtype without Python objects. What all batches have in common is worked out once.
class ShuffledBatches {
 public:
  ShuffledBatches(const Arrays& arrays, const Array& order, std::size_t batch_size, std::size_t end)
      : batch_size_(batch_size), end_(end) {
    if (batch_size == 0) throw py::value_error("batch_size is 0; at least 1 is wanted.");
    const Flat<const std::uint32_t> given = read_flat<std::uint32_t>(order, "order");
    if (end > given.size) throw py::value_error("end lies past the order.");
    order_.assign(given.data, given.data + end);  // a copy stays as it is checked here
    const std::uint32_t largest = end ? *std::max_element(order_.begin(), order_.end()) : 0;
    for (const py::handle item : arrays) {
      const py::array array = as_array(item, "the array");
      const py::dtype dtype = array.dtype();
      constexpr std::uint64_t has_objects = 1;  // NPY_ITEM_HASOBJECT
      if (array.ndim() < 1 || !(array.flags() & py::array::c_style) || (dtype.flags() & has_objects))
        throw py::value_error("the array must be C-contiguous, with one dimension or more, and hold no Python objects.");
      const auto rows = static_cast<std::size_t>(array.shape(0));
      if (end && largest >= rows) throw py::index_error("order names a row that the array does not have.");
      const std::size_t row_bytes = rows ? static_cast<std::size_t>(array.nbytes()) / rows : 0;
      sources_.push_back({array, dtype, static_cast<const char*>(array.data()), row_bytes,
                          rows * row_bytes > l2_bytes() / 2 ? most_ahead / std::max(row_bytes, line) + 1 : end,
                          std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim())});
    }
  }

  bool ended() const { return begin_ >= end_; }

  Arrays next() {
    if (ended()) throw py::stop_iteration();
    const std::size_t begin = begin_, count = std::min(batch_size_, end_ - begin);
    begin_ += count;
    py::tuple batch(sources_.size());
    for (std::size_t k = 0; k < sources_.size(); ++k) {
      Source& source = sources_[k];
      source.shape[0] = static_cast<py::ssize_t>(count);
      Array rows = new_array(source.dtype.ptr(), source.shape.size(), source.shape.data());
      char* const to = py::detail::array_proxy(rows.ptr())->data;
      {
        const WithoutGil released(count * source.row_bytes / 4);
        copy(source, begin, count, to);
      }
      PyTuple_SET_ITEM(batch.ptr(), static_cast<Py_ssize_t>(k), rows.release().ptr());
    }
    return py::reinterpret_steal<Arrays>(batch.release());
  }

 private:
  static constexpr std::size_t line = 64, most_ahead = 4096;  // bytes; of rows of 40 and 400, 2 to 16 KiB ahead are as fast, 1 slower

  struct Source {
    py::array array;  // keeps the memory
    py::dtype dtype;  // the array may be given another
    const char* data;
    std::size_t row_bytes;
    std::size_t rows_ahead;          // after which a row is asked for; past the last one where L2 holds all of them anyhow
    std::vector<py::ssize_t> shape;  // of a batch

    const char* row(std::size_t number) const { return data + number * row_bytes; }

    // Into L2: into L1, where a core waits for fewer lines, rows of 400 bytes took a loop alone 54 ns for 39, and 68 unasked.
    void ask_for(std::size_t number) const {
      const char* const begin = row(number);
      const std::size_t bytes = std::min(row_bytes, most_ahead);
      for (std::size_t at = 0; at < bytes; at += line) __builtin_prefetch(begin + at, 0, 2);
      if (bytes) __builtin_prefetch(begin + bytes - 1, 0, 2);  // where the last line begins between two of these
    }
  };

  // Short rows as two pieces of a size that the compiler knows, which may overlap: a batch of 32 rows of 40 bytes and of 4 takes 0.37 us in
  // all, and 0.41 by memcpy.
  void copy(const Source& source, std::size_t begin, std::size_t count, char* to) const {
    const std::size_t bytes = source.row_bytes;
    const auto in_halves = [&](auto size) {
      constexpr std::size_t half = size.value;
      copy_rows(source, begin, count, to, [bytes](char* into, const char* from) {
        std::memcpy(into, from, half);
        std::memcpy(into + bytes - half, from + bytes - half, half);
      });
    };
    if (bytes < 4 || bytes > 64)
      return copy_rows(source, begin, count, to, [bytes](char* into, const char* from) { std::memcpy(into, from, bytes); });
    if (bytes <= 8) return in_halves(std::integral_constant<std::size_t, 4>{});
    if (bytes <= 16) return in_halves(std::integral_constant<std::size_t, 8>{});
    if (bytes <= 32) return in_halves(std::integral_constant<std::size_t, 16>{});
    in_halves(std::integral_constant<std::size_t, 32>{});
  }

  template <class CopyRow>
  void copy_rows(const Source& source, std::size_t begin, std::size_t count, char* to, const CopyRow& copy_row) const {
    for (std::size_t i = 0; i < count; ++i) {
      if (end_ - begin - i > source.rows_ahead) source.ask_for(order_[begin + i + source.rows_ahead]);
      copy_row(to + i * source.row_bytes, source.row(order_[begin + i]));
    }
  }

  std::vector<std::uint32_t> order_;
  std::size_t batch_size_, end_, begin_ = 0;
  std::vector<Source> sources_;
};

void uniform(std::uint64_t seed, double bound, const Array& out) {
  with_dtype(out, "out", [&](auto zero) {
    using T = decltype(zero);
    const Flat<T> flat = write_flat<T>(out, "out");
    const WithoutGil released;
    fill_uniform(seed, bound, flat.size, flat.data);
  });
}

}  // namespace

void define_training(py::module_& m) {
  m.def("train", train,
        "Advances the parameters from first_step to last_step in one call; returns (stop, steps_done), where stop is 'finished', "
        "'non_finite' or 'above_limit'. progress(epochs done) is called now and then.",
        py::arg("x"), py::arg("target"), py::arg("parameters"), py::arg("momentum"), py::arg("layers"), py::arg("ranges"),
        py::arg("batch_size"), py::arg("epoch_seeds"), py::arg("first_step"), py::arg("last_step"), py::arg("mean"),
        py::arg("loss_limit"), py::arg("losses"), py::arg("progress") = py::none());
  m.def("squared_error", squared_error, "The sum of squared errors of a model over all rows.", py::arg("x"), py::arg("target"),
        py::arg("parameters"), py::arg("layers"));
  m.def("hessian_eigenvalue", hessian_eigenvalue, "The largest eigenvalue of 2 [x 1]^T [x 1] (without bias, 2 x^T x).", py::arg("x"),
        py::arg("has_bias"));
  m.def("shuffle_order", order_of, "The pseudo-random order of 0 ... rows - 1 that belongs to a seed.", py::arg("seed"), py::arg("rows"));
  py::class_<ShuffledBatches> batches(m, "ShuffledBatches",
                                      "Iterates over batches: for each array a new one of its rows in the order, up to end.");
  batches
      .def(py::init<const Arrays&, const Array&, std::size_t, std::size_t>(), py::arg("arrays"), py::arg("order"), py::arg("batch_size"),
           py::arg("end"))
      .def("__iter__", [](py::object self) -> py::typing::Iterator<Arrays> { return self; })
      .def("__next__", &ShuffledBatches::next);
  // A for loop asks the type; by way of the method, which pybind11 has put there, each batch would take 0.06 us more.
  reinterpret_cast<PyTypeObject*>(batches.ptr())->tp_iternext = [](PyObject* self) {
    return translating_errors([&]() -> PyObject* {
      auto& iterator = py::handle(self).cast<ShuffledBatches&>();
      return iterator.ended() ? nullptr : iterator.next().release().ptr();
    });
  };
  m.def("fill_uniform", uniform, "Fills out with numbers uniform in [-bound, bound], in place.", py::arg("seed"), py::arg("bound"),
        py::arg("out"));
}

}  // namespace gdlib::bindings
