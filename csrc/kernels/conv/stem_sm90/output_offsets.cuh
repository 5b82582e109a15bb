// The table of output offsets in shared memory: where results of each position go. Consumers make it once.
//
//     channels_last  bytes from the tile's first pixel, and row << 16 | column in the tile
//     contiguous     bytes from the channel's start in the output buffer
//     moments        for a thread's 32 positions of a chunk a bit each: whether it is in a tile of full size
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/ptx/shared.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// Of a thread's positions from `first` on, a bit each: whether it is one of the tile's.
template <typename C>
__device__ __forceinline__ uint32_t inside_mask(const Block<C>& block, int first, const Tile& tile) {
  const auto& p = block.p;
  uint32_t inside = 0;
#pragma unroll 1
  for (int j = 0; j < 32; ++j) {
    const int position = first + Fragment<C>::position_step(j);
    const auto [row, col] = locate_pixel(position, p.x_cols);
    inside |= (row < block.tiles().rows(tile, p) && col < block.tiles().cols(tile, p) ? 1u : 0u) << j;
  }
  return inside;
}

template <typename C>
__device__ __forceinline__ void set_up_output_offsets(const Block<C>& block) {
  const auto& p = block.p;
  const int thread = block.consumer_thread();
  for (int position = thread; position < p.tile.chunks * kChunk; position += C::kConsumerThreads) {
    const auto [row, col] = locate_pixel(position, p.x_cols);
    const bool inside = row < p.tile.p && col < p.tile.q;
    if constexpr (C::kChannelsLast) {
      store_shared(block.shared.output_offsets() + position * 8,
                   make_uint2(static_cast<uint32_t>(row * p.Q + col) * p.K * C::kBytes,
                              inside ? pack_pixel({row, col}) : kOutsideTile));
    } else if constexpr (C::kContiguous) {
      const int offset = inside ? row * p.tile.out_row + col : p.tile.out_end + position % kDiscarded;
      store_shared(block.shared.output_offsets() + position * 2, static_cast<uint16_t>(offset * C::kBytes));
    }
  }
  if constexpr (C::kMoments) {
    for (int i = thread; i < p.tile.chunks * 4; i += C::kConsumerThreads) {
      store_shared(block.shared.output_offsets() + i * 4,
                   inside_mask(block, i / 4 * kChunk + i % 4 * 2, Tile{0, 0, 0}));
    }
  }
}

}  // namespace fused_conv_bn::stem_sm90
