// Results of a contiguous output on their way through shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/vec.cuh"
#include "kernels/ptx/shared.cuh"

namespace fused_conv_bn {

// Two results of a channel to shared memory, rounded to T. kPairs: `second` lies behind `first`, and both can be stored
// at once. kBound: in 16 bits, the bound that an activation is comes with the rounding.
template <typename T, bool kPairs, Activation kBound = Activation::none>
__device__ __forceinline__ void stage_two(uint32_t first, uint32_t second, float a, float b) {
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kPairs) {
      store_shared(first, make_uint2(__float_as_uint(a), __float_as_uint(b)));
    } else {
      store_shared(first, __float_as_uint(a));
      store_shared(second, __float_as_uint(b));
    }
  } else {
    const uint32_t both = pack_pair_bounded<kBound>(T(), a, b);
    if constexpr (kPairs) {
      store_shared(first, both);
    } else {
      store_shared(first, static_cast<uint16_t>(both));
      store_shared(second, static_cast<uint16_t>(both >> 16));
    }
  }
}

// Bytes [begin, end) of a vector, element by element, from shared memory. kBytes: of an element, 2 or 4.
template <int kBytes>
__device__ __forceinline__ void write_elements(unsigned char* target, uint32_t source, int begin, int end) {
  for (int e = begin; e < end; e += kBytes) {
    if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(target + e) = load_shared_1(source + e);
    } else {
      *reinterpret_cast<uint16_t*>(target + e) = static_cast<uint16_t>(load_shared_half(source + e));
    }
  }
}

}  // namespace fused_conv_bn
