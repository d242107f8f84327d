// The neon table. 32 vector registers of 128 bits: 24 accumulators, 4 columns, 1 broadcast.
#define GDLIB_NEON 1
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

extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels<6, 4>("neon");

}  // namespace gdlib
