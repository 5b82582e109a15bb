// conv_scale_shift, conv_bn_scale, gate_conv_bn_scale, conv_bn_scale_mean and squeeze_excite on the CPU: a kernel of our own for contiguous
// float32 first layers, and else PyTorch's convolution, oneDNN's as a rule, then one pass in place.
//
// The affine is never folded into the convolution. The shift would be its bias, and libraries that begin their sums with it
// round every partial sum to the bias's magnitude: up to 23 times eager's error was measured. (float64 on AMD, small float32
// images, oneDNN below AVX-512; which of them do depends on the machine.) And with a shift there is a pass anyway, which
// multiplies for nothing.
//
// oneDNN could apply an activation as well. Its relu, relu6 and hardsigmoid turn NaN into 0, where PyTorch's pass it on.
#include "conv_bn_scale_mean.h"
#include "conv_direct_cpu.h"
#include "conv_scale_shift.h"
#include "gate_conv_bn_scale.h"
#include "spatial_mean.h"
#include "squeeze_excite.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  static constexpr RunGate* kRunGate = run_gate_cpu;

  static Tensor run(const char* op, const ConvArguments& c, bool) {
    const std::optional<Tensor> direct = direct_convolution(c, choose_conv_cpu(c, c.residual.has_value(), false));
    return direct.has_value() ? *direct : convolve_and_apply<run_elementwise_cpu>(op, c);
  }
  static std::tuple<Tensor, Tensor> run_with_means(const char* op, const ConvArguments& c, bool allow_tf32) {
    const Tensor y = run(op, c, allow_tf32);
    return {y, spatial_mean_cpu(y, true)};
  }
  static OptionalTensor run_gated(const char*, const ConvArguments&, const Operand&, bool) { return std::nullopt; }
  static OptionalTensor run_squeeze(const char*, const SqueezeArguments&) { return std::nullopt; }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CpuKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CpuKernel>::conv_bn_scale));
  m.impl("gate_conv_bn_scale", TORCH_BOX(&gate_conv_bn_scale<CpuKernel>));
  m.impl("conv_bn_scale_mean", TORCH_BOX(&conv_bn_scale_mean<CpuKernel>));
  m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite<CpuKernel>));
}

}  // namespace fused_conv_bn
