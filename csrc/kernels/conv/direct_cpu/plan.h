// Which convolutions on the CPU the kernel of this folder computes: plain numbers, as for the plans of the GPU's
// algorithms.
#pragma once

#include <cstdint>

#include "kernels/conv/problem.h"

namespace fused_conv_bn {

// How many pixels a row of the result has at least.
constexpr int64_t kDirectLeastColumns = 32;

// What a sum has at most. It is summed up in one register, term by term.
constexpr int64_t kDirectMostTerms = 256;

// Whether the kernel can run. has_avx2: the processor has it, FMA and F16C, and may use them.
inline bool covers_direct(const Conv2d& c, bool has_avx2) {
  if (!has_avx2 || c.element_bytes != 4 || c.channels_last || c.groups != 1 || c.stride_w > 2 ||
      c.Q < kDirectLeastColumns || c.C * c.R * c.S > kDirectMostTerms) {
    return false;
  }
  // The input rows of one row of the result are to fit into a cache of the second level.
  const int64_t rows = c.dilation_h * (c.R - 1) + 1;
  const int64_t columns = c.W + 2 * c.pad_w;
  return c.C * rows * columns * c.element_bytes <= 256 << 10;
}

// Whether the kernel is to run. oneDNN puts out the result of contiguous tensors in a layout of its own, takes memory
// as large as the output for it, and reorders: that is what the kernel saves. Its arithmetic is at most as fast as
// oneDNN's, and it copies its input, so that it wins where a sum has few terms, and an input element many uses.
// Measured over some hundred random problems, against oneDNN with folded weights: 1.9 times as fast in the median with
// AVX-512, 1.6 times with AVX2, and up to 20 times where PyTorch has to get new memory for each result; problem 73 four
// times. Beyond these bounds, 0.6 to 1.2 times. has_avx2: see covers_direct().
inline bool prefers_direct(const Conv2d& c, bool has_avx2) {
  const int64_t taps = c.R * c.S;
  const int64_t terms = c.C * taps;
  const bool few_terms = c.stride_w == 1 ? terms <= 75 : c.stride_w == 2 && c.dilation_w == 1 && terms <= 49;
  const bool many_uses = taps > 1 && c.K >= 8 && c.K * taps >= 48 * c.stride_w;
  const bool large = c.Q >= 2 * kDirectLeastColumns && c.N * c.P * c.Q >= 4096;
  return few_terms && many_uses && large && covers_direct(c, has_avx2);
}

}  // namespace fused_conv_bn
