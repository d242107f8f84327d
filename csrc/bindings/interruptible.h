// Long computations without the GIL that Ctrl-C ends.
#pragma once

#include <cstdint>
#include <optional>

#include <pybind11/typing.h>

#include "../engine/parallel.h"
#include "arrays.h"

namespace gdlib::bindings {

using Progress = std::optional<py::typing::Callable<py::object(std::uint64_t)>>;

// Runs `body(interrupt)` without the GIL. Every 50 ms the GIL is taken back for Python's signal handlers and `progress(*done)`; what they
// raise ends the computation and is raised here.
template <class Body>
auto interruptible(const Progress& progress, const std::uint64_t* done, Body body) {
  bool failed = false;
  const auto run = [&] {
    WithoutGil released;
    Interrupt interrupt([&] {
      released.with_gil([&] {
        if (PyErr_CheckSignals() != 0) {
          failed = true;
        } else if (progress) {
          PyObject* const result = PyObject_CallFunction((*progress).ptr(), "K", static_cast<unsigned long long>(*done));
          failed = result == nullptr;
          Py_XDECREF(result);
        }
      });
      return failed;  // the Python error stays set on this thread until the GIL is back
    });
    return body(interrupt);
  };
  const auto result = run();
  if (failed) throw py::error_already_set();
  return result;
}

template <class Body>
auto interruptible(Body body) {
  return interruptible(std::nullopt, nullptr, body);
}

}  // namespace gdlib::bindings
