// conv_bn_scale_train in its three forms, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include "bn_scale_train.h"
#include "conv_scale_shift.h"

namespace fused_conv_bn {

// What follows PyTorch's convolution: in place, or in a dense copy where its result is not dense. (Eager's conv1d keeps a permuted
// weight's layout, and its BatchNorm does not.)
template <RunBnScaleTrain* kRun>
Tensor normalise_convolution(const char* op, const Tensor& y, const TrainOperands& bn, const SavedStatistics* saved,
                             const OptionalOperand& residual, const Epilogue& epilogue) {
  const Operand written("output", y);
  const bool channels_last = computes_channels_last(written);
  const bool dense = has_strides(written, dense_strides(written, channels_last));
  const Tensor target = dense ? y : torch::stable::contiguous(y, memory_format(written.dim, channels_last));
  const Operand result("output", target);
  return apply_bn_scale_train<kRun>(op, result, bn, saved, residual, epilogue, &result);
}

// Kernel::run(op, PlainConv, TrainOperands, SavedStatistics*, residual, Epilogue, allow_tf32) computes.
template <typename Kernel>
struct ConvBnScaleTrain {
  static Tensor plain(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor running_mean,
                      OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                      double momentum, double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual, StringHandle activation,
                      double negative_slope, bool residual_last, bool allow_tf32) {
    std::optional<SavedStatistics> saved;
    return call("conv_bn_scale_train", input, conv_weight, stride, padding, dilation, groups,
                train_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, momentum, eps),
                {residual, take_string(activation), negative_slope, residual_last}, allow_tf32, false, saved);
  }

  static Stats stats(Tensor input, Tensor conv_weight, OptionalTensor conv_bias, OptionalTensor running_mean,
                     OptionalTensor running_var, OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                     double momentum, double eps, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual, StringHandle activation,
                     double negative_slope, bool residual_last, bool allow_tf32) {
    std::optional<SavedStatistics> saved;
    const Tensor y = call(
        "conv_bn_scale_train_stats", input, conv_weight, stride, padding, dilation, groups,
        train_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, momentum, eps),
        {residual, take_string(activation), negative_slope, residual_last}, allow_tf32, true, saved);
    return {y, saved->mean, saved->invstd};
  }

  // And the sums over the input that the statistics come from; none, if they come from elsewhere.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> sums(Tensor input, Tensor conv_weight, OptionalTensor conv_bias,
                                                         OptionalTensor running_mean, OptionalTensor running_var,
                                                         OptionalTensor weight, OptionalTensor bias,
                                                         double scaling_factor, double momentum, double eps,
                                                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                         std::vector<int64_t> dilation, int64_t groups,
                                                         OptionalTensor residual, StringHandle activation,
                                                         double negative_slope, bool residual_last, bool allow_tf32) {
    std::optional<SavedStatistics> saved;
    const Tensor y = call(
        "_conv_bn_scale_train_sums", input, conv_weight, stride, padding, dilation, groups,
        train_operands(conv_bias, running_mean, running_var, weight, bias, scaling_factor, momentum, eps),
        {residual, take_string(activation), negative_slope, residual_last}, allow_tf32, true, saved, true);
    return {y, saved->mean, saved->invstd, *saved->input_sums};
  }

  static FunctionalStats functional(Tensor input, Tensor conv_weight, OptionalTensor conv_bias,
                                    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor weight,
                                    OptionalTensor bias, double scaling_factor, double momentum, double eps,
                                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                                    std::vector<int64_t> dilation, int64_t groups, OptionalTensor residual,
                                    StringHandle activation, double negative_slope, bool residual_last,
                                    bool allow_tf32) {
    const OptionalTensor mean = cloned(running_mean), var = cloned(running_var);
    std::optional<SavedStatistics> saved;
    const Tensor y = call("conv_bn_scale_train_functional", input, conv_weight, stride, padding, dilation, groups,
                          train_operands(conv_bias, mean, var, weight, bias, scaling_factor, momentum, eps),
                          {residual, take_string(activation), negative_slope, residual_last}, allow_tf32, true, saved);
    return {y, saved->mean, saved->invstd, updated(mean, *saved), updated(var, *saved)};
  }

 private:
  static Tensor call(const char* op, const Tensor& input, const Tensor& conv_weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                     const TrainOperands& bn, const EpilogueArguments& arguments, bool allow_tf32, bool saves,
                     std::optional<SavedStatistics>& saved, bool wants_input_sums = false) {
    const PlainConv c = check_plain_conv(op, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
    const OptionalOperand residual = check_conv_residual(op, c, arguments.residual);
    const Epilogue epilogue = check_epilogue(op, arguments);
    bn.check(op, c.sizes.data(), c.input.dim, "the output", c.input, residual);
    for (const OptionalOperand* target : {&bn.running_mean, &bn.running_var}) {
      if (target->has_value()) {
        check_overlap(op, **target, c.weight, false);
      }
    }
    if (saves) {
      saved.emplace(c.sizes[1], c.input.dtype, c.input.device, wants_input_sums);
    }
    return with_bn_strides(Kernel::run(op, c, bn, saves ? &*saved : nullptr, residual, epilogue, allow_tf32));
  }
};

}  // namespace fused_conv_bn
