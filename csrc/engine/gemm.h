// C[rows, cols] = start + A[rows, depth] B[depth, cols]: cache blocks, packed panels, threads over blocks of C.
//
// Every element of C is one chain of multiply-adds in the order of depth: its bits depend on neither the other rows and columns, nor the
// layout of the operands, nor the number of threads. So blocks and packing are free to follow the sizes of a call.
#pragma once

#include <cstddef>

#include "aligned.h"
#include "visitor.h"

namespace gdlib {

inline std::size_t ceil_divide(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

// A matrix as it lies in memory. One of the strides is 1.
template <class T>
struct MatrixView {
  const T* data;
  std::size_t row_stride;  // elements between neighbours in a column
  std::size_t col_stride;  // elements between neighbours in a row
  const T* at(std::size_t row, std::size_t col) const { return data + row * row_stride + col * col_stride; }
};

// B laid out for the register tiles of the kernel table in use, for products that use it again and again.
template <class T>
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Throws std::bad_alloc.
  PackedMatrix(std::size_t depth, std::size_t cols, MatrixView<T> b);

  std::size_t cols() const { return cols_; }
  // The panel that begins at column `col`, from the depth `d` on, given its width in elements.
  const T* at(std::size_t d, std::size_t col, std::size_t width) const { return data_.data() + col * depth_ + d * width; }

 private:
  std::size_t depth_ = 0, cols_ = 0;
  AlignedVector<T> data_;
};

// A block of C, c[row ... row + rows, col ... col + cols], and where its first element lies.
template <class T>
struct Block {
  std::size_t row, rows, col, cols;
  T* data;
  std::size_t stride;
};

// What is done to a block of C once its sums are complete, while it is in a cache, by the thread that computed it.
template <class T>
using BlockVisitor = Visitor<const Block<T>&>;

// One product. Where chains of additions start: at the bias of the column, at what c holds, or at zero.
template <class T>
struct Product {
  std::size_t rows;
  std::size_t cols;
  std::size_t depth;
  MatrixView<T> a;
  MatrixView<T> b;                          // not read when `packed` is given
  const PackedMatrix<T>* packed = nullptr;  // b, laid out before
  const T* bias = nullptr;                  // [cols]
  bool accumulate = false;                  // start at c; without bias
  T* c = nullptr;                           // row-major
  std::size_t c_stride = 0;
  BlockVisitor<T> finish = {};  // computes no product itself: its block may lie in the scratch of its thread
  // A matrix laid out as c that `finish` updates with c's blocks, which are of no further use: it may be fetched into the cache ahead, and
  // what c holds is unspecified. Not with `accumulate`.
  const T* updated = nullptr;
};

// Computes it on up to thread_count() threads, on one where the product is small. Throws std::bad_alloc.
template <class T>
void gemm(const Product<T>& product);

}  // namespace gdlib
