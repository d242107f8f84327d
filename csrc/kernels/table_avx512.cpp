// The avx512 table. 32 vector registers of 512 bits: 24 accumulators, 3 columns, 1 broadcast.

#include "kernels.h"
#include "simd.h"
#include "table.inl"

namespace gdlib {

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = make_kernels<8, 3>("avx512");

}  // namespace gdlib
