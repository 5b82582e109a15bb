// What the ops have in common that run convolutions with packed weights on the CPU.
#pragma once

#include "kernels/conv/packed_cpu/kernel.h"
#include "torch/layout.h"

#if defined(__x86_64__)

namespace fused_conv_bn {

inline const auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

// P and Q: not positive where the image is smaller than the filter.
inline void set_output_size(Conv2d& p) {
  const int64_t height = p.H + 2 * p.pad_h - p.dilation_h * (p.R - 1);
  const int64_t width = p.W + 2 * p.pad_w - p.dilation_w * (p.S - 1);
  p.P = height > 0 ? (height - 1) / p.stride_h + 1 : 0;
  p.Q = width > 0 ? (width - 1) / p.stride_w + 1 : 0;
}

inline bool takes_depthwise(const Conv2d& p) { return p.K == p.C && p.C % kDepthwiseLanes == 0; }

// A float32 operand of four dimensions in channels_last.
inline const float* channels_last_data(const Operand& x, OptionalTensor& copy) {
  if (has_strides(x, dense_strides(x, true))) {
    return static_cast<const float*>(x.tensor->data_ptr());
  }
  copy = torch::stable::contiguous(*x.tensor, MemoryFormat::ChannelsLast);
  return static_cast<const float*>(copy->data_ptr());
}

inline void run_packed(const PackedCall& call, bool depthwise) {
  if (depthwise) {
    launch_depthwise_packed(call, parallel_for);
  } else {
    launch_conv_packed(call, parallel_for);
  }
}

}  // namespace fused_conv_bn

#endif
