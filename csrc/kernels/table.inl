// One ISA's table, made of every body above it. A tile is Rows x Cols vectors, chosen for the registers that the ISA has.

namespace gdlib {
namespace {

template <class T, int Rows, int Cols>
constexpr KernelTable<T> make_table() {
  static_assert(Rows * Cols * lanes<T> <= largest_tile, "raise largest_tile");
  KernelTable<T> table{};
  table.tile_rows = Rows;
  table.tile_cols = Cols * lanes<T>;
  table.gemm_tile = gemm_tile<T, Rows, Cols>;
  table.linear_forward = linear_forward<T>;
  table.linear_gradient = linear_gradient<T>;
  table.linear_input_gradient = linear_input_gradient<T>;
  table.linear_step = linear_step<T>;
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

template <int Rows, int Cols>
constexpr Kernels make_kernels(const char* isa) {
  return {isa, lane_bytes, make_table<float, Rows, Cols>(), make_table<double, Rows, Cols>(), shuffle};
}

}  // namespace
}  // namespace gdlib
