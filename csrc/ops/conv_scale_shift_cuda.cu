// conv_scale_shift and conv_bn_scale on CUDA: runs the algorithm that is chosen.
#include "conv_cuda.h"
#include "conv_scale_shift.h"
#include "kernels/conv/launch.cuh"

namespace fused_conv_bn {
namespace {

// By an algorithm of this package.
Tensor run_kernel(const char* op, const ConvArguments& c, const CudaConvChoice& choice) {
  const CudaScope cuda(c.input.device);
  Copies copies;
  KernelConv conv(c, requirements_of(choice.plan, choice.problem));
  conv.operands.affine = affine_tensors(c.affine, c.input.dtype, copies);
  conv.operands.residual = c.residual.has_value() ? conv.copies.data(*c.residual, conv.channels_last) : nullptr;
  const ConvCall call{choice.problem, conv.operands, choice.gpu, c.epilogue};
  dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
    if constexpr (sizeof(T) <= 4) {  // none is for float64
      cuda.check_launch(op, launch_conv<T>(choice.plan, call, cuda.stream()));
    }
  });
  return conv.y;
}

struct CudaKernel {
  static Tensor run(const char* op, const ConvArguments& c, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32);
    return std::holds_alternative<Aten>(choice.plan) ? convolve_and_apply<run_elementwise_cuda>(op, c)
                                                     : run_kernel(op, c, choice);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CudaKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CudaKernel>::conv_bn_scale));
}

}  // namespace fused_conv_bn
