// The exact path: the product of a chunk in plain float32 FMAs, from global memory. It is for float32 that does not split, and for
// Inf and NaN, which must not meet the zeros of half-filled units.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/conv/exact_products.cuh"
#include "kernels/conv/tile.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// What comes behind the first so many comes to the front, and these to the end.
template <int kFirst, int kAll>
__device__ __forceinline__ void rotate(float (&values)[kAll]) {
  if constexpr (kFirst < kAll) {
    float first[kFirst];
#pragma unroll
    for (int e = 0; e < kFirst; ++e) {
      first[e] = values[e];
    }
#pragma unroll
    for (int e = 0; e < kAll - kFirst; ++e) {
      values[e] = values[e + kFirst];
    }
#pragma unroll
    for (int e = 0; e < kFirst; ++e) {
      values[kAll - kFirst + e] = first[e];
    }
  }
}

template <typename C>
__device__ __forceinline__ void multiply_exactly(const Block<C>& block, typename C::Accumulators& acc, const Tile& tile,
                                                 int first_position) {
  const auto& p = block.p;
  const Fragment<C> fragment{p.tile};
  const typename C::T* const image = input_image(p.x, tile, p);
  constexpr int kBatch = C::kOwnPositions < 8 ? C::kOwnPositions : 8;
#pragma unroll
  for (int e = 0; e < C::kAccumulators; ++e) {
    acc[e] = 0;
  }
  // One copy of the code for some of the positions, through which the others go by rotation.
#pragma unroll 1
  for (int first = 0; first < C::kOwnPositions; first += kBatch) {
    int offsets[kBatch];  // in the image; -1: past it
    add_exact_products<C::kOwnChannels, kBatch>(
        p,
        [&](int r, int s) {
          int base = first_position + fragment.own_position() + fragment.position_step(first);
          asm volatile("" : "+r"(base));  // the compiler shall not keep all rows and columns in registers
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const auto [row, col] = locate_pixel(base + fragment.position_step(j), p.x_cols);
            // Not from input_window(): kept over all taps, it made moments in 16 bits spill 4 bytes.
            const int h = (tile.p0 + row) * p.stride_h - p.pad_h + r * p.dilation_h;
            const int w = (tile.q0 + col) * p.stride_w - p.pad_w + s * p.dilation_w;
            offsets[j] = exists(h, p.H) && exists(w, p.W) ? h * p.x_stride_h + w * p.x_stride_w : -1;
          }
        },
        [&](int j, int c) { return offsets[j] < 0 ? 0.0f : to_acc(image[offsets[j] + c * p.x_stride_c]); },
        [&](int i, int c, int r, int s) {
          int k = block.first_channel + fragment.own_channel(i);
          asm volatile("" : "+r"(k));
          return k < p.K ? to_acc(p.w[k * block.terms() + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s])
                         : 0.0f;
        },
        fragment.own(acc));
    rotate<C::kOwnChannels * kBatch>(acc);
  }
}

}  // namespace fused_conv_bn::stem_sm90
