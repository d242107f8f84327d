// The avx2 table. 16 vector registers of 256 bits: 12 accumulators, 3 columns, 1 broadcast.

#include "kernels.h"
#include "simd.h"
#include "table.inl"

namespace gdlib {

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels<4, 3>("avx2");

}  // namespace gdlib
