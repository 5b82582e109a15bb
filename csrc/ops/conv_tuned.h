// Which algorithm is the fastest for a convolution on this machine, as tuning has measured it: it comes before the rule.
//
// Each library has a table of its own, which the op _set_choices fills. What it says holds for exactly the problem that was
// measured. An algorithm that does not cover the problem, or is unknown, is not chosen: then the rule decides.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/conv/problem.h"
#include "torch/shim.h"

namespace fused_conv_bn {

// The numbers of Conv2d in their order, whether the dtype is bfloat16 (float16 has as many bytes), whether the batch's statistics
// are taken, and on the CPU how many threads there are.
using TunedProblem = std::array<int64_t, 23>;

inline TunedProblem tuned_problem(const Conv2d& p, ScalarType dtype, bool has_statistics, int64_t threads) {
  return {p.N,
          p.C,
          p.H,
          p.W,
          p.K,
          p.R,
          p.S,
          p.P,
          p.Q,
          p.stride_h,
          p.stride_w,
          p.pad_h,
          p.pad_w,
          p.dilation_h,
          p.dilation_w,
          p.groups,
          p.element_bytes,
          p.channels_last,
          p.has_residual,
          p.allow_tf32,
          dtype == ScalarType::BFloat16,
          has_statistics,
          threads};
}

class TunedChoices {
 public:
  // How many times there was something set: 0 while the table costs nothing but this question.
  uint64_t generation() const { return generation_.load(std::memory_order_relaxed); }

  // Replaces what is known of a device. problems: the numbers of one after the other. algorithms: as many names, with commas
  // between them.
  void set(const char* op, const std::string& device, const std::vector<int64_t>& problems,
           const std::string& algorithms) {
    std::vector<std::string> names;
    for (size_t begin = 0; begin < algorithms.size();) {
      const size_t end = std::min(algorithms.find(',', begin), algorithms.size());
      names.push_back(algorithms.substr(begin, end - begin));
      begin = end + 1;
    }
    constexpr size_t kNumbers = std::tuple_size_v<TunedProblem>;
    if (problems.size() != names.size() * kNumbers) {
      fail(op, ": problems has ", problems.size(), " numbers, expected ", names.size() * kNumbers, ", ", kNumbers,
           " for each of the ", names.size(), " algorithms");
    }
    Table table;
    for (size_t i = 0; i < names.size(); ++i) {
      TunedProblem problem;
      std::copy_n(problems.begin() + static_cast<std::ptrdiff_t>(i * kNumbers), kNumbers, problem.begin());
      table[problem] = names[i];
    }
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    tables_[device] = std::move(table);
    generation_.fetch_add(1, std::memory_order_relaxed);
  }

  // The name of an algorithm; "" where nothing is known.
  std::string find(const std::string& device, const TunedProblem& problem) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto table = tables_.find(device);
    if (table == tables_.end()) {
      return "";
    }
    const auto known = table->second.find(problem);
    return known == table->second.end() ? "" : known->second;
  }

 private:
  using Table = std::map<TunedProblem, std::string>;
  mutable std::shared_mutex mutex_;
  std::map<std::string, Table> tables_;
  std::atomic<uint64_t> generation_ = 0;
};

// The library's own.
TunedChoices& tuned_choices();

}  // namespace fused_conv_bn
