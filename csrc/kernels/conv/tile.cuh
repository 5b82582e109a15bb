// Tiles of a convolution's output: where one lies, what of it exists, and where the input begins that it is computed
// from.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/fast_div.h"
#include "problem.h"

namespace fused_conv_bn {

// Some output pixels of an image, from row p0 and column q0 on.
struct Tile {
  int image, p0, q0;
};

// How the images of an output are cut into tiles: into rows of them, image by image. Division: FastDiv, or a reference
// to it.
template <typename Division>
struct TileGridOf {
  int p, q;                   // output rows and columns of a tile
  Division tiles_q, tiles_p;  // of an image

  // Opaque to the compiler, so that it does not keep one call's result for the next.
  __device__ __forceinline__ Tile locate(uint32_t index) const {
    asm volatile("" : "+r"(index));
    const int row = tiles_q.div(index);
    const int image = tiles_p.div(row);
    return {image, static_cast<int>(row - image * tiles_p.divisor) * p,
            static_cast<int>(index - row * tiles_q.divisor) * q};
  }
  // The last tiles of an image may have fewer.
  __device__ __forceinline__ int rows(const Tile& tile, const Extents& c) const { return min(p, c.P - tile.p0); }
  __device__ __forceinline__ int cols(const Tile& tile, const Extents& c) const { return min(q, c.Q - tile.q0); }
  // Whether a tile's rows are those of the image, so that they follow each other in memory.
  __device__ __forceinline__ bool has_whole_rows(const Extents& c) const { return q == c.Q; }
};

using TileGrid = TileGridOf<FastDiv>;
// Contiguous kernels of stem_sm90 in 16 bits spilled 8 bytes with copies; stem_sm80 in 16 bits channels_last takes up
// to 0.4% more instructions without.
using TileGridRef = TileGridOf<const FastDiv&>;

// Of the tile's first pixel and a channel, in elements.
template <bool kChannelsLast>
__device__ __forceinline__ int64_t output_offset(const Tile& tile, const Extents& c, int channel) {
  const int64_t start = static_cast<int64_t>(tile.image) * c.K * c.P * c.Q;
  const int pixel = tile.p0 * c.Q + tile.q0;
  return kChannelsLast ? start + pixel * c.K + channel : start + channel * (c.P * c.Q) + pixel;
}

// ---- pixels of a tile -----------------------------------------------------------------------------------------------

struct TilePixel {
  int row, col;
};

// pitch: from row to row.
__device__ __forceinline__ TilePixel locate_pixel(int index, const FastDiv& pitch) {
  const int row = pitch.div(index);
  return {row, static_cast<int>(index - row * pitch.divisor)};
}

// Both in one word, and as a row that no tile has.
constexpr int kOutsideTile = 0x7fff0000;
__device__ __forceinline__ int pack_pixel(const TilePixel& pixel) { return pixel.row << 16 | pixel.col; }
// rows_16: 2^16 times the rows.
__device__ __forceinline__ bool is_inside(int packed, int rows_16, int cols) {
  return packed < rows_16 && (packed & 0xffff) < cols;
}

// ---- the input ------------------------------------------------------------------------------------------------------

// The rows and columns of the input that a tile is computed from begin here, maybe outside of the image.
struct InputWindow {
  int h0, w0;
};

__device__ __forceinline__ InputWindow input_window(const Tile& tile, const Extents& c) {
  return {tile.p0 * c.stride_h - c.pad_h, tile.q0 * c.stride_w - c.pad_w};
}

__device__ __forceinline__ bool exists(int coordinate, int extent) {
  return static_cast<unsigned>(coordinate) < static_cast<unsigned>(extent);
}

template <typename T>
__device__ __forceinline__ const T* input_image(const T* x, const Tile& tile, const Extents& c) {
  return x + static_cast<int64_t>(tile.image) * (c.C * c.H * c.W);
}

}  // namespace fused_conv_bn
