// bn_scale_cat, but for the device: bn_scale of tensors that are concatenated over their channels, without writing that.
#pragma once

#include "elementwise.h"
#include "kernels/elementwise/parts.h"

namespace fused_conv_bn {

// Starts the kernel on checked operands: each part's data is dense, in the layout of the output. One for each library.
using RunCat = void(const char* op, const Parts<void>& parts, const Tensor& output, const Shape& shape,
                    ScalarType dtype, const Device& device, const AffineTensors& affine, const Epilogue& epilogue);
RunCat run_cat_cpu;
RunCat run_cat_cuda;

template <RunCat* kRun>
Tensor bn_scale_cat(std::vector<Tensor> inputs, Tensor running_mean, Tensor running_var, OptionalTensor weight,
                    OptionalTensor bias, double scaling_factor, double eps, StringHandle activation,
                    double negative_slope) {
  const char* op = "bn_scale_cat";
  const OptionalTensor no_residual;
  const EpilogueArguments arguments{no_residual, take_string(activation), negative_slope, false};
  if (inputs.empty() || inputs.size() > kMaxParts) {
    fail(op, ": inputs has ", inputs.size(), " tensors, expected 1 to ", kMaxParts);
  }
  std::vector<std::string> names;
  std::vector<Operand> parts;
  names.reserve(inputs.size());
  parts.reserve(inputs.size());
  Operand whole("inputs", inputs[0]);
  Sizes sizes{};
  bool channels_last = true;
  for (const Tensor& input : inputs) {
    names.push_back("inputs[" + std::to_string(names.size()) + "]");
    const Operand& x = parts.emplace_back(names.back().c_str(), input);
    check_input(op, x);
    const Operand& first = parts[0];
    if (x.dim != first.dim || x.sizes[0] != first.sizes[0] ||
        !std::equal(x.sizes + 2, x.sizes + x.dim, first.sizes + 2)) {
      fail(op, ": ", x.name, " has shape ", x.shape(), ", expected ", first.shape(), ", the shape of ", first.name,
           ", but for the channels");
    }
    if (x.dtype != first.dtype) {
      fail(op, ": ", x.name, " has dtype ", dtype_name(x.dtype), ", expected ", dtype_name(first.dtype),
           ", the dtype of ", first.name);
    }
    check_same_device(op, x, first);
    channels_last = channels_last && suggests_channels_last(x);
    sizes[1] += x.sizes[1];
  }
  if (sizes[1] > kMaxChannels) {
    fail(op, ": inputs have ", sizes[1], " channels, expected at most ", kMaxChannels);
  }
  std::copy(whole.sizes, whole.sizes + 1, sizes.begin());
  std::copy(whole.sizes + 2, whole.sizes + whole.dim, sizes.begin() + 2);
  const AffineOperands bn = bn_operands({}, running_mean, running_var, weight, bias, scaling_factor, eps);
  bn.check(op, sizes[1], "inputs", whole.dtype, whole);
  const Epilogue epilogue = check_epilogue(op, arguments);

  // As torch.cat would put it out, and F.batch_norm then.
  whole.sizes = sizes.data();
  whole.numel = 1;
  for (int64_t d = 0; d < whole.dim; ++d) {
    whole.numel *= sizes[d];
  }
  const Strides of_cat = dense_strides(whole, channels_last);
  whole.strides = of_cat.data();
  channels_last = computes_channels_last(whole);
  const Strides strides = dense_strides(whole, channels_last);
  Tensor output = empty_strided(whole.dim, whole.sizes, strides.data(), whole.dtype, whole.device);
  if (whole.numel == 0) {
    return output;
  }
  Parts<void> data;
  std::vector<OptionalTensor> copied(parts.size());
  for (const Operand& x : parts) {
    if (x.sizes[1] > 0) {
      OptionalTensor& copy = copied[static_cast<size_t>(data.count)];
      data.data[data.count] = dense_data(x, dense_strides(x, channels_last), channels_last, copy);
      data.first[data.count + 1] = data.first[data.count] + static_cast<uint32_t>(x.sizes[1]);
      ++data.count;
    }
  }
  Copies copies;
  kRun(op, data, output, dense_shape(whole, channels_last), whole.dtype, whole.device,
       affine_tensors(bn, whole.dtype, copies), epilogue);
  return output;
}

}  // namespace fused_conv_bn
