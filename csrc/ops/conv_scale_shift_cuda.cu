// conv_scale_shift, conv_bn_scale, gate_conv_bn_scale, conv_bn_scale_mean and squeeze_excite on CUDA: runs the algorithm that is chosen.
#include "conv_bn_scale_mean.h"
#include "conv_cuda.h"
#include "conv_scale_shift.h"
#include "gate_conv_bn_scale.h"
#include "kernels/conv/launch.cuh"
#include "kernels/pooling/launch.cuh"
#include "spatial_mean.h"
#include "squeeze_excite.h"

namespace fused_conv_bn {
namespace {

// By an algorithm of this package. gates: of the input, where it takes them. means: of the result, where it puts them out, from so
// many parts of each image.
Tensor run_kernel(const char* op, const ConvArguments& c, const CudaConvChoice& choice,
                  const OptionalOperand& gates = std::nullopt, const OptionalTensor& means = std::nullopt,
                  int64_t parts = 0) {
  const CudaScope cuda(c.input.device);
  Copies copies;
  KernelConv conv(c, requirements_of(choice.plan, choice.problem));
  conv.operands.affine = affine_tensors(c.affine, c.input.dtype, copies);
  conv.operands.residual = c.residual.has_value() ? conv.copies.data(*c.residual, conv.channels_last) : nullptr;
  conv.operands.gates = gates.has_value() ? conv.copies.data(*gates, false) : nullptr;
  OptionalTensor sums;
  if (means.has_value()) {
    conv.operands.means = means->data_ptr();
    const int64_t stride = 1;
    if (const int64_t count = means->numel() * parts; count > 0) {
      sums = empty_strided(1, &count, &stride, ScalarType::Float, c.input.device);
      conv.operands.sums = static_cast<float*>(sums->data_ptr());
    }
  }
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
    return run(op, c, choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32));
  }
  static Tensor run(const char* op, const ConvArguments& c, const CudaConvChoice& choice) {
    return std::holds_alternative<Aten>(choice.plan) ? convolve_and_apply<run_elementwise_cuda>(op, c)
                                                     : run_kernel(op, c, choice);
  }

  // In one launch, or with one behind it that takes the means.
  static std::tuple<Tensor, Tensor> run_with_means(const char* op, const ConvArguments& c, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32);
    // A problem in two dimensions may have more images than the call has.
    const std::optional<int64_t> parts = parts_of_means(choice.plan, choice.problem, choice.gpu);
    if (parts.has_value() && choice.problem.N == c.sizes[0]) {
      const Tensor means = empty_means(c);
      return {run_kernel(op, c, choice, std::nullopt, means, *parts), means};
    }
    const Tensor y = run(op, c, choice);
    return {y, spatial_mean_cuda(y, true)};
  }

  static OptionalTensor run_gated(const char* op, const ConvArguments& c, const Operand& gates, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32);
    return takes_gates(choice.plan, choice.problem, choice.asked_for) ? OptionalTensor(run_kernel(op, c, choice, gates))
                                                                      : std::nullopt;
  }

  // In one launch, or with one in front that takes the means.
  static OptionalTensor run_squeeze(const char* op, const SqueezeArguments& a) {
    const Operand& x = a.input;
    OptionalTensor y;
    dispatch_dtype(x.dtype, [&]<typename T>(TypeTag<T>) {
      const bool channels_last = computes_channels_last(x);
      const int64_t planes = x.sizes[0] * x.sizes[1];
      const SqueezeProblem problem{x.sizes[0],         x.numel / planes,   x.sizes[1],
                                   a.weight1.sizes[0], a.weight2.sizes[0], channels_last};
      if (!squeeze_covers<T>(problem)) {
        return;
      }
      const CudaScope cuda(x.device);
      std::array<OptionalTensor, 5> copies;
      const auto data = [&](const Operand& t, bool last, size_t i) {
        return static_cast<const T*>(dense_data(t, dense_strides(t, last), last, copies[i]));
      };
      const auto bias = [&](const OptionalOperand& t, size_t i) {
        return t.has_value() ? static_cast<const T*>(channel_data(*t, x.dtype, copies[i])) : nullptr;
      };
      const T* const input = data(x, channels_last, 0);
      const SqueezeOperands<T> operands{data(a.weight1, false, 1),  bias(a.bias1, 2),        data(a.weight2, false, 3),
                                        bias(a.bias2, 4),           a.activation.activation, a.gate.activation,
                                        a.activation.negative_slope};
      const auto room = [&](int64_t elements) {
        const int64_t stride = 1;
        return empty_strided(1, &elements, &stride, x.dtype, x.device);
      };
      const OptionalTensor means = squeeze_needs_means(input, problem) ? OptionalTensor(room(planes)) : std::nullopt;
      y = empty_gates(a);
      cuda.check_launch(
          op, launch_squeeze(input, operands, means ? static_cast<T*>(means->data_ptr()) : nullptr,
                             static_cast<T*>(y->data_ptr()), problem, multiprocessors(x.device.index), cuda.stream()));
    });
    return y;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CudaKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CudaKernel>::conv_bn_scale));
  m.impl("gate_conv_bn_scale", TORCH_BOX(&gate_conv_bn_scale<CudaKernel>));
  m.impl("conv_bn_scale_mean", TORCH_BOX(&conv_bn_scale_mean<CudaKernel>));
  m.impl("squeeze_excite", TORCH_BOX(&squeeze_excite<CudaKernel>));
}

}  // namespace fused_conv_bn
