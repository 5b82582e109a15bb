// What becomes of the accumulators before they are written: the affine of each channel, and the residual.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/common/epilogue.h"
#include "kernels/conv/epilogue/affine.cuh"
#include "kernels/conv/epilogue/residual.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// The affines of the block's output channels, in the header. Consumers set them up and apply them.
template <typename C>
struct ChannelAffines {
  const Block<C>& block;
  const Params<typename C::T>& p = block.p;
  Header& header = block.shared.header();

  // A mean stays apart, as the center, only where the affines are late: results of a convolution have roundings of their own.
  __device__ __forceinline__ void fold() const {
    const int channel = block.consumer_thread();
    const int k = block.first_channel + channel;
    if (!C::kMoments && channel < C::kChannels) {
      const Affine<float> affine = k >= p.K        ? Affine<float>{0, 0, 0}
                                   : p.late_affine ? p.affine.centered(k)
                                                   : p.affine.pair(k);
      header.centers[channel] = affine.center;
      header.scales[channel] = affine.scale;
      header.shifts[channel] = affine.shift;
    }
  }

  // Looks for centers. float32: what the weights' scales have to be undone by, with the affine's scale where that is all.
  __device__ __forceinline__ void finish() const {
    const int channel = block.consumer_thread();
    const bool own = channel < C::kChannels;
    const float scale = own && !C::kMoments ? header.scales[channel] : 1.0f;
    const bool centered = own && !C::kMoments && header.centers[channel] != 0;
    if (centered) {
      set_flag(header.centered);
    }
    if constexpr (C::kFloat32) {
      const float unscale = own ? header.unscales[channel] : 1.0f;
      // What PyTorch would have it be at any scale, 0, Inf or NaN, does not count.
      const int exponent = static_cast<int>(__float_as_uint(scale) >> 23 & 255);
      if (own && scale != 0 && exponent < 255) {
        const int product = exponent + static_cast<int>(__float_as_uint(unscale) >> 23) - 127;
        if (product < 2 || product > 250) {
          set_flag(header.all_exact);
        }
        atomicMin(&header.least_unscale, product);
        atomicMax(&header.most_unscale, product);
      }
      if (own) {
        header.scaled_unscales[channel] = unscale * scale;
      }
    }
  }

  // Undoes scaling on the way: that is a power of two, and can go into the affine's scale.
  // exact: nothing was scaled; inverse: of the scale of the tile's input.
  __device__ __forceinline__ void apply(typename C::Accumulators& acc, bool exact, float inverse) const {
    const Fragment<C> fragment{p.tile};
    if (p.late_affine && header.centered != 0) {  // the parameter first: it is there at once
#pragma unroll
      for (int i = 0; i < C::kOwnChannels; ++i) {
        const int channel = fragment.own_channel(i);
        const float factor = C::kFloat32 && !exact ? header.unscales[channel] * inverse : 1.0f;
        const Affine<float> affine{0, header.scales[channel], header.shifts[channel]};
#pragma unroll
        for (int j = 0; j < C::kOwnPositions; ++j) {
          float& v = fragment.at(acc, i, j);
          v = apply_affine(fmaf(v, factor, -header.centers[channel]), affine);
        }
      }
      return;
    }
    const float* const source = C::kFloat32 && !exact ? header.scaled_unscales : header.scales;
    const auto affine_of = [&](int i) -> Affine<float> {
      const int channel = fragment.own_channel(i);
      return {0, C::kFloat32 ? source[channel] * inverse : source[channel], header.shifts[channel]};
    };
    apply_affines<C::kOwnChannels, C::kOwnPositions>(affine_of, fragment.own(acc));
  }
};

template <typename C>
__device__ __forceinline__ void add_residual(const Block<C>& block, typename C::Accumulators& acc, const Tile& tile,
                                             int first_position) {
  const auto& p = block.p;
  const Fragment<C> fragment{p.tile};
  const auto* const start = p.residual + block.y_offset(tile) +
                            fragment.own_channel(0) * (C::kChannelsLast ? 1 : p.P * p.Q);
  add_residual_of_tile<C::kChannelsLast, C::kOwnChannels, C::kOwnPositions>(
      start, p.K - block.first_channel - fragment.own_channel(0), block.tiles().rows(tile, p),
      block.tiles().cols(tile, p), p.x_cols, p,
      [&](int j) { return first_position + fragment.own_position() + fragment.position_step(j); },
      [&](int i) { return fragment.channel_step(i); }, fragment.own(acc));
}

}  // namespace fused_conv_bn::stem_sm90
