// The choice of an algorithm on CUDA: what the user asks for, by use_algorithm() or in the environment, else the rule.
#include <cstdlib>

#include "conv_choice.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

const GpuTraits& gpu_traits(int32_t index) {
  static const std::vector<GpuTraits> all = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<GpuTraits> traits;
    for (int i = 0; i < count; ++i) {
      const int capability = device_attribute(i, cudaDevAttrComputeCapabilityMajor) * 10 +
                             device_attribute(i, cudaDevAttrComputeCapabilityMinor);
      traits.push_back(
          {.compute_capability = capability,
           .multiprocessors = device_attribute(i, cudaDevAttrMultiProcessorCount),
           .shared_memory_per_block = device_attribute(i, cudaDevAttrMaxSharedMemoryPerBlockOptin),
           .shared_memory_per_multiprocessor = device_attribute(i, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
           .has_wgmma = capability == 90 && StemSm90::is_compiled()});
    }
    return traits;
  }();
  return all.at(static_cast<size_t>(index));
}

namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Read once, when the library is loaded. Unknown names are refused by the first convolution.
constexpr const char* kAlgorithmVariable = "FUSED_CONV_BN_CONV";
constexpr const char* kStatisticsVariable = "FUSED_CONV_BN_STATISTICS";
const std::string default_algorithm = variable(kAlgorithmVariable);
const std::string default_statistics = variable(kStatisticsVariable);

thread_local ThreadChoice thread_choice;

Asked asked(const char* chosen, const char* argument, const std::string& by_default, const char* from) {
  return chosen == nullptr ? Asked{from, by_default.c_str(), "or nothing for a choice by rule"}
                           : Asked{argument, chosen, kUseAlgorithmOtherwise};
}

std::tuple<std::string, std::string> use_algorithm_cuda(StringHandle algorithm_handle, StringHandle statistics_handle) {
  const std::string algorithm = take_string(algorithm_handle), statistics = take_string(statistics_handle);
  const ThreadChoice before = thread_choice;
  thread_choice = use_algorithm(before, algorithm, statistics);
  const auto name = [](const char* chosen) {
    return chosen == nullptr ? kDefault : *chosen == '\0' ? kByRule : chosen;
  };
  return {name(before.algorithm), name(before.statistics)};
}

ConvPlan remembered_plan(const Conv2d& problem, int32_t device, const GpuTraits& gpu) {
  static RememberedPlans<std::pair<Conv2d, int32_t>, ConvPlan> plans;
  return plans.get({problem, device}, [&] { return select_plan(problem, gpu); });
}

std::string describe(const PlainConv& c, bool has_residual, bool has_statistics, bool allow_tf32) {
  return choose_conv_cuda("explain", c, has_residual, has_statistics, allow_tf32).describe();
}

}  // namespace

CudaConvChoice choose_conv_cuda(const char* op, const PlainConv& c, bool has_residual, bool has_statistics,
                                bool allow_tf32, bool keeps_sums) {
  const std::optional<Conv2d> problem = narrow_to_2d(conv_problem(c, has_residual, allow_tf32));
  const int32_t device = c.input.device.index;
  CudaConvChoice choice{{}, problem.value_or(Conv2d{}), gpu_traits(device)};
  const Asked algorithm = asked(thread_choice.algorithm, "use_algorithm's algorithm", default_algorithm,
                                kAlgorithmVariable);
  choice.plan = problem.has_value() && algorithm.by_rule() ? remembered_plan(*problem, device, choice.gpu)
                                                           : choose_plan(op, algorithm, problem, choice.gpu);
  if (has_statistics) {
    const Asked statistics = asked(thread_choice.statistics, "use_algorithm's statistics", default_statistics,
                                   kStatisticsVariable);
    choice.statistics = choose_statistics(op, statistics, choice.plan, choice.problem, choice.gpu, keeps_sums);
  }
  return choice;
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("_use_algorithm", TORCH_BOX(&use_algorithm_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("_explain", TORCH_BOX(&explain<describe>)); }

}  // namespace fused_conv_bn
