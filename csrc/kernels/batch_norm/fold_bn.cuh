// fold_bn on the GPU: one thread a channel.
#pragma once

#include <cuda_runtime.h>

#include "fold.h"

namespace fused_conv_bn {

template <typename T>
__global__ void __launch_bounds__(128) fold_bn_kernel(const AffineSource<T> source, double scaling_factor, double eps,
                                                      acc_t<T>* scale, acc_t<T>* shift, uint32_t channels) {
  const uint32_t c = blockIdx.x * 128 + threadIdx.x;
  if (c < channels) {
    const Affine<double> affine = fold_to_pair(source, scaling_factor, eps, c);
    scale[c] = static_cast<acc_t<T>>(affine.scale);
    shift[c] = static_cast<acc_t<T>>(affine.shift);
  }
}

template <typename T>
cudaError_t launch_fold_bn(const AffineTensors& tensors, acc_t<T>* scale, acc_t<T>* shift, int64_t channels,
                           cudaStream_t stream) {
  if (channels > 0) {
    fold_bn_kernel<T><<<static_cast<uint32_t>((channels + 127) / 128), 128, 0, stream>>>(
        AffineSource<T>(tensors), tensors.scaling_factor, tensors.eps, scale, shift, static_cast<uint32_t>(channels));
  }
  return cudaGetLastError();
}

}  // namespace fused_conv_bn
