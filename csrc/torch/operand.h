// Arguments of an op as they come, with their names and their metadata read once, and what ops are called with together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/common/epilogue.h"
#include "kernels/conv/problem.h"
#include "shim.h"

namespace fused_conv_bn {

constexpr int64_t kMaxDim = 2 + kMaxSpace;
using Sizes = std::array<int64_t, kMaxDim>;
using Strides = std::array<int64_t, kMaxDim>;

inline std::string list_text(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + "]";
}

// None, which PyTorch passes on as an undefined tensor where an op wants one, ends in a sentence.
inline const Tensor& defined(const char* argument, const Tensor& t) {
  if (!t.defined()) {
    fail("fused_conv_bn: ", argument, " is None, expected a tensor");
  }
  return t;
}

// A tensor argument with its name and its metadata, read once. Refers to the argument.
struct Operand {
  const char* name;
  const Tensor* tensor;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t numel;
  ScalarType dtype;
  Device device;

  Operand(const char* argument, const Tensor& t)
      : name(argument),
        tensor(&defined(argument, t)),
        dim(t.dim()),
        sizes(t.sizes().data()),
        strides(t.strides().data()),
        numel(t.numel()),
        dtype(t.scalar_type()),
        device(device_of(t)) {}

  std::string shape() const { return list_text(sizes, dim); }

  bool same_shape(const Operand& other) const {
    return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }
};
using OptionalOperand = std::optional<Operand>;

inline OptionalOperand optional_operand(const char* name, const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalOperand(Operand(name, *tensor)) : std::nullopt;
}

// The schemas' <epilogue>, as it comes.
struct EpilogueArguments {
  const OptionalTensor& residual;
  std::string activation;
  double negative_slope;
  bool residual_last;
};

// BatchNorm's tensors and a convolution's bias, or a scale and a shift as weight and bias.
struct AffineOperands {
  OptionalOperand mean;
  OptionalOperand var;
  OptionalOperand weight;
  OptionalOperand bias;
  OptionalOperand conv_bias;
  double scaling_factor = 1;
  double eps = 0;

  template <typename F>
  void for_each(F&& f) const {
    for (const OptionalOperand* x : {&mean, &var, &weight, &bias, &conv_bias}) {
      if (x->has_value()) {
        f(**x);
      }
    }
  }

  bool is_identity() const {
    bool result = scaling_factor == 1;
    for_each([&](const Operand&) { result = false; });
    return result;
  }

  // In checks.h. Each operand has the dtype, or acc_dtype() of it.
  void check(const char* op, int64_t channels, const char* channels_from, ScalarType dtype,
             const Operand& reference) const;
};

inline AffineOperands bn_operands(const OptionalTensor& conv_bias, const Tensor& running_mean,
                                  const Tensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                                  double scaling_factor, double eps) {
  return {Operand("running_mean", running_mean),
          Operand("running_var", running_var),
          optional_operand("weight", weight),
          optional_operand("bias", bias),
          optional_operand("conv_bias", conv_bias),
          scaling_factor,
          eps};
}

// They are in acc_dtype(): what fold_bn puts out.
inline AffineOperands scale_shift_operands(const OptionalTensor& scale, const OptionalTensor& shift) {
  AffineOperands affine;
  affine.weight = optional_operand("scale", scale);
  affine.bias = optional_operand("shift", shift);
  return affine;
}

// What a convolution is by itself, checked.
struct PlainConv {
  Operand input;
  Operand weight;
  Spatial stride;
  Spatial padding;
  Spatial dilation;
  int64_t groups;
  Sizes sizes;  // of the result
  int64_t numel;

  int64_t space() const { return input.dim - 2; }
};

// A convolution, the affine of its results, and its epilogue.
struct ConvArguments : PlainConv {
  AffineOperands affine;
  OptionalOperand residual;
  Epilogue epilogue;
  bool dense = false;  // the result is to be dense, whatever PyTorch's convolution puts out
};

// BatchNorm's tensors and numbers in training mode, in the order of the schema.
struct TrainOperands {
  OptionalOperand conv_bias;
  OptionalOperand running_mean;
  OptionalOperand running_var;
  OptionalOperand weight;
  OptionalOperand bias;
  double scaling_factor;
  double momentum;
  double eps;

  template <typename F>
  void for_each(F&& f) const {
    for (const OptionalOperand* x : {&conv_bias, &running_mean, &running_var, &weight, &bias}) {
      if (x->has_value()) {
        f(**x);
      }
    }
  }

  // In checks.h. sizes: of what is normalised, which F.batch_norm wants to have more than one element a channel. It takes an
  // empty tensor for what it is, and so do we.
  void check(const char* op, const int64_t* sizes, int64_t dim, const char* sizes_of, const Operand& reference,
             const OptionalOperand& residual) const;
};

inline TrainOperands train_operands(const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& weight,
                                    const OptionalTensor& bias, double scaling_factor, double momentum, double eps) {
  return {optional_operand("conv_bias", conv_bias),
          optional_operand("running_mean", running_mean),
          optional_operand("running_var", running_var),
          optional_operand("weight", weight),
          optional_operand("bias", bias),
          scaling_factor,
          momentum,
          eps};
}

}  // namespace fused_conv_bn
