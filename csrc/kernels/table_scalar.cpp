// The scalar table. 16 vector registers of 128 bits: 8 accumulators, 2 columns, 1 broadcast, and room for the compiler.

#include "kernels.h"
#include "simd.h"
// The bodies, in the order in which they use each other.
#include "activations.inl"
#include "gemm_tile.inl"
#include "losses.inl"
#include "linear.inl"
#include "shuffle.inl"
#include "vectors.inl"
#include "table.inl"

namespace gdlib {

extern const Kernels kernels_scalar;
const Kernels kernels_scalar = make_kernels<4, 2>("scalar");

}  // namespace gdlib
