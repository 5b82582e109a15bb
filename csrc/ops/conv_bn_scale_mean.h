// conv_bn_scale_mean, but for the device: conv_bn_scale, and the mean of each channel of each image of its result.
#pragma once

#include <tuple>

#include "conv_scale_shift.h"

namespace fused_conv_bn {

// Where the means of a convolution's result are put: (N, K) and a 1 for each spatial dimension.
inline Tensor empty_means(const PlainConv& c) {
  const int64_t sizes[kMaxDim] = {c.sizes[0], c.sizes[1], 1, 1, 1};
  return empty_strided(c.input.dim, sizes, dense_strides(c.input.dim, sizes, false).data(), c.input.dtype,
                       c.input.device);
}

// Kernel::run_with_means(op, ConvArguments, allow_tf32): the result and its means.
template <typename Kernel>
std::tuple<Tensor, Tensor> conv_bn_scale_mean(Tensor input, Tensor conv_weight, OptionalTensor conv_bias,
                                              Tensor running_mean, Tensor running_var, OptionalTensor weight,
                                              OptionalTensor bias, double scaling_factor, double eps,
                                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                                              std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                                              StringHandle activation, double negative_slope, bool residual_last,
                                              bool allow_tf32) {
  const char* op = "conv_bn_scale_mean";
  const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
  const PlainConv c = check_plain_conv(op, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
  const AffineOperands bn = bn_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps);
  bn.check(op, c.sizes[1], "the output", c.input.dtype, c.input);
  const OptionalOperand added = check_conv_residual(op, c, residual);
  auto [y, means] = Kernel::run_with_means(op, {c, bn, added, check_epilogue(op, arguments), true}, allow_tf32);
  return {with_bn_strides(y), means};
}

}  // namespace fused_conv_bn
