// The algorithms that compute a convolution: the only list.
//
// An algorithm is a folder with a plan: what its kernel has to be told besides the problem. A plan is plain numbers, made
// without a GPU, and has
//
//     kName                       as users call the algorithm
//     kGathersMoments             how it gathers a batch's moments (problem.h), by what further launch function
//     make(problem, gpu)          a plan; nullopt where the problem is outside of the algorithm's domain
//     is_faster(problem, train)   than PyTorch's convolution with a pass behind it, by measurements; train: with a batch's
//                                 statistics, which are taken before the epilogue
//     requirements(problem)       how operands have to lie
//     describe()                  the algorithm and its tile in words
//     launch<T>(call, stream)     T: float, float16, bfloat16
//     takes_gates(problem)        whether it can multiply x by gates on its way; without it, it never does
//     has_faster_gates(problem)   than a pass of their own before it, by measurements
//     parts_of_means(problem, gpu)  of how many parts of each image it needs room for sums to put out the means of its results'
//                                   channels too, perhaps 0; nullopt where it can not; without it, it never does
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "kernels/conv/depthwise/plan.h"
#include "kernels/conv/gemm_sm80/plan.h"
#include "kernels/conv/gemm_sm90/plan.h"
#include "kernels/conv/pointwise/plan.h"
#include "kernels/conv/stem_sm80/plan.h"
#include "kernels/conv/stem_sm90/plan.h"
#include "problem.h"

namespace fused_conv_bn {

// PyTorch's convolution without a bias, then the affine and the epilogue in place. It takes every problem.
struct Aten {
  static constexpr const char* kName = "aten";
  static constexpr GathersMoments kGathersMoments = GathersMoments::never;

  static std::optional<Aten> make(const Conv2d&, const GpuTraits&) { return Aten{}; }
  bool is_faster(const Conv2d&, bool) const { return true; }
  ConvRequirements requirements(const Conv2d&) const { return {}; }
  std::string describe() const { return kName; }
};

// The first one whose plan exists and is faster computes a convolution.
using ConvPlan = std::variant<Pointwise, GemmSm90, StemSm90, StemSm80, Depthwise, GemmSm80, Aten>;

inline ConvRequirements requirements_of(const ConvPlan& plan, const Conv2d& problem) {
  return std::visit([&](const auto& p) { return p.requirements(problem); }, plan);
}

// asked_for: the algorithm, by name.
inline bool takes_gates(const ConvPlan& plan, const Conv2d& problem, bool asked_for) {
  return std::visit(
      [&]<typename Plan>(const Plan& p) {
        if constexpr (requires { p.takes_gates(problem); }) {
          return p.takes_gates(problem) && (asked_for || p.has_faster_gates(problem));
        } else {
          return false;
        }
      },
      plan);
}

// nullopt where the algorithm puts out no means.
inline std::optional<int64_t> parts_of_means(const ConvPlan& plan, const Conv2d& problem, const GpuTraits& gpu) {
  return std::visit(
      [&]<typename Plan>(const Plan& p) -> std::optional<int64_t> {
        if constexpr (requires { p.parts_of_means(problem, gpu); }) {
          return p.parts_of_means(problem, gpu);
        } else {
          return std::nullopt;
        }
      },
      plan);
}

}  // namespace fused_conv_bn
