// The neon table. 32 vector registers of 128 bits: 24 accumulators, 3 columns, 1 broadcast.
#define GDLIB_NEON 1
#include "kernels.h"
#include "simd.h"
#include "table.inl"

namespace gdlib {

extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels<8, 3>("neon");

}  // namespace gdlib
