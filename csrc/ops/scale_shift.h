// scale_shift, scale_shift.out and scale_shift_, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// Kernel::run<T, A, kResidual>(op, Elementwise, scale, shift) computes; scale and shift are acc_t<T>, one a channel.
template <typename Kernel>
struct ScaleShift {
  // Everything is checked. Writes to `target`, or to a new tensor if it is nullptr.
  static Tensor compute(const char* op, const Operand& x, const Operand& scale, const Operand& shift,
                        const OptionalOperand& residual, Activation activation, const Operand* target) {
    Elementwise e = make_elementwise(x, residual, target);
    if (e.shape.numel > 0) {
      OptionalTensor scale_copy, shift_copy;
      const void* scales = channel_data(scale, scale.dtype, scale_copy);
      const void* shifts = channel_data(shift, shift.dtype, shift_copy);
      dispatch_dtype(x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_epilogue(activation, e.residual != nullptr, [&](auto a, auto has_residual) {
          Kernel::template run<T, a(), has_residual()>(op, e, static_cast<const acc_t<T>*>(scales),
                                                       static_cast<const acc_t<T>*>(shifts));
        });
      });
      e.finish();
    }
    return e.output;
  }

  static Tensor functional(Tensor input, Tensor scale, Tensor shift, OptionalTensor residual, StringHandle activation) {
    return call("scale_shift", input, scale, shift, residual, activation, nullptr, nullptr);
  }

  static void out(Tensor input, Tensor scale, Tensor shift, OptionalTensor residual, StringHandle activation,
                  Tensor out) {
    call("scale_shift", input, scale, shift, residual, activation, &out, "out");
  }

  static void in_place(Tensor input, Tensor scale, Tensor shift, OptionalTensor residual, StringHandle activation) {
    call("scale_shift_", input, scale, shift, residual, activation, &input, "input");
  }

 private:
  // Writes to `target`, or to a new tensor if it is nullptr.
  static Tensor call(const char* op, const Tensor& input, const Tensor& scale, const Tensor& shift,
                     const OptionalTensor& residual, StringHandle activation_handle, const Tensor* target,
                     const char* target_name) {
    const std::string activation_name = take_string(activation_handle);
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
    const Activation activation = parse_activation(op, activation_name);
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
    return compute(op, x, scale_operand, shift_operand, r, activation, out.has_value() ? &*out : nullptr);
  }
};

// In place, on what is checked already: how other ops apply the epilogue to memory. One for each library.
void apply_scale_shift_cpu(const char* op, const Operand& x, const Operand& scale, const Operand& shift,
                           const OptionalOperand& residual, Activation activation);
void apply_scale_shift_cuda(const char* op, const Operand& x, const Operand& scale, const Operand& shift,
                            const OptionalOperand& residual, Activation activation);

}  // namespace fused_conv_bn
