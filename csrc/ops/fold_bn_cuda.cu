// fold_bn on CUDA.
#include "fold_bn.h"
#include "kernels/batch_norm/fold_bn.cuh"

namespace fused_conv_bn {
namespace {

std::tuple<Tensor, Tensor> fold_bn_cuda(const Tensor running_mean, const Tensor running_var,
                                        const OptionalTensor weight, const OptionalTensor bias, double scaling_factor,
                                        double eps, const OptionalTensor conv_bias) {
  return call_fold_bn(
      running_mean, running_var, weight, bias, scaling_factor, eps, conv_bias,
      [](auto tag, const AffineTensors& tensors, auto* scale, auto* shift, int64_t channels, const Device& device) {
        const CudaScope cuda(device);
        cuda.check_launch("fold_bn",
                          launch_fold_bn<typename decltype(tag)::type>(tensors, scale, shift, channels, cuda.stream()));
      });
}

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("fold_bn", TORCH_BOX(&fused_conv_bn::fold_bn_cuda)); }
