// conv_bn_scale_train, but for the device: what its CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// Kernel::run(op, PlainConv, TrainOperands, allow_tf32) computes.
template <typename Kernel>
struct ConvBnScaleTrain {
  static Tensor functional(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor running_mean,
                           OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias,
                           double scaling_factor, double momentum, double eps, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                           bool allow_tf32) {
    const char* op = "conv_bn_scale_train";
    const PlainConv c = check_plain_conv(op, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
    const TrainOperands bn{optional_operand("conv_bias", conv_bias),
                           optional_operand("running_mean", running_mean),
                           optional_operand("running_var", running_var),
                           optional_operand("weight", weight),
                           optional_operand("bias", bias),
                           scaling_factor,
                           momentum,
                           eps};
    bn.check(op, c.sizes.data(), c.input.dim, "the output", c.input);
    for (const OptionalOperand* target : {&bn.running_mean, &bn.running_var}) {
      if (target->has_value()) {
        check_overlap(op, **target, c.weight, false);
      }
    }
    const Tensor y = Kernel::run(op, c, bn, allow_tf32);
    // Of extents of 1, PyTorch's BatchNorm puts out other strides than its convolution.
    const Operand result("output", y);
    const Strides strides = dense_strides(result, computes_channels_last(result));
    return std::equal(result.strides, result.strides + result.dim, strides.begin()) ? y
                                                                                    : with_strides(y, strides.data());
  }
};

}  // namespace fused_conv_bn
