// The affine, on a thread's own sums in a product.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/epilogue.h"

namespace fused_conv_bn {

// affine(i): of the thread's channel i; sum(i, j): a reference to that of its channel i and pixel j.
template <int kOwnChannels, int kOwnPixels, typename AffineOf, typename Sum>
__device__ __forceinline__ void apply_affines(AffineOf&& affine_of, Sum&& sum) {
#pragma unroll
  for (int i = 0; i < kOwnChannels; ++i) {
    const Affine<float> affine = affine_of(i);
#pragma unroll
    for (int j = 0; j < kOwnPixels; ++j) {
      sum(i, j) = apply_affine(sum(i, j), affine);
    }
  }
}

}  // namespace fused_conv_bn
