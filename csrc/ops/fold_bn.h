// fold_bn's calls, checked: what its CPU and CUDA kernels share.
#pragma once

#include <tuple>

#include "torch/checks.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

// launch(TypeTag<T>, AffineTensors, acc_t<T>* scale, acc_t<T>* shift, channels, device) runs the kernel.
template <typename Launch>
std::tuple<Tensor, Tensor> call_fold_bn(const Tensor& running_mean, const Tensor& running_var,
                                        const OptionalTensor& weight, const OptionalTensor& bias, double scaling_factor,
                                        double eps, const OptionalTensor& conv_bias, const Launch& launch) {
  const char* op = "fold_bn";
  const AffineOperands bn = bn_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps);
  const Operand& mean = *bn.mean;
  if (mean.dim != 1 || mean.numel > kMaxChannels) {
    fail(op, ": running_mean has shape ", mean.shape(), ", expected one dimension, of at most ", kMaxChannels,
         " channels");
  }
  if (!is_supported(mean.dtype)) {
    fail(op, ": running_mean has dtype ", dtype_name(mean.dtype), ", expected " FCB_DTYPE_NAMES);
  }
  ScalarType dtype = mean.dtype;  // or the 16-bit one that other operands have
  bn.for_each([&](const Operand& x) {
    if (is_16_bit(x.dtype) && dtype == ScalarType::Float) {
      dtype = x.dtype;
    }
  });
  bn.check(op, mean.sizes[0], "running_mean", dtype, mean);
  const int64_t stride = 1;
  Tensor scale = empty_strided(1, mean.sizes, &stride, acc_dtype(dtype), mean.device);
  Tensor shift = empty_strided(1, mean.sizes, &stride, acc_dtype(dtype), mean.device);
  if (mean.numel > 0) {
    Copies copies;
    const AffineTensors tensors = affine_tensors(bn, dtype, copies);
    dispatch_dtype(dtype, [&](auto tag) {
      using Acc = acc_t<typename decltype(tag)::type>;
      launch(tag, tensors, static_cast<Acc*>(scale.data_ptr()), static_cast<Acc*>(shift.data_ptr()), mean.numel,
             mean.device);
    });
  }
  return {scale, shift};
}

}  // namespace fused_conv_bn
