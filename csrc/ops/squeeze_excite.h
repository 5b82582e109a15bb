// squeeze_excite, but for the device: the gates of a squeeze-and-excite block, from what it squeezes.
#pragma once

#include "conv_scale_shift.h"

namespace fused_conv_bn {

// Of a 1x1 convolution: of `channels` channels, which `from` has.
inline void check_squeeze_weight(const char* op, const Operand& w, const Operand& x, int64_t channels,
                                 const char* from) {
  bool fits = w.dim == x.dim && w.sizes[0] > 0 && w.sizes[1] == channels;
  for (int64_t d = 2; fits && d < w.dim; ++d) {
    fits = w.sizes[d] == 1;
  }
  if (!fits) {
    std::string sizes = std::to_string(channels);
    for (int64_t d = 2; d < x.dim; ++d) {
      sizes += ", 1";
    }
    fail(op, ": ", w.name, " has shape ", w.shape(), ", expected [outputs, ", sizes, "], the channels of ", from,
         " in dimension 1");
  }
  if (w.sizes[0] > kMaxChannels) {
    fail(op, ": ", w.name, " has ", w.sizes[0], " output channels, expected at most ", kMaxChannels);
  }
  if (w.dtype != x.dtype) {
    fail(op, ": ", w.name, " has dtype ", dtype_name(w.dtype), ", expected ", dtype_name(x.dtype),
         ", the dtype of input");
  }
  check_same_device(op, w, x);
}

struct SqueezeArguments {
  Operand input;
  Operand weight1;
  OptionalOperand bias1;
  Operand weight2;
  OptionalOperand bias2;
  Epilogue activation;
  Epilogue gate;
};

// The gates of images, (N, K, 1, ...), contiguous: where extents of 1 leave a choice as well.
inline Sizes gate_sizes(const SqueezeArguments& a) { return {a.input.sizes[0], a.weight2.sizes[0], 1, 1, 1}; }
inline Strides gate_strides(const SqueezeArguments& a) {
  return dense_strides(a.input.dim, gate_sizes(a).data(), false);
}
inline Tensor empty_gates(const SqueezeArguments& a) {
  const Operand& x = a.input;
  return empty_strided(x.dim, gate_sizes(a).data(), gate_strides(a).data(), x.dtype, x.device);
}

// A layer as a convolution of one pixel, with its bias as the shift, all in the dtype of `input`.
template <typename Kernel>
Tensor squeeze_layer(const char* op, const Tensor& input, const Operand& weight, const OptionalOperand& bias,
                     const Epilogue& epilogue) {
  const ScalarType wide = input.scalar_type();
  const Tensor w = torch::stable::to(*weight.tensor, wide);
  const PlainConv c = check_plain_conv(op, input, weight.name, w, {1}, {0}, {1}, 1);
  OptionalTensor shift;
  if (bias.has_value()) {
    shift = torch::stable::to(*bias->tensor, wide);
  }
  return Kernel::run(op, {c, scale_shift_operands(std::nullopt, shift), std::nullopt, epilogue, true}, false);
}

// Kernel::run_squeeze(op, SqueezeArguments): the result of a kernel that does it all, or nothing. Then PyTorch takes the mean, and
// Kernel::run() convolves it twice.
template <typename Kernel>
Tensor squeeze_excite(Tensor input, Tensor weight1, OptionalTensor bias1, Tensor weight2, OptionalTensor bias2,
                      StringHandle activation, StringHandle gate, double negative_slope) {
  const char* op = "squeeze_excite";
  const OptionalTensor none;
  const EpilogueArguments of_hidden{none, take_string(activation), negative_slope, false};
  const EpilogueArguments of_gate{none, take_string(gate), negative_slope, false};
  const Operand x("input", input);
  const Operand w1("weight1", weight1), w2("weight2", weight2);
  const OptionalOperand b1 = optional_operand("bias1", bias1), b2 = optional_operand("bias2", bias2);
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
  check_squeeze_weight(op, w1, x, x.sizes[1], "input");
  check_squeeze_weight(op, w2, x, w1.sizes[0], "weight1's result");
  if (b1.has_value()) {
    check_channel_param(op, *b1, w1.sizes[0], "weight1's result", x.dtype, x.dtype, x);
  }
  if (b2.has_value()) {
    check_channel_param(op, *b2, w2.sizes[0], "weight2's result", x.dtype, x.dtype, x);
  }
  const SqueezeArguments a{x, w1, b1, w2, b2, check_epilogue(op, of_hidden), check_epilogue(op, of_gate, "gate")};
  if (x.numel == 0) {
    return empty_gates(a);
  }
  if (const OptionalTensor y = Kernel::run_squeeze(op, a)) {
    return *y;
  }
  std::vector<int64_t> dims;
  for (int64_t d = 2; d < x.dim; ++d) {
    dims.push_back(d);
  }
  // In float32 at least: convolutions that round to 16 bits do so before the shift.
  const Tensor mean = torch::stable::contiguous(torch_mean(input, dims, true, acc_dtype(x.dtype)));
  const Tensor hidden = squeeze_layer<Kernel>(op, mean, w1, b1, a.activation);
  const Tensor y = torch::stable::to(squeeze_layer<Kernel>(op, hidden, w2, b2, a.gate), x.dtype);
  return with_strides(torch::stable::contiguous(y), gate_strides(a).data());
}

}  // namespace fused_conv_bn
