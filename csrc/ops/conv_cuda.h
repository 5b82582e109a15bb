// What a convolution kernel of this package takes, for every op that starts one.
#pragma once

#include "kernels/conv/problem.h"
#include "torch/layout.h"

namespace fused_conv_bn {

// Dense tensors that start at a multiple of `alignment` bytes, as kernels want them.
class DenseCopies {
 public:
  explicit DenseCopies(uintptr_t alignment) : alignment_(alignment) {}

  const void* data(const Operand& x, bool channels_last) {
    const bool dense = has_strides(x, dense_strides(x, channels_last));
    if (dense && reinterpret_cast<uintptr_t>(x.tensor->data_ptr()) % alignment_ == 0) {
      return x.tensor->data_ptr();
    }
    copies_.push_back(dense ? torch::stable::clone(*x.tensor)
                            : torch::stable::contiguous(*x.tensor, memory_format(x.dim, channels_last)));
    return copies_.back().data_ptr();
  }

 private:
  uintptr_t alignment_;
  std::vector<Tensor> copies_;
};

// The input and a residual in the memory format of the result, and a new output. The weight is taken as it lies, unless it
// has to be dense.
struct KernelConv {
  bool channels_last;
  DenseCopies copies;
  Tensor y;
  ConvOperands operands{};

  KernelConv(const PlainConv& c, const ConvRequirements& wants)
      : channels_last(computes_channels_last(c)), copies(static_cast<uintptr_t>(wants.alignment)) {
    const Strides strides = dense_strides(c.input.dim, c.sizes.data(), channels_last);
    y = empty_strided(c.input.dim, c.sizes.data(), strides.data(), c.input.dtype, c.input.device);
    operands.y = y.data_ptr();
    operands.x = copies.data(c.input, channels_last);
    const bool last = wants.channels_last_weight ||
                      (c.weight.dim >= 4 && has_strides(c.weight, dense_strides(c.weight, true)));
    const Strides dense = dense_strides(c.weight, last);
    const int64_t* const w = wants.dense_weight ? dense.data() : c.weight.strides;
    operands.set_weight(wants.dense_weight ? copies.data(c.weight, last) : c.weight.tensor->data_ptr(), c.weight.dim,
                        c.weight.sizes, w);
  }
};

}  // namespace fused_conv_bn
