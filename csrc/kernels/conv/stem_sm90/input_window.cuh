// The part of an image that a tile needs, and the table of its units in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "kernels/ptx/shared.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// The tile's input window, and what of the image it meets.
struct TileInput : InputWindow {
  const unsigned char* image;
  int end;          // past the last column that a tap of the tile meets in the image
  int first, last;  // of an input row, the bytes that are among the raw rows
};

template <typename C>
__device__ __forceinline__ TileInput tile_input(const Block<C>& block, uint32_t index) {
  const auto& p = block.p;
  const Tile tile = block.tiles().locate(index);
  const InputWindow window = input_window(tile, p);
  const int end = max(0, min(p.W, window.w0 + (p.tile.q - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1));
  const bool whole = block.tiles().has_whole_rows(p);
  return {window, reinterpret_cast<const unsigned char*>(input_image(p.x, tile, p)), end,
          whole ? 0 : max(0, window.w0) * p.x_col_bytes & ~15,
          whole ? p.x_row_bytes : min(p.x_row_bytes, (end * p.x_col_bytes + 15) & ~15)};
}

// What a unit is made of.
struct UnitSource {
  uint32_t offset;  // bytes from the window's first value
  int w;
  int channels;  // 0: its row is outside of the image
};

// What a producer thread has to know of a unit is the same for every tile, so it is worked out once. A thread of a producer
// group has the same units every time.
// x: the bytes from the window's first value to the unit's first.
// y: columns to the right, rows down << 17, how many channels there are << 27.
template <typename C>
struct UnitTable {
  const Block<C>& block;
  const Params<typename C::T>& p = block.p;

  __device__ __forceinline__ void set_up() const {
#pragma unroll 2
    for (int index = threadIdx.x; index * 8 < p.tile.unit_table; index += C::kProducerThreads) {
      const int line = p.x_cols.div(index);
      const int col = index - line * p.tile.x_cols;
      const int plane = p.x_rows.div(line);
      const int row = line - plane * p.tile.x_rows;
      const int phase = p.c_blocks.div(plane);
      const int phase_h = p.phases_w.div(phase);
      const int phase_w = phase - phase_h * p.tile.phases_w;
      const int down = row * p.stride_h + phase_h * p.tile.phase_step_h;
      const int right = col * p.stride_w + phase_w * p.tile.phase_step_w;
      const int c0 = (plane - phase * p.tile.c_blocks) * 8;
      const bool is_unit = index < p.x_units && down < p.tile.raw_rows;
      store_shared(block.shared.unit_table() + index * 8,
                   make_uint2(down * p.unit_row_bytes + right * p.x_col_bytes + c0 * p.unit_channel,
                              is_unit ? right | down << 17 | min(8, p.C - c0) << 27 : 0));
    }
  }

  __device__ __forceinline__ UnitSource source(int index, const TileInput& window) const {
    const uint2 entry = load_shared_2(block.shared.unit_table() + index * 8);
    const int h = window.h0 + static_cast<int>(entry.y >> 17 & 1023);
    return {entry.x, window.w0 + static_cast<int>(entry.y & 0x1ffff),
            exists(h, p.H) ? static_cast<int>(entry.y >> 27) : 0};
  }
};

}  // namespace fused_conv_bn::stem_sm90
