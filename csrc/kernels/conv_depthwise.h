// Which depthwise convolutions our kernels take, and how they are cut into tiles: host code without CUDA, so that
// select_config() and its tests can ask.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_params.h"

namespace fused_conv_bn {

constexpr int kDepthwiseThreads = 256;      // of a block, at most
constexpr int kDepthwiseLaneThreads = 128;  // the same for channels_last: registers allow 512 on an SM
constexpr int kDepthwiseChunkBytes = 64;    // channels_last: channels of a block; two sectors of a pixel
constexpr int kDepthwiseChunkWords = kDepthwiseChunkBytes / 16;
constexpr int kDepthwiseSharedBytes = 55 * 1024;     // of a block, where there is a choice: four fit on Hopper
constexpr int kDepthwiseMaxSharedBytes = 99 * 1024;  // what every GPU from compute capability 8.0 on can give a block
constexpr int kDepthwiseZeroBytes = 256;             // contiguous: what is read where a row of the image is missing
constexpr int64_t kDepthwiseMaxSide = 1 << 15;       // of a padded image

// Columns that a thread of the channels_last kernel computes side by side. More columns share more of their inputs and
// of the work around the sums, but take registers, and leave fewer threads to a tile, which is larger at stride 2 and
// for longer elements.
constexpr int depthwise_cols(int element_bytes, int r, int stride) {
  return element_bytes == 2 && r == 3 && stride == 1 ? 4 : 2;
}

// The same for contiguous tensors: an odd number of elements between neighbouring threads spreads them over the banks
// of shared memory, and the usual widths are multiples of 7.
constexpr int kDepthwisePlaneCols = 7;

// Channels of a thread of the channels_last kernel. The weights of 5x5 filters then take 100 registers.
constexpr int kDepthwiseLaneChannels = 4;

// A block computes tiles of tile_rows x tile_cols outputs: of the channels of one chunk (channels_last), or of `planes`
// planes in full width (contiguous). Its threads walk down `rows` rows each; `groups` of them lie below one another.
struct DepthwisePlan {
  int rows;
  int groups;
  int col_threads;
  int lanes;  // channels_last: threads of a column
  int tile_rows, tile_cols;
  int in_rows, in_cols;  // inputs of a tile; contiguous: in_cols is W
  int planes;            // 1 for channels_last
  int tiles_p, tiles_q;  // tiles of an image or of a plane
  int64_t tiles;         // in all; for channels_last, of one chunk
  int chunks;            // channels_last: chunks of channels; else 1
  int threads;
  int stage_bytes;  // of one input tile; there are two
  int shared_bytes;
};

// The size of the pieces when `size` is cut evenly into as few as have at most `most`.
inline int even_piece(int64_t size, int64_t most) { return static_cast<int>(ceil_div(size, ceil_div(size, most))); }

inline int inputs_of(int outputs, int stride, int filter) { return (outputs - 1) * stride + filter; }

// Rows of outputs that a thread walks down. More rows re-read less, fewer keep the tile in shared memory small; at
// stride 2 a tile of inputs is four times as large. Multiples of 7 are ImageNet's sizes.
inline int depthwise_rows(const ConvProblem& c) {
  return c.stride_h == 2 ? even_piece(c.P, 4) : c.P % 7 == 0 ? 7 : even_piece(c.P, 8);
}

inline void finish_channels_last(const ConvProblem& c, DepthwisePlan& p) {
  p.tile_rows = p.rows * p.groups;
  p.in_rows = inputs_of(p.tile_rows, static_cast<int>(c.stride_h), static_cast<int>(c.R));
  p.in_cols = inputs_of(p.tile_cols, static_cast<int>(c.stride_w), static_cast<int>(c.S));
  p.tiles_p = static_cast<int>(ceil_div(c.P, p.tile_rows));
  p.tiles_q = static_cast<int>(ceil_div(c.Q, p.tile_cols));
  p.tiles = c.N * p.tiles_p * p.tiles_q;
  const int cols = depthwise_cols(c.element_bytes, static_cast<int>(c.R), static_cast<int>(c.stride_w));
  p.col_threads = static_cast<int>(ceil_div(p.tile_cols, cols));
  p.lanes = kDepthwiseChunkBytes / (c.element_bytes * kDepthwiseLaneChannels);
  p.threads = static_cast<int>(ceil_div(p.lanes * p.col_threads * p.groups, 32) * 32);
  // A thread whose columns are not all in the tile reads past it, and does not use what it reads.
  p.stage_bytes = (p.in_rows * p.in_cols + (cols - 1) * static_cast<int>(c.stride_w)) * kDepthwiseChunkBytes;
  p.shared_bytes = 2 * p.stage_bytes;
}

inline DepthwisePlan plan_channels_last(const ConvProblem& c, int multiprocessors) {
  DepthwisePlan p{};
  p.planes = 1;
  p.chunks = static_cast<int>(ceil_div(c.C * c.element_bytes, kDepthwiseChunkBytes));
  p.tile_cols = even_piece(c.Q, 16);
  p.rows = depthwise_rows(c);
  // As many groups as fit, where they add up to the image. If all of them are less than a warp, then of fewer rows.
  p.groups = 1;
  finish_channels_last(c, p);
  int64_t all_groups = ceil_div(c.P, p.rows);
  if (p.col_threads * p.lanes * all_groups <= 16 && p.rows > 2) {
    p.rows = (p.rows + 1) / 2;
    all_groups = ceil_div(c.P, p.rows);
  }
  int best = 1;
  for (int groups = 2; groups <= std::min<int64_t>(all_groups, 8); ++groups) {
    p.groups = groups;
    finish_channels_last(c, p);
    if (p.threads <= kDepthwiseLaneThreads && p.shared_bytes <= kDepthwiseSharedBytes &&
        ceil_div(all_groups, groups) * groups <= ceil_div(all_groups, best) * best) {
      best = groups;
    }
  }
  p.groups = best;
  finish_channels_last(c, p);
  // Too few tiles for the GPU: smaller ones.
  while (p.tiles * p.chunks < 2 * multiprocessors && (p.groups > 1 || p.rows > 2)) {
    int& size = p.groups > 1 ? p.groups : p.rows;
    size = (size + 1) / 2;
    finish_channels_last(c, p);
  }
  return p;
}

inline void finish_contiguous(const ConvProblem& c, DepthwisePlan& p) {
  const int row_bytes = static_cast<int>(c.W) * c.element_bytes;
  const int out_row_bytes = static_cast<int>(c.Q) * c.element_bytes;
  p.tile_rows = p.rows * p.groups;
  p.in_rows = p.planes > 1 ? p.planes * static_cast<int>(c.H)
                           : std::min(static_cast<int>(c.H),
                                      inputs_of(p.tile_rows, static_cast<int>(c.stride_h), static_cast<int>(c.R)));
  p.tiles_p = static_cast<int>(ceil_div(c.P, p.tile_rows));
  p.tiles = ceil_div(c.N * c.C, p.planes) * p.tiles_p;
  p.threads = static_cast<int>(
      std::min<int64_t>(ceil_div(int64_t{p.col_threads} * p.groups * p.planes, 32) * 32, kDepthwiseThreads));
  // Each buffer begins with the phase of its tensor in 16 bytes.
  const auto buffer = [](int64_t bytes) { return static_cast<int>(ceil_div(bytes, 16) * 16 + 16); };
  const int64_t out_rows = p.planes > 1 ? p.planes * c.P : p.tile_rows;
  p.stage_bytes = buffer(int64_t{p.in_rows} * row_bytes);
  p.shared_bytes = 2 * p.stage_bytes + buffer(out_rows * out_row_bytes) + kDepthwiseZeroBytes;
}

inline DepthwisePlan plan_contiguous(const ConvProblem& c, int multiprocessors) {
  DepthwisePlan p{};
  p.chunks = 1;
  p.tiles_q = 1;
  p.planes = 1;
  p.tile_cols = static_cast<int>(c.Q);
  p.in_cols = static_cast<int>(c.W);
  p.col_threads = static_cast<int>(ceil_div(c.Q, kDepthwisePlaneCols));
  p.rows = depthwise_rows(c);
  // Wide images: fewer rows at a time, so that they fit.
  for (p.groups = 1, finish_contiguous(c, p); p.shared_bytes > kDepthwiseSharedBytes && p.rows > 1;) {
    p.rows = (p.rows + 1) / 2;
    finish_contiguous(c, p);
  }
  const int64_t all_groups = ceil_div(c.P, p.rows);
  // Doubles the size while the tile stays small enough; a warp has work first, then every multiprocessor.
  const auto grow = [&](int& size, int64_t most) {
    while (size < most) {
      const int before = size;
      size = static_cast<int>(std::min<int64_t>(2 * size, most));
      finish_contiguous(c, p);
      const int used = p.col_threads * p.groups * p.planes;
      if (used > kDepthwiseThreads || p.shared_bytes > kDepthwiseSharedBytes / 2 ||
          (used > 32 && p.tiles < 4 * multiprocessors)) {
        size = before;
        break;
      }
    }
  };
  grow(p.groups, all_groups);
  p.groups = even_piece(all_groups, p.groups);
  if (p.groups == all_groups) {  // whole planes, which lie one behind the other
    grow(p.planes, std::min<int64_t>(c.N * c.C, kDepthwiseThreads));
  }
  finish_contiguous(c, p);
  return p;
}

inline DepthwisePlan plan_depthwise(const ConvProblem& c, int multiprocessors) {
  return c.channels_last ? plan_channels_last(c, multiprocessors) : plan_contiguous(c, multiprocessors);
}

// The kernels' domain. The rest is ATen's: other filters are rare, a channel multiplier is rarer, and float64 is too; its
// kernels would be a fifth of the code.
inline bool depthwise_supports(const ConvProblem& c) {
  constexpr int64_t kMax = int64_t{1} << 31;
  if (c.element_bytes > 4 || c.groups != c.C || c.C != c.K || c.C < 1 || c.R != c.S || !(c.R == 3 || c.R == 5) ||
      c.stride_h != c.stride_w || !(c.stride_h == 1 || c.stride_h == 2) || c.dilation_h != 1 || c.dilation_w != 1 ||
      c.H < 1 || c.W < 1 || c.P < 1 || c.Q < 1) {
    return false;
  }
  // 32-bit arithmetic within an image, in the kernels and in the plan.
  if (c.pad_h > kDepthwiseMaxSide || c.pad_w > kDepthwiseMaxSide || c.H + 2 * c.pad_h > kDepthwiseMaxSide ||
      c.W + 2 * c.pad_w > kDepthwiseMaxSide || c.C > kMax / (c.H * c.W) - 1 || c.C > kMax / (c.P * c.Q) - 1 ||
      c.C > kMax / (c.W + 2 * c.pad_w + 64) - 1 || c.N > kMax / c.C - 1) {
    return false;
  }
  const DepthwisePlan p = plan_depthwise(c, 1);
  return p.tiles < kMax && p.shared_bytes <= kDepthwiseMaxSharedBytes;
}

}  // namespace fused_conv_bn
