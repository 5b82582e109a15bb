// A convolution, BatchNorm in training mode and the epilogue on the GPU, by an algorithm of this package: which kernels run, in
// which memory, in which order.
//
// With an algorithm that gathers moments first these come from sums over the input, or from a pass that computes the convolution
// and writes nothing else; then comes the convolution with the affine that they make. With the others the convolution is
// written, with its moments or not, and BatchNorm follows in place: without them BnTrainPlan, which takes them itself.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include "kernels/batch_norm/train.cuh"
#include "launch.cuh"
#include "select.h"

namespace fused_conv_bn {

template <typename T>
struct ConvTrainPlan {
  ConvPlan conv;
  // Where the statistics come from: one of these.
  std::optional<FromInputSm90> from_input;
  std::optional<int64_t> partials;            // moments of each channel that the convolution's own kernel gathers
  std::optional<BnTrainPlan<T>> from_output;  // reads what the convolution has written
  bool in_place;                              // BatchNorm and the epilogue are a pass behind the convolution

  // The chosen plan is not Aten. y: the result, dense and not empty.
  static ConvTrainPlan make(const ConvChoice& choice, const Conv2d& c, const GpuTraits& gpu, const T* y) {
    ConvTrainPlan train{choice.plan, {}, {}, {}, false};
    std::visit(
        [&]<typename Plan>(const Plan& plan) {
          train.in_place = Plan::kGathersMoments != GathersMoments::first;
          if constexpr (Plan::kGathersMoments == GathersMoments::never) {
            train.from_output = BnTrainPlan<T>::make(y, shape_of_output(c), gpu.multiprocessors);
          } else if (choice.statistics == ConvStatistics::from_input) {
            train.from_input = FromInputSm90::make(c, gpu);
          } else {
            train.partials = plan.partials(c, gpu);
          }
        },
        choice.plan);
    return train;
  }

  // Doubles. Of statistics that are gathered here: the affines, then what these come from.
  int64_t workspace(const Conv2d& c) const {
    return from_output.has_value()  ? from_output->workspace()
           : from_input.has_value() ? affine_doubles(c) + from_input->workspace() + FromInputSm90::kSums
                                    : affine_doubles(c) + *partials * c.K * kMomentsDoubles;
  }

  // Of the call's operands the affine is of no account. Its epilogue is the op's. input_sums: where the sums over the input are to
  // be left, if the statistics come from them.
  cudaError_t launch(const ConvCall& call, const TrainParams& bn, double* workspace, cudaStream_t stream,
                     double* input_sums = nullptr) const {
    return std::visit(
        [&]<typename Plan>(const Plan& plan) {
          if constexpr (Plan::kGathersMoments == GathersMoments::first) {
            return statistics_first(plan, call, bn, workspace, input_sums, stream);
          } else {
            return convolution_first(plan, call, bn, workspace, stream);
          }
        },
        conv);
  }

 private:
  static Shape shape_of_output(const Conv2d& c) {
    return {c.N * c.K * c.P * c.Q, c.K, c.channels_last ? 1 : c.P * c.Q};
  }

  // 3 floats a channel.
  static int64_t affine_doubles(const Conv2d& c) { return 2 * c.K; }

  template <typename Plan>
  cudaError_t statistics_first(const Plan& plan, const ConvCall& call, TrainParams bn, double* workspace,
                               double* input_sums, cudaStream_t stream) const {
    const Conv2d& c = call.problem;
    const AffineBuffer affines{workspace, static_cast<uint32_t>(c.K), kElement<T>};
    double* const sums = workspace + affine_doubles(c);
    bn.spare_centers = true;
    cudaError_t status;
    if (from_input.has_value()) {
      double* const all = input_sums == nullptr ? sums + from_input->workspace() : input_sums;
      status = from_input->template launch<T>(c, call.operands, sums, all, bn, affines, stream);
    } else {
      auto* const moments = reinterpret_cast<Moments*>(sums);
      status = plan.template launch_moments<T>({c, plain(call.operands), call.gpu, Epilogue{}}, moments, stream);
      if (status == cudaSuccess) {
        status = launch_bn_finish(bn, moments, *partials, 1, affines, stream);
      }
    }
    if (status != cudaSuccess) {
      return status;
    }
    const auto* const values = static_cast<const float*>(affines.data);
    ConvOperands operands = call.operands;
    operands.affine = {values, nullptr, values + c.K, values + 2 * c.K};
    operands.late_affine = true;
    return plan.template launch<T>({c, operands, call.gpu, call.epilogue}, stream);
  }

  template <typename Plan>
  cudaError_t convolution_first(const Plan& plan, const ConvCall& call, const TrainParams& bn, double* workspace,
                                cudaStream_t stream) const {
    const Conv2d& c = call.problem;
    const ConvOperands operands = plain(call.operands);
    const Epilogue none{};
    const ConvCall alone{c, operands, call.gpu, none};
    auto* const y = static_cast<T*>(call.operands.y);
    const auto* const residual = static_cast<const T*>(call.operands.residual);
    if constexpr (Plan::kGathersMoments == GathersMoments::with_results) {
      auto* const moments = reinterpret_cast<Moments*>(workspace + affine_doubles(c));
      const cudaError_t status = plan.template launch_with_moments<T>(alone, moments, stream);
      if (status != cudaSuccess) {
        return status;
      }
      return launch_bn_normalise(y, residual, y, shape_of_output(c), moments, *partials, 1, workspace, bn,
                                 call.epilogue, stream);
    } else {
      const cudaError_t status = launch_conv<T>(conv, alone, stream);
      if (status != cudaSuccess) {
        return status;
      }
      return from_output->launch(y, residual, y, bn, call.epilogue, workspace, stream);
    }
  }

  // The convolution alone.
  static ConvOperands plain(ConvOperands operands) {
    operands.affine = {};
    operands.residual = nullptr;
    return operands;
  }
};

}  // namespace fused_conv_bn
