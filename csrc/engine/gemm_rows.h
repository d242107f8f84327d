// Products that are better computed by whole rows of C, four at a time, than in tiles of panels.
#pragma once

#include "gemm.h"

namespace gdlib {

// Cycles for each element of A and B that a part of any product reads, which another core may have written, next to 2 multiply-adds of a
// vector in a cycle.
constexpr double cycles_to_read = 0.5;

// Whether this product is one: its B is read where it lies, for few rows, few steps, or some steps of a small B.
template <class T>
bool goes_by_rows(const Product<T>& product);

// The bits of gemm. Throws std::bad_alloc.
template <class T>
void gemm_by_rows(const Product<T>& product);

}  // namespace gdlib
