// What the kernels for few input channels (stem_sm90, stem_sm80) have in common before anything runs: their domain, and the
// numbers in their rules.
#pragma once

#include "problem.h"

namespace fused_conv_bn {

// float32 goes through tensor cores in two terms, which keep 22 bits of each factor (split_float.cuh). Over so few products that
// shows: the largest error of an element would be 2.7 times what is allowed, twice eager's and a rounding, for 1 of them, 1.03
// for 4, 0.7 for 8 and 0.3 for 27 (a million sums of each).
constexpr int64_t kSplitLeastTerms = 8;

// Whether both kernels' arithmetic of offsets holds. most_terms: in float32, how many products of an output may be added up.
// Tensor cores cut off what does not fit when they add to a float32 sum, and always towards 0: over long sums that adds up to
// more than twice what PyTorch's own float32 convolutions lose.
inline bool is_stem(const Conv2d& c, int64_t most_terms) {
  constexpr int64_t kMostElements = int64_t{1} << 30, kMostExtent = 1 << 20, kMostStep = 1 << 10;
  const int64_t terms = c.C * c.R * c.S;
  const bool splits = c.element_bytes == 2 ||
                      (c.element_bytes == 4 && terms >= kSplitLeastTerms && terms <= most_terms);
  return splits && c.groups == 1 && c.C <= 64 && c.R * c.S <= 256 && c.H <= kMostExtent && c.W <= kMostExtent &&
         c.K <= kMostExtent && c.pad_h <= kMostExtent && c.pad_w <= kMostExtent && c.stride_h <= kMostStep &&
         c.stride_w <= kMostStep && c.dilation_h <= kMostStep && c.dilation_w <= kMostStep &&
         c.C * c.H * c.W <= kMostElements && c.K * c.P * c.Q <= kMostElements && c.N * c.P * c.Q <= kMostElements;
}

// The kernels have been compared with PyTorch's convolution up to so many input channels. 3x3 of 64 takes 1.3 times its time,
// 2.0 in training.
constexpr int64_t kStemMostChannels = 16;
// In float32, from so many products an output on, PyTorch's convolution (TF32 is its default) is faster than stem_sm80.
constexpr int64_t kStemSm80MostTerms = 130;
// Pixels of a large output.
constexpr int64_t kStemLarge = 100000;

}  // namespace fused_conv_bn
