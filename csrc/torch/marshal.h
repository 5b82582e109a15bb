// From checked operands to what kernels take: raw pointers and plain structs. Here memory is allocated and copied.
#pragma once

#include <array>
#include <cstdint>

#include "dtype.h"
#include "kernels/batch_norm/fold.h"
#include "kernels/batch_norm/moments.h"
#include "layout.h"
#include "operand.h"

namespace fused_conv_bn {

// What had to be copied, kept alive while a kernel is launched on it.
using Copies = std::array<OptionalTensor, 5>;

// A one-dimensional operand's data as contiguous elements of `dtype`.
inline const void* channel_data(const Operand& x, ScalarType dtype, OptionalTensor& copy) {
  if (x.dtype == dtype && (x.sizes[0] <= 1 || x.strides[0] == 1)) {
    return x.tensor->data_ptr();
  }
  copy = torch::stable::contiguous(torch::stable::to(*x.tensor, dtype));
  return copy->data_ptr();
}

// The view of checked operands that kernels take, for inputs of `dtype`. Kernels know no mixtures of dtypes: operands that are
// not all of the input's are made wide.
inline AffineTensors affine_tensors(const AffineOperands& affine, ScalarType dtype, Copies& copies) {
  bool uniform = true;
  affine.for_each([&](const Operand& x) { uniform = uniform && x.dtype == dtype; });
  const ScalarType common = uniform ? dtype : acc_dtype(dtype);
  const auto data = [&](const OptionalOperand& x, size_t i) {
    return x.has_value() ? channel_data(*x, common, copies[i]) : nullptr;
  };
  return {data(affine.mean, 0),
          data(affine.var, 1),
          data(affine.weight, 2),
          data(affine.bias, 3),
          data(affine.conv_bias, 4),
          affine.scaling_factor,
          affine.eps,
          !uniform || dtype == acc_dtype(dtype)};
}

// A batch's mean and the inverse of its deviation, one of each a channel, in acc_dtype() of the input.
struct SavedStatistics {
  Tensor mean;
  Tensor invstd;
  // The sums over a convolution's input that they come from, in float64: there if they are asked for, and empty if they come from
  // elsewhere.
  OptionalTensor input_sums;

  SavedStatistics(int64_t channels, ScalarType dtype, const Device& device, bool wants_input_sums = false)
      : mean(channel_values(channels, dtype, device)), invstd(channel_values(channels, dtype, device)) {
    if (wants_input_sums) {
      input_sums = channel_values(0, ScalarType::Double, device);
    }
  }

 private:
  static Tensor channel_values(int64_t channels, ScalarType dtype, const Device& device) {
    const int64_t stride = 1;
    return empty_strided(1, &channels, &stride, acc_dtype(dtype), device);
  }
};

inline Element element_of(ScalarType dtype) {
  Element element{};
  dispatch_dtype(dtype, [&](auto tag) { element = kElement<typename decltype(tag)::type>; });
  return element;
}

// A checked operand of one element a channel, for kernels that read or write it as it lies.
inline ChannelBuffer channel_buffer(const OptionalOperand& x) {
  return x.has_value() ? ChannelBuffer{x->tensor->data_ptr(), x->strides[0], element_of(x->dtype)} : ChannelBuffer{};
}

// saved: nullptr for none.
inline TrainParams train_params(const TrainOperands& bn, const SavedStatistics* saved) {
  return {.running_mean = channel_buffer(bn.running_mean),
          .running_var = channel_buffer(bn.running_var),
          .weight = channel_buffer(bn.weight),
          .bias = channel_buffer(bn.bias),
          .conv_bias = channel_buffer(bn.conv_bias),
          .scaling_factor = bn.scaling_factor,
          .momentum = bn.momentum,
          .eps = bn.eps,
          .spare_centers = false,
          .saved_mean = saved == nullptr ? nullptr : saved->mean.data_ptr(),
          .saved_invstd = saved == nullptr ? nullptr : saved->invstd.data_ptr()};
}

// The operands of an elementwise kernel: dense, in one memory layout. `copies` keeps alive what had to be copied.
struct Elementwise {
  const void* input;
  const void* residual;  // nullptr: none
  Tensor output;
  const Tensor* copy_to;  // where the result belongs, if that is not `output`
  bool fresh;             // `output` was just allocated
  Shape shape;
  Device device;
  std::array<OptionalTensor, 2> copies;

  // Call once the kernel is launched.
  void finish() {
    if (copy_to != nullptr) {
      Tensor target = *copy_to;
      torch::stable::copy_(target, output);
    }
  }
};

// A checked operand's data with these strides.
inline const void* dense_data(const Operand& x, const Strides& strides, bool channels_last, OptionalTensor& copy) {
  if (has_strides(x, strides)) {
    return x.tensor->data_ptr();
  }
  copy = torch::stable::contiguous(*x.tensor, memory_format(x.dim, channels_last));
  return copy->data_ptr();
}

inline Shape dense_shape(const Operand& x, bool channels_last) {
  int64_t inner = 1;
  for (int64_t d = 2; d < x.dim && !channels_last; ++d) {
    inner *= x.sizes[d];
  }
  return {x.numel, x.sizes[1], inner};
}

// Checks are done; allocates and copies. `target`: the tensor to write to, nullptr for a new one.
inline Elementwise make_elementwise(const Operand& input, const OptionalOperand& residual, const Operand* target) {
  const bool channels_last = computes_channels_last(input);
  const Strides strides = dense_strides(input, channels_last);
  const bool in_place = target != nullptr && has_strides(*target, strides);
  Elementwise e{
      nullptr,
      nullptr,
      in_place ? *target->tensor : empty_strided(input.dim, input.sizes, strides.data(), input.dtype, input.device),
      target == nullptr || in_place ? nullptr : target->tensor,
      !in_place,
      dense_shape(input, channels_last),
      input.device,
      {}};
  e.input = dense_data(input, strides, channels_last, e.copies[0]);
  e.residual = residual.has_value() ? dense_data(*residual, strides, channels_last, e.copies[1]) : nullptr;
  return e;
}

// What a sequence of kernels passes its results through, for each launch of it.
inline Tensor make_workspace(int64_t doubles, const Device& device) {
  const int64_t stride = 1;
  return empty_strided(1, &doubles, &stride, ScalarType::Double, device);
}

// A checked convolution in the numbers that algorithms are chosen by.
inline ConvProblem conv_problem(const PlainConv& c, bool has_residual, bool allow_tf32) {
  const auto space = [&](const int64_t* sizes) {
    Spatial extents{};
    std::copy(sizes + 2, sizes + c.input.dim, extents.begin());
    return extents;
  };
  return {.space = static_cast<int>(c.space()),
          .N = c.input.sizes[0],
          .C = c.input.sizes[1],
          .K = c.sizes[1],
          .groups = c.groups,
          .input = space(c.input.sizes),
          .filter = space(c.weight.sizes),
          .output = space(c.sizes.data()),
          .stride = c.stride,
          .padding = c.padding,
          .dilation = c.dilation,
          .element_bytes = static_cast<int>(c.input.tensor->element_size()),
          .channels_last = computes_channels_last(c),
          .has_residual = has_residual,
          .allow_tf32 = allow_tf32};
}

}  // namespace fused_conv_bn
