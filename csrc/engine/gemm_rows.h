// Products that are better computed by whole rows of C, four at a time, than in tiles of panels.
#pragma once

#include "gemm.h"

namespace gdlib {

// Whether this product is one: its B is read where it lies, for few rows, few steps, or some steps of a small B.
template <class T>
bool goes_by_rows(const Product<T>& product);

// The bits of gemm. Throws std::bad_alloc.
template <class T>
void gemm_by_rows(const Product<T>& product);

}  // namespace gdlib
