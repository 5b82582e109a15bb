// conv_scale_shift and conv_bn_scale, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "../kernels/select_config.h"
#include "elementwise.h"

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

// What the user forces, by the name that an environment variable has.
template <typename Value, size_t kSize>
Value forced_value(const char* op, const char* variable, const std::pair<const char*, Value> (&list)[kSize],
                   const std::string& name) {
  const std::optional<Value> found = find_by_name(list, name);
  if (!found.has_value()) {
    std::ostringstream names;
    for (const auto& known : list) {
      names << (&known == &list[0] ? "'" : ", '") << known.first << "'";
    }
    fail(op, ": ", variable, " is '", name, "', expected one of ", names.str(), ", or nothing for a choice by rule");
  }
  return *found;
}

// The algorithm that the user forces by name, else the one that select_config() prefers. problem: nullptr for what is not
// two-dimensional, which PyTorch computes.
inline ConvConfig choose_config(const char* op, const std::string& forced, const ConvProblem* problem,
                                const GpuTraits& gpu) {
  const char* const variable = "FUSED_CONV_BN_CONV";
  const bool force = !forced.empty();
  const ConvAlgorithm algorithm = force ? forced_value(op, variable, kConvAlgorithms, forced) : ConvAlgorithm::aten;
  if (algorithm == ConvAlgorithm::aten && (force || problem == nullptr)) {
    return ConvConfig{};
  }
  if (!force) {
    return select_config(*problem, gpu);
  }
  const std::optional<ConvConfig> config = problem == nullptr ? std::nullopt : configure(algorithm, *problem, gpu);
  if (!config.has_value()) {
    fail(op, ": ", variable, " is '", forced, "', which does not cover this convolution, expected 'aten' for it, or ",
         "nothing for a choice by rule");
  }
  return *config;
}

// The same of statistics.
inline ConvStatistics choose_statistics(const char* op, const std::string& forced, const ConvConfig& config,
                                        const ConvProblem& problem, const GpuTraits& gpu) {
  if (forced.empty()) {
    return select_statistics(config, problem, gpu);
  }
  const char* const variable = "FUSED_CONV_BN_STATISTICS";
  const ConvStatistics statistics = forced_value(op, variable, kConvStatistics, forced);
  if (!has_statistics(statistics, config, problem, gpu)) {
    fail(op, ": ", variable, " is '", forced,
         "', which does not cover this convolution, expected 'results' for it, or ", "nothing for a choice by rule");
  }
  return statistics;
}

// What computes a convolution on CUDA: the choice, and what it was made of.
struct CudaConvChoice {
  ConvProblem problem;
  GpuTraits gpu;
  ConvConfig config;
};

// Of the CUDA library, for ops that have a convolution in them.
CudaConvChoice choose_conv_cuda(const char* op, const PlainConv& c, bool has_residual, bool has_statistics,
                                bool allow_tf32);
Tensor run_conv_cuda(const char* op, const ConvArguments& c, const CudaConvChoice& choice);

}  // namespace fused_conv_bn
