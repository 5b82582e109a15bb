// The residual: where it is added, and how a thread reads it for its own sums.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/fast_div.h"
#include "kernels/common/scalar.h"
#include "kernels/conv/tile.cuh"

namespace fused_conv_bn {

// What comes behind the affine, in its order. exists: whether there is a residual.
template <typename AddResidual, typename Activate>
__device__ __forceinline__ void finish_sums(bool exists, bool residual_last, AddResidual&& add_residual,
                                            Activate&& activate) {
  if (exists && !residual_last) {
    add_residual();
  }
  activate();
  if (exists && residual_last) [[unlikely]] {
    add_residual();
  }
}

// start: the residual of the tile's first pixel and the thread's first channel; channels: how many there are from it
// on. pixel(j): the tile's pixel, by rows that are `pitch` apart, that the thread's pixel j is. channel(i): how far its
// channel i is behind the first; of contiguous tensors 8 * i. sum(i, j): a reference to that of its channel i and pixel
// j.
template <bool kChannelsLast, int kOwnChannels, int kOwnPixels, typename T, typename Pixel, typename Channel,
          typename Sum>
__device__ __forceinline__ void add_residual_of_tile(const T* start, int channels, int rows, int cols,
                                                     const FastDiv& pitch, const Extents& c, Pixel&& pixel,
                                                     Channel&& channel, Sum&& sum) {
#pragma unroll
  for (int j = 0; j < kOwnPixels; ++j) {
    int index = pixel(j);
    asm volatile("" : "+r"(index));  // the compiler shall not keep every address of every pixel in a register
    const auto [row, col] = locate_pixel(index, pitch);
    if (row < rows && col < cols) {
      const T* source = start + (row * c.Q + col) * (kChannelsLast ? c.K : 1);
#pragma unroll
      for (int i = 0; i < kOwnChannels; ++i) {
        const int beyond = channel(i);
        if (beyond < channels) {
          sum(i, j) += to_acc(kChannelsLast ? source[beyond] : *source);
        }
        source += kChannelsLast ? 0 : 8 * (c.P * c.Q);
      }
    }
  }
}

}  // namespace fused_conv_bn
