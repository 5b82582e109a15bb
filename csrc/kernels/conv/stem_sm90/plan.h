// Which convolutions stem_sm90 takes, the tile that it takes them with, and when it is faster than PyTorch: host code without
// CUDA. tile.h says what a tile is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/batch_norm/moments.h"
#include "kernels/conv/stem.h"
#include "tile.h"

namespace fused_conv_bn {
namespace stem_sm90 {

constexpr int64_t kMostTerms = 256;

inline bool supports(const Conv2d& c, const GpuTraits& gpu) {
  return gpu.has_wgmma && is_stem(c, kMostTerms) && tile_of(c, 1, 8).units <= kMaxUnits;
}

// Time for all tiles, by this count: a position's work, a chunk's, a tile's, and loading a unit, which producers do meanwhile.
// Waves of blocks count as a whole.
inline double cost(const Conv2d& c, const GpuTraits& gpu, bool writes, const TileLayout& t) {
  const int64_t k_blocks = ceil_div(c.K, kBlockChannels);
  const int64_t tiles = c.N * t.tiles_p * t.tiles_q;
  const int64_t of_all = blocks(c, t, gpu);
  const int64_t tiles_of_block = ceil_div(tiles, of_all);
  const int64_t waves = ceil_div(of_all * k_blocks, gpu.multiprocessors);
  const double work = t.chunks * kChunk + 0.3 * t.p * static_cast<double>(t.q) + 64;
  // float32 that takes more than one round is read twice. Rows that are not whole come one by one, which was measured for
  // channels_last; contiguous output has a cost of its own below.
  const int runs = t.raw_stage == 0 || t.q == c.Q || !c.channels_last ? 0 : t.raw_rows;
  const double load = (c.element_bytes == 4 && t.rounds > 1 ? 0.1 : 0.0625) * t.unit_table + 6.0 * runs + 128;
  const double all = static_cast<double>(waves) *
                     (static_cast<double>(tiles_of_block) * std::max(work, load) + work + load);
  // Short runs in many planes.
  return writes && !c.channels_last && t.q < c.Q ? all * (1.0 + 8.0 / static_cast<double>(t.q)) : all;
}

// The tile of least cost; nullopt where none fits into shared memory.
inline std::optional<TileLayout> best_tile(const Conv2d& c, const GpuTraits& gpu, bool writes) {
  constexpr int64_t kMostParts = 16;
  std::optional<TileLayout> best;
  double least = 0;
  const int64_t least_parts = ceil_div(c.Q, 512);  // of an output row
  for (int64_t parts = least_parts; parts < least_parts + kMostParts && parts <= ceil_div(c.Q, 8); ++parts) {
    int64_t q = ceil_div(c.Q, parts);
    if (parts > 1) {
      q = round_up(q, 8);
    }
    for (int p = 1; p <= c.P && p <= 64; ++p) {
      TileLayout t = tile_of(c, p, static_cast<int>(q));
      if (int64_t{p} * t.x_cols > kMaxPositions) {
        break;
      }
      if (t.x_units > 8192 || !lay_out(c, gpu, writes, t)) {
        continue;
      }
      const double of_this = cost(c, gpu, writes, t);
      if (!best.has_value() || of_this < least) {
        least = of_this;
        best = t;
      }
    }
  }
  return best;
}

}  // namespace stem_sm90

struct StemSm90 {
  static constexpr const char* kName = "stem_sm90";
  static constexpr GathersMoments kGathersMoments = GathersMoments::first;

  stem_sm90::TileLayout tile;          // to write results
  stem_sm90::TileLayout moments_tile;  // to gather moments of them instead

  static std::optional<StemSm90> make(const Conv2d& c, const GpuTraits& gpu) {
    if (!stem_sm90::supports(c, gpu)) {
      return std::nullopt;
    }
    const std::optional<stem_sm90::TileLayout> tile = stem_sm90::best_tile(c, gpu, true);
    const std::optional<stem_sm90::TileLayout> moments_tile = stem_sm90::best_tile(c, gpu, false);
    if (!tile.has_value() || !moments_tile.has_value()) {
      return std::nullopt;
    }
    return StemSm90{*tile, *moments_tile};
  }

  bool is_faster(const Conv2d& c, bool) const {
    if (c.C > kStemMostChannels) {
      return false;
    }
    const int64_t pixels = c.N * c.P * c.Q;
    const int64_t taps = c.R * c.S;
    const int64_t terms = c.C * taps;
    const bool whole_rows = tile.q == c.Q;
    if (c.element_bytes == 2) {
      // Single channels of few taps leave nothing to multiply. Contiguous: parts of rows cannot be copied in bulk, up to 1.3
      // times; small problems of few terms are stem_sm80's.
      return c.channels_last
                 ? c.C > 1 || taps >= 25
                 : whole_rows && taps > 1 && (pixels >= kStemLarge || terms >= 150 || (c.C == 1 && taps >= 25));
    }
    // Tiles of fewer pixels than a chunk has: up to 1.9 times. Few output channels leave half of the rows idle. Parts of
    // contiguous rows are worth it where stem_sm80 is not: 7x7/2 of an image 129 us, PyTorch 364.
    const bool parts_fit = c.channels_last ? tile.p * tile.q >= 64
                                           : tile.p * tile.q >= stem_sm90::kChunk && taps >= 25 &&
                                                 terms > kStemSm80MostTerms && pixels >= kStemLarge;
    const bool fits = whole_rows || parts_fit;
    const bool enough = c.C > 1 || taps >= 25 || pixels >= kStemLarge;
    const bool small = pixels < kStemLarge && c.C <= 2 && taps < 25 && c.K <= 64;
    return taps > 1 && fits && enough && !small && pixels >= 2000 &&
           (c.K >= 48 || (c.K >= 32 && (pixels < kStemLarge ? c.channels_last : c.stride_w > 1)));
  }

  ConvRequirements requirements(const Conv2d&) const { return {stem_sm90::kAlignment, true}; }

  std::string describe() const {
    return std::string(kName) + " " + std::to_string(tile.p) + "x" + std::to_string(tile.q) + " pixels";
  }

  // Whether this CUDA library has code for it, and for statistics of its input: a build for other GPUs alone has not.
  static bool is_compiled();

  // Moments of each channel that launch_moments() puts out.
  int64_t partials(const Conv2d& c, const GpuTraits& gpu) const {
    return stem_sm90::blocks(c, moments_tile, gpu) * stem_sm90::consumers(moments_tile.splits);
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
  template <typename T>
  cudaError_t launch_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
