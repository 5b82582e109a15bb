// conv_scale_shift and conv_bn_scale, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "elementwise.h"
#include "kernels/conv/select.h"
#include "torch/conv_checks.h"

namespace fused_conv_bn {

// The result of a convolution under the strides that PyTorch's BatchNorm puts out: of extents of 1, they are others.
inline Tensor with_bn_strides(const Tensor& y) {
  const Operand result("output", y);
  const Strides strides = dense_strides(result, computes_channels_last(result));
  return std::equal(result.strides, result.strides + result.dim, strides.begin()) ? y : with_strides(y, strides.data());
}

// Kernel::run(op, ConvArguments, allow_tf32) computes.
template <typename Kernel>
struct ConvOps {
  static Tensor conv_scale_shift(Tensor input, Tensor weight, OptionalTensor scale, OptionalTensor shift,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                                 StringHandle activation, double negative_slope, bool residual_last, bool allow_tf32) {
    const char* op = "conv_scale_shift";
    const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
    const PlainConv c = check_plain_conv(op, input, "weight", weight, stride, padding, dilation, groups);
    const AffineOperands affine = scale_shift_operands(scale, shift);
    affine.check(op, c.sizes[1], "the output", acc_dtype(c.input.dtype), c.input);
    return call(op, c, affine, arguments, allow_tf32, false);
  }

  static Tensor conv_bn_scale(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, Tensor running_mean,
                              Tensor running_var, OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                              double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                              std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                              StringHandle activation, double negative_slope, bool residual_last, bool allow_tf32) {
    const char* op = "conv_bn_scale";
    const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
    const PlainConv c = check_plain_conv(op, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
    const AffineOperands bn = bn_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps);
    bn.check(op, c.sizes[1], "the output", c.input.dtype, c.input);
    return with_bn_strides(call(op, c, bn, arguments, allow_tf32, true));
  }

 private:
  static Tensor call(const char* op, const PlainConv& c, const AffineOperands& affine,
                     const EpilogueArguments& arguments, bool allow_tf32, bool dense) {
    const OptionalOperand residual = check_conv_residual(op, c, arguments.residual);
    return Kernel::run(op, {c, affine, residual, check_epilogue(op, arguments), dense}, allow_tf32);
  }
};

// PyTorch's convolution, in the strides that it chooses.
inline Tensor plain_convolution(const PlainConv& c) {
  return convolution(*c.input.tensor, *c.weight.tensor, c.space(), c.stride.data(), c.padding.data(), c.dilation.data(),
                     c.groups);
}

// The same, then the affine and the epilogue in place.
template <RunElementwise* kRun>
Tensor convolve_and_apply(const char* op, const ConvArguments& c) {
  const Tensor y = plain_convolution(c);
  if (c.affine.is_identity() && !c.residual.has_value() && c.epilogue.activation == Activation::none) {
    return y;
  }
  // In place, or by way of a dense tensor where the convolution's result is none: eager's conv1d keeps a permuted weight's layout,
  // and its BatchNorm does not.
  const Operand result("output", y);
  const Tensor dense = apply_elementwise<kRun>(op, result, c.affine, c.residual, c.epilogue, &result);
  return c.dense ? dense : y;
}

// What the user forces with an environment variable, which has a name that is not one of these.
[[noreturn]] inline void fail_unknown_choice(const char* op, const char* variable, const std::string& forced,
                                             const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) {
    list.append(list.empty() ? "'" : ", '").append(name).append("'");
  }
  fail(op, ": ", variable, " is '", forced, "', expected one of ", list, ", or nothing for a choice by rule");
}

// The plan of the algorithm that the user forces by name, else of the one that select_plan() prefers. problem: nullptr for what
// is not two-dimensional, which PyTorch computes.
inline ConvPlan choose_plan(const char* op, const std::string& forced, const Conv2d* problem, const GpuTraits& gpu) {
  const char* const variable = "FUSED_CONV_BN_CONV";
  if (forced.empty()) {
    return problem == nullptr ? ConvPlan(Aten{}) : select_plan(*problem, gpu);
  }
  const std::vector<std::string> names = algorithm_names();
  if (std::find(names.begin(), names.end(), forced) == names.end()) {
    fail_unknown_choice(op, variable, forced, names);
  }
  if (forced == Aten::kName) {
    return Aten{};
  }
  const std::optional<ConvPlan> plan = problem == nullptr ? std::nullopt : make_plan(forced, *problem, gpu);
  if (!plan.has_value()) {
    fail(op, ": ", variable, " is '", forced, "', which does not cover this convolution, expected 'aten' for it, or ",
         "nothing for a choice by rule");
  }
  return *plan;
}

// The same of statistics.
inline ConvStatistics choose_statistics(const char* op, const std::string& forced, const ConvPlan& plan,
                                        const Conv2d& problem, const GpuTraits& gpu) {
  if (forced.empty()) {
    return select_statistics(plan, problem, gpu);
  }
  const char* const variable = "FUSED_CONV_BN_STATISTICS";
  std::vector<std::string> names;
  for (const auto& [name, statistics] : kConvStatistics) {
    if (forced != name) {
      names.emplace_back(name);
      continue;
    }
    if (!has_statistics(statistics, plan, problem, gpu)) {
      fail(op, ": ", variable, " is '", forced,
           "', which does not cover this convolution, expected 'from_output' for it, or nothing for a choice by rule");
    }
    return statistics;
  }
  fail_unknown_choice(op, variable, forced, names);
}

// What computes a convolution on CUDA: the choice, and what it was made of.
struct CudaConvChoice {
  Conv2d problem;
  GpuTraits gpu;
  ConvChoice choice;
};

// Of the CUDA library, for ops that have a convolution in them.
CudaConvChoice choose_conv_cuda(const char* op, const PlainConv& c, bool has_residual, bool has_statistics,
                                bool allow_tf32);
Tensor run_conv_cuda(const char* op, const ConvArguments& c, const CudaConvChoice& choice);

}  // namespace fused_conv_bn
