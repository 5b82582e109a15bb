// From tensors to validated operands: every check and every message that a user can meet. (A convolution's: conv_checks.h.)
//
// Nothing is allocated, copied or written before the last check has passed. A message is one sentence: the op, the
// argument, what came, what was expected.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "dtype.h"
#include "kernels/batch_norm/fold.h"
#include "layout.h"
#include "operand.h"

namespace fused_conv_bn {

inline void check_same_device(const char* op, const Operand& x, const Operand& reference) {
  if (x.device != reference.device) {
    fail(op, ": ", x.name, " is on ", x.device.name(), ", expected ", reference.device.name(), ", where ",
         reference.name, " is");
  }
}

inline void check_like(const char* op, const Operand& x, const Operand& input) {
  if (!x.same_shape(input)) {
    fail(op, ": ", x.name, " has shape ", x.shape(), ", expected ", input.shape(), ", the shape of ", input.name);
  }
  if (x.dtype != input.dtype) {
    fail(op, ": ", x.name, " has dtype ", dtype_name(x.dtype), ", expected ", dtype_name(input.dtype),
         ", the dtype of ", input.name);
  }
  check_same_device(op, x, input);
}

inline void check_input(const char* op, const Operand& input) {
  if (input.dim < 2 || input.dim > kMaxDim) {
    fail(op, ": ", input.name, " has shape ", input.shape(),
         ", expected 2 to 5 dimensions: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W)");
  }
  if (!is_supported(input.dtype)) {
    fail(op, ": ", input.name, " has dtype ", dtype_name(input.dtype), ", expected " FCB_DTYPE_NAMES);
  }
  if (input.sizes[1] > kMaxChannels) {
    fail(op, ": ", input.name, " has ", input.sizes[1], " channels, expected at most ", kMaxChannels);
  }
}

// A tensor of one element a channel, with one of two dtypes (which may be the same).
inline void check_channel_param(const char* op, const Operand& x, int64_t channels, const char* channels_from,
                                ScalarType dtype, ScalarType other_dtype, const Operand& reference) {
  if (x.dim != 1 || x.sizes[0] != channels) {
    fail(op, ": ", x.name, " has shape ", x.shape(), ", expected [", channels, "], one element for each channel of ",
         channels_from);
  }
  if (x.dtype != dtype && x.dtype != other_dtype) {
    fail(op, ": ", x.name, " has dtype ", dtype_name(x.dtype), ", expected ", dtype_name(dtype),
         dtype == other_dtype ? "" : " or ", dtype == other_dtype ? "" : dtype_name(other_dtype), " with ",
         reference.name, " of dtype ", dtype_name(reference.dtype));
  }
  check_same_device(op, x, reference);
}

// The names of the schemas' argument `activation`.
constexpr std::pair<const char*, Activation> kActivationNames[kActivations] = {
    {"none", Activation::none},           {"relu", Activation::relu},
    {"relu6", Activation::relu6},         {"silu", Activation::silu},
    {"hardswish", Activation::hardswish}, {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh}, {"leaky_relu", Activation::leaky_relu},
    {"sigmoid", Activation::sigmoid},     {"hardsigmoid", Activation::hardsigmoid},
    {"mish", Activation::mish},           {"tanh", Activation::tanh}};

// name: the argument that says which activation.
inline Epilogue check_epilogue(const char* op, const EpilogueArguments& arguments, const char* name = "activation") {
  std::string names;
  for (const auto& [known, activation] : kActivationNames) {
    if (arguments.activation == known) {
      return {activation, arguments.residual_last, arguments.negative_slope};
    }
    names.append(names.empty() ? "'" : ", '").append(known).append("'");
  }
  fail(op, ": ", name, " is '", arguments.activation, "', expected one of ", names);
}

// [first, last) addresses of a non-empty tensor.
inline std::pair<uintptr_t, uintptr_t> extent(const Operand& x) {
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim; ++d) {
    last += (x.sizes[d] - 1) * x.strides[d];
  }
  const auto first = reinterpret_cast<uintptr_t>(x.tensor->data_ptr());
  return {first, first + static_cast<uintptr_t>(last + 1) * x.tensor->element_size()};
}

// What is written must not change what is still to be read. The same tensor as a whole is fine where every element is
// read just before it is written (`elementwise`); operands that are not dense are copied before anything is written.
inline void check_overlap(const char* op, const Operand& target, const Operand& x, bool elementwise) {
  if (target.numel == 0 || x.numel == 0 || !is_dense(target) || !is_dense(x)) {
    return;
  }
  const auto [target_first, target_last] = extent(target);
  const auto [first, last] = extent(x);
  if (target_first >= last || first >= target_last) {
    return;
  }
  const bool same = first == target_first && x.same_shape(target) &&
                    std::equal(x.strides, x.strides + x.dim, target.strides);
  if (!(same && elementwise)) {
    fail(op, ": ", target.name, " shares memory with ", x.name, ", expected ",
         elementwise ? "the same tensor or separate memory" : "separate memory");
  }
}

inline void check_written(const char* op, const Operand& target) {
  for (int64_t d = 0; d < target.dim; ++d) {
    if (target.numel > 0 && target.sizes[d] > 1 && target.strides[d] == 0) {
      fail(op, ": ", target.name, " has stride 0 in dimension ", d, ", expected a memory location for each element");
    }
  }
}

inline void check_target(const char* op, const Operand& target, const Operand& input) {
  check_like(op, target, input);
  check_written(op, target);
}

// ---- the tensors of a channel ----------------------------------------------------------------------------------------

inline void AffineOperands::check(const char* op, int64_t channels, const char* channels_from, ScalarType dtype,
                                  const Operand& reference) const {
  if (eps < 0) {
    fail(op, ": eps is ", eps, ", expected 0 or more");
  }
  for_each([&](const Operand& x) {
    check_channel_param(op, x, channels, channels_from, dtype, acc_dtype(dtype), reference);
  });
}

inline void TrainOperands::check(const char* op, const int64_t* sizes, int64_t dim, const char* sizes_of,
                                 const Operand& reference, const OptionalOperand& residual) const {
  int64_t values = sizes[0];
  for (int64_t d = 2; d < dim; ++d) {
    values *= sizes[d];
  }
  if (values == 1) {
    fail(op, ": ", sizes_of, " has shape ", list_text(sizes, dim),
         ", expected more than 1 value per channel when training");
  }
  if (running_mean.has_value() != running_var.has_value()) {
    const char* names[] = {"running_mean", "running_var"};
    const bool has_mean = running_mean.has_value();
    fail(op, ": ", names[has_mean], " is missing, expected one beside ", names[!has_mean], ", or neither of them");
  }
  if (eps < 0) {
    fail(op, ": eps is ", eps, ", expected 0 or more");
  }
  for_each([&](const Operand& x) {
    check_channel_param(op, x, sizes[1], sizes_of, reference.dtype, acc_dtype(reference.dtype), reference);
  });
  for (const OptionalOperand* target : {&running_mean, &running_var}) {
    if (!target->has_value()) {
      continue;
    }
    const Operand& t = **target;
    check_written(op, t);
    check_overlap(op, t, reference, false);
    if (residual.has_value()) {
      check_overlap(op, t, *residual, false);
    }
    for_each([&](const Operand& x) {
      if (x.name != t.name) {
        check_overlap(op, t, x, false);
      }
    });
  }
}

}  // namespace fused_conv_bn
