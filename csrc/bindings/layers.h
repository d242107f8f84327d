// How Python describes a network.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <vector>

#include "../engine/network.h"
#include "arrays.h"

namespace gdlib::bindings {

// (kind, in_features, out_features, has_bias), kind being "linear" or an activation's name.
using LayerTuple = std::tuple<std::string, std::size_t, std::size_t, bool>;
using Layers = std::vector<LayerTuple>;

// The network of these layers, from [.., in_features] to [.., out_features] with `parameters` parameters.
inline Network as_network(const Layers& layers, std::size_t in_features, std::size_t out_features, std::size_t parameters) {
  Network network;
  for (const auto& [kind, in, out, has_bias] : layers) network.add(activation_named(kind), in, out, has_bias);
  if (layers.empty()) throw py::value_error("there are no layers; at least one is wanted.");
  require_size(in_features, network.in_features(), "a row of x");
  require_size(out_features, network.out_features(), "a row of y");
  require_size(parameters, network.parameters(), "the parameters");
  return network;
}

}  // namespace gdlib::bindings
