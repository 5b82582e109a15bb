// The choice of an algorithm on CUDA: what the user asks for, by use_algorithm() or in the environment, else what tuning has found,
// else the rule.

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

TunedChoices& tuned_choices() {
  static TunedChoices choices;
  return choices;
}

namespace {

// A device as tuned choices are kept for it: with another driver it is another one. Asked for once.
const std::string& device_name(int32_t index) {
  static const std::vector<std::string> all = [] {
    int count = 0, driver = 0;
    cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      cudaGetDeviceProperties(&properties, i);
      names.push_back(std::string(properties.name) + ", driver " + std::to_string(driver / 1000) + "." +
                      std::to_string(driver % 1000 / 10));
    }
    return names;
  }();
  return all.at(static_cast<size_t>(index));
}

// Read once, when the library is loaded. Unknown names are refused by the first convolution, and before by Python's import.
const std::string default_algorithm = variable(kAlgorithmVariable);
const std::string default_statistics = variable(kStatisticsVariable);

thread_local ThreadChoice thread_choice;

Asked asked(const char* chosen, const char* argument, const std::string& by_default, const char* from) {
  return chosen == nullptr ? Asked{from, by_default.c_str(), kVariableOtherwise}
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

// What is tuned, else the rule's. generation: of the tuned choices; 0: the rule alone.
ConvChoice remembered_choice(const PlainConv& c, const Conv2d& problem, bool has_statistics, const GpuTraits& gpu,
                             uint64_t generation) {
  static RememberedPlans<std::tuple<Conv2d, int32_t, uint64_t, bool, bool>, ConvChoice> choices;
  const int32_t device = c.input.device.index;
  const bool tuned = generation != 0;  // to the rule the dtype makes no difference
  const bool is_bfloat16 = tuned && c.input.dtype == ScalarType::BFloat16;
  return choices.get({problem, device, generation, is_bfloat16, has_statistics}, [&]() -> ConvChoice {
    if (tuned) {
      const std::string name = tuned_choices().find(device_name(device),
                                                    tuned_problem(problem, c.input.dtype, has_statistics, 0));
      if (const std::optional<ConvPlan> plan = make_plan(name, problem, gpu)) {
        return {.plan = *plan, .tuned = true};
      }
    }
    return {.plan = select_plan(problem, gpu, has_statistics)};
  });
}

Candidates candidates_of(const PlainConv& c, bool has_residual, bool has_statistics, bool allow_tf32) {
  const std::string& device = device_name(c.input.device.index);
  const std::optional<Conv2d> problem = narrow_to_2d(conv_problem(c, has_residual, allow_tf32));
  std::string names;
  int count = 0;
  for (const std::string& name : algorithm_names()) {
    if (problem.has_value() && make_plan(name, *problem, gpu_traits(c.input.device.index)).has_value()) {
      names.append(count == 0 ? "" : ",").append(name);
      ++count;
    }
  }
  if (count < 2) {
    return {device, {}, ""};
  }
  const TunedProblem numbers = tuned_problem(*problem, c.input.dtype, has_statistics, 0);
  return {device, {numbers.begin(), numbers.end()}, names};
}

void set_choices(std::vector<int64_t> problems, StringHandle algorithms, StringHandle device_handle) {
  const std::string names = take_string(algorithms), device = take_string(device_handle);
  tuned_choices().set("_set_choices", device, problems, names);
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
  if (problem.has_value() && algorithm.by_rule()) {
    // A user who asks for the rule gets the rule.
    const uint64_t generation = thread_choice.algorithm == nullptr ? tuned_choices().generation() : 0;
    static_cast<ConvChoice&>(choice) = remembered_choice(c, *problem, has_statistics, choice.gpu, generation);
  } else {
    choice.plan = choose_plan(op, algorithm, problem, choice.gpu, has_statistics);
    choice.asked_for = !algorithm.by_rule();
  }
  if (has_statistics) {
    const Asked statistics = asked(thread_choice.statistics, "use_algorithm's statistics", default_statistics,
                                   kStatisticsVariable);
    choice.statistics = choose_statistics(op, statistics, choice.plan, choice.problem, choice.gpu, keeps_sums);
  }
  return choice;
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("_use_algorithm", TORCH_BOX(&use_algorithm_cuda));
  m.impl("_set_choices.cuda", TORCH_BOX(&set_choices));
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("_explain", TORCH_BOX(&explain<describe>));
  m.impl("_candidates", TORCH_BOX(&candidates<candidates_of>));
}

}  // namespace fused_conv_bn
