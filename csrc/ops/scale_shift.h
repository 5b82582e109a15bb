// scale_shift's calls, checked: what its CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// op(input, scale, shift, residual, activation), written to `target` (nullptr: a new tensor).
// launch(Elementwise, scale, shift, activation, dtype) runs the kernel; scale and shift are contiguous, of acc_dtype(dtype).
template <typename Launch>
Tensor call_scale_shift(const char* op, const Tensor& input, const Tensor& scale, const Tensor& shift,
                        const OptionalTensor& residual, StringHandle activation, const Tensor* target,
                        const char* target_name, const Launch& launch) {
  const std::string activation_name = take_string(activation);
  const Operand x("input", input);
  const Operand scale_operand("scale", scale);
  const Operand shift_operand("shift", shift);
  const OptionalOperand r = optional_operand("residual", residual);
  check_input(op, x);
  for (const Operand* param : {&scale_operand, &shift_operand}) {
    check_channel_param(op, *param, x.sizes[1], "input", acc_dtype(x.dtype), acc_dtype(x.dtype), x);
  }
  if (r.has_value()) {
    check_like(op, *r, x);
  }
  const Activation parsed = parse_activation(op, activation_name);
  const OptionalOperand out = target == nullptr ? std::nullopt : OptionalOperand(Operand(target_name, *target));
  if (out.has_value()) {
    check_target(op, *out, x);
    check_overlap(op, *out, x, true);
    check_overlap(op, *out, scale_operand, false);
    check_overlap(op, *out, shift_operand, false);
    if (r.has_value()) {
      check_overlap(op, *out, *r, true);
    }
  }
  Elementwise e = make_elementwise(x, r, out.has_value() ? &*out : nullptr);
  if (e.shape.numel > 0) {
    OptionalTensor scale_copy, shift_copy;
    launch(e, channel_data(scale_operand, scale_operand.dtype, scale_copy),
           channel_data(shift_operand, shift_operand.dtype, shift_copy), parsed, x.dtype);
    e.finish();
  }
  return e.output;
}

}  // namespace fused_conv_bn
