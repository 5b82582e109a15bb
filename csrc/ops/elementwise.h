// An affine and an epilogue over a tensor, in one pass: what bn_scale and scale_shift are, and what the ops with a convolution
// or with batch statistics end with.
#pragma once

#include "torch/checks.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

// Starts the kernel on checked operands. One for each library.
using RunElementwise = void(const char* op, const Elementwise& e, ScalarType dtype, const AffineTensors& affine,
                            const Epilogue& epilogue);
RunElementwise run_elementwise_cpu;
RunElementwise run_elementwise_cuda;

// Everything is checked. Writes to `target`, or to a new tensor if it is nullptr.
template <RunElementwise* kRun>
Tensor apply_elementwise(const char* op, const Operand& x, const AffineOperands& affine,
                         const OptionalOperand& residual, const Epilogue& epilogue, const Operand* target) {
  Elementwise e = make_elementwise(x, residual, target);
  if (e.shape.numel > 0) {
    Copies copies;
    kRun(op, e, x.dtype, affine_tensors(affine, x.dtype, copies), epilogue);
    e.finish();
  }
  return e.output;
}

// A call of bn_scale or scale_shift but for the affine's own checks. target: nullptr for a new tensor.
template <RunElementwise* kRun>
Tensor call_elementwise(const char* op, const Operand& x, const AffineOperands& affine,
                        const EpilogueArguments& arguments, const Tensor* target, const char* target_name) {
  const OptionalOperand residual = optional_operand("residual", arguments.residual);
  if (residual.has_value()) {
    check_like(op, *residual, x);
  }
  const Epilogue epilogue = check_epilogue(op, arguments);
  const OptionalOperand out = target == nullptr ? std::nullopt : OptionalOperand(Operand(target_name, *target));
  if (out.has_value()) {
    check_target(op, *out, x);
    check_overlap(op, *out, x, true);
    affine.for_each([&](const Operand& param) { check_overlap(op, *out, param, false); });
    if (residual.has_value()) {
      check_overlap(op, *out, *residual, true);
    }
  }
  return apply_elementwise<kRun>(op, x, affine, residual, epilogue, out.has_value() ? &*out : nullptr);
}

}  // namespace fused_conv_bn
