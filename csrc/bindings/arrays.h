// Hard checks at the border: NumPy arrays -> pointers and sizes. Nothing is converted or copied here; the Python layer does that knowingly.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>

namespace gdlib::bindings {
class Array;
class OptionalArray;
}  // namespace gdlib::bindings

namespace pybind11::detail {
template <>
struct handle_type_name<gdlib::bindings::Array> {
  static constexpr auto name = const_name("numpy.typing.NDArray[typing.Any]");
};
template <>
struct handle_type_name<gdlib::bindings::OptionalArray> {
  static constexpr auto name = const_name("numpy.typing.NDArray[typing.Any] | None");
};
}  // namespace pybind11::detail

namespace gdlib::bindings {

namespace py = pybind11;

// An argument or a result that is an array, and what the generated stubs call it. Anything is let in here: the checks below say what is
// wrong with it in words of their own.
inline bool accept_any(PyObject* value) { return value != nullptr; }

class Array : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(Array, py::object, accept_any)
};

class OptionalArray : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(OptionalArray, py::object, accept_any)
};

inline py::array as_array(py::handle value, const char* name) {
  if (!py::isinstance<py::array>(value))
    throw py::type_error(std::string(name) + " is a " + Py_TYPE(value.ptr())->tp_name + "; a NumPy array is wanted.");
  return py::reinterpret_borrow<py::array>(value);
}

template <class T>
bool has_dtype(const py::array& array) {
  // NumPy has one object for each built-in dtype, which nearly every array holds; others may be equal to it.
  static PyObject* const native = py::dtype::of<T>().release().ptr();
  PyObject* const dtype = py::detail::array_proxy(array.ptr())->descr;
  return (dtype == native || py::detail::npy_api::get().PyArray_EquivTypes_(dtype, native)) &&
         (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_);
}

template <class T>
void require_dtype(const py::array& array, const char* name) {
  if (!has_dtype<T>(array))
    throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(array.dtype())) + "; aligned " +
                         std::string(py::str(py::dtype::of<T>())) + " is wanted.");
}

// A flat vector: any C-contiguous array.
template <class T>
struct Flat {
  T* data;
  std::size_t size;
};

template <class T>
Flat<const T> read_flat(py::handle value, const char* name) {
  const py::array array = as_array(value, name);
  require_dtype<T>(array, name);
  if (!(array.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " is not C-contiguous.");
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <class T>
Flat<T> write_flat(py::handle value, const char* name) {
  const Flat<const T> flat = read_flat<T>(value, name);
  const py::array array = as_array(value, name);
  if (!array.writeable()) throw py::value_error(std::string(name) + " is read-only; it is written in place.");
  return {const_cast<T*>(flat.data), flat.size};
}

// A matrix whose rows are contiguous and any non-negative number of elements apart.
template <class T>
struct Rows {
  const T* data;
  std::size_t rows;
  std::size_t cols;
  std::size_t stride;
  std::size_t extent() const { return rows && cols ? (rows - 1) * stride + cols : 0; }
};

template <class T>
Rows<T> read_rows(py::handle value, const char* name) {
  const py::array array = as_array(value, name);
  require_dtype<T>(array, name);
  if (array.ndim() != 2) throw py::value_error(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions; 2 are wanted.");
  const auto rows = static_cast<std::size_t>(array.shape(0)), cols = static_cast<std::size_t>(array.shape(1));
  constexpr py::ssize_t item = sizeof(T);
  std::size_t stride = cols;
  if (rows > 1) {
    if (array.strides(0) < 0 || array.strides(0) % item) throw py::value_error(std::string(name) + " has rows out of order.");
    stride = static_cast<std::size_t>(array.strides(0) / item);
  }
  if (rows > 0 && cols > 1 && array.strides(1) != item) throw py::value_error(std::string(name) + " has rows that are not contiguous.");
  return {static_cast<const T*>(array.data()), rows, cols, stride};
}

inline void require_size(std::size_t got, std::size_t wanted, const char* name) {
  if (got != wanted)
    throw py::value_error(std::string(name) + " has " + std::to_string(got) + " elements; " + std::to_string(wanted) + " are wanted.");
}

inline void require_shape(py::handle value, std::size_t rows, std::size_t cols, const char* name) {
  const py::array array = as_array(value, name);
  if (array.ndim() != 2 || static_cast<std::size_t>(array.shape(0)) != rows || static_cast<std::size_t>(array.shape(1)) != cols)
    throw py::value_error(std::string(name) + " must have shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "].");
}

// A new C-contiguous array, straight from NumPy: py::array would take twice as long to work out the strides.
inline Array new_array(PyObject* dtype, std::size_t dimensions, const py::ssize_t* shape) {
  const py::detail::npy_api& api = py::detail::npy_api::get();
  Py_INCREF(dtype);  // the call takes a reference over
  PyObject* const array = api.PyArray_NewFromDescr_(api.PyArray_Type_, dtype, static_cast<int>(dimensions),
                                                    const_cast<Py_intptr_t*>(shape), nullptr, nullptr, 0, nullptr);
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<Array>(array);
}

template <class T>
Array new_array(std::size_t dimensions, const py::ssize_t* shape) {
  static PyObject* const dtype = py::dtype::of<T>().release().ptr();
  return new_array(dtype, dimensions, shape);
}

template <class T>
Array new_matrix(std::size_t rows, std::size_t cols) {
  const py::ssize_t shape[2] = {static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(cols)};
  return new_array<T>(2, shape);
}

// Both have the same shape.
inline void require_same_shape(py::handle value, py::handle other, const char* name) {
  const py::array a = as_array(value, name), b = as_array(other, name);
  if (a.ndim() != b.ndim() || !std::equal(a.shape(), a.shape() + a.ndim(), b.shape()))
    throw py::value_error(std::string(name) + " has another shape.");
}

// The memory that is written does not reach into memory that is read.
template <class T>
void require_apart(const T* written, std::size_t count, const char* name, const T* read, std::size_t extent, const char* other) {
  if (read && count && extent && std::less<>{}(written, read + extent) && std::less<>{}(read, written + count))
    throw py::value_error(std::string(name) + " shares memory with " + other + "; give it memory of its own.");
}

// Calls body with a float or a double, by the array's dtype.
template <class Body>
auto with_dtype(py::handle value, const char* name, Body body) {
  const py::array array = as_array(value, name);
  if (has_dtype<float>(array)) return body(float{});
  require_dtype<double>(array, name);
  return body(double{});
}

// Multiply-adds below which a call keeps the GIL: handing it over costs about 40 ns, as much as this takes.
constexpr std::size_t work_under_gil = 2'000;

// Releases the GIL while a computation touches only memory that its arguments keep alive: the caller holds references to every array for
// the whole call, and NumPy does not move data.
class WithoutGil {
 public:
  explicit WithoutGil(std::size_t work = work_under_gil) : state_(work < work_under_gil ? nullptr : PyEval_SaveThread()) {}
  ~WithoutGil() {
    if (state_) take_back();
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Calls body with the GIL, in between.
  template <class Body>
  void with_gil(Body body) {
    take_back();
    body();
    state_ = PyEval_SaveThread();
  }

 private:
  // While the interpreter ends, Python before 3.14 unwinds a thread that asks for the GIL (pthread_exit), through frames that must not be
  // unwound. Such a daemon thread waits here instead until the process is gone.
  void take_back() noexcept {
    if (finalizing()) park();
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      park();
    }
  }

  static bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }

  [[noreturn]] static void park() {
    for (;;) pause();
  }

  PyThreadState* state_;
};

}  // namespace gdlib::bindings
