// gate_conv_bn_scale, but for the device: conv_bn_scale of an input times a gate for each channel of each image.
#pragma once

#include "conv_scale_shift.h"
#include "gate.h"

namespace fused_conv_bn {

// Kernel::run_gated(op, ConvArguments, gates, allow_tf32): the result of an algorithm that takes gates along, or nothing. Then
// the gated input is written, and Kernel::run() convolves it.
template <typename Kernel>
Tensor gate_conv_bn_scale(Tensor input, Tensor gate, Tensor conv_weight, OptionalTensor conv_bias, Tensor running_mean,
                          Tensor running_var, OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                          double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                          StringHandle activation, double negative_slope, bool residual_last, bool allow_tf32) {
  const char* op = "gate_conv_bn_scale";
  const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
  const auto check = [&](const Tensor& x) {
    return check_plain_conv(op, x, "conv_weight", conv_weight, stride, padding, dilation, groups);
  };
  const PlainConv c = check(input);
  const Operand gates("gate", gate);
  const int64_t pixels = check_gates(op, c.input, gates);
  const AffineOperands bn = bn_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps);
  bn.check(op, c.sizes[1], "the output", c.input.dtype, c.input);
  const OptionalOperand added = check_conv_residual(op, c, residual);
  const Epilogue epilogue = check_epilogue(op, arguments);
  if (const OptionalTensor y = Kernel::run_gated(op, {c, bn, added, epilogue, true}, gates, allow_tf32)) {
    return with_bn_strides(*y);
  }
  const Tensor gated = apply_gates<Kernel::kRunGate>(op, c.input, gates, pixels, std::nullopt, Epilogue{});
  return with_bn_strides(Kernel::run(op, {check(gated), bn, added, epilogue, true}, allow_tf32));
}

}  // namespace fused_conv_bn
