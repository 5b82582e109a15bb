// The fragment of a chunk's product that a consumer thread has: which channels and positions, and in which accumulators.
//
// A position is a pixel of the tile with its columns padded to x_cols, so that positions and units have the same offsets.
// Contiguous: rows of the product are channels; a warp has 16 of them to itself, a thread two. channels_last: rows are
// positions, and channels are dealt to the columns so that a thread ends up with 16 bytes of a pixel's.
#pragma once

#include <cuda_runtime.h>

#include "block.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// The row and the column group that a thread has in a product.
__device__ __forceinline__ int fragment_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int fragment_col() { return threadIdx.x % 4; }

template <typename C>
struct Fragment {
  static constexpr int kVec = C::kVec;

  const TileLayout& tile;

  static __device__ __forceinline__ float& at(typename C::Accumulators& acc, int channel, int position) {
    return C::kChannelsLast
               ? acc[position / 2 * (C::kAccumulators / 2) + channel / 2 * 4 + position % 2 * 2 + channel % 2]
               : acc[position / 2 * 4 + channel * 2 + position % 2];
  }
  static __device__ __forceinline__ float at(const typename C::Accumulators& acc, int channel, int position) {
    return at(const_cast<typename C::Accumulators&>(acc), channel, position);
  }

  static __device__ __forceinline__ auto own(typename C::Accumulators& acc) {
    return [&acc](int channel, int position) -> float& { return at(acc, channel, position); };
  }

  __device__ __forceinline__ int own_channel(int i) const {
    return (C::kChannelsLast ? fragment_col() * kVec : warp() * 16 + interleaved(fragment_row())) + channel_step(i);
  }
  static __device__ __forceinline__ int channel_step(int i) {  // from the first to another
    return C::kChannelsLast ? i / kVec * (4 * kVec) + i % kVec : i * 8;
  }
  static __device__ __forceinline__ int own_position() {  // the first
    return C::kChannelsLast ? warp() * 16 + fragment_row() : fragment_col() * 2;
  }
  static __device__ __forceinline__ int position_step(int j) {  // from the first to another
    return C::kChannelsLast ? j / 2 * 64 + j % 2 * 8 : j / 2 * 8 + j % 2;
  }

  // Of eight neighbouring channels, even ones first where output buffers say so.
  __device__ __forceinline__ int interleaved(int channel) const {
    return tile.out_interleaves ? channel % 4 * 2 + channel / 4 : channel;
  }
  // The channel that a row of the weights has.
  __device__ __forceinline__ int row_channel(int row) const {
    const int i = row / 8 * 2 + row % 2;
    return C::kChannelsLast ? i / kVec * (4 * kVec) + row % 8 / 2 * kVec + i % kVec
                            : row / 8 * 8 + interleaved(row % 8);
  }
};

}  // namespace fused_conv_bn::stem_sm90
