// gemm_sm80: any convolution of 16 bits and channels_last as a product of matrices, with its epilogue, on tensor cores from
// compute capability 8.0 on (cp.async, mma.sync).
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "kernels/conv/problem.h"

namespace fused_conv_bn {
namespace gemm_sm80 {

constexpr int kDepth = 64;      // terms of a stage: 128 bytes of a pixel's or a filter's
constexpr int kChunk = 8;       // terms that are copied at once: 16 bytes
constexpr int kPaddedSums = 8;  // between the rows of sums on their way out, in floats

// A block's tile of the product: its pixels by its filters, shared out to warps.
struct TileShape {
  int pixels, filters;
  int warps_m, warps_n;  // that share the pixels, and the filters
  int stages;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes() const { return (pixels + filters) * kDepth * 2; }
  constexpr int sum_bytes() const { return pixels * (filters + kPaddedSums) * 4; }
  // What the copies are staged in takes the sums later; then come scale and shift of each filter.
  constexpr int shared_memory() const {
    const int staged = stages * stage_bytes();
    return (staged > sum_bytes() ? staged : sum_bytes()) + filters * 8;
  }
};

constexpr TileShape kTiles[] = {{128, 128, 2, 4, 3}, {128, 64, 2, 2, 3}, {64, 64, 2, 2, 4}, {128, 32, 4, 1, 4}};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// 32-bit arithmetic within an operand, rows and columns in 16 bits.
inline bool supports(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kMost = int64_t{1} << 30, kMostSide = 1 << 13;
  if (gpu.compute_capability < 80 || !c.channels_last || c.element_bytes != 2 || c.groups < 1 ||
      c.C / c.groups % kChunk != 0 || c.C < 1 || c.K < 1 || c.R < 1 || c.S < 1) {
    return false;
  }
  const int64_t terms = c.C / c.groups * c.R * c.S;
  return c.N * c.P * c.Q <= kMost && c.H <= kMostSide && c.W <= kMostSide && c.pad_h <= kMostSide &&
         c.pad_w <= kMostSide && c.dilation_h * (c.R - 1) <= kMostSide && c.dilation_w * (c.S - 1) <= kMostSide &&
         c.N * c.H * c.W <= kMost / c.C && terms <= kMost / c.K &&
         ceil_div(c.N * c.P * c.Q, 64) * ceil_div(c.K / c.groups, 32) <= kMost / c.groups;  // blocks
}

inline int64_t count_tiles(const Conv2d& c, const TileShape& t) {
  return ceil_div(c.N * c.P * c.Q, t.pixels) * ceil_div(c.K / c.groups, t.filters) * c.groups;
}

inline int blocks_per_multiprocessor(const TileShape& t, const GpuTraits& gpu) {
  constexpr int kReserved = 1024;  // of each block, by the system
  const int by_memory = gpu.shared_memory_per_multiprocessor / (t.shared_memory() + kReserved);
  return std::min(by_memory, 1024 / t.threads());
}

// The tile of least time by a model: blocks run in waves; one takes the longer of its products and of its copies to shared
// memory, and an epilogue. The numbers are those of an mma.sync of 1024 products a cycle and multiprocessor.
inline std::optional<int> best_tile(const Conv2d& c, const GpuTraits& gpu) {
  std::optional<int> best;
  double least = 0;
  const auto depth = static_cast<double>(round_up(c.C / c.groups * c.R * c.S, 16));
  for (int i = 0; i < kTileCount; ++i) {
    const TileShape& t = kTiles[i];
    const int blocks = blocks_per_multiprocessor(t, gpu);
    if (t.shared_memory() > gpu.shared_memory_per_block || blocks < 1) {
      continue;
    }
    const int64_t tiles = count_tiles(c, t);
    const double products = t.pixels * t.filters * depth / 1024;
    const double copies = (t.pixels + t.filters) * depth * 2 / 32;
    const double epilogue = 600.0 + t.pixels * t.filters / 16.0;
    const int64_t at_a_time = std::min<int64_t>(ceil_div(tiles, gpu.multiprocessors), blocks);
    const double one = std::max(products, copies) * static_cast<double>(at_a_time) + epilogue;
    const double cost = one * static_cast<double>(ceil_div(tiles, gpu.multiprocessors * at_a_time));
    if (!best.has_value() || cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

}  // namespace gemm_sm80

struct GemmSm80 {
  static constexpr const char* kName = "gemm_sm80";
  static constexpr GathersMoments kGathersMoments = GathersMoments::never;

  int tile;  // of kTiles

  static std::optional<GemmSm80> make(const Conv2d& c, const GpuTraits& gpu) {
    const auto tile = gemm_sm80::supports(c, gpu) ? gemm_sm80::best_tile(c, gpu) : std::nullopt;
    return tile.has_value() ? std::optional(GemmSm80{*tile}) : std::nullopt;
  }

  // For 654 layers of ten networks, batch 1 to 32, on an H200 it takes 1.13 times as long in the geometric mean, from 0.1 to 3.6,
  // and gemm_sm90 is there. No other GPU has run it: a user or tuning asks for it.
  bool is_faster(const Conv2d&, bool) const { return false; }

  ConvRequirements requirements(const Conv2d&) const {
    return {.alignment = 16, .dense_weight = true, .channels_last_weight = true};
  }

  std::string describe() const {
    const gemm_sm80::TileShape& t = gemm_sm80::kTiles[tile];
    return std::string(kName) + " " + std::to_string(t.filters) + " channels by " + std::to_string(t.pixels) +
           " pixels";
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
