// One ISA's table, made of every body above it. A tile is Rows x Vectors vectors, chosen for the registers that the ISA has.
#include "kernels.h"
#include "simd.h"
// In the order in which they use each other.
#include "activations.inl"
#include "gemm.inl"
#include "losses.inl"
#include "vectors.inl"
#include "linear.inl"
#include "linear_forward.inl"
#include "linear_turns.inl"
#include "linear_step.inl"
#include "linear_run.inl"
#include "shuffle.inl"

namespace gdlib {
namespace {

template <class T, int Rows, int Vectors>
constexpr KernelTable<T> make_table() {
  KernelTable<T> table{};
  table.tile_rows = Rows;
  table.tile_vectors = Vectors;
  table.lanes = lanes<T>;
  fill_tiles<T, Rows, Vectors>(table);
  // All rows of a tile where vectors are whole lines (5 to 8 rows 1.2 to 2.1 times as fast, Zen 4; not measured for 8 rows of NEON).
  constexpr int few = lane_bytes == 64 ? Rows : 4;
  static_assert(few <= Rows, "few rows are one tile's");
  fill_transposed<T, few>(table);
  table.gemm_rows = gemm_rows<T>;
  table.gemm_pack_columns = gemm_pack_columns<T>;
  table.gemm_pack_rows = gemm_pack_rows<T, Rows>;
  table.linear_forward = linear_forward<T>;
  table.linear_gradient = linear_gradient<T>;
  table.linear_input_gradient = linear_input_gradient<T>;
  table.column_sums = column_sums<T>;
  table.linear_step = linear_step<T>;
  table.gain_together = gain_together<T>;
  table.linear_steps = linear_steps<T>;
  table.run_features = most_run_vectors * lanes<T> - 2;
  table.linear_run = linear_run<T>;
  table.extend_rows = extend_rows<T>;
  table.squared_error_sum = squared_error_sum<T>;
  table.squared_error_terms = squared_error_terms<T>;
  table.squared_error_gradient = squared_error_gradient<T>;
  table.activation_forward = activation_forward<T>;
  table.activation_backward = activation_backward<T>;
  table.sgd_update = sgd_update<T>;
  table.all_finite = all_finite<T>;
  table.average = average<T>;
  return table;
}

template <int Rows, int Vectors>
constexpr Kernels make_kernels(const char* isa) {
  return {isa, lane_bytes, make_table<float, Rows, Vectors>(), make_table<double, Rows, Vectors>(), shuffle};
}

}  // namespace
}  // namespace gdlib
