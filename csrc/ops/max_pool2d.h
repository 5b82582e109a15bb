// max_pool2d, but for the device: F.max_pool2d, and what it refuses.
#pragma once

#include <vector>

#include "kernels/pooling/problem.h"
#include "torch/conv_checks.h"
#include "torch/marshal.h"

namespace fused_conv_bn {

// A checked call. `window`: of rows and columns.
struct MaxPoolArguments {
  Operand input;
  PoolWindow window[2];
  bool ceil_mode;
};

// Outputs of a window: in ceil_mode the last one may begin before the end of the input, and reach beyond it.
inline int64_t pooled_size(const PoolWindow& w, bool ceil_mode) {
  const int64_t rest = w.input + 2 * w.padding - w.dilation * (w.kernel - 1) - 1;
  if (rest + (ceil_mode ? w.stride - 1 : 0) < 0) {
    return 0;
  }
  const int64_t size = (rest + (ceil_mode ? w.stride - 1 : 0)) / w.stride + 1;
  return ceil_mode && (size - 1) * w.stride >= w.input + w.padding ? size - 1 : size;
}

// The windows over an input of these sizes, (N, C, H, W).
inline void check_pool_windows(const char* op, const int64_t* sizes, const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation, bool ceil_mode, PoolWindow (&window)[2]) {
  for (int64_t d = 1; d < 4; ++d) {
    if (sizes[d] < 1) {
      fail(op, ": input has shape ", list_text(sizes, 4),
           ", expected at least one element in each dimension but the first");
    }
  }
  const Spatial kernel = check_window(op, "kernel_size", kernel_size, 2, 1);
  const Spatial step = stride.empty() ? kernel : check_window(op, "stride", stride, 2, 1);
  const Spatial border = check_window(op, "padding", padding, 2, 0);
  const Spatial spread = check_window(op, "dilation", dilation, 2, 1);
  for (int d = 0; d < 2; ++d) {
    PoolWindow& w = window[d];
    w = {sizes[d + 2], 0, kernel[d], step[d], border[d], spread[d]};
    const int64_t covered = (w.kernel - 1) * w.dilation + 1;
    if (w.padding > w.kernel / 2) {
      fail(op, ": padding is ", list_text(border.data(), 2), ", expected at most half of kernel_size, which is ",
           list_text(kernel.data(), 2));
    }
    w.output = pooled_size(w, ceil_mode);
    if (w.output < 1) {
      fail(op, ": input has shape ", list_text(sizes, 4), ", expected at least one window: in dimension ", d + 2,
           " that has ", w.input + 2 * w.padding, " elements with its padding, and a window covers ", covered);
    }
    if (w.input >= kMostPooled || covered > kMostPooled) {
      fail(op, ": dimension ", d + 2, " of input has ", w.input, " elements and a window covers ", covered,
           ", expected at most ", kMostPooled);
    }
  }
}

inline MaxPoolArguments check_max_pool2d(const char* op, const Tensor& input, const std::vector<int64_t>& kernel_size,
                                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                         const std::vector<int64_t>& dilation, bool ceil_mode) {
  MaxPoolArguments a{Operand("input", input), {}, ceil_mode};
  const Operand& x = a.input;
  if (x.dim != 4) {
    fail(op, ": input has shape ", x.shape(), ", expected 4 dimensions: (N, C, H, W)");
  }
  check_input(op, x);
  check_pool_windows(op, x.sizes, kernel_size, stride, padding, dilation, ceil_mode, a.window);
  return a;
}

// Of an input of these sizes, dense in one of two layouts. window: checked.
inline PoolProblem pool_problem(const char* op, const int64_t* sizes, bool channels_last,
                                const PoolWindow (&window)[2]) {
  const int64_t channels = channels_last ? sizes[1] : 1;
  if ((window[1].input + 1) * channels > kMostPooled) {
    fail(op, ": input has shape ", list_text(sizes, 4), ", expected rows of at most ", kMostPooled, " elements");
  }
  return {sizes[0] * sizes[1] / channels, channels, window[0], window[1]};
}

}  // namespace fused_conv_bn
