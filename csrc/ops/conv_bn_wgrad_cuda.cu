// _conv_bn_wgrad on CUDA: the gradients of a convolution's weight and of the BatchNorm behind it, for few input channels, from the
// gradient of the output and the input alone (kernels/conv/wgrad_stem_sm80/plan.h).
#include <tuple>

#include "conv_choice.h"
#include "conv_cuda.h"
#include "kernels/conv/wgrad_stem_sm80/operands.h"
#include "kernels/conv/wgrad_stem_sm80/plan.h"
#include "torch/marshal.h"

namespace fused_conv_bn {
namespace {

constexpr const char* kOp = "_conv_bn_wgrad";

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor channel_values(bool wanted, int64_t channels, ScalarType dtype, const Device& device) {
  const int64_t size = wanted ? channels : 0, stride = 1;
  return empty_strided(1, &size, &stride, dtype, device);
}

ChannelBuffer buffer_of(const Tensor& x) { return x.numel() == 0 ? ChannelBuffer{} : channel_buffer(Operand("", x)); }

WeightBuffer buffer_of(const Tensor& x, const int64_t* strides) {
  return {x.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Activation check_derivative(const std::string& name, const OptionalOperand& result) {
  for (const Activation activation : {Activation::none, Activation::relu, Activation::sigmoid, Activation::tanh}) {
    if (name == kActivationNames[static_cast<int>(activation)].first &&
        result.has_value() == (activation != Activation::none)) {
      return activation;
    }
  }
  fail(kOp, ": activation is '", name, "' ", result.has_value() ? "with" : "without",
       " result, expected 'relu', 'sigmoid' or 'tanh' with it or 'none' without it");
}

// problem, device, has_result, has_statistics, has_input_sums
using PlanKey = std::tuple<Conv2d, int32_t, bool, bool, bool>;

std::optional<WgradStemSm80> remembered_plan(const PlanKey& key) {
  static RememberedPlans<PlanKey, std::optional<WgradStemSm80>> plans;
  return plans.get(key, [&] {
    const auto& [problem, device, has_result, has_statistics, has_input_sums] = key;
    return WgradStemSm80::make(problem, gpu_traits(device), has_result, has_statistics, has_input_sums);
  });
}

Gradients wgrad_cuda(Tensor dy, OptionalTensor result, Tensor input, Tensor conv_weight, OptionalTensor conv_bias,
                     OptionalTensor mean, OptionalTensor var, OptionalTensor weight, double scaling_factor, double eps,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, StringHandle activation, bool has_statistics, bool needs_conv_weight,
                     bool needs_input, OptionalTensor input_sums) {
  const std::string activation_name = take_string(activation);
  const PlainConv c = check_plain_conv(kOp, input, "conv_weight", conv_weight, stride, padding, dilation, groups);
  const Operand gradient("dy", dy);
  const OptionalOperand output = optional_operand("result", result);
  check_like_output(kOp, gradient, c);
  if (output.has_value()) {
    check_like_output(kOp, *output, c);
  }
  WgradOperands o{};
  o.activation = check_derivative(activation_name, output);
  const OptionalOperand means = optional_operand("mean", mean), vars = optional_operand("var", var),
                        weights = optional_operand("weight", weight), biases = optional_operand("conv_bias", conv_bias);
  for (const OptionalOperand* x : {&means, &vars, &weights, &biases}) {
    if (x->has_value()) {
      check_channel_param(kOp, **x, c.sizes[1], "the output", c.input.dtype, acc_dtype(c.input.dtype), c.input);
    }
  }
  const std::optional<Conv2d> problem = c.space() == 2 ? narrow_to_2d(conv_problem(c, false, false)) : std::nullopt;
  const GpuTraits& gpu = gpu_traits(c.input.device.index);
  if (input_sums.has_value()) {
    const Operand sums("input_sums", *input_sums);
    if (sums.dtype != ScalarType::Double || sums.dim != 1 || sums.sizes[0] != FromInputSm90::kSums ||
        sums.strides[0] != 1 || sums.device != c.input.device || !has_statistics || !problem.has_value() ||
        !FromInputSm90::supports(*problem, gpu)) {
      fail(kOp, ": input_sums has shape ", sums.shape(),
           ", expected what _conv_bn_scale_train_sums returned for this input");
    }
    o.input_sums = static_cast<const double*>(input_sums->data_ptr());
  }
  const auto plan = problem.has_value() ? remembered_plan({*problem, c.input.device.index, output.has_value(),
                                                           has_statistics, o.input_sums != nullptr})
                                        : std::nullopt;
  if (!plan.has_value()) {
    fail(kOp, ": conv_weight has shape ", c.weight.shape(), " with input of shape ", c.input.shape(),
         ", expected a convolution of few channels that ", WgradStemSm80::kName, " covers");
  }
  const Device& device = c.input.device;
  const ScalarType wide = acc_dtype(c.input.dtype);
  const ScalarType of_bn = weights.has_value() ? weights->dtype : means.has_value() ? means->dtype : wide;
  const bool w_last = suggests_channels_last(c.weight);
  const Strides dense = dense_strides(c.weight, w_last);
  const auto like_weight = [&](bool wanted) {
    return wanted ? empty_strided(c.weight.dim, c.weight.sizes, dense.data(), c.weight.dtype, device)
                  : channel_values(false, 0, c.weight.dtype, device);
  };
  const int64_t K = c.sizes[1];
  const Tensor dw = like_weight(needs_conv_weight), scaled_weight = like_weight(needs_input);
  const Tensor dweight = channel_values(true, K, of_bn, device), dbias = channel_values(true, K, of_bn, device);
  const Tensor dconv_bias = channel_values(biases.has_value(), K, biases.has_value() ? biases->dtype : wide, device);
  const Tensor input_scale = channel_values(needs_input && has_statistics, K, wide, device);
  const Tensor input_shift = channel_values(needs_input && has_statistics, K, wide, device);
  const CudaScope cuda(device);
  DenseCopies copies(sizeof(float));
  o.x = copies.data(c.input, problem->channels_last);
  o.dy = copies.data(gradient, problem->channels_last);
  o.result = output.has_value() ? copies.data(*output, problem->channels_last) : nullptr;
  o.w = {conv_weight.data_ptr(), c.weight.strides[0], c.weight.strides[1], c.weight.strides[2], c.weight.strides[3]};
  o.has_statistics = has_statistics;
  o.mean = channel_buffer(means), o.var = channel_buffer(vars), o.weight = channel_buffer(weights);
  o.conv_bias = channel_buffer(biases);
  o.scaling_factor = scaling_factor;
  o.eps = eps;
  if (needs_conv_weight) {
    o.dw = buffer_of(dw, dense.data());
  }
  if (needs_input) {
    o.scaled_weight = buffer_of(scaled_weight, dense.data());
  }
  o.dweight = buffer_of(dweight), o.dbias = buffer_of(dbias), o.dconv_bias = buffer_of(dconv_bias);
  o.input_scale = buffer_of(input_scale), o.input_shift = buffer_of(input_shift);
  const Tensor workspace = make_workspace(plan->workspace(), device);
  dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
    if constexpr (sizeof(T) <= 4) {
      cuda.check_launch(kOp,
                        plan->launch<T>({*problem, o, gpu}, static_cast<double*>(workspace.data_ptr()), cuda.stream()));
    }
  });
  return {dw, dweight, dbias, dconv_bias, scaled_weight, input_scale, input_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("_conv_bn_wgrad", TORCH_BOX(&wgrad_cuda)); }

}  // namespace fused_conv_bn
