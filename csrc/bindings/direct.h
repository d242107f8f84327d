// Functions of positional arguments with CPython's own calling convention, for calls as short as a step of the readable loop: pybind11
// takes 25 to 75 ns more to hand over their arguments.
#pragma once

#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "arrays.h"

namespace gdlib::bindings {

// What the generated stubs call a type, and how it comes in and goes out.
template <class T>
struct Direct;

template <>
struct Direct<Array> {
  static constexpr const char* type = "numpy.typing.NDArray[typing.Any]";
  static Array in(PyObject* value) { return py::reinterpret_borrow<Array>(value); }
  static PyObject* out(Array value) { return value.release().ptr(); }
};

template <>
struct Direct<OptionalArray> {
  static constexpr const char* type = "numpy.typing.NDArray[typing.Any] | None";
  static OptionalArray in(PyObject* value) { return py::reinterpret_borrow<OptionalArray>(value); }
};

template <>
struct Direct<double> {
  static constexpr const char* type = "float";
  static double in(PyObject* value) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  }
  static PyObject* out(double value) { return PyFloat_FromDouble(value); }
};

template <>
struct Direct<std::optional<double>> {
  static constexpr const char* type = "float | None";
  static std::optional<double> in(PyObject* value) { return value == Py_None ? std::nullopt : std::optional(Direct<double>::in(value)); }
};

template <>
struct Direct<py::dict> {
  static constexpr const char* type = "dict[str, typing.Any]";
  static py::dict in(PyObject* value) {
    if (!PyDict_Check(value)) throw py::type_error(std::string("a ") + Py_TYPE(value)->tp_name + " came; a dict is wanted.");
    return py::reinterpret_borrow<py::dict>(value);
  }
};

template <>
struct Direct<bool> {
  static constexpr const char* type = "bool";
  static bool in(PyObject* value) {
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
  }
  static PyObject* out(bool value) { return PyBool_FromLong(value); }
};

template <>
struct Direct<std::string> {
  static constexpr const char* type = "str";
  static std::string in(PyObject* value) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) throw py::error_already_set();
    return {text, static_cast<std::size_t>(size)};
  }
};

// Calls body, which returns a new reference; what it throws becomes Python's error.
template <class Body>
PyObject* translating_errors(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto function, class Signature = decltype(function)>
class DirectFunction;

template <auto function, class Result, class... Arguments>
class DirectFunction<function, Result (*)(Arguments...)> {
 public:
  static constexpr std::size_t count = sizeof...(Arguments);

  static void define(py::module_& m, const char* name, const char* doc, const std::array<const char*, count>& names) {
    static std::string text;  // which Python does not copy, like the definition
    static PyMethodDef definition{nullptr, nullptr, METH_FASTCALL, nullptr};
    const std::array<const char*, count> types{Direct<std::decay_t<Arguments>>::type...};
    text = std::string(name) + "(";
    for (std::size_t i = 0; i < count; ++i) text += std::string(names[i]) + ": " + types[i] + (i < least ? ", " : " = None, ");
    text += "/) -> ";
    if constexpr (std::is_void_v<Result>)
      text += "None";
    else
      text += Direct<Result>::type;
    text += std::string("\n\n") + doc;
    definition.ml_name = name;
    definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    definition.ml_doc = text.c_str();
    PyObject* const defined = PyCFunction_NewEx(&definition, nullptr, py::str(m.attr("__name__")).ptr());
    if (!defined) throw py::error_already_set();
    m.add_object(name, py::reinterpret_steal<py::object>(defined));
  }

 private:
  template <class... T>
  struct Last {
    using type = std::decay_t<typename decltype((std::enable_if<true, T>{}, ...))::type>;
  };
  // The last argument may be left out where it may be None.
  static constexpr std::size_t least = count - std::is_same_v<typename Last<Arguments...>::type, OptionalArray>;

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const auto n = static_cast<std::size_t>(given);
    if (n < least || n > count)
      return PyErr_Format(PyExc_TypeError, "%zu arguments came; %zu are wanted.", n, n < least ? least : count);
    std::array<PyObject*, count> values;
    for (std::size_t i = 0; i < count; ++i) values[i] = i < n ? arguments[i] : Py_None;
    return translating_errors([&] { return invoke(values, std::index_sequence_for<Arguments...>{}); });
  }

  template <std::size_t... I>
  static PyObject* invoke(const std::array<PyObject*, count>& values, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      function(Direct<std::decay_t<Arguments>>::in(values[I])...);
      Py_RETURN_NONE;
    } else {
      return Direct<Result>::out(function(Direct<std::decay_t<Arguments>>::in(values[I])...));
    }
  }
};

}  // namespace gdlib::bindings
