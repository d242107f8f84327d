// Predictions: the outputs of a network, from parameters as they are, or from a predictor that has laid them out.
#include "../engine/predictor.h"

#include <memory>
#include <variant>

#include <pybind11/stl.h>

#include "../dispatch/dispatch.h"
#include "../engine/linear.h"
#include "arrays.h"
#include "interruptible.h"
#include "layers.h"
#include "module.h"

namespace gdlib::bindings {
namespace {

// `body(y, interrupt)` fills a new [rows, outputs]; it is false when an output is not finite.
template <class T, class Body>
Array filled(const Rows<T>& rows, std::size_t outputs, std::size_t work, Body body) {
  Array result = new_matrix<T>(rows.rows, outputs);
  T* const y = write_flat<T>(result, "out").data;
  constexpr std::size_t short_work = 10'000'000;  // multiply-adds, about 1 ms: no time to be interrupted
  bool finite;
  if (work < short_work) {
    const WithoutGil released(work);
    Interrupt never(nullptr);
    finite = body(y, never);
  } else {
    finite = interruptible([&](Interrupt& interrupt) { return body(y, interrupt); });
  }
  if (!finite) {
    PyErr_SetString(PyExc_FloatingPointError, "an output is not finite.");
    throw py::error_already_set();
  }
  return result;
}

Array forward(const Layers& layers, const Array& x, const Array& parameters) {
  return with_dtype(parameters, "the parameters", [&](auto zero) -> Array {
    using T = decltype(zero);
    const Rows<T> rows = read_rows<T>(x, "x");
    const Flat<const T> p = read_flat<T>(parameters, "the parameters");
    const std::size_t outputs = layers.empty() ? 0 : std::get<2>(layers.back());
    const Network network = as_network(layers, rows.cols, outputs, p.size);
    NetworkScratch<T> scratch(network, rows.rows, false, Need::outputs);
    return filled<T>(rows, outputs, rows.rows * p.size, [&](T* y, Interrupt& interrupt) {
      return network_forward(network, rows.rows, rows.data, rows.stride, p.data, y, scratch, interrupt);
    });
  });
}

template <class T>
Array predicted(Predictor<T>& predictor, const Array& x) {
  const Rows<T> rows = read_rows<T>(x, "x");
  const Network& network = predictor.network();
  require_size(rows.cols, network.in_features(), "a row of x");
  if (predictor.outdated()) throw py::value_error("the predictor was made for another kernel table.");
  return filled<T>(rows, network.out_features(), rows.rows * network.parameters(), [&](T* y, Interrupt& interrupt) {
    return predictor.forward(rows.rows, rows.data, rows.stride, y, interrupt);
  });
}

// Of either dtype.
class PyPredictor {
 public:
  PyPredictor(const Layers& layers, const Array& parameters) {
    with_dtype(parameters, "the parameters", [&](auto zero) {
      using T = decltype(zero);
      const Flat<const T> p = read_flat<T>(parameters, "the parameters");
      if (layers.empty()) throw py::value_error("there are no layers; at least one is wanted.");
      const Network network = as_network(layers, std::get<1>(layers.front()), std::get<2>(layers.back()), p.size);
      const WithoutGil released;
      predictor_ = std::make_unique<Predictor<T>>(network, p.data);
    });
  }

  Array call(const Array& x) {
    return std::visit([&](const auto& predictor) { return predicted(*predictor, x); }, predictor_);
  }

 private:
  std::variant<std::unique_ptr<Predictor<float>>, std::unique_ptr<Predictor<double>>> predictor_;
};

}  // namespace

void define_predictor(py::module_& m) {
  m.def("network_forward", forward, "The outputs of layers (kind, in_features, out_features, has_bias), one after the other.",
        py::arg("layers"), py::arg("x"), py::arg("parameters"));
  m.attr("few_outputs") = few_outputs;  // layers with fewer read their weights as they are
  py::class_<PyPredictor>(m, "Predictor", "A frozen copy of a network, laid out for predictions; threads may share it.")
      .def(py::init<const Layers&, const Array&>(), py::arg("layers"), py::arg("parameters"))
      .def("__call__", &PyPredictor::call, "The outputs of x[rows, in_features].", py::arg("x"));
}

}  // namespace gdlib::bindings
