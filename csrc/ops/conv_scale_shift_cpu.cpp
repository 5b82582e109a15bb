// conv_scale_shift on the CPU: a kernel of our own for contiguous float32 first layers, and else PyTorch's convolution,
// oneDNN's as a rule, then one pass in place.
//
// Without an activation and a residual there is no such pass: scale is folded into the weight and shift is its bias, so
// that they cost nothing. That is done where it is as accurate as the pass:
//   - Weights of 32 bits or more. Rounding them errs as much as the accumulation of their products does; a 16-bit weight
//     would lose half the digits that its sums keep.
//   - A bias that oneDNN adds last. Kernels that begin their sums with it round every partial sum to the bias's magnitude:
//     where that is large against the sum, errors of 4 to 24 times eager's were measured.
//
// oneDNN could apply an activation as well. Its relu and relu6 turn NaN into 0, where PyTorch's pass it on, and the pass
// over problem 73's output takes about a tenth of the convolution's time, so it is left alone.
#include "../kernels/fold_weight_cpu.h"
#include "../kernels/scale_shift_cpu.h"
#include "conv_direct_cpu.h"
#include "conv_scale_shift.h"
#include "scale_shift.h"

namespace fused_conv_bn {
namespace {

const auto kParallelFor = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

template <typename F>
void dispatch_foldable(ScalarType dtype, F&& f) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      f(tag);
    }
  });
}

// weight * scale, in the memory format that the weight suggests; nullopt where that would cost accuracy.
std::optional<Tensor> folded_weight(const Operand& weight, const Operand& scale) {
  std::optional<Tensor> result;
  dispatch_foldable(weight.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OptionalTensor scale_copy, weight_copy;
    const bool channels_last = suggests_channels_last(weight);
    const void* from = weight.tensor->data_ptr();
    Strides strides = dense_strides(weight, channels_last);
    if (has_strides(weight, strides)) {
      std::copy(weight.strides, weight.strides + weight.dim, strides.begin());  // those of extents of 1 count too
    } else {
      weight_copy = torch::stable::contiguous(*weight.tensor, memory_format(weight.dim, channels_last));
      from = weight_copy->data_ptr();
    }
    Tensor folded = empty_strided(weight.dim, weight.sizes, strides.data(), weight.dtype, weight.device);
    const int64_t channels = weight.sizes[0];
    const int64_t inner = weight.numel / channels;
    if (fold_weight(static_cast<const T*>(from), static_cast<const T*>(channel_data(scale, scale.dtype, scale_copy)),
                    static_cast<T*>(folded.data_ptr()), channels, inner, kParallelFor)) {
      result = folded;
    }
  });
  return result;
}

bool all_ones(const Operand& scale) {
  bool result = true;
  dispatch_foldable(scale.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OptionalTensor copy;
    const auto* values = static_cast<const T*>(channel_data(scale, scale.dtype, copy));
    result = std::all_of(values, values + scale.numel, [](T value) { return value == T(1); });
  });
  return result;
}

Tensor ones_like(const Operand& x) {
  const int64_t stride = 1;
  Tensor result = empty_strided(1, x.sizes, &stride, x.dtype, x.device);
  dispatch_foldable(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::fill_n(static_cast<T*>(result.data_ptr()), x.numel, T(1));
  });
  return result;
}

// Whether the convolution would add a bias last. Seen for channels_last with AVX2 and newer, and for contiguous inputs of
// few channels with AVX-512. (Also, a bias makes oneDNN 3.12 crash on some kernels that lie wholly in the padding.)
bool adds_bias_last(const ConvArguments& c) {
  bool one_tap = true;
  for (int64_t d = 0; d < c.space(); ++d) {
    const int64_t taps = c.weight.sizes[d + 2];
    one_tap = one_tap && taps == 1;
    if (c.padding[d] > c.dilation[d] * (taps - 1)) {
      return false;
    }
  }
#if defined(__x86_64__)
  if (!use_v3()) {
    return false;
  }
  const bool avx512 = use_v4();
#else
  const bool avx512 = false;
#endif
  return computes_channels_last(c) || (avx512 && c.groups == 1 && c.input.sizes[1] < 16 && !one_tap);
}

struct CpuKernel {
  static Tensor run(const char* op, const ConvArguments& c, bool) {
    OptionalTensor scale_copy, shift_copy;
    const std::optional<Tensor> direct = direct_convolution(c, channel_data(c.scale, c.scale.dtype, scale_copy),
                                                            channel_data(c.shift, c.shift.dtype, shift_copy),
                                                            c.residual, c.activation);
    if (direct.has_value()) {
      return *direct;
    }
    const bool affine_only = c.activation == Activation::none && !c.residual.has_value();
    if (affine_only && c.input.dtype == c.scale.dtype && adds_bias_last(c)) {
      const std::optional<Tensor> weight = all_ones(c.scale) ? std::optional<Tensor>(*c.weight.tensor)
                                                             : folded_weight(c.weight, c.scale);
      if (weight.has_value()) {
        return plain_convolution(c, *weight, c.shift.tensor);
      }
    }
    const Tensor y = plain_convolution(c, *c.weight.tensor, nullptr);
    apply_scale_shift_cpu(op, Operand("output", y), c.scale, c.shift, c.residual, c.activation);
    return y;
  }
};

std::tuple<Tensor, Tensor> fold_conv_weight(Tensor weight, Tensor scale) {
  const char* op = "_fold_conv_weight";
  const Operand w("weight", weight);
  const Operand s("scale", scale);
  if (w.dim < 3 || w.dim > kMaxDim || w.numel == 0) {
    fail(op, ": weight has shape ", w.shape(), ", expected 3 to 5 dimensions and at least one element");
  }
  if (!is_supported(w.dtype)) {
    fail(op, ": weight has dtype ", dtype_name(w.dtype), ", expected " FCB_DTYPE_NAMES);
  }
  check_channel_param(op, s, w.sizes[0], "the output", acc_dtype(w.dtype), acc_dtype(w.dtype), w);
  const std::optional<Tensor> folded = folded_weight(w, s);
  if (folded.has_value()) {
    return {*folded, ones_like(s)};
  }
  return {torch::stable::clone(weight), torch::stable::clone(scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("conv_scale_shift", TORCH_BOX(&ConvScaleShift<CpuKernel>::functional));
  m.impl("_fold_conv_weight", TORCH_BOX(&fold_conv_weight));
}

}  // namespace fused_conv_bn
