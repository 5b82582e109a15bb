// _conv_config: select_plan() on plain numbers, for tests. In the CPU library, as it needs no GPU.
#include "conv_scale_shift.h"

namespace fused_conv_bn {
namespace {

std::string conv_config(std::vector<int64_t> problem, std::vector<int64_t> gpu, StringHandle algorithm_handle,
                        StringHandle statistics_handle) {
  const char* op = "_conv_config";
  const std::string algorithm = take_string(algorithm_handle), statistics = take_string(statistics_handle);
  constexpr size_t kProblem = 20, kGpu = 5;
  if (problem.size() != kProblem || gpu.size() != kGpu) {
    fail(op, ": problem and gpu have ", problem.size(), " and ", gpu.size(), " values, expected ", kProblem, " and ",
         kGpu);
  }
  const int64_t* v = problem.data();
  const Conv2d p{v[0],
                 v[1],
                 v[2],
                 v[3],
                 v[4],
                 v[5],
                 v[6],
                 v[7],
                 v[8],
                 v[9],
                 v[10],
                 v[11],
                 v[12],
                 v[13],
                 v[14],
                 v[15],
                 static_cast<int>(v[16]),
                 v[17] != 0,
                 v[18] != 0,
                 v[19] != 0};
  const GpuTraits traits{static_cast<int>(gpu[0]), static_cast<int>(gpu[1]), static_cast<int>(gpu[2]),
                         static_cast<int>(gpu[3]), gpu[4] != 0};
  ConvChoice choice{choose_plan(op, algorithm, &p, traits)};
  if (statistics != "none") {
    choice.statistics = choose_statistics(op, statistics, choice.plan, p, traits);
  }
  return choice.describe();
}

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("_conv_config", TORCH_BOX(&fused_conv_bn::conv_config));
}
