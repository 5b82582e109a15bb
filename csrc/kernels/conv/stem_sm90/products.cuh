// The product of a chunk, by wgmma: all k steps of 128 positions with the block's channels.
//
// A step has two units, and im2col is a table of their offsets. float32 takes three products of its splits: high * high, and
// scaled by 2^-11 low * high + high * low.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "kernels/common/split_float.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// x: the chunk's first unit. meanwhile(): what there is to do while the tensor cores are busy with the last products.
template <typename C, typename F>
__device__ __forceinline__ void multiply(const Block<C>& block, typename C::Accumulators& acc, uint32_t x,
                                         F&& meanwhile) {
  using MmaType = typename C::MmaType;
  const auto& p = block.p;
  const uint32_t w_start = operand_start(block.shared.weights(), C::kWeightRows * 16);
  constexpr uint32_t kStep = 2 * C::kWeightRows * 16 >> 4;
  // f(the step's pixels, its weights, whether there is something to add to)
  const auto for_each_step = [&](uint32_t units, auto&& f) {
    f((units >> 4) + p.steps[0], w_start, std::false_type{});
#pragma unroll 1
    for (int step = 1; step < p.tile.k_steps; ++step) {
      f((units >> 4) + p.steps[step], w_start + step * kStep, std::true_type{});
    }
  };
  const uint32_t x_low = p.tile.x_split >> 4;  // float32: from high splits to low ones
  constexpr uint32_t w_low = C::kChannels * 16 >> 4;
  if constexpr (C::kFloat32 && C::kChannelsLast) {
    // High and low splits of the weights, side by side, are columns of one product: the pixels are read once for both.
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // 64 positions each
      typename C::Accumulators both;
      float low[32];
      product_fence();
      for_each_step(x + part * (64 * 16), [&](uint32_t units, uint32_t w, auto more) {
        product_m64n128<MmaType, more()>(both, operand(units), operand(w));
        product_m64n64<MmaType, more()>(low, operand(units + x_low), operand(w));
      });
      product_commit();
      if (part == 1) {
        meanwhile();
      }
      product_wait<0>();
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        acc[part * 32 + e] = fmaf(both[32 + e] + low[e], 1 / kLowScale, both[e]);
      }
    }
  } else {
    typename C::Accumulators low;
    product_fence();
    for_each_step(x, [&](uint32_t units, uint32_t w, auto more) {
      if constexpr (C::kChannelsLast) {
        product_into_part<MmaType, 0, more()>(acc, operand(units), operand(w));
        product_into_part<MmaType, 1, more()>(acc, operand(units + 64), operand(w));
      } else if constexpr (C::kFloat32) {
        product_m64n128<MmaType, more()>(low, operand(w + w_low), operand(units));
        product_m64n128<MmaType, more()>(acc, operand(w), operand(units));
        product_m64n128<MmaType, true>(low, operand(w), operand(units + x_low));
      } else {
        product_m64n128<MmaType, more()>(acc, operand(w), operand(units));
      }
    });
    product_commit();
    meanwhile();
    product_wait<0>();
    if constexpr (C::kFloat32) {
#pragma unroll
      for (int e = 0; e < C::kAccumulators; ++e) {
        acc[e] = fmaf(low[e], 1 / kLowScale, acc[e]);
      }
    }
  }
}

}  // namespace fused_conv_bn::stem_sm90
