// conv_scale_shift, conv_bn_scale and gate_conv_bn_scale on CUDA: runs the algorithm that is chosen.
#include "conv_cuda.h"
#include "conv_scale_shift.h"
#include "gate_conv_bn_scale.h"
#include "kernels/conv/launch.cuh"

namespace fused_conv_bn {
namespace {

// By an algorithm of this package. gates: of the input, where it takes them.
Tensor run_kernel(const char* op, const ConvArguments& c, const CudaConvChoice& choice,
                  const OptionalOperand& gates = std::nullopt) {
  const CudaScope cuda(c.input.device);
  Copies copies;
  KernelConv conv(c, requirements_of(choice.plan, choice.problem));
  conv.operands.affine = affine_tensors(c.affine, c.input.dtype, copies);
  conv.operands.residual = c.residual.has_value() ? conv.copies.data(*c.residual, conv.channels_last) : nullptr;
  conv.operands.gates = gates.has_value() ? conv.copies.data(*gates, false) : nullptr;
  const ConvCall call{choice.problem, conv.operands, choice.gpu, c.epilogue};
  dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
    if constexpr (sizeof(T) <= 4) {  // none is for float64
      cuda.check_launch(op, launch_conv<T>(choice.plan, call, cuda.stream()));
    }
  });
  return conv.y;
}

struct CudaKernel {
  static constexpr RunGate* kRunGate = run_gate_cuda;

  static Tensor run(const char* op, const ConvArguments& c, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32);
    return std::holds_alternative<Aten>(choice.plan) ? convolve_and_apply<run_elementwise_cuda>(op, c)
                                                     : run_kernel(op, c, choice);
  }

  static OptionalTensor run_gated(const char* op, const ConvArguments& c, const Operand& gates, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32);
    return takes_gates(choice.plan, choice.problem, choice.asked_for) ? OptionalTensor(run_kernel(op, c, choice, gates))
                                                                      : std::nullopt;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CudaKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CudaKernel>::conv_bn_scale));
  m.impl("gate_conv_bn_scale", TORCH_BOX(&gate_conv_bn_scale<CudaKernel>));
}

}  // namespace fused_conv_bn
