// The sizes of this machine's caches: blocks of data are cut to the second level, and read from memory in other ways than from the third.
#pragma once

#include <cstddef>

namespace gdlib {

// Bytes of one core's L2. Asked of the operating system once; where it does not say, the smallest in use: 256 KiB.
std::size_t l2_bytes();

// Bytes of the L3 that cores share; where the system does not say, 32 MiB. Nothing that it decides may show in the bits of a result.
std::size_t l3_bytes();

}  // namespace gdlib
