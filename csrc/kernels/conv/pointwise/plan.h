// pointwise: a 1x1 convolution of images of one pixel, as squeeze-and-excite blocks have it: (N, C) by (K, C). Any numbers of
// channels and filters, products in float32, compute capability 7.5 on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/conv/problem.h"

namespace fused_conv_bn {
namespace pointwise {

constexpr int kMostThreads = 128;  // of a block

// Results of a thread: so many images by so many filters, both powers of 2. Lanes of a warp share the channels of each.
struct TileShape {
  int images, filters;
  int depth;  // loads of each row that are on their way together

  constexpr int results() const { return images * filters; }
};

// Alone, a result has all of 1280 channels of 16 bits on their way at once. Together, results share loads and conversions.
constexpr TileShape kTiles[] = {{1, 1, 5}, {4, 2, 3}};

// Bytes of a load: the largest power of 2 that divides a row, up to 16.
inline int load_bytes(const Conv2d& c) {
  int bytes = 16;
  while (bytes > c.element_bytes && c.C * c.element_bytes % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

// Lanes that share a row of so many loads, as a power of 2. In the end each result is to have a lane of its own.
inline int log_lanes(const TileShape& t, int64_t loads) {
  int log = 0;
  while (log < 5 && ((1 << log) < t.results() || (1 << log) < loads)) {
    ++log;
  }
  return log;
}

inline int64_t count_tiles(const Conv2d& c, const TileShape& t) {
  return ceil_div(c.N, t.images) * ceil_div(c.K, t.filters);
}

inline int64_t count_warps(const Conv2d& c, const TileShape& t, int64_t loads) {
  return ceil_div(count_tiles(c, t) << log_lanes(t, loads), 32);
}

// Results alone where they are few, or where lanes would have nothing to share.
inline int best_tile(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kWarps = 2;  // of a multiprocessor, at least
  const int64_t loads = c.C * c.element_bytes / load_bytes(c);
  return 2 * loads > kTiles[1].results() && count_warps(c, kTiles[1], loads) >= kWarps * gpu.multiprocessors ? 1 : 0;
}

// 32-bit arithmetic within an operand.
inline bool supports(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return gpu.compute_capability >= 75 && (c.element_bytes == 2 || c.element_bytes == 4) && c.groups == 1 && c.H == 1 &&
         c.W == 1 && c.R == 1 && c.S == 1 && c.P == 1 && c.Q == 1 && c.pad_h == 0 && c.pad_w == 0 && c.C >= 1 &&
         c.K >= 1 && c.N >= 1 && c.N <= kMost / c.C && c.N <= kMost / c.K && c.C <= kMost / c.K;
}

}  // namespace pointwise

struct Pointwise {
  static constexpr const char* kName = "pointwise";
  static constexpr GathersMoments kGathersMoments = GathersMoments::never;

  int tile;            // of kTiles
  bool is_recent_gpu;  // compute capability 8.0 on

  static std::optional<Pointwise> make(const Conv2d& c, const GpuTraits& gpu) {
    return pointwise::supports(c, gpu)
               ? std::optional(Pointwise{pointwise::best_tile(c, gpu), gpu.compute_capability >= 80})
               : std::nullopt;
  }

  // One short kernel, where PyTorch has a longer one and a pass behind it: on an H200 2 us for 5, for the layers of
  // squeeze-and-excite blocks at batch 1 to 256. With more products than these, tensor cores make up for their longer start.
  bool is_faster(const Conv2d& c, bool train) const {
    constexpr int64_t kMostImages = 256, kMostProducts = int64_t{1} << 24;
    const int64_t most = c.K > c.C ? kMostProducts / 2 : kMostProducts;
    return is_recent_gpu && !train && c.N <= kMostImages && c.C * c.K <= most / c.N;
  }

  ConvRequirements requirements(const Conv2d&) const { return {}; }

  std::string describe() const {
    const pointwise::TileShape& t = pointwise::kTiles[tile];
    return std::string(kName) + " " + std::to_string(t.filters) + (t.filters == 1 ? " channel by " : " channels by ") +
           std::to_string(t.images) + (t.images == 1 ? " image" : " images");
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
