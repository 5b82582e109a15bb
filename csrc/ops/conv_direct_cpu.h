// How the ops with a convolution in them reach the CPU kernel for first layers.
#pragma once

#include "kernels/conv/direct_cpu/kernel.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

// The convolution as the kernel sees it, if the kernel is to run.
inline std::optional<Conv2d> direct_problem(const PlainConv& c, bool has_residual) {
  const std::optional<Conv2d> problem = narrow_to_2d(conv_problem(c, has_residual, false));
  return problem.has_value() && prefers_direct(*problem, use_v3()) ? problem : std::nullopt;
}

inline Tensor convolve_direct(const ConvArguments& c, const Conv2d& problem) {
  Copies copies;
  const AffineSource<float> source(affine_tensors(c.affine, c.input.dtype, copies));
  std::vector<float> scale, shift;
  for (int64_t k = 0; k < problem.K; ++k) {
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
  ConvOperands operands{};
  operands.x = contiguous_data(c.input, x_copy);
  operands.w = c.weight.tensor->data_ptr();
  operands.w_stride_k = c.weight.strides[0], operands.w_stride_c = c.weight.strides[1];
  operands.w_stride_r = c.weight.strides[2], operands.w_stride_s = c.weight.strides[3];
  operands.residual = c.residual.has_value() ? contiguous_data(*c.residual, residual_copy) : nullptr;
  operands.y = y.data_ptr();
  const DirectCall call{.problem = problem,
                        .operands = operands,
                        .scale = scale.data(),
                        .shift = shift.data(),
                        .epilogue = c.epilogue,
                        .threads = torch::stable::get_num_threads()};
  launch_conv_direct(call, [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  });
  return y;
}

#endif

// Nothing where PyTorch's convolution is to run.
inline std::optional<Tensor> direct_convolution([[maybe_unused]] const ConvArguments& c) {
#if defined(__x86_64__)
  if (const std::optional<Conv2d> problem = direct_problem(c, c.residual.has_value())) {
    return convolve_direct(c, *problem);
  }
#endif
  return std::nullopt;
}

}  // namespace fused_conv_bn
