// From tensors to validated, dense operands: every check and every message that a user can meet.
//
// Nothing is allocated, copied or written before the last check has passed. A message is one sentence: the op, the
// argument, what came, what was expected.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"
#include "kernels/batch_norm/fold.h"
#include "kernels/batch_norm/moments.h"
#include "kernels/common/epilogue.h"
#include "kernels/elementwise/memory_format.h"
#include "shim.h"

namespace fused_conv_bn {

constexpr int64_t kMaxDim = 5;
using Sizes = std::array<int64_t, kMaxDim>;
using Strides = std::array<int64_t, kMaxDim>;

inline std::string list_text(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + "]";
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
        tensor(&t),
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

// ---- memory layout ---------------------------------------------------------------------------------------------------

// The dimensions from the innermost to the outermost one of a channels_last tensor: C, then space from the last, then N.
inline int64_t channels_last_order(int64_t dim, int64_t position) {
  return position == 0 ? 1 : (position == dim - 1 ? 0 : dim - position);
}

// PyTorch's Tensor.suggest_memory_format(): whether the strides read as channels_last (4-D) or channels_last_3d (5-D).
// Extents of 1 make strides ambiguous, and what is ambiguous counts as contiguous.
inline bool suggests_channels_last(const Operand& x) {
  if (x.dim < 4 || x.strides[1] == 0) {
    return false;
  }
  int64_t least = 0;
  for (int64_t position = 0; position < x.dim; ++position) {
    const int64_t d = channels_last_order(x.dim, position);
    if (x.sizes[d] == 0 || x.strides[d] < least || (d == 0 && least == x.strides[1])) {
      return false;
    }
    least = x.strides[d] * (x.sizes[d] > 1 ? x.sizes[d] : 1);
  }
  return true;
}

inline Strides dense_strides(int64_t dim, const int64_t* sizes, bool channels_last) {
  Strides strides{};
  int64_t next = 1;
  for (int64_t position = 0; position < dim; ++position) {
    const int64_t d = channels_last ? channels_last_order(dim, position) : dim - 1 - position;
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

inline Strides dense_strides(const Operand& x, bool channels_last) {
  return dense_strides(x.dim, x.sizes, channels_last);
}

// Whether x's elements lie as the given strides say. The strides of extents of 1 do not count.
inline bool has_strides(const Operand& x, const Strides& strides) {
  for (int64_t d = 0; d < x.dim; ++d) {
    if (x.sizes[d] > 1 && x.strides[d] != strides[d]) {
      return x.numel == 0;
    }
  }
  return true;
}

inline bool is_dense(const Operand& x) {
  return has_strides(x, dense_strides(x, false)) || (x.dim >= 4 && has_strides(x, dense_strides(x, true)));
}

// Whether eager's F.batch_norm would put out x's shape as channels_last. Its CPU kernels ask for a dense layout first,
// contiguous before channels_last; cuDNN's go by the strides alone. They differ where extents of 1 leave a choice.
inline bool computes_channels_last(const Operand& x) {
  if (x.device.type != aoti_torch_device_type_cpu()) {
    return suggests_channels_last(x);
  }
  if (x.dim < 4 || has_strides(x, dense_strides(x, false))) {
    return false;
  }
  return has_strides(x, dense_strides(x, true)) || suggests_channels_last(x);
}

inline MemoryFormat memory_format(int64_t dim, bool channels_last) {
  if (!channels_last) {
    return MemoryFormat::Contiguous;
  }
  return dim == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// ---- checks ----------------------------------------------------------------------------------------------------------

inline void check_same_device(const char* op, const Operand& x, const Operand& reference) {
  if (x.device != reference.device) {
    fail(op, ": ", x.name, " is on ", x.device.name(), ", expected ", reference.device.name(), ", where ",
         reference.name, " is");
  }
}

inline void check_like(const char* op, const Operand& x, const Operand& input) {
  if (!x.same_shape(input)) {
    fail(op, ": ", x.name, " has shape ", x.shape(), ", expected ", input.shape(), ", the shape of input");
  }
  if (x.dtype != input.dtype) {
    fail(op, ": ", x.name, " has dtype ", dtype_name(x.dtype), ", expected ", dtype_name(input.dtype),
         ", the dtype of input");
  }
  check_same_device(op, x, input);
}

inline void check_input(const char* op, const Operand& input) {
  if (input.dim < 2 || input.dim > kMaxDim) {
    fail(op, ": input has shape ", input.shape(),
         ", expected 2 to 5 dimensions: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W)");
  }
  if (!is_supported(input.dtype)) {
    fail(op, ": input has dtype ", dtype_name(input.dtype), ", expected " FCB_DTYPE_NAMES);
  }
  if (input.sizes[1] > kMaxChannels) {
    fail(op, ": input has ", input.sizes[1], " channels, expected at most ", kMaxChannels);
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

// The schemas' <epilogue>, as it comes.
struct EpilogueArguments {
  const OptionalTensor& residual;
  std::string activation;
  double negative_slope;
  bool residual_last;
};

inline Epilogue check_epilogue(const char* op, const EpilogueArguments& arguments) {
  std::string names;
  for (const auto& [known, activation] : kActivationNames) {
    if (arguments.activation == known) {
      return {activation, arguments.residual_last, arguments.negative_slope};
    }
    names.append(names.empty() ? "'" : ", '").append(known).append("'");
  }
  fail(op, ": activation is '", arguments.activation, "', expected one of ", names);
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

// ---- the affine of a channel -----------------------------------------------------------------------------------------

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

  // Each operand has the dtype, or acc_dtype() of it.
  void check(const char* op, int64_t channels, const char* channels_from, ScalarType dtype,
             const Operand& reference) const {
    if (eps < 0) {
      fail(op, ": eps is ", eps, ", expected 0 or more");
    }
    for_each([&](const Operand& x) {
      check_channel_param(op, x, channels, channels_from, dtype, acc_dtype(dtype), reference);
    });
  }
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

// ---- convolutions ----------------------------------------------------------------------------------------------------

constexpr int64_t kMaxSpace = kMaxDim - 2;
using Window = std::array<int64_t, kMaxSpace>;  // a value for each spatial dimension

// What a convolution is by itself, checked.
struct PlainConv {
  Operand input;
  Operand weight;
  Window stride;
  Window padding;
  Window dilation;
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

// stride, padding or dilation: a value for each spatial dimension, or one for all of them, as in PyTorch.
inline Window check_window(const char* op, const char* name, const std::vector<int64_t>& values, int64_t space,
                           int64_t least) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const auto count = static_cast<int64_t>(values.size());
  if (count != 1 && count != space) {
    fail(op, ": ", name, " has ", count, " values, expected 1", space == 1 ? "" : " or ",
         space == 1 ? "" : std::to_string(space), ", for the ", space, " spatial dimension", space == 1 ? "" : "s",
         " of input");
  }
  Window window{};
  for (int64_t d = 0; d < space; ++d) {
    window[d] = values[count == 1 ? 0 : d];
    if (window[d] < least || window[d] > kMost) {
      fail(op, ": ", name, " is ", list_text(values.data(), count), ", expected values from ", least, " to ", kMost);
    }
  }
  return window;
}

inline void check_conv_weight(const char* op, const Operand& weight, const Operand& input, int64_t groups) {
  if (weight.dim != input.dim) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected ", input.dim,
         " dimensions, as many as input: (output channels, input channels / groups, then the kernel)");
  }
  if (weight.dtype != input.dtype) {
    fail(op, ": ", weight.name, " has dtype ", dtype_name(weight.dtype), ", expected ", dtype_name(input.dtype),
         ", the dtype of input");
  }
  check_same_device(op, weight, input);
  if (weight.numel == 0) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected at least one element in each dimension");
  }
  if (groups < 1 || input.sizes[1] % groups != 0 || weight.sizes[0] % groups != 0) {
    fail(op, ": groups is ", groups, ", expected a divisor of the ", input.sizes[1], " channels of input and of the ",
         weight.sizes[0], " output channels of ", weight.name);
  }
  if (weight.sizes[1] != input.sizes[1] / groups) {
    fail(op, ": ", weight.name, " has shape ", weight.shape(), ", expected ", input.sizes[1] / groups,
         " in dimension 1, the channels of input, ", input.sizes[1], ", over groups, ", groups);
  }
  if (weight.sizes[0] > kMaxChannels) {
    fail(op, ": ", weight.name, " has ", weight.sizes[0], " output channels, expected at most ", kMaxChannels);
  }
}

inline PlainConv check_plain_conv(const char* op, const Tensor& input, const char* weight_name, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  PlainConv c{Operand("input", input), Operand(weight_name, weight), {}, {}, {}, groups, {}, 1};
  const Operand& x = c.input;
  if (x.dim < 3) {
    fail(op, ": input has shape ", x.shape(),
         ", expected 3 to 5 dimensions: (N, C, L), (N, C, H, W) or (N, C, D, H, W)");
  }
  check_input(op, x);
  for (int64_t d = 1; d < x.dim; ++d) {
    if (x.sizes[d] == 0) {
      fail(op, ": input has shape ", x.shape(), ", expected at least one element in each dimension but the first");
    }
  }
  check_conv_weight(op, c.weight, x, groups);
  c.stride = check_window(op, "stride", stride, c.space(), 1);
  c.padding = check_window(op, "padding", padding, c.space(), 0);
  c.dilation = check_window(op, "dilation", dilation, c.space(), 1);
  c.sizes[0] = x.sizes[0];
  c.sizes[1] = c.weight.sizes[0];
  for (int64_t d = 0; d < c.space(); ++d) {
    const int64_t padded = x.sizes[d + 2] + 2 * c.padding[d];
    const int64_t taps = c.weight.sizes[d + 2];
    if (taps - 1 > (padded - 1) / c.dilation[d]) {
      fail(op, ": ", c.weight.name, " has shape ", c.weight.shape(),
           ", expected a kernel that fits into input of shape ", x.shape(), ": in dimension ", d + 2, " that has ",
           padded, " elements with its padding, and ", taps, " taps with dilation ", c.dilation[d], " cover more");
    }
    c.sizes[d + 2] = (padded - 1 - c.dilation[d] * (taps - 1)) / c.stride[d] + 1;
  }
  for (int64_t d = 0; d < x.dim; ++d) {
    c.numel *= c.sizes[d];
  }
  return c;
}

// The residual of a convolution.
inline OptionalOperand check_conv_residual(const char* op, const PlainConv& c, const OptionalTensor& residual) {
  const OptionalOperand r = optional_operand("residual", residual);
  if (r.has_value()) {
    const Operand& x = c.input;
    if (r->dim != x.dim || !std::equal(r->sizes, r->sizes + r->dim, c.sizes.begin())) {
      fail(op, ": residual has shape ", r->shape(), ", expected ", list_text(c.sizes.data(), x.dim),
           ", the shape of the output");
    }
    if (r->dtype != x.dtype) {
      fail(op, ": residual has dtype ", dtype_name(r->dtype), ", expected ", dtype_name(x.dtype),
           ", the dtype of input");
    }
    check_same_device(op, *r, x);
  }
  return r;
}

// Whether eager's convolution puts its result out as channels_last: cuDNN and PyTorch's CPU kernels do if the input or
// the weight reads as that, but for float64 on CUDA and in 5 dimensions, and for empty batches.
inline bool computes_channels_last(const PlainConv& c) {
  const bool on_cpu = c.input.device.type == aoti_torch_device_type_cpu();
  if (c.numel == 0 || (c.input.dtype == ScalarType::Double && !(on_cpu && c.input.dim == 4))) {
    return false;
  }
  return suggests_channels_last(c.input) || suggests_channels_last(c.weight);
}

// ---- operands of the kernels -----------------------------------------------------------------------------------------

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

  // sizes: of what is normalised, which F.batch_norm wants to have more than one element a channel. It takes an empty
  // tensor for what it is, and so do we.
  void check(const char* op, const int64_t* sizes, int64_t dim, const char* sizes_of, const Operand& reference,
             const OptionalOperand& residual) const {
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

// A batch's mean and the inverse of its deviation, one of each a channel, in acc_dtype() of the input.
struct SavedStatistics {
  Tensor mean;
  Tensor invstd;

  SavedStatistics(int64_t channels, ScalarType dtype, const Device& device)
      : mean(channel_values(channels, dtype, device)), invstd(channel_values(channels, dtype, device)) {}

 private:
  static Tensor channel_values(int64_t channels, ScalarType dtype, const Device& device) {
    const int64_t stride = 1;
    return empty_strided(1, &channels, &stride, acc_dtype(dtype), device);
  }
};

// A checked operand of one element a channel, for kernels that read or write it as it lies.
inline ChannelBuffer channel_buffer(const OptionalOperand& x) {
  ChannelBuffer buffer{};
  if (x.has_value()) {
    buffer = {x->tensor->data_ptr(), x->strides[0], {}};
    dispatch_dtype(x->dtype, [&](auto tag) { buffer.element = kElement<typename decltype(tag)::type>; });
  }
  return buffer;
}

// saved: nullptr for none.
inline TrainParams train_params(const TrainOperands& bn, const SavedStatistics* saved, bool spare_centers = false) {
  return {channel_buffer(bn.running_mean),
          channel_buffer(bn.running_var),
          channel_buffer(bn.weight),
          channel_buffer(bn.bias),
          channel_buffer(bn.conv_bias),
          bn.scaling_factor,
          bn.momentum,
          bn.eps,
          spare_centers,
          saved == nullptr ? nullptr : saved->mean.data_ptr(),
          saved == nullptr ? nullptr : saved->invstd.data_ptr()};
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

// Checks are done; allocates and copies. `target`: the tensor to write to, nullptr for a new one.
inline Elementwise make_elementwise(const Operand& input, const OptionalOperand& residual, const Operand* target) {
  const bool channels_last = computes_channels_last(input);
  const Strides strides = dense_strides(input, channels_last);
  int64_t inner = 1;
  for (int64_t d = 2; d < input.dim && !channels_last; ++d) {
    inner *= input.sizes[d];
  }
  const bool in_place = target != nullptr && has_strides(*target, strides);
  Elementwise e{
      nullptr,
      nullptr,
      in_place ? *target->tensor : empty_strided(input.dim, input.sizes, strides.data(), input.dtype, input.device),
      target == nullptr || in_place ? nullptr : target->tensor,
      !in_place,
      Shape{input.numel, input.sizes[1], inner},
      input.device,
      {}};
  const auto dense_data = [&](const Operand& x, OptionalTensor& copy) -> const void* {
    if (has_strides(x, strides)) {
      return x.tensor->data_ptr();
    }
    copy = torch::stable::contiguous(*x.tensor, memory_format(x.dim, channels_last));
    return copy->data_ptr();
  };
  e.input = dense_data(input, e.copies[0]);
  e.residual = residual.has_value() ? dense_data(*residual, e.copies[1]) : nullptr;
  return e;
}

}  // namespace fused_conv_bn
