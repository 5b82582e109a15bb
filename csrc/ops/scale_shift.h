// scale_shift, scale_shift.out and scale_shift_, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "elementwise.h"

namespace fused_conv_bn {

template <RunElementwise* kRun>
struct ScaleShift {
  static Tensor functional(Tensor input, OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                           StringHandle activation, double negative_slope, bool residual_last) {
    return call("scale_shift", input, scale_shift_operands(scale, shift),
                {residual, take_string(activation), negative_slope, residual_last}, nullptr, nullptr);
  }

  static void out(Tensor input, OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                  StringHandle activation, double negative_slope, bool residual_last, Tensor out) {
    call("scale_shift", input, scale_shift_operands(scale, shift),
         {residual, take_string(activation), negative_slope, residual_last}, &out, "out");
  }

  static void in_place(Tensor input, OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                       StringHandle activation, double negative_slope, bool residual_last) {
    call("scale_shift_", input, scale_shift_operands(scale, shift),
         {residual, take_string(activation), negative_slope, residual_last}, &input, "input");
  }

 private:
  static Tensor call(const char* op, const Tensor& input, const AffineOperands& affine,
                     const EpilogueArguments& arguments, const Tensor* target, const char* target_name) {
    const Operand x("input", input);
    check_input(op, x);
    affine.check(op, x.sizes[1], "input", acc_dtype(x.dtype), x);
    return call_elementwise<kRun>(op, x, affine, arguments, target, target_name);
  }
};

}  // namespace fused_conv_bn
