// conv_scale_shift and conv_bn_scale, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "conv_choice.h"
#include "elementwise.h"

namespace fused_conv_bn {

// The result of a convolution under the strides that PyTorch's BatchNorm puts out: of extents of 1, they are others.
inline Tensor with_bn_strides(const Tensor& y) {
  const Operand result("output", y);
  const Strides strides = dense_strides(result, computes_channels_last(result));
  return std::equal(result.strides, result.strides + result.dim, strides.begin()) ? y : with_strides(y, strides.data());
}

// Kernel::run(op, ConvArguments, allow_tf32) computes.
template <typename Kernel>
struct ConvOps {
  static Tensor conv_scale_shift(Tensor input, Tensor weight, OptionalTensor scale, OptionalTensor shift,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                                 StringHandle activation, double negative_slope, bool residual_last, bool allow_tf32) {
    const char* op = "conv_scale_shift";
    const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
    const PlainConv c = check_plain_conv(op, input, "weight", weight, stride, padding, dilation, groups);
    const AffineOperands affine = scale_shift_operands(scale, shift);
    affine.check(op, c.sizes[1], "the output", acc_dtype(c.input.dtype), c.input);
    return call(op, c, affine, arguments, allow_tf32, false);
  }

  static Tensor conv_bn_scale(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, Tensor running_mean,
                              Tensor running_var, OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                              double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                              std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                              StringHandle activation, double negative_slope, bool residual_last, bool allow_tf32) {
    const char* op = "conv_bn_scale";
    const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
    const PlainConv c = check_plain_conv(op, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
    const AffineOperands bn = bn_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps);
    bn.check(op, c.sizes[1], "the output", c.input.dtype, c.input);
    return with_bn_strides(call(op, c, bn, arguments, allow_tf32, true));
  }

 private:
  static Tensor call(const char* op, const PlainConv& c, const AffineOperands& affine,
                     const EpilogueArguments& arguments, bool allow_tf32, bool dense) {
    const OptionalOperand residual = check_conv_residual(op, c, arguments.residual);
    return Kernel::run(op, {c, affine, residual, check_epilogue(op, arguments), dense}, allow_tf32);
  }
};

// PyTorch's convolution, in the strides that it chooses.
inline Tensor plain_convolution(const PlainConv& c) {
  return convolution(*c.input.tensor, *c.weight.tensor, c.space(), c.stride.data(), c.padding.data(), c.dilation.data(),
                     c.groups);
}

// The same, then the affine and the epilogue in place.
template <RunElementwise* kRun>
Tensor convolve_and_apply(const char* op, const ConvArguments& c) {
  const Tensor y = plain_convolution(c);
  if (c.affine.is_identity() && !c.residual.has_value() && c.epilogue.activation == Activation::none) {
    return y;
  }
  // In place, or by way of a dense tensor where the convolution's result is none: eager's conv1d keeps a permuted weight's layout,
  // and its BatchNorm does not.
  const Operand result("output", y);
  const Tensor dense = apply_elementwise<kRun>(op, result, c.affine, c.residual, c.epilogue, &result);
  return c.dense ? dense : y;
}

}  // namespace fused_conv_bn
