// How the ops with a convolution in them reach the CPU kernel for first layers, and when.
#pragma once

#include "conv_tuned.h"
#include "kernels/conv/direct_cpu/kernel.h"
#include "kernels/conv/registry.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

constexpr const char* kDirectName = "direct_cpu";
constexpr const char* kCpuName = "cpu";  // of the only device that the library's table has choices for

// What computes a convolution on the CPU, and what that was chosen by.
struct CpuConvChoice {
  std::optional<Conv2d> problem;  // nothing for what PyTorch alone computes
  bool covered = false;           // by the kernel
  bool direct = false;            // the kernel is to run
  bool tuned = false;
};

inline TunedProblem tuned_problem_cpu(const PlainConv& c, const Conv2d& problem, bool has_statistics) {
  return tuned_problem(problem, c.input.dtype, has_statistics, torch::stable::get_num_threads());
}

inline CpuConvChoice choose_conv_cpu(const PlainConv& c, bool has_residual, bool has_statistics) {
  CpuConvChoice choice{narrow_to_2d(conv_problem(c, has_residual, false))};
#if defined(__x86_64__)
  if (!choice.problem.has_value()) {
    return choice;
  }
  choice.covered = covers_direct(*choice.problem, use_v3());
  choice.direct = c.space() == 2 && prefers_direct(*choice.problem, use_v3());  // others were not measured
#endif
  if (choice.covered && tuned_choices().generation() != 0) {
    const std::string name = tuned_choices().find(kCpuName, tuned_problem_cpu(c, *choice.problem, has_statistics));
    choice.tuned = name == kDirectName || name == Aten::kName;
    choice.direct = choice.tuned ? name == kDirectName : choice.direct;
  }
  return choice;
}

#if defined(__x86_64__)

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
  operands.set_weight(c.weight.tensor->data_ptr(), c.weight.dim, c.weight.sizes, c.weight.strides);
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
inline std::optional<Tensor> direct_convolution([[maybe_unused]] const ConvArguments& c,
                                                [[maybe_unused]] const CpuConvChoice& choice) {
#if defined(__x86_64__)
  if (choice.direct) {
    return convolve_direct(c, *choice.problem);
  }
#endif
  return std::nullopt;
}

}  // namespace fused_conv_bn
