// What a convolution kernel of this package takes, for every op that starts one.
#pragma once

#include "../checks.h"
#include "../kernels/conv_params.h"

namespace fused_conv_bn {

// Dense in the memory format of the result, and from a multiple of `alignment` bytes on, as kernels want it.
class DenseCopies {
 public:
  DenseCopies(bool channels_last, uintptr_t alignment) : channels_last_(channels_last), alignment_(alignment) {}

  const void* data(const Operand& x) {
    const bool dense = has_strides(x, dense_strides(x, channels_last_));
    if (dense && reinterpret_cast<uintptr_t>(x.tensor->data_ptr()) % alignment_ == 0) {
      return x.tensor->data_ptr();
    }
    copies_.push_back(dense ? torch::stable::clone(*x.tensor)
                            : torch::stable::contiguous(*x.tensor, memory_format(x.dim, channels_last_)));
    return copies_.back().data_ptr();
  }

 private:
  bool channels_last_;
  uintptr_t alignment_;
  std::vector<Tensor> copies_;
};

// The input and a new output; the weight is taken as it lies.
struct KernelConv {
  DenseCopies copies;
  Tensor y;
  ConvOperands operands{};

  KernelConv(const PlainConv& c, uintptr_t alignment) : copies(computes_channels_last(c), alignment) {
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
