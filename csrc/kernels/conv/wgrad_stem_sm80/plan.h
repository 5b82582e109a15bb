// The gradients of a convolution's weight and of the BatchNorm behind it, for few input channels, in one pass over the gradient
// of the output, dy, and the input, x; compute capability 8.0 on. Host code without CUDA: domain, tile and layout.
//
// With z = W x and dv the gradient of BatchNorm's output (dy, times the activation's derivative), every gradient comes from sums
// over pixels:
//
//     G = sum dv x^T      d = sum dv        and where BatchNorm takes a batch's statistics     S = sum x x^T      s = sum x
//
// x being a pixel's patch of C * R * S values. BatchNorm's backward is affine in dv and z, and z is W x: sum dv z = W G, and the
// weight's gradient is a combination of G, W S and s. So neither z nor its gradient exists. (finish.cuh has the formulas.)
//
// Both are products of tensor cores with pixels as the inner dimension: G of the output channels by the patch, S of the patch by
// itself. A patch is made of units: 16 bytes of shared memory with 8 values of a pixel, so that a tap is a shift of an address.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>

#include "kernels/common/scalar.h"
#include "kernels/conv/stem.h"
#include "kernels/statistics/from_input_sm90/plan.h"

namespace fused_conv_bn {

namespace wgrad_stem_sm80 {

constexpr int kSteps = 4;  // of 16 output pixels, which tensor cores multiply at a time
constexpr int kChunk = 16 * kSteps;
constexpr int kMostUnits = 128;  // of a patch
constexpr int kChunkStages = 2;  // of a warp's dy
constexpr int kWindows = 2;      // of units: one that is read, one that is made
constexpr int kMostChannels = 16;
constexpr int64_t kMostPixels = 1024;  // of a tile
constexpr int64_t kLeastCols = 16;     // of a tile, unless the output has fewer
// Values of the window of a tile of so many columns: what fits into any GPU's shared memory, with a warp's dy.
constexpr int64_t kMostWindow = 2304;

// What is multiplied with the patch.
enum class Rows {
  gradient,  // dy
  patch,     // the patch itself
};

// A block's warps: some multiply, the others make the windows. Compute capability 9.0 gives each kind the registers that it needs
// (setmaxnreg, which is for warpgroups: four warps). Elsewhere all have as many, and there are no more than 8.
struct Warps {
  int producers, consumers;
};
constexpr Warps kWarps90 = {4, 12}, kWarpsElsewhere = {4, 8};
constexpr Warps warps_of(int compute_capability) { return compute_capability == 90 ? kWarps90 : kWarpsElsewhere; }
constexpr int kWarpTiles = 1;  // of 16 rows of the product, that a warp has
constexpr int kWarpRows = 16 * kWarpTiles;
// Bytes from line to line of a warp's dy: of a channel's pixels, or of a pixel's channels. What a warp reads at once lies in
// different banks.
FCB_HD constexpr int chunk_pitch(int element_bytes, bool channels_last) {
  return (channels_last ? kWarpRows : kChunk) * element_bytes + element_bytes * 8;
}
constexpr int kMostRoleUnits = 9;  // columns that a warp has, in units of 8
constexpr int kFewUnits = 6;       // another kernel's
constexpr int kMostColumns = 16;   // roles side by side
constexpr int kRoleTaps = 16;

// How a patch is made of units.
struct Layout {
  int slots;        // channels of a tap in a unit: 1, 2, 4 or 8. A unit has 8 / slots taps of a filter's row
  int blocks;       // of channels, where they are more than 8
  int row_units;    // of a filter's row and a block of channels
  int block_units;  // of a block of channels
  int units;        // of a patch

  int p, q;  // output rows and columns of a tile
  int tiles_p, tiles_q;
  int chunks;         // of a tile
  int x_rows;         // of the input window
  int phase_cols;     // columns of the window that lie stride_w apart, side by side
  int x_pitch;        // units from row to row
  int x_term;         // bytes of a window in one term
  int raw_cols;       // of the input's rows that the window is made of
  int raw_pitch;      // elements from row to row: of a channel, or of all
  int raw_bytes;      // of the rows as they lie in memory
  int chunk_bytes;    // of a warp's stage: dy, and what is beside it
  int roles;          // shares of a product
  int block_columns;  // of these, side by side for a block of channels: shares of its units
  int role_units;     // that a share has, at most
  int block_roles;    // that a block has
  int groups;         // of warps with the same shares, which take chunks in turn
  int producers;      // warps that make the windows
  int threads;        // of a block; warps behind the consumers have nothing to do
  int shared_memory;

  FCB_HD int consumers() const { return block_roles * groups; }
  FCB_HD int columns() const { return blocks * block_columns; }
  FCB_HD int role_blocks() const { return (roles + block_roles - 1) / block_roles; }
  // A role's sums: in each tile of 16 rows its units and a column of sums, 4 values a lane.
  FCB_HD int tile_sums() const { return (role_units + 1) * 4 * 32; }
  FCB_HD int role_sums() const { return kWarpTiles * tile_sums(); }
};

// The start of a block's shared memory.
struct Header {
  uint32_t most[kWindows][kMostChannels];  // magnitudes of a tile's input, by channel, as bits
  uint32_t zeros[4];                       // a unit
  int taps[kMostUnits];                    // where units are, from a pixel's window on, in bytes
  // The same of a role's units, in the order in which loads of 16 bytes want them. Behind the last one it is there again.
  int role_taps[kMostColumns][kRoleTaps];
};
constexpr int kHeaderBytes = (sizeof(Header) + 127) / 128 * 128;

inline Layout unit_layout(const Conv2d& c) {
  Layout t{};
  t.slots = c.C > 4 ? 8 : c.C > 2 ? 4 : static_cast<int>(c.C);
  t.blocks = static_cast<int>(ceil_div(c.C, 8));
  t.row_units = static_cast<int>(ceil_div(c.S, 8 / t.slots));
  t.block_units = static_cast<int>(c.R * t.row_units);
  t.units = t.blocks * t.block_units;
  return t;
}

// has_result: a result is read beside dy, for the activation's derivative.
inline std::optional<Layout> make_layout(const Conv2d& c, const GpuTraits& gpu, Rows rows, bool has_result, int p,
                                         int q, int consumers) {
  Layout t = unit_layout(c);
  const int tap_cols = 8 / t.slots;
  t.p = p;
  t.q = q;
  t.tiles_p = static_cast<int>(ceil_div(c.P, p));
  t.tiles_q = static_cast<int>(ceil_div(c.Q, q));
  t.chunks = static_cast<int>(ceil_div(p * q, kChunk));
  t.x_rows = static_cast<int>((p - 1) * c.stride_h + (c.R - 1) * c.dilation_h + 1);
  const int64_t cols = (q - 1) * c.stride_w + int64_t{t.row_units - 1} * tap_cols * c.dilation_w + 1;
  const int64_t phases = std::min(cols, c.stride_w);
  t.phase_cols = static_cast<int>(ceil_div(cols, c.stride_w));
  t.x_pitch = static_cast<int>(t.phase_cols * phases);
  const int64_t x_term = int64_t{t.blocks} * t.x_rows * t.x_pitch * 16;
  const int64_t raw_cols = (t.phase_cols - 1) * c.stride_w + phases + (tap_cols - 1) * c.dilation_w;
  // Copies of 16 bytes may have to begin before the window.
  const int64_t element_channels = c.channels_last ? c.C : 1, piece = 16 / c.element_bytes;
  const int64_t raw_pitch = round_up(raw_cols * element_channels + piece - 1, piece);
  const int64_t raw_bytes = (c.channels_last ? 1 : c.C) * t.x_rows * raw_pitch * c.element_bytes;
  if (x_term > gpu.shared_memory_per_block || raw_bytes > gpu.shared_memory_per_block) {
    return std::nullopt;
  }
  t.x_term = static_cast<int>(x_term);
  t.raw_cols = static_cast<int>(raw_cols);
  t.raw_pitch = static_cast<int>(raw_pitch);
  t.raw_bytes = static_cast<int>(raw_bytes);
  const int terms = c.element_bytes == 4 ? 2 : 1;
  t.chunk_bytes = (c.channels_last ? kChunk : kWarpRows) * chunk_pitch(c.element_bytes, c.channels_last) *
                  (has_result ? 2 : 1);
  const int64_t all_rows = rows == Rows::gradient ? c.K : round_up(t.units, 2) * 8;
  t.block_columns = static_cast<int>(ceil_div(t.block_units, kMostRoleUnits));
  t.role_units = static_cast<int>(ceil_div(t.block_units, t.block_columns));
  if (t.columns() > kMostColumns) {
    return std::nullopt;
  }
  t.roles = static_cast<int>(ceil_div(all_rows, kWarpRows)) * t.columns();
  const int role_blocks = static_cast<int>(ceil_div(t.roles, consumers));
  t.block_roles = static_cast<int>(ceil_div(t.roles, role_blocks));
  t.groups = std::min(consumers / t.block_roles, t.chunks);
  const Warps warps = warps_of(gpu.compute_capability);
  t.producers = warps.producers;
  t.threads = 32 * (warps.producers + warps.consumers);
  const int64_t ring = rows == Rows::gradient ? int64_t{t.consumers()} * kChunkStages * t.chunk_bytes : 0;
  const int64_t work = kWindows * terms * x_term + raw_bytes + ring;
  const int64_t sums = int64_t{t.consumers()} * t.role_sums() * 4;  // in the same place, at the end
  const int64_t all = kHeaderBytes + std::max(work, sums);
  if (all > gpu.shared_memory_per_block) {
    return std::nullopt;
  }
  t.shared_memory = static_cast<int>(all);
  return t;
}

// What a warp's copies of dy are made of, in bytes: pieces that begin at multiples of their size, whatever the tile. address: of
// dy and of what lies like it.
inline int copy_bytes(const Conv2d& c, const Layout& t, int64_t address) {
  const int64_t bytes = c.element_bytes;
  const int64_t run = c.channels_last ? c.K * bytes
                      : t.q == c.Q  // a tile's pixels follow each other
                          ? std::gcd(t.p * c.Q * bytes, c.P * c.Q * bytes)
                          : std::gcd(t.q * bytes, c.Q * bytes);
  return static_cast<int>(std::gcd(int64_t{16}, std::gcd(run, address)));
}

// The same of the input's rows.
inline int input_copy_bytes(const Conv2d& c, int64_t address) {
  return static_cast<int>(
      std::gcd(int64_t{16}, std::gcd(c.W * (c.channels_last ? c.C : 1) * c.element_bytes, address)));
}

// The tile with the least time, by a count of instructions of an H200's code: of a chunk, of the copies of dy in it, of a window's
// rows and units.
inline std::optional<Layout> best_layout(const Conv2d& c, const GpuTraits& gpu, Rows rows, bool has_result) {
  std::optional<Layout> best;
  double least = 0;
  for (int consumers = warps_of(gpu.compute_capability).consumers; consumers >= 1; consumers /= 2) {
    for (int64_t splits = ceil_div(c.Q, kMostPixels); splits <= c.Q; splits += ceil_div(splits, 8)) {
      const int64_t q = ceil_div(c.Q, splits);
      if (q < kLeastCols && splits > 1) {
        break;
      }
      for (int64_t p = 1; p <= 16 && p <= c.P && p * q <= kMostPixels; ++p) {
        const auto t = make_layout(c, gpu, rows, has_result, static_cast<int>(p), static_cast<int>(q), consumers);
        if (!t.has_value()) {
          continue;
        }
        const int terms = c.element_bytes == 4 ? 2 : 1;
        const double copies = rows == Rows::patch ? 0 : 8.0 * kWarpRows * c.element_bytes / copy_bytes(c, *t, 0);
        const double chunk = (terms == 2 ? 720 : 460) + copies * (has_result ? 2 : 1);
        const double multiply = static_cast<double>(t->chunks) / t->groups * chunk + 100;
        const double unit_lines = ceil_div(int64_t{t->blocks} * t->x_rows, t->producers);
        const double window = unit_lines * (40 + (terms == 2 ? 160.0 : 100.0) * ceil_div(t->x_pitch, 32)) +
                              t->raw_bytes / (t->producers * 32.0) *
                                  (30.0 / input_copy_bytes(c, 0) + (terms == 2 ? 4.0 : 0.0)) +
                              500;
        // Warps wait for results more than for each other: the time is about a warp's own, of the slower kind.
        const double cost = std::max(multiply, window) * t->role_blocks() * t->tiles_p * t->tiles_q;
        if (!best.has_value() || cost < least) {
          least = cost;
          best = t;
        }
      }
    }
  }
  return best;
}

}  // namespace wgrad_stem_sm80

// What is asked of a gradient's pass.
struct WgradStemSm80 {
  static constexpr const char* kName = "wgrad_stem_sm80";

  wgrad_stem_sm80::Layout gradient;  // G and d
  // S and s, unless there are none or they are given: sums over the input, or the patch by itself.
  std::optional<FromInputSm90> from_input;
  std::optional<wgrad_stem_sm80::Layout> patch;
  int gradient_blocks, patch_blocks;  // that share the tiles

  // Python knows the same domain (_conv.py).
  static bool supports(const Conv2d& c, const GpuTraits& gpu) {
    using namespace wgrad_stem_sm80;
    constexpr int64_t kMostElements = int64_t{1} << 30;  // of an image, and pixels
    if (gpu.compute_capability < 80 || c.groups != 1 || c.element_bytes > 4 || c.C > kMostChannels ||
        c.R * c.S > kMostUnits || unit_layout(c).units > kMostUnits || c.C * c.H * c.W > kMostElements ||
        c.K * c.P * c.Q > kMostElements || c.N * c.P * c.Q > kMostElements) {
      return false;
    }
    const int64_t rows = (c.R - 1) * c.dilation_h + 1, cols = (c.S - 1) * c.dilation_w + kLeastCols * c.stride_w;
    return round_up(c.C, 8) * rows * cols <= kMostWindow;
  }

  // has_statistics: BatchNorm takes the batch's. has_input_sums: FromInputSm90's are there.
  static std::optional<WgradStemSm80> make(const Conv2d& c, const GpuTraits& gpu, bool has_result, bool has_statistics,
                                           bool has_input_sums) {
    using namespace wgrad_stem_sm80;
    if (!supports(c, gpu)) {
      return std::nullopt;
    }
    const auto gradient = best_layout(c, gpu, Rows::gradient, has_result);
    if (!gradient.has_value()) {
      return std::nullopt;
    }
    WgradStemSm80 plan{*gradient, {}, {}, blocks(c, gpu, *gradient), 0};
    if (!has_statistics || has_input_sums) {
    } else if (FromInputSm90::supports(c, gpu)) {
      plan.from_input = FromInputSm90::make(c, gpu);
    } else {
      plan.patch = best_layout(c, gpu, Rows::patch, false);
      if (!plan.patch.has_value()) {
        return std::nullopt;
      }
      plan.patch_blocks = blocks(c, gpu, *plan.patch);
    }
    return plan;
  }

  // Doubles: each block's sums, all sums, and what sums over the input need.
  int64_t workspace() const {
    return partials() + sums() + (from_input ? from_input->workspace() + FromInputSm90::kSums : 0);
  }
  int64_t partials() const { return gradient_blocks * gradient_sums() + patch_blocks * patch_sums(); }
  int64_t sums() const { return gradient_sums() + patch_sums(); }
  int64_t gradient_sums() const { return int64_t{gradient.roles} * gradient.role_sums(); }
  int64_t patch_sums() const { return patch ? int64_t{patch->roles} * patch->role_sums() : 0; }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const struct WgradCall& call, double* workspace, cudaStream_t stream) const;
#endif

 private:
  // One on each multiprocessor; more where a warp would add up float32 sums of too many chunks.
  static int blocks(const Conv2d& c, const GpuTraits& gpu, const wgrad_stem_sm80::Layout& t) {
    constexpr int64_t kMostChunks = 512;  // of a warp
    const int64_t tiles = c.N * t.tiles_p * t.tiles_q;
    const int64_t resident = std::max<int64_t>(1, gpu.multiprocessors / t.role_blocks());
    const int64_t least = ceil_div(tiles * ceil_div(t.chunks, t.groups), kMostChunks);
    return static_cast<int>(std::min(tiles, round_up(std::max(resident, least), resident)));
  }
};

}  // namespace fused_conv_bn
