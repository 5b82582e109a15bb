// bn_scale_train in its three forms, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include <tuple>

#include "elementwise.h"

namespace fused_conv_bn {

// Gathers the statistics of e's input, updates the running ones, and writes the output. Everything is checked. One for each
// library.
using RunBnScaleTrain = void(const char* op, const Elementwise& e, ScalarType dtype, const TrainParams& params,
                             const Epilogue& epilogue);
RunBnScaleTrain run_bn_scale_train_cpu;
RunBnScaleTrain run_bn_scale_train_cuda;

// Writes to `target`, or to a new tensor if it is nullptr. saved: nullptr for none.
template <RunBnScaleTrain* kRun>
Tensor apply_bn_scale_train(const char* op, const Operand& x, const TrainOperands& bn, const SavedStatistics* saved,
                            const OptionalOperand& residual, const Epilogue& epilogue, const Operand* target) {
  Elementwise e = make_elementwise(x, residual, target);
  if (e.shape.numel > 0) {
    kRun(op, e, x.dtype, train_params(bn, saved), epilogue);
    e.finish();
  } else if (saved != nullptr) {
    torch::stable::fill_(saved->mean, 0);
    torch::stable::fill_(saved->invstd, 0);
  }
  return e.output;
}

using Stats = std::tuple<Tensor, Tensor, Tensor>;
using FunctionalStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A tensor that a functional form may write to in the place of an argument.
inline OptionalTensor cloned(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(torch::stable::clone(*x)) : std::nullopt;
}

// What a functional form returns for running statistics.
inline Tensor updated(const OptionalTensor& x, const SavedStatistics& saved) {
  if (x.has_value()) {
    return *x;
  }
  const int64_t size = 0, stride = 1;
  return empty_strided(1, &size, &stride, saved.mean.scalar_type(), device_of(saved.mean));
}

template <RunBnScaleTrain* kRun>
struct BnScaleTrain {
  static Tensor plain(Tensor input, OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                      OptionalTensor bias, double scaling_factor, double momentum, double eps, OptionalTensor residual,
                      StringHandle activation, double negative_slope, bool residual_last) {
    std::optional<SavedStatistics> saved;
    return call("bn_scale_train", input,
                train_operands({}, running_mean, running_var, weight, bias, scaling_factor, momentum, eps),
                {residual, take_string(activation), negative_slope, residual_last}, false, saved);
  }

  static Stats stats(Tensor input, OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                     OptionalTensor bias, double scaling_factor, double momentum, double eps, OptionalTensor residual,
                     StringHandle activation, double negative_slope, bool residual_last) {
    std::optional<SavedStatistics> saved;
    const Tensor y = call("bn_scale_train_stats", input,
                          train_operands({}, running_mean, running_var, weight, bias, scaling_factor, momentum, eps),
                          {residual, take_string(activation), negative_slope, residual_last}, true, saved);
    return {y, saved->mean, saved->invstd};
  }

  static FunctionalStats functional(Tensor input, OptionalTensor running_mean, OptionalTensor running_var,
                                    OptionalTensor weight, OptionalTensor bias, double scaling_factor, double momentum,
                                    double eps, OptionalTensor residual, StringHandle activation, double negative_slope,
                                    bool residual_last) {
    const OptionalTensor mean = cloned(running_mean), var = cloned(running_var);
    std::optional<SavedStatistics> saved;
    const Tensor y = call("bn_scale_train_functional", input,
                          train_operands({}, mean, var, weight, bias, scaling_factor, momentum, eps),
                          {residual, take_string(activation), negative_slope, residual_last}, true, saved);
    return {y, saved->mean, saved->invstd, updated(mean, *saved), updated(var, *saved)};
  }

 private:
  static Tensor call(const char* op, const Tensor& input, const TrainOperands& bn, const EpilogueArguments& arguments,
                     bool saves, std::optional<SavedStatistics>& saved) {
    const Operand x("input", input);
    check_input(op, x);
    const OptionalOperand residual = optional_operand("residual", arguments.residual);
    if (residual.has_value()) {
      check_like(op, *residual, x);
    }
    const Epilogue epilogue = check_epilogue(op, arguments);
    bn.check(op, x.sizes, x.dim, "input", x, residual);
    if (saves) {
      saved.emplace(x.sizes[1], x.dtype, x.device);
    }
    return apply_bn_scale_train<kRun>(op, x, bn, saves ? &*saved : nullptr, residual, epilogue, nullptr);
  }
};

}  // namespace fused_conv_bn
