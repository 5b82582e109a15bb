// Affine, residual and activation of a thread's own part of a product.
#pragma once

#include "block.cuh"
#include "kernels/common/epilogue.h"
#include "kernels/conv/epilogue/affine.cuh"
#include "kernels/conv/epilogue/residual.cuh"

namespace fused_conv_bn::stem_sm80 {

// What was scaled is unscaled on the way: that is a power of two, and can go into the affine's scale.
template <typename K>
__device__ __forceinline__ void apply_affines(const Block<K>& b, typename K::Accumulator& acc, bool exact,
                                              float inverse) {
  const float* const source = K::kFloat && !exact ? b.header().unscales : b.header().scales;
  const float factor = K::kFloat && !exact ? inverse : 1.0f;
  const auto affine_of = [&](int i) -> Affine<float> {
    const int channel = b.own_channel(i, b.g());
    return {0, K::kFloat ? source[channel] * factor : source[channel], b.header().shifts[channel]};
  };
  fused_conv_bn::apply_affines<K::kOwnChannels, K::kOwnPixels>(affine_of, b.own(acc));
}

template <typename K>
__device__ __forceinline__ void activate(const Block<K>& b, typename K::Accumulator& acc) {
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
__device__ __forceinline__ void add_residual(const Block<K>& b, typename K::Accumulator& acc, const Tile& tile) {
  const auto& p = b.p;
  const auto* const start = p.residual + b.y_offset(tile) + b.own_channel(0, b.g()) * (K::kLast ? 1 : p.c.P * p.c.Q);
  add_residual_of_tile<K::kLast, K::kOwnChannels, K::kOwnPixels>(
      start, p.c.K - b.first_channel - b.own_channel(0, b.g()), b.tiles().rows(tile, p.c), b.tiles().cols(tile, p.c),
      p.tile_q, p.c, [&](int j) { return b.own_pixel(j, b.t()); }, [&](int i) { return b.own_channel(i, 0); },
      b.own(acc));
}

// What comes behind the affine.
template <typename K>
__device__ __forceinline__ void finish(const Block<K>& b, typename K::Accumulator& acc, const Tile& tile) {
  finish_sums(
      b.p.residual != nullptr, b.p.residual_last, [&] { add_residual(b, acc, tile); }, [&] { activate(b, acc); });
}

}  // namespace fused_conv_bn::stem_sm80
