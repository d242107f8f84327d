// The scalar table. 16 vector registers of 128 bits: 8 accumulators, 2 columns, 1 broadcast, and room for the compiler.

#include "kernels.h"
#include "simd.h"
#include "table.inl"

namespace gdlib {

extern const Kernels kernels_scalar;
const Kernels kernels_scalar = make_kernels<4, 2>("scalar");

}  // namespace gdlib
