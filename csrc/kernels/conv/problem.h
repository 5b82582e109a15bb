// A convolution as algorithms see it, in cuDNN's letters: x (N, C, H, W) with w (K, C / groups, R, S) gives y (N, K, P, Q).
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <optional>

#include "kernels/batch_norm/fold.h"

namespace fused_conv_bn {

constexpr int kMaxSpace = 3;
using Spatial = std::array<int64_t, kMaxSpace>;  // a value for each spatial dimension

// What there is to compute, and how the tensors lie, in 1 to 3 spatial dimensions.
struct ConvProblem {
  int space;  // how many spatial dimensions there are
  int64_t N, C, K, groups;
  Spatial input, filter, output;  // extents
  Spatial stride, padding, dilation;
  int element_bytes;   // of x, w, y and the residual: 2, 4 or 8
  bool channels_last;  // x, y and the residual; else they are contiguous
  bool has_residual;
  bool allow_tf32;
};

// The same in two dimensions. select_plan() looks at this alone.
struct Conv2d {
  int64_t N;
  int64_t C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  int element_bytes;
  bool channels_last;
  bool has_residual;
  bool allow_tf32;

  auto operator<=>(const Conv2d&) const = default;
};

// What the algorithms of this package take: a problem of two dimensions, with a result that is not empty.
//
// Where windows do not move in a dimension, nor reach further than a pixel, it and one beside it of that kind are one. In
// channels_last the first one's pixels are then as good as images. So are 1-D convolutions, and 3-D ones that have filters of
// 1xRxS, Tx1x1 and 1x1x1. Not those in 1-D whose result has permuted strides in PyTorch, as their weight has: it has no name for
// them.
inline std::optional<Conv2d> narrow_to_2d(const ConvProblem& c) {
  if (c.space == 1 && c.channels_last) {
    return std::nullopt;
  }
  struct Dimension {
    int64_t input = 1, filter = 1, output = 1, stride = 1, padding = 0, dilation = 1;

    bool is_still() const { return filter == 1 && stride == 1 && padding == 0; }
    // Of this one in front, both of which are still.
    void take(const Dimension& outer) { input *= outer.input, output *= outer.output; }
  };
  std::array<Dimension, kMaxSpace> all;  // what is missing is in front
  for (size_t i = 0, at = static_cast<size_t>(kMaxSpace - c.space); at < all.size(); ++i, ++at) {
    all[at] = {c.input[i], c.filter[i], c.output[i], c.stride[i], c.padding[i], c.dilation[i]};
  }
  auto& [depth, rows, columns] = all;
  int64_t images = c.N;
  if (depth.is_still() && rows.is_still()) {
    rows.take(depth);
  } else if (rows.is_still() && columns.is_still()) {
    columns.take(rows);
    rows = depth;
  } else if (depth.is_still() && (c.channels_last || depth.input == 1)) {
    images *= depth.input;
  } else {
    return std::nullopt;
  }
  if (images == 0) {
    return std::nullopt;
  }
  return Conv2d{.N = images,
                .C = c.C,
                .H = rows.input,
                .W = columns.input,
                .K = c.K,
                .R = rows.filter,
                .S = columns.filter,
                .P = rows.output,
                .Q = columns.output,
                .stride_h = rows.stride,
                .stride_w = columns.stride,
                .pad_h = rows.padding,
                .pad_w = columns.padding,
                .dilation_h = rows.dilation,
                .dilation_w = columns.dilation,
                .groups = c.groups,
                .element_bytes = c.element_bytes,
                .channels_last = c.channels_last,
                .has_residual = c.has_residual,
                .allow_tf32 = c.allow_tf32};
}

// A problem's extents as kernels take them, in 32 bits: a plan's domain has looked at their products. The batch is not among
// them.
struct Extents {
  int C, H, W;
  int K, R, S;
  int P, Q;
  int stride_h, stride_w;
  int pad_h, pad_w;
  int dilation_h, dilation_w;
};

inline Extents narrow(const Conv2d& c) {
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  return {number(c.C),     number(c.H),     number(c.W),          number(c.K),         number(c.R),
          number(c.S),     number(c.P),     number(c.Q),          number(c.stride_h),  number(c.stride_w),
          number(c.pad_h), number(c.pad_w), number(c.dilation_h), number(c.dilation_w)};
}

// The operands. w may have any strides, counted in elements; everything else is dense.
struct ConvOperands {
  const void* x;
  const void* w;
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  AffineTensors affine;
  // The kernel before this one makes the tensors of `affine`, and nothing else; the mean is to stay apart, as the center.
  bool late_affine;
  const void* residual;  // nullptr: none
  void* y;
  void* means;        // an element for each image and channel of y, whose mean it is; nullptr: none
  float* sums;        // room for sums of so many parts of y's images as the plan may need, (N, parts, K); nullptr: none
  const void* gates;  // an element for each image and channel of x, which is multiplied by it first; nullptr: none

  // Of a weight of dim - 2 spatial dimensions, as narrow_to_2d() sees them.
  void set_weight(const void* data, int64_t dim, const int64_t* sizes, const int64_t* strides) {
    const int64_t rows = dim == 5 && sizes[2] > 1 ? 2 : dim - 2;
    w = data;
    w_stride_k = strides[0], w_stride_c = strides[1];
    w_stride_r = dim == 3 ? 0 : strides[rows], w_stride_s = strides[dim - 1];
  }
};

// What select_plan() knows of the GPU.
struct GpuTraits {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_memory_per_block;  // the most a block may ask for, in bytes
  int shared_memory_per_multiprocessor;
  bool has_wgmma;  // it has compute capability 9.0's own matrix instructions, and code for it was compiled
};

// What a kernel is launched for.
struct ConvCall {
  const Conv2d& problem;
  const ConvOperands& operands;
  const GpuTraits& gpu;
  const Epilogue& epilogue;
};

// How an algorithm gathers the moments of a batch's results, channel by channel, for BatchNorm in training mode.
enum class GathersMoments {
  never,
  first,         // launch_moments() computes the convolution, and writes nothing but its moments
  with_results,  // launch_with_moments() is launch() that writes them too, of the results as they are stored
};

// How a kernel wants its operands.
struct ConvRequirements {
  int alignment = 1;                  // bytes: where input and residual are to start
  bool dense_weight = false;          // the weight too, contiguous or channels_last; else it may have any strides
  bool channels_last_weight = false;  // a dense one is to be that
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fused_conv_bn
