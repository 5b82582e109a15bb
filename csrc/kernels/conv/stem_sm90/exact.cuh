// The exact path: the product of a chunk in plain float32 FMAs, from global memory. It is for float32 that does not split, and for
// Inf and NaN, which must not meet the zeros of half-filled units.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
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
  const auto weight = [&](int k, int c, int r, int s) {
    return to_acc(p.w[k * block.terms() + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s]);
  };
  constexpr int kBatch = C::kOwnPositions < 8 ? C::kOwnPositions : 8;
#pragma unroll
  for (int e = 0; e < C::kAccumulators; ++e) {
    acc[e] = 0;
  }
  // One copy of the code for some of the positions, through which the others go by rotation.
#pragma unroll 1
  for (int first = 0; first < C::kOwnPositions; first += kBatch) {
#pragma unroll 1
    for (int tap = 0; tap < p.R * p.S; ++tap) {
      const int r = tap / p.S;
      const int s = tap - r * p.S;
      int base = first_position + fragment.own_position() + fragment.position_step(first);
      asm volatile("" : "+r"(base));  // the compiler shall not keep all rows and columns in registers
      int offsets[kBatch];            // -1: past the image
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int position = base + fragment.position_step(j);
        const int row = p.x_cols.div(position);
        const int h = (tile.p0 + row) * p.stride_h - p.pad_h + r * p.dilation_h;
        const int w = (tile.q0 + position - row * p.tile.x_cols) * p.stride_w - p.pad_w + s * p.dilation_w;
        const bool inside = exists(h, p.H) && exists(w, p.W);
        offsets[j] = inside ? h * p.x_stride_h + w * p.x_stride_w : -1;
      }
#pragma unroll 1
      for (int c = 0; c < p.C; ++c) {
        float v[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          v[j] = offsets[j] < 0 ? 0.0f : to_acc(image[offsets[j] + c * p.x_stride_c]);
        }
#pragma unroll
        for (int i = 0; i < C::kOwnChannels; ++i) {
          int k = block.first_channel + fragment.own_channel(i);
          asm volatile("" : "+r"(k));
          const float w = k < p.K ? weight(k, c, r, s) : 0.0f;
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            fragment.at(acc, i, j) = fmaf(w, v[j], fragment.at(acc, i, j));
          }
        }
      }
    }
    rotate<C::kOwnChannels * kBatch>(acc);
  }
}

}  // namespace fused_conv_bn::stem_sm90
