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

constexpr uint32_t kFinishWarps = 4;  // of a block

// Over the warp, or over the block, in each of the threads.
__device__ __forceinline__ double channel_sum(double value, bool whole_block) {
  warp_sum(value);
  if (whole_block) {
    __shared__ double warps[kFinishWarps];
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (uint32_t i = 1; i < kFinishWarps; ++i) {
      value += warps[i];
    }
  }
  return value;
}

// A channel's partials, of which there are `count`, are [splits][channels][inner]; a block takes one channel, or each of
// its warps does. As merge(), of all at once: first the mean, by distances from that of the first partial, then the
// squared distances from it. One kernel for all element types: it is long and takes next to no time.
__global__ void __launch_bounds__(32 * kFinishWarps)
    bn_finish_kernel(const TrainParams params, const Moments* partials, uint32_t count, FastDiv inner, bool whole_block,
                     AffineBuffer affines) {
  const uint32_t threads = whole_block ? 32 * kFinishWarps : 32;
  const uint32_t c = whole_block ? blockIdx.x : blockIdx.x * kFinishWarps + threadIdx.x / 32;
  if (c >= affines.channels) {
    return;
  }
  const auto each = [&](const auto& f) {
    for (uint32_t i = threadIdx.x % threads; i < count; i += threads) {
      const uint32_t split = inner.div(i);
      f(partials[(static_cast<int64_t>(split) * affines.channels + c) * inner.divisor + (i - split * inner.divisor)]);
    }
  };
  const ChannelValues channel = channel_values(params, c);
  wait_for_previous();
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
  m2 = channel_sum(m2, whole_block);
  if (threadIdx.x % threads == 0) {
    affines.set(c, finish_channel(params, channel, {values, mean, m2}, c, affines.element));
  }
}

cudaError_t launch_bn_finish(const TrainParams& params, const Moments* partials, int64_t splits, int64_t inner,
                             const AffineBuffer& affines, cudaStream_t stream) {
  const auto count = static_cast<uint32_t>(splits * inner);
  const bool whole_block = count > 64;
  const uint32_t blocks = whole_block ? affines.channels : (affines.channels + kFinishWarps - 1) / kFinishWarps;
  return launch_kernel(bn_finish_kernel, blocks, 32 * kFinishWarps, 0, true, stream, params, partials, count,
                       FastDiv(static_cast<uint32_t>(inner)), whole_block, affines);
}

}  // namespace fused_conv_bn
