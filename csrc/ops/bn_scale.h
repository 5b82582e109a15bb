// bn_scale, bn_scale.out and bn_scale_, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// Kernel::run<T>(op, Elementwise, BnParams<P>) computes; T is the input's element type, P that of the BN tensors, T or
// acc_t<T>.
template <typename Kernel>
struct BnScale {
  static Tensor functional(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                           OptionalTensor bias, double scaling_factor, double eps) {
    return call("bn_scale", input, running_mean, running_var, weight, bias, scaling_factor, eps, nullptr, nullptr);
  }

  static void out(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight, OptionalTensor bias,
                  double scaling_factor, double eps, Tensor out) {
    call("bn_scale", input, running_mean, running_var, weight, bias, scaling_factor, eps, &out, "out");
  }

  static void in_place(Tensor input, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                       OptionalTensor bias, double scaling_factor, double eps) {
    call("bn_scale_", input, running_mean, running_var, weight, bias, scaling_factor, eps, &input, "input");
  }

 private:
  // Writes to `target`, or to a new tensor if it is nullptr.
  static Tensor call(const char* op, const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
                     const OptionalTensor& weight, const OptionalTensor& bias, double scaling_factor, double eps,
                     const Tensor* target, const char* target_name) {
    const Operand x("input", input);
    const BnOperands bn{Operand("running_mean", running_mean),
                        Operand("running_var", running_var),
                        optional_operand("weight", weight),
                        optional_operand("bias", bias),
                        std::nullopt,
                        scaling_factor,
                        eps};
    check_input(op, x);
    bn.check(op, x.sizes[1], "input", x.dtype, x);
    const OptionalOperand out = target == nullptr ? std::nullopt : OptionalOperand(Operand(target_name, *target));
    if (out.has_value()) {
      check_target(op, *out, x);
      check_overlap(op, *out, x, true);
      bn.for_each([&](const Operand& param) { check_overlap(op, *out, param, false); });
    }
    Elementwise e = make_elementwise(x, std::nullopt, out.has_value() ? &*out : nullptr);
    if (e.shape.numel > 0) {
      dispatch_dtype(x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        dispatch_bn_params<T>(bn, x.dtype, [&](const auto& params) { Kernel::template run<T>(op, e, params); });
      });
      e.finish();
    }
    return e.output;
  }
};

}  // namespace fused_conv_bn
