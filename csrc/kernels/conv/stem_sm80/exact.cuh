// The product in plain float32.
#pragma once

#include <cstdint>

#include "kernels/conv/exact_products.cuh"
#include "weights.cuh"

namespace fused_conv_bn::stem_sm80 {

// float32 as it is, in FMAs: for values that do not split.
template <typename K>
__device__ __forceinline__ void multiply_exactly(const Block<K>& b, typename K::Accumulator& acc) {
  const auto& p = b.p;
  float zero = 0;
  asm volatile("" : "+f"(zero));  // else all zeros are made before it is known which way to go
  for_each<K>([&](int i, int j, int e) { acc[i][j][e] = zero; });
  uint32_t base[K::kOwnPixels];
#pragma unroll
  for (int j = 0; j < K::kOwnPixels; ++j) {
    base[j] = b.window() + 2 * b.header().window_offsets[b.own_pixel(j, b.t())];
  }
  int offset = 0;
  add_exact_products<K::kOwnChannels, K::kOwnPixels>(
      p.c,
      [&](int r, int s) { offset = (r * p.c.dilation_h * p.tile.x_cols + s * p.c.dilation_w) * 2 * p.tile.x_pitch; },
      [&](int j, int c) { return __uint_as_float(load_shared_1(base[j] + offset + c * 4)); },
      [&](int i, int c, int r, int s) {
        int k = b.first_channel + b.own_channel(i, b.g());
        asm volatile("" : "+r"(k));  // the compiler shall not keep the addresses of all channels in registers
        return k < p.c.K ? weight(b, k, c, r, s) : 0.0f;
      },
      b.own(acc));
}

}  // namespace fused_conv_bn::stem_sm80
