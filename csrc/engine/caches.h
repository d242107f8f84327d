// The size of this machine's second level of cache, which blocks of data are cut to.
#pragma once

#include <cstddef>

namespace gdlib {

// Bytes of one core's L2. Asked of the operating system once; where it does not say, the smallest in use: 256 KiB.
std::size_t l2_bytes();

}  // namespace gdlib
