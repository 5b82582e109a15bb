// The backward of bn_scale, scale_shift and bn_scale_train, in one op or in two with the sums between them, and the moments of a
// tensor's channels, but for the device: what their CPU and CUDA kernels share.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "kernels/batch_norm/backward.h"
#include "torch/checks.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

// What kernels take of a backward: pointers to dense memory in one layout, of type `dtype`.
struct BackwardCall {
  const char* op;
  Shape shape;
  ScalarType dtype;
  Device device;
  const void* dy;
  const void* z;
  const void* other;
  void* dz;
  void* dresidual;
  bool from_result;
  BackwardParams bn;
  AffineTensors affine;  // in evaluation
  Epilogue epilogue;
  const double* given;  // sums, [2][channels]; nullptr: none

  template <typename T>
  BackwardTensors<T> tensors() const {
    return {static_cast<const T*>(dy), static_cast<const T*>(z),   static_cast<const T*>(other),
            static_cast<T*>(dz),       static_cast<T*>(dresidual), from_result};
  }
};

// On checked operands that are not empty. One of each for each library.
using RunBackward = void(const BackwardCall& call);
RunBackward run_backward_cpu;
RunBackward run_backward_cuda;

// moments: [count, mean, m2][channels].
using RunMoments = void(const char* op, const void* x, const Shape& shape, ScalarType dtype, const Device& device,
                        double* moments);
RunMoments run_moments_cpu;
RunMoments run_moments_cuda;

// ---- arguments and checks --------------------------------------------------------------------------------------------

// Which gradients are asked for.
struct BackwardNeeds {
  bool input;
  bool weight;
  bool bias;
  bool conv_bias;
  bool residual;
  bool sums;
};

struct BackwardOperands {
  Operand dy;
  OptionalOperand input;
  OptionalOperand result;
  OptionalOperand residual;
  OptionalOperand mean;
  OptionalOperand var;
  OptionalOperand invstd;
  OptionalOperand weight;
  OptionalOperand bias;
  OptionalOperand conv_bias;
  double scaling_factor;
  double eps;
  Epilogue epilogue;

  bool trains() const { return invstd.has_value(); }
  bool from_result() const { return result.has_value(); }
  bool from_input() const { return epilogue.activation != Activation::none && !from_result(); }

  template <typename F>
  void for_each_channel_param(F&& f) const {
    for (const OptionalOperand* x : {&mean, &var, &invstd, &weight, &bias, &conv_bias}) {
      if (x->has_value()) {
        f(**x);
      }
    }
  }
};

inline void check_result(const char* op, const BackwardOperands& b, const std::string& activation) {
  if (!b.result.has_value()) {
    return;
  }
  const Activation a = b.epilogue.activation;
  if (a == Activation::none || !derives_from_result(a)) {
    fail(op, ": result is given with activation '", activation,
         "', expected it with 'relu', 'sigmoid' or 'tanh' alone, whose derivatives it tells");
  }
  if (b.residual.has_value()) {
    fail(op, ": residual is given beside result, expected one of them: the result has the residual in it");
  }
}

// takes_sums: for dz they are given.
inline void check_backward(const char* op, const BackwardOperands& b, const BackwardNeeds& needs,
                           const std::string& activation, bool takes_sums) {
  check_input(op, b.dy);
  for (const OptionalOperand* x : {&b.input, &b.result, &b.residual}) {
    if (x->has_value()) {
      check_like(op, **x, b.dy);
    }
  }
  check_result(op, b, activation);
  if (b.eps < 0) {
    fail(op, ": eps is ", b.eps, ", expected 0 or more");
  }
  if (b.trains() && b.var.has_value()) {
    fail(op, ": var is given beside invstd, expected one of them: var in evaluation, invstd in training");
  }
  if (b.trains() != b.mean.has_value() && !b.var.has_value()) {
    fail(op, ": ", b.trains() ? "mean" : "invstd", " is missing, expected one beside ", b.trains() ? "invstd" : "mean");
  }
  b.for_each_channel_param([&](const Operand& x) {
    check_channel_param(op, x, b.dy.sizes[1], b.dy.name, b.dy.dtype, acc_dtype(b.dy.dtype), b.dy);
  });
  if (!b.input.has_value()) {
    const char* use = needs.weight || (needs.sums && !takes_sums) ? "the gradient of weight"
                      : b.trains() && needs.input                 ? "the gradient of input in training"
                      : b.from_input()                            ? "the derivative of the activation"
                                                                  : nullptr;
    if (use != nullptr) {
      fail(op, ": input is missing, expected it for ", use);
    }
  }
}

// ---- from operands to results ----------------------------------------------------------------------------------------

struct BackwardResults {
  Tensor input, weight, bias, conv_bias, residual, sums;
};

inline Tensor empty_channels(int64_t channels, ScalarType dtype, const Device& device) {
  const int64_t stride = 1;
  return empty_strided(1, &channels, &stride, dtype, device);
}

// Of a parameter, in its dtype, or in another one where it was not given.
inline ChannelBuffer channel_gradient(bool needed, const OptionalOperand& parameter, ScalarType other,
                                      const Operand& dy, Tensor& gradient) {
  if (!needed) {
    return {};
  }
  const ScalarType dtype = parameter.has_value() ? parameter->dtype : other;
  gradient = empty_channels(dy.sizes[1], dtype, dy.device);
  return {gradient.data_ptr(), 1, element_of(dtype)};
}

// Everything is checked. given, counts: of the op that takes sums.
template <RunBackward* kRun>
BackwardResults apply_backward(const char* op, const BackwardOperands& b, const BackwardNeeds& needs,
                               const Tensor* given, const OptionalOperand& counts) {
  const Operand& dy = b.dy;
  // dz lies as eager's would: as what it is the gradient of.
  const Operand& like = b.input.has_value()      ? *b.input
                        : b.result.has_value()   ? *b.result
                        : b.residual.has_value() ? *b.residual
                                                 : dy;
  const bool channels_last = computes_channels_last(like);
  const Strides strides = dense_strides(like, channels_last);
  const int64_t channels = dy.sizes[1];
  BackwardResults results;
  const auto tensor = [&](bool needed, Tensor& result) {
    if (needed) {
      result = empty_strided(dy.dim, dy.sizes, strides.data(), dy.dtype, dy.device);
    }
    return needed ? result.data_ptr() : nullptr;
  };
  BackwardCall call{op,         dense_shape(like, channels_last),
                    dy.dtype,   dy.device,
                    {},         {},
                    {},         {},
                    {},         b.from_result(),
                    {},         {},
                    b.epilogue, given == nullptr ? nullptr : static_cast<const double*>(given->data_ptr())};
  call.dz = tensor(needs.input, results.input);
  call.dresidual = tensor(needs.residual, results.residual);
  const ScalarType wide = acc_dtype(dy.dtype), of_weight = b.weight.has_value() ? b.weight->dtype : wide;
  BackwardParams& bn = call.bn;
  bn = {.mean = channel_buffer(b.mean),
        .var = channel_buffer(b.var),
        .invstd = channel_buffer(b.invstd),
        .weight = channel_buffer(b.weight),
        .bias = channel_buffer(b.bias),
        .conv_bias = channel_buffer(b.conv_bias),
        .scaling_factor = b.scaling_factor,
        .eps = b.eps,
        .counts = channel_buffer(counts),
        .count = channels > 0 ? static_cast<double>(dy.numel / channels) : 0,
        .dweight = channel_gradient(needs.weight, b.weight, wide, dy, results.weight),
        .dbias = channel_gradient(needs.bias, b.bias, of_weight, dy, results.bias),
        .dconv_bias = channel_gradient(needs.conv_bias, b.conv_bias, dy.dtype, dy, results.conv_bias),
        .sums = nullptr};
  if (b.trains()) {
    bn.conv_bias = {};  // the batch's mean is that without it
  }
  if (needs.sums) {
    const int64_t sizes[] = {2, channels}, sums_strides[] = {channels, 1};
    results.sums = empty_strided(2, sizes, sums_strides, ScalarType::Double, dy.device);
    bn.sums = static_cast<double*>(results.sums.data_ptr());
  }
  if (dy.numel == 0) {
    for (Tensor* gradient : {&results.weight, &results.bias, &results.conv_bias, &results.sums}) {
      if (gradient->defined()) {
        torch::stable::fill_(*gradient, 0);
      }
    }
    return results;
  }
  std::array<OptionalTensor, 3> copies;
  const auto data = [&](const OptionalOperand& x, size_t i) {
    return x.has_value() ? dense_data(*x, strides, channels_last, copies[i]) : nullptr;
  };
  const bool needs_z = needs.weight || needs.sums || (b.trains() && needs.input) || b.from_input();
  call.dy = dense_data(dy, strides, channels_last, copies[0]);
  call.z = needs_z ? data(b.input, 1) : nullptr;
  call.other = b.from_result() ? data(b.result, 2) : b.from_input() ? data(b.residual, 2) : nullptr;
  Copies affine_copies;
  if (!b.trains()) {
    const AffineOperands affine{b.mean, b.var, b.weight, b.bias, b.conv_bias, b.scaling_factor, b.eps};
    call.affine = affine_tensors(affine, dy.dtype, affine_copies);
  }
  kRun(call);
  return results;
}

// ---- the ops ---------------------------------------------------------------------------------------------------------

template <RunBackward* kRun>
struct BnScaleBackward {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Gradients all(Tensor dy, OptionalTensor input, OptionalTensor result, OptionalTensor residual,
                       OptionalTensor mean, OptionalTensor var, OptionalTensor invstd, OptionalTensor weight,
                       OptionalTensor bias, OptionalTensor conv_bias, double scaling_factor, double eps,
                       StringHandle activation, double negative_slope, bool needs_input, bool needs_weight,
                       bool needs_bias, bool needs_conv_bias, bool needs_residual) {
    const char* op = "bn_scale_backward";
    const std::string name = take_string(activation);
    const BackwardNeeds needs{needs_input, needs_weight, needs_bias, needs_conv_bias, needs_residual, false};
    const BackwardOperands b = operands(op, dy, input, result, residual, mean, var, invstd, weight, bias, conv_bias,
                                        scaling_factor, eps, name, negative_slope);
    check_backward(op, b, needs, name, false);
    BackwardResults r = apply_backward<kRun>(op, b, needs, nullptr, std::nullopt);
    return {r.input, r.weight, r.bias, r.conv_bias, r.residual};
  }

  static std::tuple<Tensor, Tensor, Tensor> sums(Tensor dy, Tensor input, OptionalTensor result,
                                                 OptionalTensor residual, Tensor mean, Tensor invstd,
                                                 OptionalTensor weight, OptionalTensor bias, double scaling_factor,
                                                 StringHandle activation, double negative_slope, bool needs_weight,
                                                 bool needs_bias) {
    const char* op = "bn_scale_backward_sums";
    const OptionalTensor z(input), center(mean), inverse(invstd);  // operands refer to them
    const std::string name = take_string(activation);
    const BackwardNeeds needs{false, needs_weight, needs_bias, false, false, true};
    const BackwardOperands b = operands(op, dy, z, result, residual, center, {}, inverse, weight, bias, {},
                                        scaling_factor, 0, name, negative_slope);
    check_backward(op, b, needs, name, false);
    BackwardResults r = apply_backward<kRun>(op, b, needs, nullptr, std::nullopt);
    return {r.sums, r.weight, r.bias};
  }

  static std::tuple<Tensor, Tensor> apply(Tensor dy, Tensor input, OptionalTensor result, OptionalTensor residual,
                                          Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
                                          Tensor sums, Tensor count, double scaling_factor, StringHandle activation,
                                          double negative_slope, bool needs_residual) {
    const char* op = "bn_scale_backward_apply";
    const OptionalTensor z(input), center(mean), inverse(invstd);  // operands refer to them
    const std::string name = take_string(activation);
    const BackwardNeeds needs{true, false, false, false, needs_residual, false};
    const BackwardOperands b = operands(op, dy, z, result, residual, center, {}, inverse, weight, bias, {},
                                        scaling_factor, 0, name, negative_slope);
    check_backward(op, b, needs, name, true);
    const int64_t channels = b.dy.sizes[1];
    const Operand s("sums", sums);
    if (s.dim != 2 || s.sizes[0] != 2 || s.sizes[1] != channels || s.dtype != ScalarType::Double) {
      fail(op, ": sums has shape ", s.shape(), " and dtype ", dtype_name(s.dtype), ", expected [2, ", channels,
           "] and float64, as bn_scale_backward_sums puts it out");
    }
    check_same_device(op, s, b.dy);
    const Operand counts("count", count);
    check_channel_param(op, counts, channels, b.dy.name, ScalarType::Double, ScalarType::Double, b.dy);
    const Tensor dense = torch::stable::contiguous(sums);
    BackwardResults r = apply_backward<kRun>(op, b, needs, &dense, counts);
    return {r.input, r.residual};
  }

 private:
  static BackwardOperands operands(const char* op, const Tensor& dy, const OptionalTensor& input,
                                   const OptionalTensor& result, const OptionalTensor& residual,
                                   const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& invstd,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& conv_bias, double scaling_factor, double eps,
                                   const std::string& activation, double negative_slope) {
    return {Operand("dy", dy),
            optional_operand("input", input),
            optional_operand("result", result),
            optional_operand("residual", residual),
            optional_operand("mean", mean),
            optional_operand("var", var),
            optional_operand("invstd", invstd),
            optional_operand("weight", weight),
            optional_operand("bias", bias),
            optional_operand("conv_bias", conv_bias),
            scaling_factor,
            eps,
            check_epilogue(op, {residual, activation, negative_slope, false})};
  }
};

// [count, mean, m2][channels] in float64, for tensors whose channels lie in several processes.
template <RunMoments* kRun>
Tensor bn_moments(Tensor input) {
  const char* op = "bn_moments";
  const Operand x("input", input);
  check_input(op, x);
  const bool channels_last = computes_channels_last(x);
  const int64_t sizes[] = {3, x.sizes[1]}, strides[] = {x.sizes[1], 1};
  Tensor moments = empty_strided(2, sizes, strides, ScalarType::Double, x.device);
  if (x.numel == 0) {
    torch::stable::fill_(moments, 0);
    return moments;
  }
  OptionalTensor copy;
  const void* data = dense_data(x, dense_strides(x, channels_last), channels_last, copy);
  kRun(op, data, dense_shape(x, channels_last), x.dtype, x.device, static_cast<double*>(moments.data_ptr()));
  return moments;
}

}  // namespace fused_conv_bn
