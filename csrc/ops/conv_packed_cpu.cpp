// _conv_packed: a convolution with a weight that was packed and scaled before, for snapshots of models.
#include "conv_packed.h"
#include "torch/conv_checks.h"

namespace fused_conv_bn {
namespace {

// How many output channels lie side by side in a packed weight; 0 where another processor's kernel would be better.
int64_t packed_channels() {
#if defined(__x86_64__)
  return use_v3() ? packed_kernel().channels : 0;  // frozen.py has what was measured
#else
  return 0;
#endif
}

#if defined(__x86_64__)

const float* floats(const Operand& x) { return static_cast<const float*>(x.tensor->data_ptr()); }

Tensor conv_packed(Tensor input, Tensor weight, Tensor shift, int64_t filters, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, OptionalTensor residual,
                   StringHandle activation, double negative_slope, bool residual_last) {
  const char* op = "_conv_packed";
  const Epilogue epilogue = check_epilogue(op, {residual, take_string(activation), negative_slope, residual_last});
  const Operand x("input", input), w("weight", weight), b("shift", shift);
  const OptionalOperand r = optional_operand("residual", residual);
  const Spatial s = check_window(op, "stride", stride, 2, 1), d = check_window(op, "dilation", dilation, 2, 1);
  const Spatial pad = check_window(op, "padding", padding, 2, 0);
  const bool depthwise = w.dim == 3;
  const int64_t channels = x.dim == 4 ? x.sizes[1] : 0;
  const int64_t tile = packed_kernel().channels, tiles = ceil_div(filters, tile);
  const bool fits = depthwise ? w.sizes[2] == channels && filters == channels && channels % kDepthwiseLanes == 0
                              : w.dim == 5 && w.sizes[0] == tiles && w.sizes[3] == channels && w.sizes[4] == tile &&
                                    channels > 0 && d[1] == 1;
  const auto is_float = [](const Operand& t) { return t.dtype == ScalarType::Float && t.device.is_cpu(); };
  if (!use_v3() || !fits || !is_float(x) || !is_float(w) || !is_float(b) || x.numel == 0 || w.numel == 0 ||
      b.numel != tiles * tile || !has_strides(w, dense_strides(w, false))) {
    fail(op, ": input has shape ", x.shape(), " and weight ", w.shape(), ", which is not packed for it");
  }
  Conv2d p{};
  p.N = x.sizes[0], p.C = channels, p.H = x.sizes[2], p.W = x.sizes[3], p.K = filters;
  p.R = depthwise ? w.sizes[0] : w.sizes[1];
  p.S = depthwise ? w.sizes[1] : w.sizes[2];
  p.stride_h = s[0], p.stride_w = s[1], p.pad_h = pad[0], p.pad_w = pad[1], p.dilation_h = d[0], p.dilation_w = d[1];
  set_output_size(p);
  if (p.P <= 0 || p.Q <= 0) {
    fail(op, ": input has shape ", x.shape(), ", which is smaller than the filter");
  }
  const int64_t sizes[] = {p.N, p.K, p.P, p.Q};
  if (r.has_value() && (r->dim != 4 || !std::equal(sizes, sizes + 4, r->sizes) || !is_float(*r))) {
    fail(op, ": residual has shape ", r->shape(), ", expected ", list_text(sizes, 4), " in float32, as the result");
  }
  const Strides strides = dense_strides(4, sizes, true);
  const Tensor y = empty_strided(4, sizes, strides.data(), x.dtype, x.device);
  OptionalTensor copies[2];
  const PackedCall call{.problem = p,
                        .x = channels_last_data(x, copies[0]),
                        .weight = floats(w),
                        .shift = floats(b),
                        .residual = r.has_value() ? channels_last_data(*r, copies[1]) : nullptr,
                        .y = static_cast<float*>(y.data_ptr()),
                        .epilogue = epilogue,
                        .threads = torch::stable::get_num_threads()};
  run_packed(call, depthwise);
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("_packed_channels", TORCH_BOX(&packed_channels));
}
#if defined(__x86_64__)
STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("_conv_packed", TORCH_BOX(&conv_packed)); }
#endif

}  // namespace fused_conv_bn
