// The product in plain float32.
#pragma once

#include <cstdint>

#include "weights.cuh"

namespace fused_conv_bn::stem_sm80 {

// float32 as it is, in FMAs: for values that do not split.
template <typename K>
__device__ __forceinline__ void multiply_exactly(const Block<K>& b, typename K::Product& acc) {
  const auto& p = b.p;
  float zero = 0;
  asm volatile("" : "+f"(zero));  // else all zeros are made before it is known which way to go
  for_each<K>([&](int i, int j, int e) { acc[i][j][e] = zero; });
  uint32_t base[K::kOwnPixels];
#pragma unroll
  for (int j = 0; j < K::kOwnPixels; ++j) {
    base[j] = b.patch() + 2 * b.header().operands[b.own_pixel(j, b.t())];
  }
#pragma unroll 1
  for (int tap = 0; tap < p.R * p.S; ++tap) {
    const int r = tap / p.S;
    const int s = tap - r * p.S;
    const int offset = (r * p.dilation_h * p.tile.x_cols + s * p.dilation_w) * 2 * p.tile.x_pitch;
#pragma unroll 1
    for (int c = 0; c < p.C; ++c) {
      float v[K::kOwnPixels];
#pragma unroll
      for (int j = 0; j < K::kOwnPixels; ++j) {
        v[j] = __uint_as_float(load_shared_1(base[j] + offset + c * 4));
      }
#pragma unroll
      for (int i = 0; i < K::kOwnChannels; ++i) {
        int k = b.first_channel + b.own_channel(i, b.g());
        asm volatile("" : "+r"(k));  // the compiler shall not keep the addresses of all channels in registers
        const float w = k < p.K ? weight(b, k, c, r, s) : 0.0f;
#pragma unroll
        for (int j = 0; j < K::kOwnPixels; ++j) {
          b.at(acc, i, j) = fmaf(w, v[j], b.at(acc, i, j));
        }
      }
    }
  }
}

}  // namespace fused_conv_bn::stem_sm80
