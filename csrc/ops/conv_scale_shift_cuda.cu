// conv_scale_shift and conv_bn_scale on CUDA: chooses an algorithm and runs it.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <sstream>

#include "../kernels/conv_kernels.h"
#include "conv_cuda.h"
#include "conv_scale_shift.h"

namespace fused_conv_bn {
namespace {

const GpuTraits& gpu_traits(int32_t index) {
  static const std::vector<GpuTraits> all = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<GpuTraits> traits;
    for (int i = 0; i < count; ++i) {
      const int capability = device_attribute(i, cudaDevAttrComputeCapabilityMajor) * 10 +
                             device_attribute(i, cudaDevAttrComputeCapabilityMinor);
      traits.push_back({capability, device_attribute(i, cudaDevAttrMultiProcessorCount),
                        device_attribute(i, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        device_attribute(i, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                        capability == 90 && conv_hopper_is_compiled()});
    }
    return traits;
  }();
  return all.at(static_cast<size_t>(index));
}

ConvProblem make_problem(const PlainConv& c, bool has_residual, bool allow_tf32) {
  const int64_t* x = c.input.sizes;
  const int64_t* w = c.weight.sizes;
  ConvProblem p{};
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.K = w[0], p.R = w[2], p.S = w[3];
  p.P = c.sizes[2], p.Q = c.sizes[3];
  p.stride_h = c.stride[0], p.stride_w = c.stride[1];
  p.pad_h = c.padding[0], p.pad_w = c.padding[1];
  p.dilation_h = c.dilation[0], p.dilation_w = c.dilation[1];
  p.groups = c.groups;
  p.element_bytes = static_cast<int>(c.input.tensor->element_size());
  p.channels_last = computes_channels_last(c);
  p.has_residual = has_residual;
  p.allow_tf32 = allow_tf32;
  return p;
}

// select_config() tries many tiles, which takes longer than a small convolution: each problem is looked at once.
ConvConfig remembered_config(const ConvProblem& problem, int32_t device, const GpuTraits& gpu) {
  constexpr size_t kMost = 4096;  // where shapes never repeat, the memory shall not grow
  static std::mutex mutex;
  static std::map<std::pair<ConvProblem, int32_t>, ConvConfig> configs;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<ConvProblem, int32_t> key(problem, device);
  const auto known = configs.find(key);
  if (known != configs.end()) {
    return known->second;
  }
  if (configs.size() >= kMost) {
    configs.clear();
  }
  return configs.emplace(key, select_config(problem, gpu)).first->second;
}

// FUSED_CONV_BN_PRINT_CONFIG=1: each choice on stderr, once.
void print_config(const char* op, const PlainConv& c, bool has_residual, bool allow_tf32, const ConvConfig& config) {
  static std::mutex mutex;
  static std::set<std::string> printed;
  const auto window = [&](const Window& values) { return list_text(values.data(), c.space()); };
  std::ostringstream text;
  text << "fused_conv_bn: " << op << " of " << c.input.shape() << " with " << c.weight.shape() << ", stride "
       << window(c.stride) << ", padding " << window(c.padding) << ", dilation " << window(c.dilation) << ", groups "
       << c.groups << ", " << dtype_name(c.input.dtype)
       << (computes_channels_last(c) ? " channels_last" : " contiguous") << (has_residual ? ", residual" : "")
       << (allow_tf32 ? ", TF32" : "") << ": " << config_text(config) << "\n";
  const std::string line = text.str();
  const std::lock_guard<std::mutex> lock(mutex);
  if (printed.insert(line).second) {
    std::fputs(line.c_str(), stderr);
  }
}

// An algorithm of this package: launch(TypeTag<T>, ConvOperands) starts its kernel.
template <typename Launch>
Tensor run_kernel(const char* op, const ConvArguments& c, const CudaScope& cuda, uintptr_t alignment, bool dense_weight,
                  const Launch& launch) {
  Copies copies;
  KernelConv conv(c, alignment, dense_weight);
  conv.operands.affine = affine_tensors(c.affine, c.input.dtype, copies);
  conv.operands.residual = c.residual.has_value() ? conv.copies.data(*c.residual, conv.channels_last) : nullptr;
  dispatch_dtype(c.input.dtype, [&](auto tag) { cuda.check_launch(op, launch(tag, conv.operands)); });
  return conv.y;
}

struct CudaKernel {
  static Tensor run(const char* op, const ConvArguments& c, bool allow_tf32) {
    return run_conv_cuda(op, c, choose_conv_cuda(op, c, c.residual.has_value(), false, allow_tf32));
  }
};

}  // namespace

CudaConvChoice choose_conv_cuda(const char* op, const PlainConv& c, bool has_residual, bool has_statistics,
                                bool allow_tf32) {
  const bool two_dimensional = c.space() == 2 && c.numel > 0;
  CudaConvChoice choice{two_dimensional ? make_problem(c, has_residual, allow_tf32) : ConvProblem{},
                        gpu_traits(c.input.device.index),
                        {}};
  const auto setting = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value == nullptr ? "" : value);
  };
  const std::string forced = setting("FUSED_CONV_BN_CONV");
  choice.config = two_dimensional && forced.empty()
                      ? remembered_config(choice.problem, c.input.device.index, choice.gpu)
                      : choose_config(op, forced, two_dimensional ? &choice.problem : nullptr, choice.gpu);
  if (has_statistics) {
    choice.config.statistics = choose_statistics(op, setting("FUSED_CONV_BN_STATISTICS"), choice.config, choice.problem,
                                                 choice.gpu);
  }
  if (setting("FUSED_CONV_BN_PRINT_CONFIG") == "1") {
    print_config(op, c, has_residual, allow_tf32, choice.config);
  }
  return choice;
}

Tensor run_conv_cuda(const char* op, const ConvArguments& c, const CudaConvChoice& choice) {
  const CudaScope cuda(c.input.device);
  const ConvConfig& config = choice.config;
  const bool depthwise = config.algorithm == ConvAlgorithm::depthwise;
  const bool hopper = config.algorithm == ConvAlgorithm::hopper;
  const uintptr_t alignment = hopper ? kHopperAlignment : (depthwise && choice.problem.channels_last ? 16 : 1);
  const auto run = [&](const auto& launch) {
    return run_kernel(op, c, cuda, alignment, hopper, [&](auto tag, const ConvOperands& operands) {
      if constexpr (sizeof(typename decltype(tag)::type) <= 4) {  // none is for float64
        return launch(tag, operands);
      }
      return cudaErrorInvalidValue;
    });
  };
  switch (config.algorithm) {
    case ConvAlgorithm::hopper:
      return run([&](auto tag, const ConvOperands& operands) {
        return launch_conv_hopper<typename decltype(tag)::type>(choice.problem, operands, config.hopper, choice.gpu,
                                                                c.epilogue, nullptr, cuda.stream());
      });
    case ConvAlgorithm::few_channels:
      return run([&](auto tag, const ConvOperands& operands) {
        return launch_conv_few_channels<typename decltype(tag)::type>(choice.problem, operands, config.few_channels,
                                                                      choice.gpu, c.epilogue, cuda.stream());
      });
    case ConvAlgorithm::depthwise:
      return run([&](auto tag, const ConvOperands& operands) {
        return launch_conv_depthwise<typename decltype(tag)::type>(
            choice.problem, operands, c.epilogue, config.depthwise, choice.gpu.multiprocessors, cuda.stream());
      });
    case ConvAlgorithm::aten:
      break;
  }
  return convolve_and_apply<run_elementwise_cuda>(op, c);
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CudaKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CudaKernel>::conv_bn_scale));
}

}  // namespace fused_conv_bn
