// The merge of the partial sums of BatchNorm's backward on the GPU, and the gradients of its parameters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backward_launch.cuh"
#include "kernels/common/fast_div.h"
#include "kernels/ptx/launch.cuh"
#include "warp_sum.cuh"

namespace fused_conv_bn {

// As bn_finish_kernel: a block takes one channel, or each of its warps does.
__global__ void __launch_bounds__(32 * kFinishWarps)
    backward_finish_kernel(const BackwardParams params, const double* partials, uint32_t count, FastDiv inner,
                           bool whole_block, const BackwardBuffer buffer) {
  const uint32_t threads = whole_block ? 32 * kFinishWarps : 32;
  const uint32_t c = finish_channel_index(whole_block);
  if (c >= buffer.channels) {
    return;
  }
  const int64_t columns = static_cast<int64_t>(buffer.channels) * inner.divisor;
  double s1 = 0, s2 = 0;
  wait_for_previous();
  for (uint32_t i = threadIdx.x % threads; i < count; i += threads) {
    const uint32_t split = inner.div(i);
    const double* from = partials + int64_t{2} * split * columns + static_cast<int64_t>(c) * inner.divisor +
                         (i - split * inner.divisor);
    s1 += from[0];
    s2 += from[columns];
  }
  s1 = channel_sum(s1, whole_block);
  s2 = channel_sum(s2, whole_block);
  if (threadIdx.x % threads == 0) {
    finish_backward(params, c, s1, s2, buffer);
  }
}

cudaError_t launch_backward_finish(const BackwardParams& bn, const double* partials, int64_t splits, int64_t inner,
                                   const BackwardBuffer& buffer, cudaStream_t stream) {
  const FinishGrid grid(splits * inner, buffer.channels);
  return launch_kernel(backward_finish_kernel, grid.blocks, 32 * kFinishWarps, 0, true, stream, bn, partials,
                       grid.count, FastDiv(static_cast<uint32_t>(inner)), grid.whole_block, buffer);
}

}  // namespace fused_conv_bn
