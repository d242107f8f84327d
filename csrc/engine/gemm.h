// C[rows, cols] = A[rows, depth] B[depth, cols], any strides on the inputs: packed panels, cache blocks, threads over blocks of C.
#pragma once

#include <cstddef>

namespace gdlib {

template <class T>
struct MatrixView {
  const T* data;
  std::size_t row_stride;  // elements between neighbours in a column
  std::size_t col_stride;  // elements between neighbours in a row
  const T* at(std::size_t row, std::size_t col) const { return data + row * row_stride + col * col_stride; }
};

// c[rows, cols] (+)= a b + bias[cols], c row-major with c_stride; bias may be null. Every element is summed in depth order within fixed
// blocks of depth: its bits depend on neither `rows`, nor its place, nor the number of threads. Throws std::bad_alloc.
template <class T>
void gemm(std::size_t rows, std::size_t cols, std::size_t depth, MatrixView<T> a, MatrixView<T> b, const T* bias, bool accumulate, T* c,
          std::size_t c_stride);

}  // namespace gdlib
