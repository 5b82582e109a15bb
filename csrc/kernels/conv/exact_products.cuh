// A convolution's sums in plain float32 FMAs: for values that do not split into two terms (split_float.cuh).
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace fused_conv_bn {

// A thread's own sums grow by the products of all taps and input channels. begin_tap(r, s) comes before each tap's;
// value(j, c): of its pixel j; weight(i, c, r, s): of its output channel i; sum(i, j): a reference.
template <int kOwnChannels, int kOwnPixels, typename BeginTap, typename Value, typename Weight, typename Sum>
__device__ __forceinline__ void add_exact_products(const Extents& c, BeginTap&& begin_tap, Value&& value,
                                                   Weight&& weight, Sum&& sum) {
#pragma unroll 1
  for (int tap = 0; tap < c.R * c.S; ++tap) {
    const int r = tap / c.S;
    const int s = tap - r * c.S;
    begin_tap(r, s);
#pragma unroll 1
    for (int channel = 0; channel < c.C; ++channel) {
      float v[kOwnPixels];
#pragma unroll
      for (int j = 0; j < kOwnPixels; ++j) {
        v[j] = value(j, channel);
      }
#pragma unroll
      for (int i = 0; i < kOwnChannels; ++i) {
        const float w = weight(i, channel, r, s);
#pragma unroll
        for (int j = 0; j < kOwnPixels; ++j) {
          sum(i, j) = fmaf(w, v[j], sum(i, j));
        }
      }
    }
  }
}

}  // namespace fused_conv_bn
