// What a convolution kernel of this package takes, for every op that starts one.
#pragma once

#include "../checks.h"
#include "../kernels/conv_params.h"

namespace fused_conv_bn {

// Dense in the memory format of the result, as kernels want it.
class DenseCopies {
 public:
  explicit DenseCopies(bool channels_last) : channels_last_(channels_last) {}

  const void* data(const Operand& x) {
    if (has_strides(x, dense_strides(x, channels_last_))) {
      return x.tensor->data_ptr();
    }
    copies_.push_back(torch::stable::contiguous(*x.tensor, memory_format(x.dim, channels_last_)));
    return copies_.back().data_ptr();
  }

 private:
  bool channels_last_;
  std::vector<Tensor> copies_;
};

// The input and a new output; the weight is taken as it lies.
struct KernelConv {
  DenseCopies copies;
  Tensor y;
  ConvOperands operands{};

  explicit KernelConv(const PlainConv& c) : copies(computes_channels_last(c)) {
    const Strides strides = dense_strides(c.input.dim, c.sizes.data(), computes_channels_last(c));
    y = empty_strided(c.input.dim, c.sizes.data(), strides.data(), c.input.dtype, c.input.device);
    operands.x = copies.data(c.input);
    operands.w = c.weight.tensor->data_ptr();
    operands.w_stride_k = c.weight.strides[0], operands.w_stride_c = c.weight.strides[1];
    operands.w_stride_r = c.weight.strides[2], operands.w_stride_s = c.weight.strides[3];
    operands.y = y.data_ptr();
  }
};

}  // namespace fused_conv_bn
