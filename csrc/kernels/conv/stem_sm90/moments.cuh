// Moments of each output channel, for BatchNorm in training mode: a consumer thread gathers those of its two channels over all its
// tiles, and writes nothing else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/batch_norm/moments.h"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// Sums of the distances from a pivot and of their squares. The pivot is the mean of the first values: the distances are about
// as large as the deviation, however large the mean is. From time to time they go into moments in float64.
template <typename C>
struct ChannelMoments {
  static constexpr float kMostCount = 8192;  // in float32 sums

  const Block<C>& block;
  float count = 0;
  float pivots[2] = {0, 0};
  float sums[2] = {0, 0};
  float squares[2] = {0, 0};
  Moments all[2] = {};

  // inside: which of the positions count. What was scaled is unscaled on the way: that is a power of two.
  __device__ __forceinline__ void add(const typename C::Accumulators& acc, uint32_t inside, bool exact, float inverse) {
    const auto positions = static_cast<float>(__popc(inside));
    if (positions == 0) {
      return;
    }
    const Fragment<C> fragment{block.p.tile};
    const auto value = [&](int i, int j) { return fragment.at(acc, i, j); };
    float factors[2] = {1, 1};
    if (C::kFloat32 && !exact) {
      factors[0] = block.shared.header().unscales[fragment.own_channel(0)] * inverse;
      factors[1] = block.shared.header().unscales[fragment.own_channel(1)] * inverse;
    }
    if (count == 0) {
      const float share = 1 / positions;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pivots[i] = 0;
#pragma unroll
        for (int j = 0; j < C::kOwnPositions; ++j) {
          pivots[i] += inside >> j & 1 ? value(i, j) * factors[i] * share : 0.0f;
        }
      }
    }
    // Sums of few at first: fewer roundings, and shorter chains.
    float sum[2][2] = {}, square[2][2] = {};
#pragma unroll
    for (int j = 0; j < C::kOwnPositions; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float distance = inside >> j & 1 ? fmaf(value(i, j), factors[i], -pivots[i]) : 0.0f;
        sum[i][j % 2] += distance;
        square[i][j % 2] = fmaf(distance, distance, square[i][j % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] += sum[i][0] + sum[i][1];
      squares[i] += square[i][0] + square[i][1];
    }
    count += positions;
    if (count >= kMostCount) {
      flush();
    }
  }

  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      all[i] = merge(all[i], from_sums(count, pivots[i], sums[i], squares[i]));
      sums[i] = squares[i] = 0;
    }
    count = 0;
  }

  // By the first of the four threads that share the channels.
  __device__ __forceinline__ void write(int consumer) {
    const auto& p = block.p;
    flush();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Moments m = all[i];
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        const Moments theirs{__shfl_xor_sync(0xffffffffu, m.count, other), __shfl_xor_sync(0xffffffffu, m.mean, other),
                             __shfl_xor_sync(0xffffffffu, m.m2, other)};
        m = merge(m, theirs);
      }
      const int k = block.first_channel + Fragment<C>{p.tile}.own_channel(i);
      if (fragment_col() == 0 && k < p.K) {
        p.moments[static_cast<int64_t>(blockIdx.x * C::kConsumers + consumer) * p.K + k] = m;
      }
    }
  }
};

}  // namespace fused_conv_bn::stem_sm90
