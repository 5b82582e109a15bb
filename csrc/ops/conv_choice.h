// What computes a convolution: the algorithm that the user asks for, else the one that tuning has found, else the one that is
// chosen by rule.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "conv_tuned.h"
#include "kernels/conv/select.h"
#include "torch/conv_checks.h"

namespace fused_conv_bn {

// An algorithm, or a source of statistics, that the user asks for.
struct Asked {
  const char* where;      // what the user has set
  const char* name;       // "": nothing, and the choice is by rule
  const char* otherwise;  // how the user asks for a choice by rule, as messages end

  bool by_rule() const { return *name == '\0'; }
};

[[noreturn]] inline void fail_unknown(const char* op, const Asked& asked, const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) {
    list.append(list.empty() ? "'" : ", '").append(name).append("'");
  }
  fail(op, ": ", asked.where, " is '", asked.name, "', expected one of ", list, ", ", asked.otherwise);
}

[[noreturn]] inline void fail_not_covered(const char* op, const Asked& asked, const char* instead) {
  fail(op, ": ", asked.where, " is '", asked.name, "', which does not cover this convolution, expected '", instead,
       "' for it, ", asked.otherwise);
}

// The algorithm of this name, as its plan spells it.
inline const char* find_algorithm(const char* op, const Asked& asked) {
  const char* found = nullptr;
  for_each_algorithm([&]<typename Plan>(std::in_place_type_t<Plan>) {
    found = std::strcmp(asked.name, Plan::kName) == 0 ? Plan::kName : nullptr;
    return found != nullptr;
  });
  if (found == nullptr) {
    fail_unknown(op, asked, algorithm_names());
  }
  return found;
}

// The same of statistics.
inline const std::pair<const char*, ConvStatistics>& find_statistics(const char* op, const Asked& asked) {
  std::vector<std::string> names;
  for (const auto& known : kConvStatistics) {
    if (std::strcmp(asked.name, known.first) == 0) {
      return known;
    }
    names.emplace_back(known.first);
  }
  fail_unknown(op, asked, names);
}

// The plan of the algorithm that the user asks for, else of the one that select_plan() prefers. problem: nothing for what no
// algorithm of this package takes, and PyTorch computes.
inline ConvPlan choose_plan(const char* op, const Asked& asked, const std::optional<Conv2d>& problem,
                            const GpuTraits& gpu, bool train) {
  if (asked.by_rule()) {
    return problem.has_value() ? select_plan(*problem, gpu, train) : ConvPlan(Aten{});
  }
  const std::string name = find_algorithm(op, asked);
  if (name == Aten::kName) {
    return Aten{};
  }
  const std::optional<ConvPlan> plan = problem.has_value() ? make_plan(name, *problem, gpu) : std::nullopt;
  if (!plan.has_value()) {
    fail_not_covered(op, asked, Aten::kName);
  }
  return *plan;
}

// The same of statistics.
inline ConvStatistics choose_statistics(const char* op, const Asked& asked, const ConvPlan& plan, const Conv2d& problem,
                                        const GpuTraits& gpu, bool keeps_sums = false) {
  if (asked.by_rule()) {
    return select_statistics(plan, problem, gpu, keeps_sums);
  }
  const ConvStatistics statistics = find_statistics(op, asked).second;
  if (!has_statistics(statistics, plan, problem, gpu)) {
    fail_not_covered(op, asked, "from_output");
  }
  return statistics;
}

// The environment's names. The CUDA library reads them once, when it is loaded.
constexpr const char* kAlgorithmVariable = "FUSED_CONV_BN_CONV";
constexpr const char* kStatisticsVariable = "FUSED_CONV_BN_STATISTICS";
constexpr const char* kVariableOtherwise = "or nothing for a choice by rule";

inline std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// What use_algorithm() has set for a thread; nullptr: what the environment says.
struct ThreadChoice {
  const char* algorithm = nullptr;
  const char* statistics = nullptr;
};

constexpr const char* kByRule = "by rule";
constexpr const char* kDefault = "default";
constexpr const char* kUseAlgorithmOtherwise = "'by rule' or 'default'";

// A choice after use_algorithm(algorithm, statistics) inside of it. An empty name leaves things as they are.
inline ThreadChoice use_algorithm(ThreadChoice choice, const std::string& algorithm, const std::string& statistics) {
  const auto apply = [](const char*& current, const char* argument, const std::string& name, const auto& find) {
    if (name == kDefault) {
      current = nullptr;
    } else if (name == kByRule) {
      current = "";
    } else if (!name.empty()) {
      current = find("use_algorithm", Asked{argument, name.c_str(), kUseAlgorithmOtherwise});
    }
  };
  apply(choice.algorithm, "algorithm", algorithm, find_algorithm);
  apply(choice.statistics, "statistics", statistics,
        [](const char* op, const Asked& asked) { return find_statistics(op, asked).first; });
  return choice;
}

// What computes a convolution on CUDA: the choice, and what it was made of.
struct CudaConvChoice : ConvChoice {
  Conv2d problem;
  GpuTraits gpu;
  bool asked_for = false;  // the plan's algorithm, by name
};

// Making a plan tries many tiles, which takes longer than a small convolution: each problem is looked at once.
template <typename Key, typename Plan>
class RememberedPlans {
 public:
  template <typename Make>
  Plan get(const Key& key, Make&& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = plans_.find(key);
    if (known != plans_.end()) {
      return known->second;
    }
    if (plans_.size() >= kMost) {
      plans_.clear();
    }
    return plans_.emplace(key, make()).first->second;
  }

 private:
  static constexpr size_t kMost = 4096;  // where shapes never repeat, the memory shall not grow
  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

// Of the CUDA library: a device, asked for once.
const GpuTraits& gpu_traits(int32_t index);

// The same, for ops that have a convolution in them. keeps_sums: see select_statistics().
CudaConvChoice choose_conv_cuda(const char* op, const PlainConv& c, bool has_residual, bool has_statistics,
                                bool allow_tf32, bool keeps_sums = false);

// The device's name, the problem's numbers as _set_choices takes them, and the names of the algorithms that cover it, with commas
// between them. No numbers and no names where there is nothing to choose.
using Candidates = std::tuple<std::string, std::vector<int64_t>, std::string>;

// _candidates, but for the device: find(PlainConv, has_residual, has_statistics, allow_tf32).
template <auto* find>
Candidates candidates(Tensor input, Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, bool has_residual, bool has_statistics,
                      bool allow_tf32) {
  const PlainConv c = check_plain_conv("_candidates", input, "weight", weight, stride, padding, dilation, groups);
  return find(c, has_residual, has_statistics, allow_tf32);
}

// _explain, but for the device: describe(PlainConv, has_residual, has_statistics, allow_tf32).
template <auto* describe>
std::string explain(Tensor input, Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool has_residual, bool has_statistics,
                    bool allow_tf32) {
  const PlainConv c = check_plain_conv("explain", input, "weight", weight, stride, padding, dilation, groups);
  return describe(c, has_residual, has_statistics, allow_tf32);
}

}  // namespace fused_conv_bn
