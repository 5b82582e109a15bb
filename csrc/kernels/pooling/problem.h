// Windows over images, and squeeze-and-excite blocks, in numbers.
#pragma once

#include <cstdint>

namespace fused_conv_bn {

// Of a window in one dimension. The size of the output says what ceil_mode does.
struct PoolWindow {
  int64_t input;
  int64_t output;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

// (images, rows, columns, channels), dense. Contiguous: a channel alone, and images for all of them.
struct PoolProblem {
  int64_t images;
  int64_t channels;
  PoolWindow rows;
  PoolWindow columns;
};

// A squeeze-and-excite block: means over the pixels of images, and two layers on them.
struct SqueezeProblem {
  int64_t images;
  int64_t pixels;
  int64_t channels;
  int64_t hidden;
  int64_t outputs;
  bool channels_last;  // else planes of pixels
};

// What one thread counts in 32 bits: the elements of a row of pixels and one more, rows, and what a window covers.
constexpr int64_t kMostPooled = int64_t{1} << 30;

// Of a window whose maximum has a position, in a byte.
constexpr int64_t kMostPositions = 256;

}  // namespace fused_conv_bn
