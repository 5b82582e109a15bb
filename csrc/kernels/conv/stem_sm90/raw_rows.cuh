// Copies of a tile's input rows to shared memory, as they lie in the image.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "input_window.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// By a producer group: starts the copies into a raw stage. Its barrier `raw_full` says when they are there.
template <typename C>
__device__ __forceinline__ void start_raw_rows(const Block<C>& block, uint32_t index, int stage) {
  const auto& p = block.p;
  const int copies = p.x_separate * (block.tiles().has_whole_rows(p) ? 1 : p.tile.raw_rows);
  if (index >= p.tiles || (p.raw_in_bulk && block.group_warp() >= copies)) {
    return;
  }
  const TileInput window = tile_input(block, index);
  const int above = max(0, -window.h0);  // rows outside of the image
  const int rows = max(0, min(p.tile.raw_rows, p.H - window.h0) - above);
  const int bytes = max(0, window.last - window.first);
  const uint32_t target = block.shared.raw_rows(stage) + above * p.tile.raw_pitch;
  const unsigned char* const source = window.image + static_cast<int64_t>(window.h0 + above) * p.x_row_bytes +
                                      window.first;
  if (p.raw_in_bulk) {
    if (block.group_thread() == 0) {
      barrier_arrive_expect(block.shared.raw_full(stage), p.x_separate * rows * bytes);
    }
    // Whole rows follow each other in memory and in the stage. The warps share the copies: starting one takes long.
    const int run = block.tiles().has_whole_rows(p) ? rows * bytes : bytes;
    for (int i = block.group_warp() + C::kGroupThreads / 32 * lane(); i < copies && run > 0; i += C::kGroupThreads) {
      const int channel = block.tiles().has_whole_rows(p) ? i : static_cast<int>(p.raw_rows.div(i));
      const int row = block.tiles().has_whole_rows(p) ? 0 : i - channel * p.tile.raw_rows;
      if (row < rows) {
        fetch_bulk(target + (channel * p.tile.raw_rows + row) * p.tile.raw_pitch,
                   source + (static_cast<int64_t>(channel) * p.H + row) * p.x_row_bytes, run,
                   block.shared.raw_full(stage));
      }
    }
    return;
  }
  // Four bytes at a time, or two where rows begin at odd multiples of them.
  const bool odd = p.x_row_bytes % 4 != 0;
  for (int i = block.group_warp(); i < p.x_separate * p.tile.raw_rows; i += C::kGroupThreads / 32) {
    const int channel = p.raw_rows.div(i);
    const int row = i - channel * p.tile.raw_rows;
    const unsigned char* const start = source + (static_cast<int64_t>(channel) * p.H + row) * p.x_row_bytes;
    if (row >= rows) {
      continue;
    }
    if (!odd) {
      for (int e = lane() * 4; e < bytes; e += 32 * 4) {
        copy_async_1(target + i * p.tile.raw_pitch + e, start + e);
      }
    } else if constexpr (!C::kFloat32) {
      for (int e = lane() * 2; e < bytes; e += 32 * 2) {
        store_shared(target + i * p.tile.raw_pitch + e, __ldg(reinterpret_cast<const uint16_t*>(start + e)));
      }
    }
  }
  if (odd) {
    barrier_arrive(block.shared.raw_full(stage));
  } else {
    barrier_arrive_behind_copies(block.shared.raw_full(stage));
  }
}

}  // namespace fused_conv_bn::stem_sm90
