// fold_bn on the GPU: one thread a channel.
#pragma once

#include <cuda_runtime.h>

#include "fold.h"

namespace fused_conv_bn {

template <typename P>
__global__ void __launch_bounds__(128)
    fold_bn_kernel(const BnParams<P> bn, acc_t<P>* scale, acc_t<P>* shift, uint32_t channels) {
  const uint32_t c = blockIdx.x * 128 + threadIdx.x;
  if (c < channels) {
    const Affine<double> affine = fold_to_pair(bn, c);
    scale[c] = static_cast<acc_t<P>>(affine.scale);
    shift[c] = static_cast<acc_t<P>>(affine.shift);
  }
}

template <typename P>
cudaError_t launch_fold_bn(const BnParams<P>& bn, acc_t<P>* scale, acc_t<P>* shift, int64_t channels,
                           cudaStream_t stream) {
  if (channels > 0) {
    fold_bn_kernel<<<static_cast<uint32_t>((channels + 127) / 128), 128, 0, stream>>>(bn, scale, shift,
                                                                                      static_cast<uint32_t>(channels));
  }
  return cudaGetLastError();
}

}  // namespace fused_conv_bn
