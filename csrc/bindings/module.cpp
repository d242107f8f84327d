// gdlib._core: the compiled face of the engine.
#include "module.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "../dispatch/dispatch.h"
#include "../engine/caches.h"
#include "../engine/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native kernels of gdlib. Use the gdlib package: these functions check types and sizes only.";
  try {
    gdlib::initialize_threads();
    gdlib::kernels();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  m.def("isa", [] { return std::string(gdlib::kernels().isa); }, "The kernel table in use.");
  m.def("available_isas", &gdlib::available_isas, "The kernel tables that this machine can run, slowest first.");
  m.def("cpu_features", &gdlib::cpu_features, "Features of this CPU that some kernel table needs.");
  m.def("select_isa", &gdlib::select_isa, "Forces a kernel table; not while another thread computes.", py::arg("name"));
  m.def("cache_bytes", [] { return std::pair(gdlib::l2_bytes(), gdlib::l3_bytes()); }, "A core's L2, and the L3 that it shares.");
  m.def("num_threads", &gdlib::thread_count, "Threads that a call may use.");
  m.def("set_num_threads", &gdlib::set_thread_count, "Sets the threads that a call may use.", py::arg("count"));
  m.def("openmp_enabled", &gdlib::openmp_enabled, "True when the extension was built with OpenMP.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The compiler's version text.");
  gdlib::bindings::define_layers(m);
  gdlib::bindings::define_training(m);
  gdlib::bindings::define_predictor(m);
}
