// The checks of a convolution's arguments.
#pragma once

#include <vector>

#include "checks.h"

namespace fused_conv_bn {

// stride, padding or dilation: a value for each spatial dimension, or one for all of them, as in PyTorch.
inline Spatial check_window(const char* op, const char* name, const std::vector<int64_t>& values, int64_t space,
                            int64_t least) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const auto count = static_cast<int64_t>(values.size());
  if (count != 1 && count != space) {
    fail(op, ": ", name, " has ", count, " values, expected 1", space == 1 ? "" : " or ",
         space == 1 ? "" : std::to_string(space), ", for the ", space, " spatial dimension", space == 1 ? "" : "s",
         " of input");
  }
  Spatial window{};
  for (int64_t d = 0; d < space; ++d) {
    window[d] = values[count == 1 ? 0 : d];
    if (window[d] < least || window[d] > kMost) {
      fail(op, ": ", name, " is ", list_text(values.data(), count), ", expected values from ", least, " to ", kMost);
    }
  }
  return window;
}

inline void check_conv_weight(const char* op, const Operand& weight, const Operand& input, int64_t groups) {
  if (weight.dim != input.dim) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected ", input.dim,
         " dimensions, as many as input: (output channels, input channels / groups, then the kernel)");
  }
  if (weight.dtype != input.dtype) {
    fail(op, ": ", weight.name, " has dtype ", dtype_name(weight.dtype), ", expected ", dtype_name(input.dtype),
         ", the dtype of input");
  }
  check_same_device(op, weight, input);
  if (weight.numel == 0) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected at least one element in each dimension");
  }
  if (groups < 1 || input.sizes[1] % groups != 0 || weight.sizes[0] % groups != 0) {
    fail(op, ": groups is ", groups, ", expected a divisor of the ", input.sizes[1], " channels of input and of the ",
         weight.sizes[0], " output channels of ", weight.name);
  }
  if (weight.sizes[1] != input.sizes[1] / groups) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected ", input.sizes[1] / groups,
         " in dimension 1, the channels of input, ", input.sizes[1], ", over groups, ", groups);
  }
  if (weight.sizes[0] > kMaxChannels) {
    fail(op, ": ", weight.name, " has ", weight.sizes[0], " output channels, expected at most ", kMaxChannels);
  }
}

inline PlainConv check_plain_conv(const char* op, const Tensor& input, const char* weight_name, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  PlainConv c{Operand("input", input), Operand(weight_name, weight), {}, {}, {}, groups, {}, 1};
  const Operand& x = c.input;
  if (x.dim < 3) {
    fail(op, ": input has shape ", x.shape(),
         ", expected 3 to 5 dimensions: (N, C, L), (N, C, H, W) or (N, C, D, H, W)");
  }
  check_input(op, x);
  for (int64_t d = 1; d < x.dim; ++d) {
    if (x.sizes[d] == 0) {
      fail(op, ": input has shape ", x.shape(), ", expected at least one element in each dimension but the first");
    }
  }
  check_conv_weight(op, c.weight, x, groups);
  c.stride = check_window(op, "stride", stride, c.space(), 1);
  c.padding = check_window(op, "padding", padding, c.space(), 0);
  c.dilation = check_window(op, "dilation", dilation, c.space(), 1);
  c.sizes[0] = x.sizes[0];
  c.sizes[1] = c.weight.sizes[0];
  for (int64_t d = 0; d < c.space(); ++d) {
    const int64_t padded = x.sizes[d + 2] + 2 * c.padding[d];
    const int64_t taps = c.weight.sizes[d + 2];
    if (taps - 1 > (padded - 1) / c.dilation[d]) {
      fail(op, ": ", c.weight.name, " has shape ", c.weight.shape(),
           ", expected a kernel that fits into input of shape ", x.shape(), ": in dimension ", d + 2, " that has ",
           padded, " elements with its padding, and ", taps, " taps with dilation ", c.dilation[d], " cover more");
    }
    c.sizes[d + 2] = (padded - 1 - c.dilation[d] * (taps - 1)) / c.stride[d] + 1;
  }
  for (int64_t d = 0; d < x.dim; ++d) {
    c.numel *= c.sizes[d];
  }
  return c;
}

// A tensor that lies beside a convolution's output.
inline void check_like_output(const char* op, const Operand& r, const PlainConv& c) {
  const Operand& x = c.input;
  if (r.dim != x.dim || !std::equal(r.sizes, r.sizes + r.dim, c.sizes.begin())) {
    fail(op, ": ", r.name, " has shape ", r.shape(), ", expected ", list_text(c.sizes.data(), x.dim),
         ", the shape of the output");
  }
  if (r.dtype != x.dtype) {
    fail(op, ": ", r.name, " has dtype ", dtype_name(r.dtype), ", expected ", dtype_name(x.dtype),
         ", the dtype of input");
  }
  check_same_device(op, r, x);
}

// The residual of a convolution.
inline OptionalOperand check_conv_residual(const char* op, const PlainConv& c, const OptionalTensor& residual) {
  const OptionalOperand r = optional_operand("residual", residual);
  if (r.has_value()) {
    check_like_output(op, *r, c);
  }
  return r;
}

}  // namespace fused_conv_bn
