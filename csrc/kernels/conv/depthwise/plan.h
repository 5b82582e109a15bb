// Which depthwise convolutions our kernels take, and how they are cut into tiles: host code without CUDA, so that
// select_plan() and its tests can ask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/conv/problem.h"

namespace fused_conv_bn {

constexpr int kDepthwiseThreads = 256;               // of a block, at most
constexpr int kDepthwiseSharedBytes = 55 * 1024;     // of a block, where there is a choice: four fit on Hopper
constexpr int kDepthwiseMaxSharedBytes = 99 * 1024;  // what every GPU from compute capability 8.0 on can give a block
constexpr int kDepthwiseZeroBytes = 256;             // contiguous: what is read where a row of the image is missing
constexpr int64_t kDepthwiseMaxSide = 1 << 15;       // of a padded image
constexpr int kDepthwiseAffineBytes = 8;             // channels_last: a channel's scale and shift, in float32
constexpr int kDepthwiseSumBytes = 8;                // channels_last, with means: a thread's sums
constexpr int kSectorBytes = 32;                     // of global memory: what one access moves at least

// Columns that a thread computes side by side. More of them share more of their inputs and of the work around the sums,
// but take registers. Contiguous: an odd number of elements between neighbouring threads spreads them over the banks of
// shared memory. The usual widths are multiples of 7.
constexpr int kDepthwiseCols = 7;

// channels_last: channels of a thread, and the threads of a block and blocks of a multiprocessor for which there have
// to be registers: 20 warps of 3x3, 12 of 5x5.
constexpr int kDepthwiseLaneChannels = 2;
constexpr int depthwise_lane_threads(int r) { return r == 3 ? 160 : 128; }
constexpr int depthwise_lane_blocks(int r) { return r == 3 ? 4 : 3; }

// channels_last: steps of input rows in shared memory, one of which is computed while the others arrive.
constexpr int depthwise_stages(int stride) { return stride == 1 ? 4 : 3; }

// channels_last: whether the kernels of a dtype add up means. Those of float32 with 3x3 filters have no registers for it.
constexpr bool depthwise_sums(int element_bytes) { return element_bytes == 2; }

// Contiguous: a block computes tiles of `planes` planes, tile_rows rows of each in full width. Its threads walk down
// `rows` rows each; row_threads of them lie below one another.
//
// channels_last: a block computes `channels` channels of tile_cols columns, and walks down a range of at least
// tile_rows rows: a launch cuts the rows of all images, one after the other, into as many even ranges as run at a time.
struct DepthwisePlan {
  int tile_cols;
  int in_cols;      // inputs of a tile; contiguous: W
  int col_threads;  // threads side by side
  int threads;
  int stage_bytes;  // contiguous: of the inputs of a tile; there are two. channels_last: of those of a step
  int shared_bytes;
  int tile_rows;
  // contiguous
  int rows, row_threads, planes;
  int in_rows;
  int tiles_p;  // tiles of a plane
  int64_t tiles;
  // channels_last
  int channels;
  int chunks;  // of so many channels
  int lanes;   // threads of a column
  int tiles_q;
};

// The size of the pieces when `size` is cut evenly into as few as have at most `most`.
inline int even_piece(int64_t size, int64_t most) { return static_cast<int>(ceil_div(size, ceil_div(size, most))); }

// Shared memory of the sums of a block's threads.
inline int depthwise_sums_bytes(const DepthwisePlan& p) { return p.threads * kDepthwiseSumBytes; }

inline int inputs_of(int outputs, int stride, int filter) { return (outputs - 1) * stride + filter; }

// Rows of outputs that a thread walks down. More rows re-read less, fewer keep the tile in shared memory small; at
// stride 2 a tile of inputs is four times as large. Multiples of 7 are ImageNet's sizes.
inline int depthwise_rows(const Conv2d& c) {
  return c.stride_h == 2 ? even_piece(c.P, 4) : c.P % 7 == 0 ? 7 : even_piece(c.P, 8);
}

// Into how many ranges a launch cuts the rows, where so many blocks run at a time.
inline int64_t depthwise_ranges(const Conv2d& c, const DepthwisePlan& p, int64_t blocks) {
  constexpr int64_t kMost = 65535;  // of gridDim.y
  return std::clamp<int64_t>(std::min(blocks / (int64_t{p.tiles_q} * p.chunks), c.N * c.P / p.tile_rows), 1, kMost);
}

// Parts that a tile across the image cuts an image's rows into, at most.
inline int64_t depthwise_parts(const Conv2d& c, int64_t ranges) {
  return 1 + ceil_div(c.P - 1, std::max<int64_t>(c.N * c.P / ranges, 1));
}

// Images that each range has, where it has whole ones.
inline int64_t depthwise_images(const Conv2d& c, const DepthwisePlan& p, int64_t blocks) {
  return ceil_div(std::max<int64_t>(c.N, 1), std::max<int64_t>(blocks / p.chunks, 1));
}

// Shared memory that a block asks for so that no more than so many find room on a multiprocessor of compute capability
// 9.0, the only one where kernels begin early.
inline int depthwise_bytes_of_share(int64_t blocks) {
  constexpr int64_t kAll = 228 * 1024, kReserved = 1024, kUnit = 128;  // of a multiprocessor; of a block, by the system
  return static_cast<int>(std::min<int64_t>(kDepthwiseMaxSharedBytes, (kAll / blocks - kReserved) / kUnit * kUnit));
}

// How long a channels_last plan takes, in steps of a warp. All warps of a multiprocessor take their turns; a block
// takes two steps' time to begin, and waits for four turns at each step. Inputs that tiles share are copied by each.
// Pieces of pixels move more slowly where they are not whole lines. Of all plans for 29 layers (3x3 and 5x5, 16 bits
// and float32, batches of 8 and 64), measured on an H200, this finds one that takes 1.03 times the fastest one's time
// in the mean, 1.16 at worst.
inline int64_t channels_last_cost(const Conv2d& c, const DepthwisePlan& p, int multiprocessors, bool whole_images) {
  constexpr int kLineBytes = 128, kStartSteps = 2, kWaitTurns = 4;
  constexpr int64_t kSharedBytes = 220 * 1024;  // of a multiprocessor
  const int r = static_cast<int>(c.R);
  const int most_threads = depthwise_lane_threads(r) * depthwise_lane_blocks(r);
  const int64_t resident = std::max<int64_t>(
      std::min(most_threads / p.threads, static_cast<int>(kSharedBytes / p.shared_bytes)), 1);
  int64_t ranges = depthwise_ranges(c, p, resident * multiprocessors);
  int64_t rows = std::max<int64_t>(ceil_div(c.N * c.P, ranges), 1);
  // A range begins anew with each image.
  int64_t images = rows * ranges == c.N * c.P && c.P % rows == 0 ? 1 : 1 + ceil_div(rows, c.P);
  if (whole_images) {
    images = depthwise_images(c, p, resident * multiprocessors);
    ranges = ceil_div(c.N, images);
    rows = images * c.P;
  }
  const int64_t steps = rows + images * ((c.R - 1) / c.stride_h);
  const int64_t blocks = ceil_div(ranges * p.tiles_q * p.chunks, multiprocessors);
  const int64_t cost = blocks * (p.threads / 32) * (steps + kStartSteps) + kWaitTurns * steps;
  const bool whole_lines = p.chunks == 1 || p.channels * c.element_bytes % kLineBytes == 0;
  return cost * (whole_lines ? 4 : 5) * 64 * p.in_cols / (p.tile_cols * c.stride_w);
}

// Tries numbers of columns, of channels, in whole sectors and evenly shared out, and of rows. whole_images: for blocks that put out
// means; there may be no such plan, which has no channels.
inline DepthwisePlan plan_channels_last(const Conv2d& c, int multiprocessors, bool whole_images = false) {
  constexpr int kMostColThreads = 16;
  const int r = static_cast<int>(c.R), stride = static_cast<int>(c.stride_w);
  const int sector = kSectorBytes / c.element_bytes;
  const int64_t all_col_threads = ceil_div(c.Q, kDepthwiseCols);
  DepthwisePlan p{}, best{};
  int64_t best_cost = 0;
  for (int64_t most_cols = 1; most_cols <= std::min<int64_t>(all_col_threads, kMostColThreads); ++most_cols) {
    p.col_threads = even_piece(all_col_threads, most_cols);
    p.tile_cols = p.col_threads * kDepthwiseCols;
    p.tiles_q = static_cast<int>(ceil_div(c.Q, p.tile_cols));
    p.in_cols = inputs_of(p.tile_cols, stride, r);
    p.channels = 0;
    if (whole_images && p.tiles_q > 1) {
      continue;
    }
    for (int threads = depthwise_lane_threads(r); threads >= 64; threads -= 32) {
      const int most = std::max(threads / p.col_threads * kDepthwiseLaneChannels / sector, 1) * sector;
      const int channels = static_cast<int>(round_up(even_piece(c.C, most), sector));
      if (channels == p.channels || channels / kDepthwiseLaneChannels * p.col_threads > threads) {
        continue;
      }
      p.channels = channels;
      p.chunks = static_cast<int>(ceil_div(c.C, p.channels));
      p.lanes = p.channels / kDepthwiseLaneChannels;
      p.threads = static_cast<int>(round_up(p.lanes * p.col_threads, 32));
      p.stage_bytes = stride * p.in_cols * p.channels * c.element_bytes;
      const int weight_bytes = r * r * p.channels * c.element_bytes;
      p.shared_bytes = depthwise_stages(stride) * p.stage_bytes + weight_bytes + p.channels * kDepthwiseAffineBytes;
      if (whole_images) {
        p.shared_bytes += depthwise_sums_bytes(p);
      }
      if (p.shared_bytes > kDepthwiseMaxSharedBytes) {
        continue;
      }
      for (int64_t rows = c.P;; rows = ceil_div(rows, 2)) {
        p.tile_rows = static_cast<int>(rows);
        const int64_t cost = channels_last_cost(c, p, multiprocessors, whole_images);
        if (best_cost == 0 || cost < best_cost) {
          best = p;
          best_cost = cost;
        }
        if (rows == 1) {
          break;
        }
      }
    }
  }
  return best;
}

inline void finish_contiguous(const Conv2d& c, DepthwisePlan& p) {
  const int row_bytes = static_cast<int>(c.W) * c.element_bytes;
  const int out_row_bytes = static_cast<int>(c.Q) * c.element_bytes;
  p.tile_rows = p.rows * p.row_threads;
  p.in_rows = p.planes > 1 ? p.planes * static_cast<int>(c.H)
                           : std::min(static_cast<int>(c.H),
                                      inputs_of(p.tile_rows, static_cast<int>(c.stride_h), static_cast<int>(c.R)));
  p.tiles_p = static_cast<int>(ceil_div(c.P, p.tile_rows));
  p.tiles = ceil_div(c.N * c.C, p.planes) * p.tiles_p;
  p.threads = static_cast<int>(
      std::min<int64_t>(ceil_div(int64_t{p.col_threads} * p.row_threads * p.planes, 32) * 32, kDepthwiseThreads));
  // Each buffer begins with the phase of its tensor in 16 bytes.
  const auto buffer = [](int64_t bytes) { return static_cast<int>(ceil_div(bytes, 16) * 16 + 16); };
  const int64_t out_rows = p.planes > 1 ? p.planes * c.P : p.tile_rows;
  p.stage_bytes = buffer(int64_t{p.in_rows} * row_bytes);
  p.shared_bytes = 2 * p.stage_bytes + buffer(out_rows * out_row_bytes) + kDepthwiseZeroBytes;
}

inline DepthwisePlan plan_contiguous(const Conv2d& c, int multiprocessors) {
  DepthwisePlan p{};
  p.planes = 1;
  p.tile_cols = static_cast<int>(c.Q);
  p.in_cols = static_cast<int>(c.W);
  p.col_threads = static_cast<int>(ceil_div(c.Q, kDepthwiseCols));
  p.rows = depthwise_rows(c);
  // Wide images: fewer rows at a time, so that they fit.
  for (p.row_threads = 1, finish_contiguous(c, p); p.shared_bytes > kDepthwiseSharedBytes && p.rows > 1;) {
    p.rows = (p.rows + 1) / 2;
    finish_contiguous(c, p);
  }
  const int64_t all_row_threads = ceil_div(c.P, p.rows);
  // Doubles the size while the tile stays small enough; a warp has work first, then every multiprocessor.
  const auto grow = [&](int& size, int64_t most) {
    while (size < most) {
      const int before = size;
      size = static_cast<int>(std::min<int64_t>(2 * size, most));
      finish_contiguous(c, p);
      const int used = p.col_threads * p.row_threads * p.planes;
      if (used > kDepthwiseThreads || p.shared_bytes > kDepthwiseSharedBytes / 2 ||
          (used > 32 && p.tiles < 4 * multiprocessors)) {
        size = before;
        break;
      }
    }
  };
  grow(p.row_threads, all_row_threads);
  p.row_threads = even_piece(all_row_threads, p.row_threads);
  if (p.row_threads == all_row_threads) {  // whole planes, which lie one behind the other
    grow(p.planes, std::min<int64_t>(c.N * c.C, kDepthwiseThreads));
  }
  finish_contiguous(c, p);
  return p;
}

inline DepthwisePlan plan_depthwise(const Conv2d& c, int multiprocessors) {
  return c.channels_last ? plan_channels_last(c, multiprocessors) : plan_contiguous(c, multiprocessors);
}

// The kernels' domain. The rest is ATen's: other filters are rare, a channel multiplier is rarer, and so are float64,
// whose kernels would be a fifth of the code, and pixels that are not a multiple of 16 bytes.
inline bool depthwise_supports(const Conv2d& c) {
  constexpr int64_t kMax = int64_t{1} << 31;
  if (c.element_bytes > 4 || c.groups != c.C || c.C != c.K || c.C < 1 || c.R != c.S || !(c.R == 3 || c.R == 5) ||
      c.stride_h != c.stride_w || !(c.stride_h == 1 || c.stride_h == 2) || c.dilation_h != 1 || c.dilation_w != 1 ||
      c.H < 1 || c.W < 1 || c.P < 1 || c.Q < 1 || (c.channels_last && c.C * c.element_bytes % 16 != 0)) {
    return false;
  }
  // 32-bit arithmetic within an image, in the kernels and in the plan.
  if (c.pad_h > kDepthwiseMaxSide || c.pad_w > kDepthwiseMaxSide || c.H + 2 * c.pad_h > kDepthwiseMaxSide ||
      c.W + 2 * c.pad_w > kDepthwiseMaxSide || c.C > kMax / (c.H * c.W) - 1 || c.C > kMax / (c.P * c.Q) - 1 ||
      c.C > kMax / (c.W + 2 * c.pad_w + 64) - 1 || c.N > kMax / c.C - 1) {
    return false;
  }
  if (c.channels_last) {
    return c.N * c.P < kMax / (ceil_div(c.Q, kDepthwiseCols) * ceil_div(c.C * c.element_bytes, kSectorBytes));
  }
  const DepthwisePlan p = plan_contiguous(c, 1);
  return p.tiles < kMax && p.shared_bytes <= kDepthwiseMaxSharedBytes;
}

struct Depthwise {
  static constexpr const char* kName = "depthwise";
  static constexpr GathersMoments kGathersMoments = GathersMoments::never;

  DepthwisePlan plan;
  std::optional<DepthwisePlan>
      whole_images{};  // of means by blocks that have whole images; else parts of them are added up

  // Whole images are faster up to 14x14 pixels, where there are blocks for half the multiprocessors: of 64 layers on an H200
  // (batches of 1 to 64) by 1 to 3 us.
  static std::optional<Depthwise> make(const Conv2d& c, const GpuTraits& gpu) {
    constexpr int64_t kMostPixels = 256;
    if (gpu.compute_capability < 80 || !depthwise_supports(c)) {
      return std::nullopt;
    }
    Depthwise made{plan_depthwise(c, gpu.multiprocessors)};
    if (c.channels_last && depthwise_sums(c.element_bytes) && c.P * c.Q <= kMostPixels) {
      const DepthwisePlan p = plan_channels_last(c, gpu.multiprocessors, true);
      if (p.channels > 0 && 2 * c.N * p.chunks >= gpu.multiprocessors) {
        made.whole_images = p;
      }
    }
    return made;
  }

  // Of how many parts of an image there may be sums, whichever number of blocks runs at a time.
  std::optional<int64_t> parts_of_means(const Conv2d& c, const GpuTraits& gpu) const {
    constexpr int kMostThreads = 2048, kMostBlocks = 32;  // of a multiprocessor
    if (whole_images.has_value()) {
      return 0;
    }
    if (!c.channels_last || !depthwise_sums(c.element_bytes) ||
        plan.shared_bytes + depthwise_sums_bytes(plan) > kDepthwiseMaxSharedBytes) {
      return std::nullopt;
    }
    const int64_t blocks = int64_t{std::min(kMostThreads / plan.threads, kMostBlocks)} * gpu.multiprocessors;
    return plan.tiles_q * depthwise_parts(c, depthwise_ranges(c, plan, blocks));
  }

  bool is_faster(const Conv2d& c, bool) const {
    if (!c.channels_last) {
      return c.N * c.C * c.P * c.Q >= 1 << 18;
    }
    return c.element_bytes == 2 || c.R == 3 || c.N * c.C * c.P * c.Q >= 1 << 14;
  }

  ConvRequirements requirements(const Conv2d& c) const { return {c.channels_last ? 16 : 1, false}; }

  std::string describe() const {
    const auto text = [](int value) { return std::to_string(value); };
    return std::string(kName) + " " +
           (plan.channels > 0 ? text(plan.channels) + " channels by " + text(plan.tile_cols) + " columns"
                              : text(plan.tile_rows) + "x" + text(plan.tile_cols) + " pixels");
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
