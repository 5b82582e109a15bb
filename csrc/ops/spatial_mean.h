// spatial_mean, but for the device: the mean of each channel of each image.
#pragma once

#include "torch/checks.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

Tensor spatial_mean_cpu(Tensor input, bool keepdim);
Tensor spatial_mean_cuda(Tensor input, bool keepdim);

inline Operand check_spatial_mean(const Tensor& input) {
  const char* op = "spatial_mean";
  const Operand x("input", input);
  if (x.dim < 3) {
    fail(op, ": input has shape ", x.shape(),
         ", expected 3 to 5 dimensions: (N, C, L), (N, C, H, W) or (N, C, D, H, W)");
  }
  check_input(op, x);
  return x;
}

}  // namespace fused_conv_bn
