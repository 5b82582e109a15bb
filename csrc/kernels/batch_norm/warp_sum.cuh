// Sums over the lanes of a warp, and over the blocks that merge the partials of channels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

constexpr uint32_t kFinishWarps = 4;  // of a block

// Over the warp, or over the block, in each of the threads.
__device__ __forceinline__ double channel_sum(double value, bool whole_block) {
  warp_sum(value);
  if (whole_block) {
    __shared__ double warps[kFinishWarps];
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (uint32_t i = 1; i < kFinishWarps; ++i) {
      value += warps[i];
    }
  }
  return value;
}

// How many blocks merge `count` partials of each channel: a block takes one channel, or each of its warps does.
struct FinishGrid {
  uint32_t count;
  bool whole_block;
  uint32_t blocks;

  FinishGrid(int64_t partials, int64_t channels)
      : count(static_cast<uint32_t>(partials)),
        whole_block(partials > 64),
        blocks(static_cast<uint32_t>(whole_block ? channels : (channels + kFinishWarps - 1) / kFinishWarps)) {}
};

// The channel of this thread.
__device__ __forceinline__ uint32_t finish_channel_index(bool whole_block) {
  return whole_block ? blockIdx.x : blockIdx.x * kFinishWarps + threadIdx.x / 32;
}

}  // namespace fused_conv_bn
