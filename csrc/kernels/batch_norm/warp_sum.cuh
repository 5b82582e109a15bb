// Sums over the lanes of a warp.
#pragma once

#include <cuda_runtime.h>

namespace fused_conv_bn {

// Each value's sum over a warp, in every lane. A loop, because where the compiler cannot tell that a warp's lanes are
// together it writes each shuffle twice.
template <typename... Values>
__device__ __forceinline__ void warp_sum(Values&... values) {
#pragma unroll 1
  for (int mask = 16; mask > 0; mask /= 2) {
    ((values += __shfl_xor_sync(0xffffffffu, values, mask)), ...);
  }
}

}  // namespace fused_conv_bn
