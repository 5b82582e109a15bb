// bn_scale_train, but for the device: what its CPU and CUDA kernels share.
#pragma once

#include "../checks.h"

namespace fused_conv_bn {

// Kernel::run<T>(op, Elementwise, TrainParams) computes: the statistics of the input, the running ones, the output.
template <typename Kernel>
struct BnScaleTrain {
  static Tensor functional(Tensor input, OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                           OptionalTensor bias, double scaling_factor, double momentum, double eps) {
    const char* op = "bn_scale_train";
    const Operand x("input", input);
    const TrainOperands bn{std::nullopt,
                           optional_operand("running_mean", running_mean),
                           optional_operand("running_var", running_var),
                           optional_operand("weight", weight),
                           optional_operand("bias", bias),
                           scaling_factor,
                           momentum,
                           eps};
    check_input(op, x);
    bn.check(op, x.sizes, x.dim, "input", x);
    return compute(op, x, bn, nullptr);
  }

  // Everything is checked. Writes to `target`, or to a new tensor if it is nullptr.
  static Tensor compute(const char* op, const Operand& x, const TrainOperands& bn, const Operand* target) {
    Elementwise e = make_elementwise(x, std::nullopt, target);
    if (e.shape.numel > 0) {
      dispatch_dtype(x.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        Kernel::template run<T>(op, e, train_params(bn));
      });
      e.finish();
    }
    return e.output;
  }
};

// In place, on what is checked already: how conv_bn_scale_train treats a convolution's result. One for each library.
void apply_bn_scale_train_cpu(const char* op, const Operand& x, const TrainOperands& bn);
void apply_bn_scale_train_cuda(const char* op, const Operand& x, const TrainOperands& bn);

// The affines of a convolution's channels whose moments a kernel has gathered, [count][channels], and their running statistics. affines:
// centers, then scales, then shifts. dtype: of the input; not float64.
void finish_bn_cuda(const char* op, const TrainOperands& bn, ScalarType dtype, const Device& device,
                    const Moments* moments, int64_t count, int64_t channels, float* affines);

}  // namespace fused_conv_bn
