// bn_scale's calls, checked: what its CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// f(TypeTag<T>, BnParams<P>): the input's element type and that of the BN operands, which is T or acc_t<T>.
template <typename F>
void dispatch_bn_types(const BnOperands& bn, ScalarType dtype, F&& f) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_bn_params<T>(bn, dtype, [&](const auto& params) { f(tag, params); });
  });
}

// op(input, running_mean, running_var, weight, bias, scaling_factor, eps), written to `target` (nullptr: a new tensor).
// launch(Elementwise, BnOperands, dtype) runs the kernel.
template <typename Launch>
Tensor call_bn_scale(const char* op, const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
                     const OptionalTensor& weight, const OptionalTensor& bias, double scaling_factor, double eps,
                     const Tensor* target, const char* target_name, const Launch& launch) {
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
    launch(e, bn, x.dtype);
    e.finish();
  }
  return e.output;
}

}  // namespace fused_conv_bn
