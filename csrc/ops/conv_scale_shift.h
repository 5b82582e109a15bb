// conv_scale_shift, but for the device: what its CPU and CUDA kernels share.
#pragma once

#include "../checks.h"
#include "../kernels/select_config.h"

namespace fused_conv_bn {

// Kernel::run(op, ConvArguments, allow_tf32) computes.
template <typename Kernel>
struct ConvScaleShift {
  static Tensor functional(Tensor input, Tensor weight, Tensor scale, Tensor shift, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                           OptionalTensor residual, StringHandle activation, bool allow_tf32) {
    const char* op = "conv_scale_shift";
    const std::string activation_name = take_string(activation);
    return Kernel::run(
        op, check_conv(op, input, weight, scale, shift, stride, padding, dilation, groups, residual, activation_name),
        allow_tf32);
  }
};

// PyTorch's convolution of the input with `weight`, in the memory format that the result is to have.
inline Tensor plain_convolution(const PlainConv& c, const Tensor& weight, const Tensor* bias) {
  Tensor y = convolution(*c.input.tensor, weight, bias, c.space(), c.stride.data(), c.padding.data(), c.dilation.data(),
                         c.groups);
  const bool channels_last = computes_channels_last(c);
  // PyTorch's flags may have chosen another: then this is one copy.
  return has_strides(Operand("output", y), dense_strides(c.input.dim, c.sizes.data(), channels_last))
             ? y
             : torch::stable::contiguous(y, memory_format(c.input.dim, channels_last));
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
