// The readable loop's calls: one layer, one loss, one update at a time.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "arrays.h"
#include "direct.h"
#include "module.h"

#include "../dispatch/dispatch.h"
#include "../engine/caches.h"
#include "../engine/linear.h"
#include "../engine/network.h"
#include "../engine/tasks.h"

namespace gdlib::bindings {
namespace {

template <class T>
struct Layer {
  const T* weight;
  const T* bias;
  std::size_t in_features;
  std::size_t out_features;
};

template <class T>
Layer<T> read_layer(py::handle weight, py::handle bias) {
  const py::array array = as_array(weight, "weight");
  const Flat<const T> flat = read_flat<T>(weight, "weight");
  if (array.ndim() != 2) throw py::value_error("weight must have 2 dimensions.");
  Layer<T> layer{flat.data, nullptr, static_cast<std::size_t>(array.shape(1)), static_cast<std::size_t>(array.shape(0))};
  if (!bias.is_none()) {
    const Flat<const T> values = read_flat<T>(bias, "bias");
    require_size(values.size, layer.out_features, "bias");
    layer.bias = values.data;
  }
  return layer;
}

// Where a result goes: `out`, or a new array, of which nothing is left to check.
template <class T>
struct Output {
  Array array;
  T* data;
  std::size_t size;
  const char* given;  // the argument's name; null for a new array

  Output(const OptionalArray& out, std::size_t rows, std::size_t cols, const char* name)
      : array(out.is_none() ? new_matrix<T>(rows, cols) : py::reinterpret_borrow<Array>(out)),
        size(rows * cols),
        given(out.is_none() ? nullptr : name) {
    if (given) {
      data = write_flat<T>(out, name).data;
      require_shape(out, rows, cols, name);
    } else {
      data = static_cast<T*>(static_cast<void*>(py::detail::array_proxy(array.ptr())->data));
    }
  }

  void require_apart_from(const T* read, std::size_t extent, const char* other) const {
    if (given) require_apart<T>(data, size, given, read, extent, other);
  }
};

Array forward(const Array& x, const Array& weight, const OptionalArray& bias, const OptionalArray& out) {
  return with_dtype(weight, "weight", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Layer<T> layer = read_layer<T>(weight, bias);
    const Rows<T> rows = read_rows<T>(x, "x");
    require_size(rows.cols, layer.in_features, "a row of x");
    const Output<T> y(out, rows.rows, layer.out_features, "out");
    y.require_apart_from(rows.data, rows.extent(), "x");
    y.require_apart_from(layer.weight, layer.in_features * layer.out_features, "weight");
    y.require_apart_from(layer.bias, layer.out_features, "bias");
    bool finite;
    {
      const WithoutGil released(y.size * layer.in_features);
      finite = linear_forward<T>(rows.rows, layer.in_features, layer.out_features, rows.data, rows.stride, layer.weight, layer.bias, y.data,
                                 {}, true);
    }
    if (!finite) {
      PyErr_SetString(PyExc_FloatingPointError, "the output is not finite.");
      throw py::error_already_set();
    }
    return y.array;
  });
}

Array backward(const Array& g, const Array& x, const Array& weight, const Array& weight_gradient, const OptionalArray& bias_gradient,
               const OptionalArray& input_gradient) {
  return with_dtype(weight, "weight", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Layer<T> layer = read_layer<T>(weight, py::none());
    const Rows<T> rows = read_rows<T>(x, "x");
    require_size(rows.cols, layer.in_features, "a row of x");
    const Flat<const T> output = read_flat<T>(g, "the gradient");
    require_shape(g, rows.rows, layer.out_features, "the gradient");
    const Flat<T> weights = write_flat<T>(weight_gradient, "weight.grad");
    require_size(weights.size, layer.in_features * layer.out_features, "weight.grad");
    T* bias = nullptr;
    if (!bias_gradient.is_none()) {
      const Flat<T> flat = write_flat<T>(bias_gradient, "bias.grad");
      require_size(flat.size, layer.out_features, "bias.grad");
      bias = flat.data;
    }
    const Output<T> input(input_gradient, rows.rows, layer.in_features, "input_gradient");
    input.require_apart_from(rows.data, rows.extent(), "x");
    input.require_apart_from(output.data, output.size, "the gradient");
    input.require_apart_from(layer.weight, weights.size, "weight");
    require_apart<T>(weights.data, weights.size, "weight.grad", rows.data, rows.extent(), "x");
    require_apart<T>(weights.data, weights.size, "weight.grad", output.data, output.size, "the gradient");
    {
      const WithoutGil released(input.size * layer.out_features);
      linear_input_gradient<T>(rows.rows, layer.in_features, layer.out_features, output.data, layer.weight, input.data);
      linear_weight_gradient<T>(rows.rows, layer.in_features, layer.out_features, output.data, rows.data, rows.stride, true, weights.data,
                                bias);
    }
    return input.array;
  });
}

// Where an elementwise result goes: `out`, or a new array, of the shape of the array that it is made of.
template <class T>
struct Elementwise {
  Array array;
  T* data;
  // Whether the result bypasses the caches: where they cannot hold what a call reads and writes, that is 1.3 to 1.7 times as fast. The
  // pages of a new array have just been cleared and are in the caches anyhow.
  bool nontemporal;

  // `arrays` of one size are read and written; `out` may be `in_place`, of that name.
  Elementwise(const OptionalArray& out, const Array& like, const Flat<const T>& in_place, const char* name, std::size_t arrays) {
    if (out.is_none()) {
      const py::array shape = as_array(like, "x");
      array = new_array<T>(static_cast<std::size_t>(shape.ndim()), shape.shape());
      data = write_flat<T>(array, "out").data;
      nontemporal = false;
      return;
    }
    const Flat<T> flat = write_flat<T>(out, "out");
    require_same_shape(out, like, "out");
    if (flat.data != in_place.data) require_apart<T>(flat.data, flat.size, "out", in_place.data, in_place.size, name);
    array = py::reinterpret_borrow<Array>(out);
    data = flat.data;
    nontemporal = data != in_place.data && arrays * flat.size * sizeof(T) > l3_bytes();
  }
};

Array activate(const std::string& kind, const Array& x, const OptionalArray& out) {
  return with_dtype(x, "x", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Activation activation = activation_named(kind);
    const Flat<const T> from = read_flat<T>(x, "x");
    const Elementwise<T> y(out, x, from, "x", 2);
    {
      const WithoutGil released;
      in_stretches(from.size, [&](std::size_t at, std::size_t size) {
        table<T>().activation_forward(activation, 1, size, {from.data + at, size}, {y.data + at, size}, y.nontemporal);
      });
    }
    return y.array;
  });
}

Array activate_backward(const std::string& kind, const Array& y, const Array& g, const OptionalArray& out) {
  return with_dtype(y, "y", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Activation activation = activation_named(kind);
    const Flat<const T> output = read_flat<T>(y, "y"), from = read_flat<T>(g, "the gradient");
    require_same_shape(g, y, "the gradient");
    const Elementwise<T> into(out, y, from, "the gradient", 3);
    require_apart<T>(into.data, output.size, "out", output.data, output.size, "y");
    {
      const WithoutGil released;
      in_stretches(output.size, [&](std::size_t at, std::size_t size) {
        table<T>().activation_backward(activation, 1, size, {output.data + at, size}, {from.data + at, size}, {into.data + at, size},
                                       into.nontemporal);
      });
    }
    return into.array;
  });
}

double elements(const Array& output) { return static_cast<double>(as_array(output, "output").size()); }

double squared_error_sum(const Array& output, const Array& target) {
  return with_dtype(output, "output", [&](auto zero) {
    using T = decltype(zero);
    const Flat<const T> o = read_flat<T>(output, "output"), t = read_flat<T>(target, "target");
    require_same_shape(target, output, "target");
    if (o.size == 0) throw py::value_error("output is empty.");
    const WithoutGil released(o.size);
    return sum_of_stretches(o.size, [&](std::size_t at, std::size_t size) {
      return table<T>().squared_error_sum(size, o.data + at, t.data + at);
    });
  });
}

double squared_error_mean(const Array& output, const Array& target) { return squared_error_sum(output, target) / elements(output); }

// The terms, or scale times the gradient.
template <class Kernel>
Array of_residuals(const Array& output, const Array& target, const OptionalArray& out, Kernel kernel) {
  return with_dtype(output, "output", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Flat<const T> o = read_flat<T>(output, "output"), t = read_flat<T>(target, "target");
    require_same_shape(target, output, "target");
    const Elementwise<T> result(out, output, o, "the output", 3);
    if (!out.is_none()) {
      require_apart<T>(result.data, o.size, "out", o.data, o.size, "the output");
      require_apart<T>(result.data, o.size, "out", t.data, t.size, "the target");
    }
    {
      const WithoutGil released(o.size);
      in_stretches(o.size, [&](std::size_t at, std::size_t size) {
        kernel(size, o.data + at, t.data + at, result.data + at, result.nontemporal);
      });
    }
    return result.array;
  });
}

// The options of one of optim.SGD's groups, which its user may change between steps.
class Group {
 public:
  explicit Group(const py::dict& options) : options_(options) {}

  // Not below 0 and finite.
  double number(PyObject* key) const {
    const double value = Direct<double>::in(of(key).ptr());
    if (!(value >= 0.0 && std::isfinite(value))) throw py::value_error(name(key) + " is negative or not finite.");
    return value;
  }

  bool flag(PyObject* key) const { return Direct<bool>::in(of(key).ptr()); }

 private:
  static std::string name(PyObject* key) { return Direct<std::string>::in(key); }

  // With a reference: the conversion of a user's object may change the group.
  py::object of(PyObject* key) const {
    PyObject* const value = PyDict_GetItemWithError(options_.ptr(), key);
    if (value) return py::reinterpret_borrow<py::object>(value);
    if (PyErr_Occurred()) throw py::error_already_set();
    throw py::key_error(name(key));
  }

  const py::dict& options_;
};

// Interned, so that a look into a group compares pointers.
struct OptionNames {
  PyObject* const lr = PyUnicode_InternFromString("lr");
  PyObject* const momentum = PyUnicode_InternFromString("momentum");
  PyObject* const dampening = PyUnicode_InternFromString("dampening");
  PyObject* const weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* const nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* const maximize = PyUnicode_InternFromString("maximize");
};

void sgd_update(const Array& parameter, const Array& gradient, const OptionalArray& momentum_buffer, const py::dict& options,
                bool first_step) {
  static const OptionNames names;
  const Group group(options);  // before the arrays: a user's object that becomes a number may do anything to them
  const double lr = group.number(names.lr), momentum = group.number(names.momentum), dampening = group.number(names.dampening);
  const double weight_decay = group.number(names.weight_decay);
  const bool nesterov = group.flag(names.nesterov), maximize = group.flag(names.maximize);
  if (lr == 0.0) throw py::value_error("lr is 0.");
  with_dtype(parameter, "parameter", [&](auto zero) {
    using T = decltype(zero);
    const Flat<T> p = write_flat<T>(parameter, "parameter");
    const Flat<const T> g = read_flat<T>(gradient, "gradient");
    require_size(g.size, p.size, "gradient");
    T* buffer = nullptr;
    if (momentum != 0.0 && momentum_buffer.is_none()) throw py::value_error("momentum needs a buffer.");
    if (!momentum_buffer.is_none()) {
      const Flat<T> flat = write_flat<T>(momentum_buffer, "momentum_buffer");
      require_size(flat.size, p.size, "momentum_buffer");
      buffer = flat.data;
    }
    const SgdOptions<T> update{static_cast<T>(lr),           static_cast<T>(momentum), static_cast<T>(dampening),
                               static_cast<T>(weight_decay), nesterov,                 maximize};
    const WithoutGil released(p.size);
    in_stretches(p.size, [&](std::size_t at, std::size_t size) {
      table<T>().sgd_update({1, size, update, T(1), first_step, g.data + at, size, p.data + at, buffer ? buffer + at : nullptr, size});
    });
  });
}

bool all_finite(const Array& x) {
  return with_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const Flat<const T> flat = read_flat<T>(x, "x");
    const WithoutGil released;
    std::atomic<bool> finite{true};  // relaxed: a flag alone, which the loop's end publishes
    in_stretches(flat.size, [&](std::size_t at, std::size_t size) {
      if (!table<T>().all_finite(size, flat.data + at)) finite.store(false, std::memory_order_relaxed);
    });
    return finite.load(std::memory_order_relaxed);
  });
}

void set_zero(const Array& x) {
  with_dtype(x, "x", [&](auto zero) {
    const auto flat = write_flat<decltype(zero)>(x, "x");
    const WithoutGil released(flat.size / 8);
    std::fill_n(flat.data, flat.size, zero);
  });
}

void average(const Array& sources, const Array& mean) {
  with_dtype(mean, "mean", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows = read_rows<T>(sources, "sources");
    const Flat<T> out = write_flat<T>(mean, "mean");
    require_size(out.size, rows.cols, "mean");
    if (rows.rows == 0) throw py::value_error("sources has no rows; at least 1 is wanted.");
    const bool is_row = out.data >= rows.data && out.data < rows.data + rows.extent() && rows.stride > 0 &&
                        static_cast<std::size_t>(out.data - rows.data) % rows.stride == 0;
    if (!is_row) require_apart<T>(out.data, out.size, "mean", rows.data, rows.extent(), "sources");
    const WithoutGil released;
    in_stretches(out.size, [&](std::size_t at, std::size_t size) {
      table<T>().average(size, rows.rows, rows.data + at, rows.stride, out.data + at);
    });
  });
}

Array squared_error_terms(const Array& output, const Array& target) {
  return of_residuals(output, target, py::none(), [](std::size_t n, const auto* o, const auto* t, auto* result, bool) {
    table<std::remove_reference_t<decltype(*result)>>().squared_error_terms(n, o, t, result);
  });
}

Array squared_error_gradient(const Array& output, const Array& target, std::optional<double> scale, const OptionalArray& out) {
  const double factor = scale ? *scale : 1.0 / elements(output);
  return of_residuals(output, target, out, [factor](std::size_t n, const auto* o, const auto* t, auto* result, bool nontemporal) {
    using T = std::remove_reference_t<decltype(*result)>;
    table<T>().squared_error_gradient(n, o, t, static_cast<T>(factor), result, nontemporal);
  });
}

}  // namespace

void define_layers(py::module_& m) {
  DirectFunction<forward>::define(m, "linear_forward", "y[rows, out] = x weight^T + bias, into `out` when one is given.",
                                  {"x", "weight", "bias", "out"});
  DirectFunction<backward>::define(
      m, "linear_backward",
      "weight_gradient += g^T x and bias_gradient += column sums of g, in place; returns the gradient of x, g weight, into "
      "`input_gradient` when one is given.",
      {"g", "x", "weight", "weight_gradient", "bias_gradient", "input_gradient"});
  DirectFunction<squared_error_sum>::define(m, "squared_error_sum", "sum of (output - target)^2, carried in double.", {"output", "target"});
  DirectFunction<squared_error_mean>::define(m, "squared_error_mean", "mean of (output - target)^2, carried in double.",
                                             {"output", "target"});
  DirectFunction<squared_error_terms>::define(m, "squared_error_terms", "(output - target)^2, element by element.", {"output", "target"});
  DirectFunction<squared_error_gradient>::define(m, "squared_error_gradient",
                                                 "scale * 2 (output - target), into `out` when one is given; a scale of None is "
                                                 "1 / elements.",
                                                 {"output", "target", "scale", "out"});
  DirectFunction<activate>::define(m, "activation_forward", "relu, tanh or sigmoid of every element; out may be x.", {"kind", "x", "out"});
  DirectFunction<activate_backward>::define(m, "activation_backward",
                                            "g times the activation's derivative where its output is y; out may be g.",
                                            {"kind", "y", "g", "out"});
  DirectFunction<sgd_update>::define(m, "sgd_update", "PyTorch's SGD step on flat vectors, in place, with the options of a group.",
                                     {"parameter", "gradient", "momentum_buffer", "group", "first_step"});
  DirectFunction<all_finite>::define(m, "all_finite", "True when no element is NaN or infinite.", {"x"});
  DirectFunction<set_zero>::define(m, "set_zero", "x = 0, in place.", {"x"});
  DirectFunction<average>::define(m, "average", "mean[n] = the mean of the rows of sources[count, n], added in order; mean may be one.",
                                  {"sources", "mean"});
}

}  // namespace gdlib::bindings
