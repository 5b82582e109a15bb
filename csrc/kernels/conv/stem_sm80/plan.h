// Which convolutions the stem_sm80 kernel takes, and how they are cut into tiles: host code without CUDA, so that
// select_plan() and its tests can ask. The kernel reads the same numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/common/scalar.h"
#include "kernels/conv/stem.h"

namespace fused_conv_bn {

namespace stem_sm80 {

constexpr int kBlockThreads = 256;
constexpr int kTilePixels = 256;  // output pixels of a tile, at most
constexpr int kQuad = 4;          // input channels of a tap that a thread feeds to one tensor core instruction

// Groups of a block's threads, each with a tile of its own, which multiply alternately. Where they are two, a warp has
// 64 pixels, else 32.
FCB_HD constexpr int thread_groups(bool alternating) { return alternating ? 2 : 1; }
// From 10.0 on two do not fit into the registers, as the compiler deals them out. That was not measured.
FCB_HD constexpr bool can_alternate(int compute_capability) { return compute_capability < 100; }
// Blocks of a multiprocessor that registers suffice for.
FCB_HD constexpr int resident_blocks(bool alternating) { return alternating ? 1 : 2; }

// A block's tile, and how shared memory is laid out for it. Bytes, unless it says otherwise.
struct TileLayout {
  int channels;        // output channels: 32 or 64
  int p, q;            // output rows and columns
  int x_rows, x_cols;  // of the input window
  int quads_per_tap;   // input channels, in quads
  int k_steps;         // of four quads each
  int x_pitch;         // from pixel to pixel, of the high and of the low term each
  int x_term;          // of the window, in one term
  int split_terms;     // 2 where float32 is split into a high and a low term, else 1
  bool alternating;    // contiguous float32: a block has two thread groups
  int copies;          // alternating: where copies of the input's rows are, from the window's start
  int group_bytes;     // alternating: of a thread group's window or staging buffer, and copies
  int staging_row;     // from row to row of a contiguous tile, in elements; p rows follow each other directly if q == Q
  int staging_pitch;   // from channel to channel of a contiguous tile, in elements
  int staging_end;     // in each channel's staging buffer, where the offsets for results outside the tile begin
  int tiles_p, tiles_q;
  int shared_memory;

  int w_term() const { return k_steps * (channels / 16) * 512; }
};

// The start of a block's shared memory: a table of fixed size (16 bytes, 4 words a channel, 2 a warp, 3 a pixel), then
// an offset for each quad.
FCB_HD constexpr int header_bytes(int k_steps, int channels) {
  return (16 + channels * 16 + kBlockThreads / 32 * 8 + kTilePixels * 12 + (k_steps + 3) * 16 + 127) / 128 * 128;
}

inline TileLayout make_layout(const Conv2d& c, int p, int q, bool alternating) {
  TileLayout t{};
  t.alternating = alternating;
  t.channels = c.K > 32 ? 64 : 32;
  t.p = p;
  t.q = q;
  t.x_rows = static_cast<int>((p - 1) * c.stride_h + (c.R - 1) * c.dilation_h + 1);
  t.x_cols = static_cast<int>((q - 1) * c.stride_w + (c.S - 1) * c.dilation_w + 1);
  t.quads_per_tap = static_cast<int>(ceil_div(c.C, kQuad));
  t.k_steps = static_cast<int>(ceil_div(c.R * c.S * t.quads_per_tap, 4));
  t.split_terms = c.element_bytes == 4 ? 2 : 1;
  t.x_pitch = t.quads_per_tap * 8;
  // Neighbouring output pixels are stride_w pixels apart: where that is a multiple of 64 bytes, they would meet in few
  // banks.
  if ((t.x_pitch * c.stride_w) % 64 == 0) {
    t.x_pitch += c.stride_w % 2 == 0 ? 16 : 32;
  }
  const int64_t x_term = round_up(int64_t{t.x_rows} * t.x_cols * t.x_pitch, 128);
  t.x_term = static_cast<int>(std::min<int64_t>(x_term, INT32_MAX));
  const int vector = 16 / c.element_bytes;
  int64_t staging;
  if (c.channels_last) {
    staging = 0;
  } else {
    t.staging_row = static_cast<int>(q == c.Q ? q : round_up(q, vector) + vector);
    t.staging_end = static_cast<int>(round_up(int64_t{p} * t.staging_row + vector, 2));
    const int64_t positions = t.staging_end + std::max(0, kTilePixels - p * q) + vector;
    // Eight channels side by side, each with four pairs of pixels, in different banks.
    const int wanted = 8;  // elements: 8 words (float32, stored in pairs) or 4
    const int words32 = 128 / c.element_bytes;
    t.staging_pitch = static_cast<int>(round_up(positions - wanted, words32) + wanted);
    staging = int64_t{t.channels} * t.staging_pitch;
  }
  t.tiles_p = static_cast<int>(ceil_div(c.P, p));
  t.tiles_q = static_cast<int>(ceil_div(c.Q, q));
  int64_t work = round_up(std::max(t.split_terms * x_term, staging * c.element_bytes), 16);
  if (alternating) {
    t.copies = static_cast<int>(std::min<int64_t>(work, INT32_MAX));
    work += c.C * t.x_rows * c.W * c.element_bytes;
    t.group_bytes = static_cast<int>(std::min<int64_t>(work, INT32_MAX));
    work *= thread_groups(alternating);
  }
  const int64_t total = header_bytes(t.k_steps, t.channels) + int64_t{t.split_terms} * t.w_term() + work;
  t.shared_memory = static_cast<int>(std::min<int64_t>(total, INT32_MAX));
  return t;
}

constexpr int64_t kMostTerms = 512;

inline bool supports(const Conv2d& c, const GpuTraits& gpu) {
  return gpu.compute_capability >= 80 && is_stem(c, kMostTerms);
}

inline int blocks_per_multiprocessor(const TileLayout& t, const GpuTraits& gpu) {
  return std::min(resident_blocks(t.alternating),
                  gpu.shared_memory_per_multiprocessor / (t.shared_memory / 1024 + 1) / 1024);
}

inline int64_t count_tiles(const Conv2d& c, const TileLayout& t) {
  return c.N * t.tiles_p * t.tiles_q * ceil_div(c.K, t.channels);
}

// Whole rows that copies of 16 bytes make up, pixels for each of four warps with 64, and tiles for both thread groups
// of every multiprocessor. 128 images of 128x128 with 8 channels take 0.82 of the time of single tiles then, of 64x64
// with 3 channels 0.80.
inline bool alternates(const Conv2d& c, const TileLayout& t, const GpuTraits& gpu) {
  return can_alternate(gpu.compute_capability) && c.element_bytes == 4 && !c.channels_last && t.channels == 64 &&
         t.q == c.Q && c.W % 4 == 0 && t.p * t.q > 3 * 64 && count_tiles(c, t) >= 2 * gpu.multiprocessors;
}

// The tile that the blocks need least time for, by this count: tensor core work goes by 32 pixels, and loading an input
// pixel costs about as much as a third of an output pixel's work. Waves of blocks count as a whole. nullopt where no tile
// fits into shared memory.
inline std::optional<TileLayout> best_tile(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kMostSplits = 16;
  std::optional<TileLayout> best;
  double least = 0;
  for (int pixels = kTilePixels; pixels >= 64; pixels /= 2) {
    const int64_t least_splits = ceil_div(c.Q, pixels);
    for (int64_t splits = least_splits; splits < least_splits + kMostSplits && splits <= ceil_div(c.Q, 8); ++splits) {
      int64_t q = ceil_div(c.Q, splits);
      if (splits > 1) {
        q = round_up(q, 2);
      }
      if (q > pixels) {
        continue;
      }
      const int64_t p = std::min<int64_t>(c.P, pixels / q);
      TileLayout t = make_layout(c, static_cast<int>(p), static_cast<int>(q), false);
      if (t.shared_memory > gpu.shared_memory_per_block) {
        continue;
      }
      const int blocks = std::max(1, blocks_per_multiprocessor(t, gpu));
      if (alternates(c, t, gpu)) {
        const TileLayout alternating = make_layout(c, static_cast<int>(p), static_cast<int>(q), true);
        if (alternating.shared_memory <= gpu.shared_memory_per_block) {
          t = alternating;
        }
      }
      const int64_t waves = ceil_div(count_tiles(c, t), int64_t{blocks} * gpu.multiprocessors);
      double cost = static_cast<double>(round_up(p * q, 32)) + 32 + 0.3 * t.x_rows * t.x_cols;
      if (!c.channels_last && q < c.Q) {
        cost *= 1.0 + 8.0 / static_cast<double>(q);  // short runs in many planes
      }
      cost *= static_cast<double>(waves) * (blocks == 1 ? 0.7 : 1.0);
      if (!best.has_value() || cost < least) {
        least = cost;
        best = t;
      }
    }
  }
  return best;
}

}  // namespace stem_sm80

struct StemSm80 {
  static constexpr const char* kName = "stem_sm80";
  static constexpr GathersMoments kGathersMoments = GathersMoments::never;

  stem_sm80::TileLayout tile;

  static std::optional<StemSm80> make(const Conv2d& c, const GpuTraits& gpu) {
    const auto tile = stem_sm80::supports(c, gpu) ? stem_sm80::best_tile(c, gpu) : std::nullopt;
    return tile.has_value() ? std::optional(StemSm80{*tile}) : std::nullopt;
  }

  bool is_faster(const Conv2d& c, bool) const {
    if (c.C > kStemMostChannels) {
      return false;
    }
    const int64_t pixels = c.N * c.P * c.Q;
    const int64_t taps = c.R * c.S;
    const int64_t terms = c.C * taps;
    if (taps == 1) {  // a matrix product of little depth: channels_last 1.5 and 1.6, contiguous 0.9 and 1.3
      return c.channels_last && pixels >= 1 << 17;
    }
    // float32 of many terms: up to 2.9 times PyTorch's time, TF32 being its default.
    return c.element_bytes == 4 ? pixels >= 20000 && terms <= kStemSm80MostTerms && (c.C > 1 || pixels >= kStemLarge)
                                : c.C > 1 || pixels >= 20000;
  }

  ConvRequirements requirements(const Conv2d&) const { return {}; }

  std::string describe() const {
    return std::string(kName) + " " + std::to_string(tile.channels) + " channels by " + std::to_string(tile.p) + "x" +
           std::to_string(tile.q) + " pixels";
  }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
