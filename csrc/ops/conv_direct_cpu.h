// How the ops with a convolution in them reach the CPU kernel for first layers, and for which layers they do.
#pragma once

#include "kernels/conv/direct_cpu/kernel.h"
#include "torch/checks.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

// Whether the kernel of conv_direct_cpu.h is to run. oneDNN puts out the result of contiguous tensors in a layout of its own,
// takes memory as large as the output for it, and reorders: that is what the kernel saves. Its arithmetic is at most as
// fast as oneDNN's, and it copies its input, so that it wins where a sum has few terms, and an input element many uses.
// Measured over some hundred random problems, against oneDNN with folded weights: 1.9 times as fast in the median with
// AVX-512, 1.6 times with AVX2, and up to 20 times where PyTorch has to get new memory for each result; problem 73 four
// times. Beyond these bounds, 0.6 to 1.2 times.
inline bool prefers_direct(const PlainConv& c) {
  if (c.input.dim != 4 || c.input.dtype != ScalarType::Float || c.groups != 1 || c.numel == 0 || !use_v3() ||
      computes_channels_last(c)) {
    return false;
  }
  const int64_t channels = c.sizes[1];
  const int64_t taps = c.weight.sizes[2] * c.weight.sizes[3];
  const int64_t terms = c.input.sizes[1] * taps;
  const int64_t stride = c.stride[1];
  const bool few_terms = stride == 1 ? terms <= 75 : stride == 2 && c.dilation[1] == 1 && terms <= 49;
  const bool many_uses = taps > 1 && channels >= 8 && channels * taps >= 48 * stride;
  const bool large = c.sizes[3] >= 2 * kDirectLeastColumns && c.numel / channels >= 4096;
  if (!few_terms || !many_uses || !large) {
    return false;
  }
  // The input rows of one row of the result are to fit into a cache of the second level.
  const int64_t rows = c.dilation[0] * (c.weight.sizes[2] - 1) + 1;
  const int64_t columns = c.input.sizes[3] + 2 * c.padding[1];
  return c.input.sizes[1] * rows * columns * static_cast<int64_t>(sizeof(float)) <= 256 << 10;
}

inline Tensor convolve_direct(const ConvArguments& c) {
  Copies copies;
  const AffineSource<float> source(affine_tensors(c.affine, c.input.dtype, copies));
  std::vector<float> scale, shift;
  for (int64_t k = 0; k < c.sizes[1]; ++k) {
    const Affine<float> affine = source.pair(static_cast<uint32_t>(k));
    scale.push_back(affine.scale);
    shift.push_back(affine.shift);
  }
  const Tensor y = empty_strided(c.input.dim, c.sizes.data(), dense_strides(c.input.dim, c.sizes.data(), false).data(),
                                 c.input.dtype, c.input.device);
  OptionalTensor x_copy, residual_copy;
  const auto contiguous_data = [](const Operand& x, OptionalTensor& copy) -> const void* {
    if (has_strides(x, dense_strides(x, false))) {
      return x.tensor->data_ptr();
    }
    copy = torch::stable::contiguous(*x.tensor);
    return copy->data_ptr();
  };
  const int64_t* w = c.weight.strides;
  const ConvOperands operands{contiguous_data(c.input, x_copy),
                              c.weight.tensor->data_ptr(),
                              w[0],
                              w[1],
                              w[2],
                              w[3],
                              {},
                              false,
                              c.residual.has_value() ? contiguous_data(*c.residual, residual_copy) : nullptr,
                              y.data_ptr()};
  const int64_t *x = c.input.sizes, *taps = c.weight.sizes + 2;
  const Conv2d problem{x[0],
                       x[1],
                       x[2],
                       x[3],
                       c.sizes[1],
                       taps[0],
                       taps[1],
                       c.sizes[2],
                       c.sizes[3],
                       c.stride[0],
                       c.stride[1],
                       c.padding[0],
                       c.padding[1],
                       c.dilation[0],
                       c.dilation[1],
                       c.groups,
                       sizeof(float),
                       false,
                       c.residual.has_value(),
                       false};
  launch_conv_direct(problem, operands, scale.data(), shift.data(), c.epilogue, torch::stable::get_num_threads(),
                     [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
                       torch::stable::parallel_for(begin, end, grain, body);
                     });
  return y;
}

#endif

// Nothing where PyTorch's convolution is to run.
inline std::optional<Tensor> direct_convolution([[maybe_unused]] const ConvArguments& c) {
#if defined(__x86_64__)
  if (prefers_direct(c)) {
    return convolve_direct(c);
  }
#endif
  return std::nullopt;
}

}  // namespace fused_conv_bn
