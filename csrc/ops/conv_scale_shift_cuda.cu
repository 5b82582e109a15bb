// conv_scale_shift and conv_bn_scale on CUDA: chooses an algorithm and runs it.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <sstream>

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
                        capability == 90 && has_stem_sm90()});
    }
    return traits;
  }();
  return all.at(static_cast<size_t>(index));
}

Conv2d make_problem(const PlainConv& c, bool has_residual, bool allow_tf32) {
  const int64_t* x = c.input.sizes;
  const int64_t* w = c.weight.sizes;
  Conv2d p{};
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

// select_plan() tries many tiles, which takes longer than a small convolution: each problem is looked at once.
ConvPlan remembered_plan(const Conv2d& problem, int32_t device, const GpuTraits& gpu) {
  constexpr size_t kMost = 4096;  // where shapes never repeat, the memory shall not grow
  static std::mutex mutex;
  static std::map<std::pair<Conv2d, int32_t>, ConvPlan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<Conv2d, int32_t> key(problem, device);
  const auto known = plans.find(key);
  if (known != plans.end()) {
    return known->second;
  }
  if (plans.size() >= kMost) {
    plans.clear();
  }
  return plans.emplace(key, select_plan(problem, gpu)).first->second;
}

// FUSED_CONV_BN_PRINT_CONFIG=1: each choice on stderr, once.
void print_config(const char* op, const PlainConv& c, bool has_residual, bool allow_tf32, const ConvChoice& choice) {
  static std::mutex mutex;
  static std::set<std::string> printed;
  const auto window = [&](const Spatial& values) { return list_text(values.data(), c.space()); };
  std::ostringstream text;
  text << "fused_conv_bn: " << op << " of " << c.input.shape() << " with " << c.weight.shape() << ", stride "
       << window(c.stride) << ", padding " << window(c.padding) << ", dilation " << window(c.dilation) << ", groups "
       << c.groups << ", " << dtype_name(c.input.dtype)
       << (computes_channels_last(c) ? " channels_last" : " contiguous") << (has_residual ? ", residual" : "")
       << (allow_tf32 ? ", TF32" : "") << ": " << choice.describe() << "\n";
  const std::string line = text.str();
  const std::lock_guard<std::mutex> lock(mutex);
  if (printed.insert(line).second) {
    std::fputs(line.c_str(), stderr);
  }
}

// An algorithm of this package.
template <typename Plan>
Tensor run_plan(const char* op, const ConvArguments& c, const Plan& plan, const CudaConvChoice& choice) {
  const CudaScope cuda(c.input.device);
  Copies copies;
  KernelConv conv(c, plan.requirements(choice.problem));
  conv.operands.affine = affine_tensors(c.affine, c.input.dtype, copies);
  conv.operands.residual = c.residual.has_value() ? conv.copies.data(*c.residual, conv.channels_last) : nullptr;
  const ConvCall call{choice.problem, conv.operands, choice.gpu, c.epilogue};
  dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
    if constexpr (sizeof(T) <= 4) {  // none is for float64
      cuda.check_launch(op, plan.template launch<T>(call, cuda.stream()));
    }
  });
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
  CudaConvChoice choice{
      two_dimensional ? make_problem(c, has_residual, allow_tf32) : Conv2d{}, gpu_traits(c.input.device.index), {}};
  const auto setting = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value == nullptr ? "" : value);
  };
  const std::string forced = setting("FUSED_CONV_BN_CONV");
  choice.choice.plan = two_dimensional && forced.empty()
                           ? remembered_plan(choice.problem, c.input.device.index, choice.gpu)
                           : choose_plan(op, forced, two_dimensional ? &choice.problem : nullptr, choice.gpu);
  if (has_statistics) {
    choice.choice.statistics = choose_statistics(op, setting("FUSED_CONV_BN_STATISTICS"), choice.choice.plan,
                                                 choice.problem, choice.gpu);
  }
  if (setting("FUSED_CONV_BN_PRINT_CONFIG") == "1") {
    print_config(op, c, has_residual, allow_tf32, choice.choice);
  }
  return choice;
}

Tensor run_conv_cuda(const char* op, const ConvArguments& c, const CudaConvChoice& choice) {
  return std::visit(
      [&]<typename Plan>(const Plan& plan) {
        if constexpr (std::is_same_v<Plan, Aten>) {
          return convolve_and_apply<run_elementwise_cuda>(op, c);
        } else {
          return run_plan(op, c, plan, choice);
        }
      },
      choice.choice.plan);
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvOps<CudaKernel>::conv_scale_shift));
  m.impl("conv_bn_scale", TORCH_BOX(&ConvOps<CudaKernel>::conv_bn_scale));
}

}  // namespace fused_conv_bn
