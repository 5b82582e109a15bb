// Which algorithm computes a convolution, and where a batch's statistics come from: by name and by rule.
//
// Both are pure: plain numbers in, a plan out, no GPU needed.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/statistics/from_input_sm90/plan.h"
#include "registry.h"

namespace fused_conv_bn {

// Where a batch's statistics come from.
enum class ConvStatistics {
  none,         // there are none to take
  from_output,  // the convolution's results: as they are written, or computed twice, or read again, by the algorithm
  from_input,   // sums over the input, before the convolution
};
constexpr std::pair<const char*, ConvStatistics> kConvStatistics[] = {{"from_output", ConvStatistics::from_output},
                                                                      {"from_input", ConvStatistics::from_input}};

constexpr const char* kTuned = ", tuned";  // behind the description of what tuning has chosen

struct ConvChoice {
  ConvPlan plan = Aten{};
  ConvStatistics statistics = ConvStatistics::none;
  bool tuned = false;  // the plan's algorithm was measured to be the fastest for this problem

  std::string describe() const {
    return std::visit([](const auto& p) { return p.describe(); }, plan) +
           (statistics == ConvStatistics::from_input ? ", statistics from the input" : "") + (tuned ? kTuned : "");
  }
};

// f(std::in_place_type<Plan>) for each algorithm in turn, until it returns true.
template <typename F, typename... Plans>
void for_each_algorithm(F&& f, const std::variant<Plans...>*) {
  (f(std::in_place_type<Plans>) || ...);
}
template <typename F>
void for_each_algorithm(F&& f) {
  for_each_algorithm(f, static_cast<const ConvPlan*>(nullptr));
}

inline std::vector<std::string> algorithm_names() {
  std::vector<std::string> names;
  for_each_algorithm([&]<typename Plan>(std::in_place_type_t<Plan>) {
    names.emplace_back(Plan::kName);
    return false;
  });
  return names;
}

// The plan of the algorithm with this name; nullopt if the problem is outside of its domain, or there is none.
inline std::optional<ConvPlan> make_plan(const std::string& name, const Conv2d& problem, const GpuTraits& gpu) {
  std::optional<ConvPlan> made;
  for_each_algorithm([&]<typename Plan>(std::in_place_type_t<Plan>) {
    if (name != Plan::kName) {
      return false;
    }
    if (const std::optional<Plan> plan = Plan::make(problem, gpu)) {
      made = *plan;
    }
    return true;
  });
  return made;
}

// By the rules of the plans. They say where an algorithm is faster than PyTorch's convolution with the epilogue behind it, ReLU's
// and SiLU's. gemm_sm90 and pointwise were measured by themselves (their plan.h), all others on an H200 against
// torch 2.11 with cuDNN 9.19, under PyTorch's default flags, for 834 random problems: 1 to 16 channels and depthwise, filters of
// 1x1 to 7x7, batch 1 to 64, three dtypes, both layouts. By these rules 18 of them took more than 1.03 times PyTorch's time, 1.4
// at most; the geometric mean over all was 1.06 times that of the best choice. train: with a batch's statistics.
inline ConvPlan select_plan(const Conv2d& problem, const GpuTraits& gpu, bool train) {
  ConvPlan selected = Aten{};
  for_each_algorithm([&]<typename Plan>(std::in_place_type_t<Plan>) {
    const std::optional<Plan> plan = Plan::make(problem, gpu);
    if (!plan.has_value() || !plan->is_faster(problem, train)) {
      return false;
    }
    selected = *plan;
    return true;
  });
  return selected;
}

// Whether a batch's statistics can come from there.
inline bool has_statistics(ConvStatistics statistics, const ConvPlan& plan, const Conv2d& problem,
                           const GpuTraits& gpu) {
  return statistics == ConvStatistics::from_output ||
         (std::visit([](const auto& p) { return p.kGathersMoments == GathersMoments::first; }, plan) &&
          FromInputSm90::supports(problem, gpu));
}

// keeps_sums: backward wants the sums over the input, and else takes them itself.
inline ConvStatistics select_statistics(const ConvPlan& plan, const Conv2d& problem, const GpuTraits& gpu,
                                        bool keeps_sums = false) {
  const bool input = (keeps_sums || FromInputSm90::is_faster(problem)) &&
                     has_statistics(ConvStatistics::from_input, plan, problem, gpu);
  return input ? ConvStatistics::from_input : ConvStatistics::from_output;
}

}  // namespace fused_conv_bn
