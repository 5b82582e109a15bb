// bn_scale, bn_scale.out and bn_scale_, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "elementwise.h"

namespace fused_conv_bn {

template <RunElementwise* kRun>
struct BnScale {
  static Tensor functional(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                           OptionalTensor bias, double scaling_factor, double eps, OptionalTensor residual,
                           StringHandle activation, double negative_slope, bool residual_last) {
    return call("bn_scale", input, bn_operands({}, running_mean, running_var, weight, bias, scaling_factor, eps),
                {residual, take_string(activation), negative_slope, residual_last}, nullptr, nullptr);
  }

  static void out(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight, OptionalTensor bias,
                  double scaling_factor, double eps, OptionalTensor residual, StringHandle activation,
                  double negative_slope, bool residual_last, Tensor out) {
    call("bn_scale", input, bn_operands({}, running_mean, running_var, weight, bias, scaling_factor, eps),
         {residual, take_string(activation), negative_slope, residual_last}, &out, "out");
  }

  static void in_place(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                       OptionalTensor bias, double scaling_factor, double eps, OptionalTensor residual,
                       StringHandle activation, double negative_slope, bool residual_last) {
    call("bn_scale_", input, bn_operands({}, running_mean, running_var, weight, bias, scaling_factor, eps),
         {residual, take_string(activation), negative_slope, residual_last}, &input, "input");
  }

 private:
  static Tensor call(const char* op, const Tensor& input, const AffineOperands& bn, const EpilogueArguments& arguments,
                     const Tensor* target, const char* target_name) {
    const Operand x("input", input);
    check_input(op, x);
    bn.check(op, x.sizes[1], "input", x.dtype, x);
    return call_elementwise<kRun>(op, x, bn, arguments, target, target_name);
  }
};

}  // namespace fused_conv_bn
