// Which kernel runs a convolution, and how: decided here alone, on the host, from plain numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_params.h"

namespace fused_conv_bn {

// What select_config() knows of the GPU.
struct GpuTraits {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_memory_per_block;  // the most a block may ask for, in bytes
  int shared_memory_per_multiprocessor;
};

enum class ConvAlgorithm {
  aten,          // PyTorch's convolution without a bias, then scale_shift_ in place
  few_channels,  // implicit GEMM on tensor cores, mma.sync: compute capability 8.0 and newer
  depthwise,     // groups == C == K
};

// ---- few_channels ----------------------------------------------------------------------------------------------------

constexpr int kFewChannelsThreads = 256;
constexpr int kFewChannelsPixels = 256;  // output pixels of a block's tile, at most: 32 a warp
constexpr int kQuad = 4;                 // input channels that a thread feeds to one tensor core instruction

// A block's tile, and how shared memory is laid out for it. Bytes, unless it says otherwise.
struct FewChannelsTile {
  int channels;        // output channels: 32 or 64
  int p, q;            // output rows and columns
  int x_rows, x_cols;  // of the input patch
  int quads_per_tap;   // input channels, in fours
  int k_steps;         // of four quads each
  int x_pitch;         // from pixel to pixel, in the high and the low plane each
  int x_plane;
  int planes;          // 2 where float32 is split in two halves, else 1
  int stage_row;       // from row to row of a contiguous tile, in elements; p rows follow each other directly if q == Q
  int stage_pitch;     // from channel to channel (contiguous) or pixel to pixel (channels_last), in elements
  int tiles_p, tiles_q;
  int shared_memory;

  int w_plane() const { return k_steps * (channels / 16) * 512; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The header of a block's shared memory: per channel a factor, scale and shift; per warp two words; then k_steps * 4 offsets.
inline int few_channels_header(const FewChannelsTile& t) {
  return static_cast<int>(round_up(t.channels * 12 + 64 + t.k_steps * 16, 128));
}

inline FewChannelsTile few_channels_tile(const ConvProblem& c, int p, int q) {
  FewChannelsTile t{};
  t.channels = c.K > 32 ? 64 : 32;
  t.p = p;
  t.q = q;
  t.x_rows = static_cast<int>((p - 1) * c.stride_h + (c.R - 1) * c.dilation_h + 1);
  t.x_cols = static_cast<int>((q - 1) * c.stride_w + (c.S - 1) * c.dilation_w + 1);
  t.quads_per_tap = static_cast<int>(ceil_div(c.C, kQuad));
  t.k_steps = static_cast<int>(ceil_div(c.R * c.S * t.quads_per_tap, 4));
  t.planes = c.element_bytes == 4 ? 2 : 1;
  t.x_pitch = t.quads_per_tap * 8;
  // Neighbouring output pixels are stride_w pixels apart: where that is a multiple of 64 bytes, they would meet in few banks.
  if ((t.x_pitch * c.stride_w) % 64 == 0) {
    t.x_pitch += c.stride_w % 2 == 0 ? 16 : 32;
  }
  t.x_plane = static_cast<int>(round_up(int64_t{t.x_rows} * t.x_cols * t.x_pitch, 128));
  const int vector = 16 / c.element_bytes;
  int64_t stage;
  if (c.channels_last) {
    t.stage_row = 0;
    t.stage_pitch = t.channels + vector;  // keeps eight channels of four pairs of pixels in different banks
    stage = (int64_t{p} * q + 1) * t.stage_pitch;
  } else {
    t.stage_row = static_cast<int>(q == c.Q ? q : round_up(q, vector) + vector);
    const int64_t positions = int64_t{p} * t.stage_row + vector + 1;
    // Eight channels side by side, each with four pairs of pixels, in different banks.
    const int wanted = 8;  // elements: 8 words (float32, stored in pairs) or 4
    const int words32 = 128 / c.element_bytes;
    t.stage_pitch = static_cast<int>(round_up(positions - wanted, words32) + wanted);
    stage = int64_t{t.channels} * t.stage_pitch;
  }
  t.tiles_p = static_cast<int>(ceil_div(c.P, p));
  t.tiles_q = static_cast<int>(ceil_div(c.Q, q));
  const int64_t total = few_channels_header(t) + int64_t{t.planes} * t.w_plane() +
                        std::max(int64_t{t.planes} * t.x_plane, stage * c.element_bytes);
  t.shared_memory = static_cast<int>(std::min<int64_t>(total, INT32_MAX));
  return t;
}

inline bool few_channels_supports(const ConvProblem& c, const GpuTraits& gpu) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return gpu.compute_capability >= 80 && c.element_bytes <= 4 && c.groups == 1 && c.C <= 64 && c.R * c.S <= 256 &&
         c.H <= 1 << 20 && c.W <= 1 << 20 && c.stride_h <= 1 << 10 && c.stride_w <= 1 << 10 && c.pad_h <= 1 << 20 &&
         c.pad_w <= 1 << 20 && c.dilation_h <= 1 << 10 && c.dilation_w <= 1 << 10 && c.K <= 1 << 20 &&
         c.C * c.H * c.W <= kLimit && c.K * c.P * c.Q <= kLimit && c.N * c.P * c.Q <= kLimit;
}

inline int few_channels_blocks(const FewChannelsTile& t, const GpuTraits& gpu) {
  return std::min(2, gpu.shared_memory_per_multiprocessor / (t.shared_memory + 1024));
}

// The tile that the blocks need least time for, by this count: tensor core work goes by 32 pixels, and loading an input
// pixel costs about as much as a third of an output pixel's work. Waves of blocks count as a whole.
inline bool few_channels_best_tile(const ConvProblem& c, const GpuTraits& gpu, FewChannelsTile& best) {
  double least = 0;
  bool found = false;
  const int64_t max_splits = ceil_div(c.Q, 8);
  for (int pixels = kFewChannelsPixels; pixels >= 64; pixels /= 2) {
    for (int64_t splits = 1; splits <= max_splits; ++splits) {
      int64_t q = ceil_div(c.Q, splits);
      if (splits > 1) {
        q = round_up(q, 2);
      }
      if (q > pixels) {
        continue;
      }
      const int64_t p = std::min<int64_t>(c.P, pixels / q);
      const FewChannelsTile t = few_channels_tile(c, static_cast<int>(p), static_cast<int>(q));
      if (t.shared_memory > gpu.shared_memory_per_block) {
        continue;
      }
      const int blocks = std::max(1, few_channels_blocks(t, gpu));
      const int64_t tiles = c.N * t.tiles_p * t.tiles_q * ceil_div(c.K, t.channels);
      const int64_t waves = ceil_div(tiles, int64_t{blocks} * gpu.multiprocessors);
      double cost = static_cast<double>(round_up(p * q, 32)) + 32 + 0.3 * t.x_rows * t.x_cols;
      if (!c.channels_last && q < c.Q) {
        cost *= 1.0 + 8.0 / static_cast<double>(q);  // short runs in many planes
      }
      cost *= static_cast<double>(waves) * (blocks == 1 ? 0.7 : 1.0);
      if (!found || cost < least) {
        found = true;
        least = cost;
        best = t;
      }
    }
  }
  return found;
}

struct ConvConfig {
  ConvAlgorithm algorithm = ConvAlgorithm::aten;
  FewChannelsTile few_channels{};
};

}  // namespace fused_conv_bn
