// bn_scale, bn_scale.out and bn_scale_ on the CPU.
#include "bn_scale.h"
#include "elementwise_cpu.h"

namespace fused_conv_bn {
namespace {

Tensor run(const char* op, const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
           const OptionalTensor& weight, const OptionalTensor& bias, double scaling_factor, double eps,
           const Tensor* target, const char* target_name) {
  return call_bn_scale(op, input, running_mean, running_var, weight, bias, scaling_factor, eps, target, target_name,
                       [&](const Elementwise& e, const BnOperands& bn, ScalarType dtype) {
                         dispatch_bn_types(bn, dtype, [&](auto tag, const auto& params) {
                           using T = typename decltype(tag)::type;
                           const auto affine_of = [&](uint32_t c) { return fold_channel<T>(params, c); };
                           run_elementwise_cpu<T, Activation::none, false>(e, affine_of);
                         });
                       });
}

Tensor bn_scale_cpu(const Tensor input, const Tensor running_mean, const Tensor running_var,
                    const OptionalTensor weight, const OptionalTensor bias, double scaling_factor, double eps) {
  return run("bn_scale", input, running_mean, running_var, weight, bias, scaling_factor, eps, nullptr, nullptr);
}

void bn_scale_out_cpu(const Tensor input, const Tensor running_mean, const Tensor running_var,
                      const OptionalTensor weight, const OptionalTensor bias, double scaling_factor, double eps,
                      const Tensor out) {
  run("bn_scale", input, running_mean, running_var, weight, bias, scaling_factor, eps, &out, "out");
}

void bn_scale_inplace_cpu(const Tensor input, const Tensor running_mean, const Tensor running_var,
                          const OptionalTensor weight, const OptionalTensor bias, double scaling_factor, double eps) {
  run("bn_scale_", input, running_mean, running_var, weight, bias, scaling_factor, eps, &input, "input");
}

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale", TORCH_BOX(&fused_conv_bn::bn_scale_cpu));
  m.impl("bn_scale.out", TORCH_BOX(&fused_conv_bn::bn_scale_out_cpu));
  m.impl("bn_scale_", TORCH_BOX(&fused_conv_bn::bn_scale_inplace_cpu));
}
