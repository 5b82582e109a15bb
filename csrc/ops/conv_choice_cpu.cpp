// The choice on the CPU: _explain, _candidates, and the table of tuned choices. And what of the choice on CUDA needs no GPU:
// _explain_problem, and the names that use_algorithm() takes.
#include "conv_choice.h"
#include "conv_direct_cpu.h"

namespace fused_conv_bn {

TunedChoices& tuned_choices() {
  static TunedChoices choices;
  return choices;
}

namespace {

std::string describe(const PlainConv& c, bool has_residual, bool has_statistics, bool) {
  const CpuConvChoice choice = choose_conv_cpu(c, has_residual, has_statistics);
  return std::string(choice.direct ? kDirectName : Aten::kName) + (choice.tuned ? kTuned : "");
}

Candidates candidates_of(const PlainConv& c, bool has_residual, bool has_statistics, bool) {
  const CpuConvChoice choice = choose_conv_cpu(c, has_residual, has_statistics);
  if (!choice.covered) {
    return {kCpuName, {}, ""};
  }
  const TunedProblem problem = tuned_problem_cpu(c, *choice.problem, has_statistics);
  return {kCpuName, {problem.begin(), problem.end()}, std::string(kDirectName) + "," + Aten::kName};
}

void set_choices(std::vector<int64_t> problems, StringHandle algorithms) {
  tuned_choices().set("_set_choices", kCpuName, problems, take_string(algorithms));
}

std::string explain_problem(std::vector<int64_t> problem, std::vector<int64_t> gpu, StringHandle algorithm_handle,
                            StringHandle statistics_handle) {
  const char* op = "_explain_problem";
  const std::string algorithm = take_string(algorithm_handle), statistics = take_string(statistics_handle);
  constexpr size_t kProblem = 20, kGpu = 5;
  if (problem.size() != kProblem || gpu.size() != kGpu) {
    fail(op, ": problem and gpu have ", problem.size(), " and ", gpu.size(), " values, expected ", kProblem, " and ",
         kGpu);
  }
  const Conv2d p{.N = problem[0],
                 .C = problem[1],
                 .H = problem[2],
                 .W = problem[3],
                 .K = problem[4],
                 .R = problem[5],
                 .S = problem[6],
                 .P = problem[7],
                 .Q = problem[8],
                 .stride_h = problem[9],
                 .stride_w = problem[10],
                 .pad_h = problem[11],
                 .pad_w = problem[12],
                 .dilation_h = problem[13],
                 .dilation_w = problem[14],
                 .groups = problem[15],
                 .element_bytes = static_cast<int>(problem[16]),
                 .channels_last = problem[17] != 0,
                 .has_residual = problem[18] != 0,
                 .allow_tf32 = problem[19] != 0};
  const GpuTraits traits{.compute_capability = static_cast<int>(gpu[0]),
                         .multiprocessors = static_cast<int>(gpu[1]),
                         .shared_memory_per_block = static_cast<int>(gpu[2]),
                         .shared_memory_per_multiprocessor = static_cast<int>(gpu[3]),
                         .has_wgmma = gpu[4] != 0};
  const auto asked = [](const char* argument, const std::string& name) {
    return Asked{argument, name.c_str(), "or '' for a choice by rule"};
  };
  ConvChoice choice{choose_plan(op, asked("algorithm", algorithm), p, traits, statistics != "none")};
  if (statistics != "none") {
    choice.statistics = choose_statistics(op, asked("statistics", statistics), choice.plan, p, traits);
  }
  return choice.describe();
}

void check_algorithm(StringHandle algorithm_handle, StringHandle statistics_handle) {
  const std::string algorithm = take_string(algorithm_handle), statistics = take_string(statistics_handle);
  use_algorithm({}, algorithm, statistics);
}

void check_environment() {
  const std::string algorithm = variable(kAlgorithmVariable), statistics = variable(kStatisticsVariable);
  if (!algorithm.empty()) {
    find_algorithm("fused_conv_bn", {kAlgorithmVariable, algorithm.c_str(), kVariableOtherwise});
  }
  if (!statistics.empty()) {
    find_statistics("fused_conv_bn", {kStatisticsVariable, statistics.c_str(), kVariableOtherwise});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("_explain_problem", TORCH_BOX(&explain_problem));
  m.impl("_check_algorithm", TORCH_BOX(&check_algorithm));
  m.impl("_check_environment", TORCH_BOX(&check_environment));
  m.impl("_set_choices.cpu", TORCH_BOX(&set_choices));
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("_explain", TORCH_BOX(&explain<describe>));
  m.impl("_candidates", TORCH_BOX(&candidates<candidates_of>));
}

}  // namespace fused_conv_bn
