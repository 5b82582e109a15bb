// What the kernels of wgrad_stem_sm80 read and write, as the op and the emulator hand it on.
#pragma once

#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "kernels/conv/problem.h"

namespace fused_conv_bn {

// A convolution's weight, or what is like it.
struct WeightBuffer {
  void* data;
  int64_t stride_k, stride_c, stride_r, stride_s;
};

// What there is to know besides the problem, and what is to be written; nullptr where it is missing, or not wanted.
struct WgradOperands {
  const void* x;
  const void* dy;
  const void* result;
  Activation activation;
  WeightBuffer w;
  bool has_statistics;  // the batch's: `var` is its inverse deviation, and `mean` is not read
  ChannelBuffer mean, var, weight, conv_bias;
  double scaling_factor;
  double eps;
  const double* input_sums;        // the forward's sums over the input (statistics/from_input_sm90)
  WeightBuffer dw, scaled_weight;  // scaled_weight: w * a
  ChannelBuffer dweight, dbias, dconv_bias;
  ChannelBuffer input_scale, input_shift;  // dv + input_scale * z + input_shift is the gradient of z, over a
};

struct WgradCall {
  const Conv2d& problem;
  const WgradOperands& operands;
  const GpuTraits& gpu;
};

}  // namespace fused_conv_bn
