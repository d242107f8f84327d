#pragma once

#include <pybind11/pybind11.h>

namespace gdlib::bindings {

void define_layers(pybind11::module_& m);
void define_training(pybind11::module_& m);
void define_predictor(pybind11::module_& m);

}  // namespace gdlib::bindings
