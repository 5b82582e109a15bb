// A float32 convolution of channels_last tensors with a packed weight on the CPU, with its epilogue.
//
// A tile is some pixels of a row, and two vectors of output channels. Its sums stay in registers while a value of each pixel is
// multiplied by the weights of those channels: one load of them serves all pixels. A filter's row is one run of memory in the
// input, as is its row in the weight. Where a filter reaches beyond the image, the rows that it needs are copied with their
// padding first. Depthwise, a tile is some pixels and one vector of channels.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/conv/problem.h"
#include "kernels/elementwise/scale_shift_cpu.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

// Terms that are summed up by themselves before they are added to those before them: long sums err less.
constexpr int64_t kPackedTerms = 512;

// What a tile reads: `rows` rows of a filter, each `terms` values of the input, `row` values from one row to the next.
struct PackedInput {
  int64_t rows, terms, row;
};

// What it writes: the pixels of `y` and `residual` are `pitch` values apart, and `channels` are left from here on.
// `shift` has as many values as there are lanes.
struct PackedOutput {
  const float* shift;
  const float* residual;
  float* y;
  int64_t pitch, channels;
  const Epilogue* epilogue;
};

// A row of a depthwise convolution's result. `x` is the image's first row that a filter's first valid row falls on, `rows` are
// valid, and `weight` is that of the first of them. Of all channels those from the first to behind the last are computed.
struct DepthwiseRow {
  const float* x;
  const float* weight;
  int64_t rows, filter, row, channels, width, stride, padding, dilation, columns;
  int64_t first_channel = 0, last_channel = 0;
};

namespace packed_v3 {
#define FCB_ARCH "arch=x86-64-v3"
#define FCB_LANES 8
#include "tiles.h"
#undef FCB_ARCH
#undef FCB_LANES
}  // namespace packed_v3

namespace packed_v4 {
#define FCB_ARCH "arch=x86-64-v4"
#define FCB_LANES 16
#include "tiles.h"
#undef FCB_ARCH
#undef FCB_LANES
}  // namespace packed_v4

// An instruction set's tiles.
struct PackedKernel {
  int64_t channels, pixels;  // of a tile
  void (*run_pixels)(const float*, const int64_t*, const PackedInput&, const float*, const PackedOutput&, int64_t);
};

inline const PackedKernel& packed_kernel() {
  static const PackedKernel v3{packed_v3::kChannelsOfTile, packed_v3::kPixelsOfTile, packed_v3::run_pixels};
  static const PackedKernel v4{packed_v4::kChannelsOfTile, packed_v4::kPixelsOfTile, packed_v4::run_pixels};
  return use_v4() ? v4 : v3;
}

// Depthwise, what is left of the channels is of vectors half as long.
constexpr int64_t kDepthwiseLanes = packed_v3::kLanes;

// Channels go block by block, so that all pixels of a row find the weights of one in the first level of the caches.
inline void run_depthwise_row(DepthwiseRow row, const PackedOutput& out) {
  constexpr int64_t kStep = packed_v4::kDepthwiseVectors * packed_v4::kLanes, kWeights = 24 << 8;
  const int64_t block = std::max<int64_t>(1, kWeights / (row.filter * row.filter) / kStep) * kStep;
  const int64_t vectors = use_v4() ? row.channels / packed_v4::kLanes * packed_v4::kLanes : 0;
  for (; row.first_channel < row.channels; row.first_channel = row.last_channel) {
    if (row.first_channel < vectors) {
      row.last_channel = std::min(row.first_channel + block, vectors);
      packed_v4::run_depthwise_row(row, out);
    } else {
      row.last_channel = std::min(row.first_channel + block, row.channels);
      packed_v3::run_depthwise_row(row, out);
    }
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// A problem of channels_last tensors, and its packed weight: for each tile of output channels the rows of the filter, each of
// S * C terms, with the weights of a term side by side; depthwise (R, S, C). shift: K values, rounded up to whole tiles.
struct PackedCall {
  const Conv2d& problem;
  const float* x;
  const float* weight;
  const float* shift;
  const float* residual;  // nullptr: none
  float* y;
  const Epilogue& epilogue;
  int64_t threads;
};

template <typename ParallelFor>
void launch_depthwise_packed(const PackedCall& call, const ParallelFor& parallel_for) {
  const Conv2d& p = call.problem;
  constexpr int64_t kLeastProducts = 1 << 17;  // to be worth another thread
  const int64_t grain = ceil_div(kLeastProducts, p.Q * p.C * p.R * p.S);
  parallel_for(int64_t{0}, p.N * p.P, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / p.P, top = i % p.P * p.stride_h - p.pad_h;
      const int64_t first = top < 0 ? ceil_div(-top, p.dilation_h) : 0;
      const int64_t last = std::min(p.R, p.H - top <= 0 ? 0 : ceil_div(p.H - top, p.dilation_h));
      const DepthwiseRow row{.x = call.x + (n * p.H + top + first * p.dilation_h) * p.W * p.C,
                             .weight = call.weight + first * p.S * p.C,
                             .rows = std::max<int64_t>(0, last - first),
                             .filter = p.S,
                             .row = p.dilation_h * p.W * p.C,
                             .channels = p.C,
                             .width = p.W,
                             .stride = p.stride_w,
                             .padding = p.pad_w,
                             .dilation = p.dilation_w,
                             .columns = p.Q};
      const int64_t to = i * p.Q * p.C;
      run_depthwise_row(row, PackedOutput{.shift = call.shift,
                                          .residual = call.residual == nullptr ? nullptr : call.residual + to,
                                          .y = call.y + to,
                                          .pitch = p.C,
                                          .channels = p.C,
                                          .epilogue = &call.epilogue});
    }
  });
}

template <typename ParallelFor>
void launch_conv_packed(const PackedCall& call, const ParallelFor& parallel_for) {
  const Conv2d& p = call.problem;
  constexpr int64_t kBytes = 128 << 10;  // of the input that a band reads: leaves room for weights in the second level
  const PackedKernel& kernel = packed_kernel();
  const int64_t least_pixels = 8 * kernel.pixels;
  const bool pads = p.pad_h != 0 || p.pad_w != 0;
  // A band is some pixels of the result, with padding whole rows. It may reach over several images.
  const int64_t whole = p.N * p.P * p.Q;
  const int64_t unit = pads ? p.Q : 1;
  const int64_t bytes = p.stride_h * p.stride_w * p.C * static_cast<int64_t>(sizeof(float));
  const int64_t wanted = std::max(least_pixels, kBytes / bytes);
  const int64_t tiles = ceil_div(p.K, kernel.channels);
  int64_t count = ceil_div(whole, round_up(wanted, unit));
  if (count > call.threads) {
    count = round_up(count, call.threads);  // each has as many
  }
  int64_t band = round_up(ceil_div(whole, count), unit);
  if (!pads && band > kernel.pixels) {
    band = round_up(band, kernel.pixels);
  }
  count = ceil_div(whole, band);
  // Where there are few bands, threads share the channels of one.
  constexpr int64_t kLeastProducts = 1 << 18;
  const int64_t products = band * p.C * p.R * p.S * kernel.channels;
  const int64_t items = count;
  int64_t parts = 1;
  if (call.threads > 1 && items < 4 * call.threads) {
    parts = tiles;
  }
  const int64_t part = ceil_div(tiles, parts);
  parts = ceil_div(tiles, part);
  const int64_t grain = ceil_div(kLeastProducts, products * part);
  const int64_t width = p.W + 2 * p.pad_w;
  const PackedInput in{.rows = p.R, .terms = p.S * p.C, .row = p.dilation_h * (pads ? width : p.W) * p.C};
  const int64_t step = p.R * p.S * p.C * kernel.channels;
  parallel_for(int64_t{0}, items * parts, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offset(band);
    std::vector<float> buffer;
    int64_t filled = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / parts, first = i * band;
      const int64_t pixels = std::min(band, whole - first);
      const float* x = call.x;
      if (i != filled) {
        filled = i;
        if (pads) {
          buffer.clear();
          // Image by image: the padded rows that the band's rows of the result in it need.
          for (int64_t j = 0; j < pixels;) {
            const int64_t row = (first + j) / p.Q, n = row / p.P, top = row % p.P * p.stride_h - p.pad_h;
            const int64_t rows = std::min(p.P - row % p.P, (pixels - j) / p.Q);
            const auto start = static_cast<int64_t>(buffer.size());
            const int64_t height = (rows - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
            buffer.resize(start + height * width * p.C);
            float* to = buffer.data() + start;
            for (int64_t h = top; h < top + height; ++h, to += width * p.C) {
              if (h < 0 || h >= p.H) {
                std::fill_n(to, width * p.C, 0.0f);
                continue;
              }
              const float* const from = call.x + (n * p.H + h) * p.W * p.C;
              std::fill_n(to, p.pad_w * p.C, 0.0f);
              std::copy_n(from, p.W * p.C, to + p.pad_w * p.C);
              std::fill_n(to + (p.pad_w + p.W) * p.C, p.pad_w * p.C, 0.0f);
            }
            for (int64_t k = 0; k < rows * p.Q; ++k, ++j) {
              offset[j] = start + (k / p.Q * p.stride_h * width + k % p.Q * p.stride_w) * p.C;
            }
          }
        } else {
          int64_t q = first % p.Q, row = first / p.Q % p.P, image = first / (p.P * p.Q);
          for (int64_t j = 0; j < pixels; ++j) {
            offset[j] = ((image * p.H + row * p.stride_h) * p.W + q * p.stride_w) * p.C;
            if (++q == p.Q) {
              q = 0;
              if (++row == p.P) {
                row = 0;
                ++image;
              }
            }
          }
        }
      }
      if (pads) {
        x = buffer.data();
      }
      const int64_t from = item % parts * part;
      for (int64_t tile = from; tile < std::min(from + part, tiles); ++tile) {
        const int64_t k = tile * kernel.channels;
        const int64_t to = first * p.K + k;
        kernel.run_pixels(x, offset.data(), in, call.weight + tile * step,
                          PackedOutput{.shift = call.shift + k,
                                       .residual = call.residual == nullptr ? nullptr : call.residual + to,
                                       .y = call.y + to,
                                       .pitch = p.K,
                                       .channels = p.K - k,
                                       .epilogue = &call.epilogue},
                          pixels);
      }
    }
  });
}

#endif

}  // namespace fused_conv_bn
