// The merge of a batch's partials on the GPU, and what BatchNorm in training mode makes of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/fast_div.h"
#include "kernels/ptx/launch.cuh"
#include "launch.cuh"
#include "moments.h"
#include "warp_sum.cuh"

namespace fused_conv_bn {

// The moments of channel c, whose partials, of which there are `count`, are [splits][channels][inner]; a block takes one
// channel, or each of its warps does. As merge(), of all at once: first the mean, by distances from that of the first partial,
// then the squared distances from it.
__device__ __forceinline__ Moments channel_moments(const Moments* partials, uint32_t c, uint32_t channels,
                                                   uint32_t count, FastDiv inner, bool whole_block) {
  const uint32_t threads = whole_block ? 32 * kFinishWarps : 32;
  const auto each = [&](const auto& f) {
    for (uint32_t i = threadIdx.x % threads; i < count; i += threads) {
      const uint32_t split = inner.div(i);
      f(partials[(static_cast<int64_t>(split) * channels + c) * inner.divisor + (i - split * inner.divisor)]);
    }
  };
  const double pivot = partials[static_cast<int64_t>(c) * inner.divisor].mean;
  double values = 0, sum = 0, m2 = 0;
  each([&](const Moments& m) {
    values += m.count;
    sum += m.count * (m.mean - pivot);
  });
  values = channel_sum(values, whole_block);
  const double mean = pivot + divide_by_count(channel_sum(sum, whole_block), values);
  each([&](const Moments& m) {
    const double distance = m.mean - mean;
    m2 += m.m2 + m.count * (distance * distance);
  });
  return {values, mean, channel_sum(m2, whole_block)};
}

// One kernel for all element types: it is long and takes next to no time.
__global__ void __launch_bounds__(32 * kFinishWarps)
    bn_finish_kernel(const TrainParams params, const Moments* partials, uint32_t count, FastDiv inner, bool whole_block,
                     AffineBuffer affines) {
  const uint32_t c = finish_channel_index(whole_block);
  if (c >= affines.channels) {
    return;
  }
  const ChannelValues channel = channel_values(params, c);
  wait_for_previous();
  const Moments m = channel_moments(partials, c, affines.channels, count, inner, whole_block);
  if (threadIdx.x % (whole_block ? 32 * kFinishWarps : 32) == 0) {
    affines.set(c, finish_channel(params, channel, m, c, affines.element));
  }
}

// The moments themselves, as [count, mean, m2][channels].
__global__ void __launch_bounds__(32 * kFinishWarps)
    bn_moments_kernel(const Moments* partials, uint32_t count, FastDiv inner, bool whole_block, double* moments,
                      uint32_t channels) {
  const uint32_t c = finish_channel_index(whole_block);
  if (c >= channels) {
    return;
  }
  wait_for_previous();
  const Moments m = channel_moments(partials, c, channels, count, inner, whole_block);
  if (threadIdx.x % (whole_block ? 32 * kFinishWarps : 32) == 0) {
    moments[c] = m.count;
    moments[channels + c] = m.mean;
    moments[2 * static_cast<int64_t>(channels) + c] = m.m2;
  }
}

cudaError_t launch_bn_finish(const TrainParams& params, const Moments* partials, int64_t splits, int64_t inner,
                             const AffineBuffer& affines, cudaStream_t stream) {
  const FinishGrid grid(splits * inner, affines.channels);
  return launch_kernel(bn_finish_kernel, grid.blocks, 32 * kFinishWarps, 0, true, stream, params, partials, grid.count,
                       FastDiv(static_cast<uint32_t>(inner)), grid.whole_block, affines);
}

cudaError_t launch_bn_moments(const Moments* partials, int64_t splits, int64_t inner, double* moments, int64_t channels,
                              cudaStream_t stream) {
  const FinishGrid grid(splits * inner, channels);
  return launch_kernel(bn_moments_kernel, grid.blocks, 32 * kFinishWarps, 0, true, stream, partials, grid.count,
                       FastDiv(static_cast<uint32_t>(inner)), grid.whole_block, moments,
                       static_cast<uint32_t>(channels));
}

}  // namespace fused_conv_bn
