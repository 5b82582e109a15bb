// Affine, residual and activation of a thread's own part of a product.
#pragma once

#include "block.cuh"
#include "kernels/common/epilogue.h"

namespace fused_conv_bn::stem_sm80 {

// What was scaled is unscaled on the way: that is a power of two, and can go into the affine's scale.
template <typename K>
__device__ __forceinline__ void apply_affine(const Block<K>& b, typename K::Product& acc, bool exact, float inverse) {
  const float* const source = K::kFloat && !exact ? b.header().unscales : b.header().scales;
  const float factor = K::kFloat && !exact ? inverse : 1.0f;
#pragma unroll
  for (int i = 0; i < K::kOwnChannels; ++i) {
    const int channel = b.own_channel(i, b.g());
    const Affine<float> affine{0, K::kFloat ? source[channel] * factor : source[channel], b.header().shifts[channel]};
#pragma unroll
    for (int j = 0; j < K::kOwnPixels; ++j) {
      b.at(acc, i, j) = fused_conv_bn::apply_affine(b.at(acc, i, j), affine);
    }
  }
}

template <typename K>
__device__ __forceinline__ void activate(const Block<K>& b, typename K::Product& acc) {
  using T = typename K::Element;
  const auto& p = b.p;
  dispatch_some<K::kBounds>(p.activation, [&](auto a) {
    if constexpr (a() != Activation::none) {
      for_each<K>(
          [&](int i, int j, int e) { acc[i][j][e] = fused_conv_bn::activate<a(), T>(acc[i][j][e], p.negative_slope); });
    }
  });
}

template <typename K>
__device__ __forceinline__ void add_residual(const Block<K>& b, typename K::Product& acc, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  const T* const start = p.residual + b.y_offset(tile) + b.own_channel(0, b.g()) * (K::kLast ? 1 : p.P * p.Q);
  const int channels = p.K - b.first_channel - b.own_channel(0, b.g());
#pragma unroll
  for (int j = 0; j < K::kOwnPixels; ++j) {
    int pixel = b.own_pixel(j, b.t());
    asm volatile("" : "+r"(pixel));  // the compiler shall not keep every address of every pixel in a register
    const int row = p.tile_q.div(pixel);
    const int col = pixel - row * p.tile.q;
    if (row < b.rows(tile) && col < b.cols(tile)) {
      const T* source = start + (row * p.Q + col) * (K::kLast ? p.K : 1);
#pragma unroll
      for (int i = 0; i < K::kOwnChannels; ++i) {
        const int beyond = b.own_channel(i, 0);
        if (beyond < channels) {
          b.at(acc, i, j) += to_acc(K::kLast ? source[beyond] : *source);
        }
        source += K::kLast ? 0 : 8 * (p.P * p.Q);  // own_channel() goes by eights
      }
    }
  }
}

// What comes behind the affine.
template <typename K>
__device__ __forceinline__ void finish(const Block<K>& b, typename K::Product& acc, const Tile& tile) {
  const auto& p = b.p;
  if (p.residual != nullptr && !p.residual_last) {
    add_residual(b, acc, tile);
  }
  activate(b, acc);
  if (p.residual != nullptr && p.residual_last) [[unlikely]] {
    add_residual(b, acc, tile);
  }
}

}  // namespace fused_conv_bn::stem_sm80
