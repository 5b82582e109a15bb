// fold_bn on the CPU.
#include "fold_bn.h"

namespace fused_conv_bn {
namespace {

std::tuple<Tensor, Tensor> fold_bn_cpu(const Tensor running_mean, const Tensor running_var, const OptionalTensor weight,
                                       const OptionalTensor bias, double scaling_factor, double eps,
                                       const OptionalTensor conv_bias) {
  return call_fold_bn(
      running_mean, running_var, weight, bias, scaling_factor, eps, conv_bias,
      [](auto tag, const AffineTensors& tensors, auto* scale, auto* shift, int64_t channels, const Device&) {
        using T = typename decltype(tag)::type;
        const AffineSource<T> source(tensors);
        for (int64_t c = 0; c < channels; ++c) {
          const Affine<double> affine = fold_to_pair(source, tensors.scaling_factor, tensors.eps,
                                                     static_cast<uint32_t>(c));
          scale[c] = static_cast<acc_t<T>>(affine.scale);
          shift[c] = static_cast<acc_t<T>>(affine.shift);
        }
      });
}

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("fold_bn", TORCH_BOX(&fused_conv_bn::fold_bn_cpu)); }
