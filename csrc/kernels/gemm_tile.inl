// The register tile of GEMM: Rows x (Cols vectors) accumulators, one broadcast of a per row and depth step.
// Accumulates in T. Packing, blocking and edges are the engine's.

namespace gdlib {
namespace {

template <class T, int Rows, int Cols>
void gemm_tile(size_t depth, const T* a, const T* b, const T* bias, bool accumulate, T* c, size_t c_stride) {
  constexpr size_t w = lanes<T>;
  Vector<T> sum[Rows][Cols];
  for (int r = 0; r < Rows; ++r)
    for (int k = 0; k < Cols; ++k) sum[r][k] = zero<T>();
  for (size_t d = 0; d < depth; ++d, a += Rows, b += Cols * w) {
    Vector<T> column[Cols];
#pragma GCC unroll 8
    for (int k = 0; k < Cols; ++k) column[k] = load(b + k * w);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> row = broadcast(a[r]);
#pragma GCC unroll 8
      for (int k = 0; k < Cols; ++k) sum[r][k] = fma(row, column[k], sum[r][k]);
    }
  }
  for (int r = 0; r < Rows; ++r, c += c_stride)
    for (int k = 0; k < Cols; ++k) {
      Vector<T> value = accumulate ? load(c + k * w) + sum[r][k] : sum[r][k];
      if (bias) value += load(bias + k * w);
      store(c + k * w, value);
    }
}

}  // namespace
}  // namespace gdlib
