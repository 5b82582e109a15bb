// Which convolutions the hopper kernel takes, and how they are cut into tiles: host code without CUDA, so that
// select_plan() and its tests can ask. The kernel reads the same numbers.
//
// The rows of the input that a tile needs come to shared memory as they lie in the image: a slab. (Where the image itself
// consists of units, there is none.) From there they go into units of 16 bytes: eight values of k for one output column. A
// unit has the same column of `taps` neighbouring taps of a filter row, `slots` channels each; 8 = taps * slots. Units of
// neighbouring output columns lie side by side, and those of the next output row one pitch further, whatever the strides:
// rows and columns of the image go into planes by their phase (their number modulo the stride). So a unit of the filter is
// nothing but an offset, the same for every output pixel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/scalar.h"
#include "kernels/conv/problem.h"

namespace fused_conv_bn {

constexpr int kHopperLoaders = 2;  // warpgroups that load
// Warpgroups that multiply and write, by turns. With a third, SiLU took 1.26 times ReLU's time where it had taken 1.47 (problem
// 73, float16 channels_last), and ReLU no longer than before. In float32 there are no registers for it.
constexpr int kHopperMostTakers = 3;
FCB_HD constexpr int hopper_takers(int halves) { return halves == 2 ? 2 : kHopperMostTakers; }
FCB_HD constexpr int hopper_threads(int halves) { return 128 * (kHopperLoaders + hopper_takers(halves)); }
// Units of the input that a loading thread has in registers at once. With four, problem 73 took 177 us in float16 NCHW, with
// two 169.
FCB_HD constexpr int hopper_units_at_once(int halves, bool writes, bool channels_last) {
  return (writes ? channels_last : halves == 2) ? 4 : 2;
}
// Teams of loading threads that take turns with the tiles. float32 has to be looked at before it can be split, and a team waits
// most of that time. For contiguous outputs two teams were slower (176 -> 182 us for problem 73).
FCB_HD constexpr int hopper_teams(int halves, bool pixels) { return halves == 2 && pixels ? kHopperLoaders : 1; }
FCB_HD constexpr int hopper_place_bytes(bool channels_last) { return channels_last ? 8 : 2; }
constexpr int kHopperChannels = 64;         // output channels of a block, at most
constexpr int kHopperChunk = 128;           // positions that a warpgroup multiplies at a time
constexpr int kHopperMostUnits = 128;       // of a filter
constexpr int kHopperMostPositions = 1024;  // of a tile
constexpr int kHopperMostStages = 4;        // tiles in shared memory
constexpr int kHopperSlabs = 2;
constexpr int kHopperOutside = 8;  // of a channel: places for results outside the tile, for threads that share it
constexpr int kHopperHeader = 2048;
constexpr int64_t kHopperL2Bytes = int64_t{60} << 20;  // of L2, at most
constexpr int kHopperAlignment = 16;                   // of input and weights in memory
// A run of the output is staged where it starts in memory, modulo so many bytes.
constexpr int kHopperRunAlign = 32;

// A block's tile, and how shared memory is laid out for it. Bytes, unless it says otherwise.
struct HopperTile {
  int p, q;                        // output rows and columns
  int slots_log2;                  // slots: channels of a tap in a unit
  int channel_blocks;              // units that the channels of a tap take
  int phase_step_h, phase_step_w;  // phases that occur are multiples of these
  int phases_h, phases_w;
  int x_rows, x_cols;  // of a plane, in units
  int64_t x_units;     // of all planes
  int units;           // of the filter
  int k_steps;         // of two units each
  int halves;          // 2 where float32 is split
  int chunks;
  int x_half;  // the units of one half
  int stages;
  bool takers_share;         // the warpgroups that multiply share a tile's chunks; else they take turns with the tiles
  int w_passes, w_channels;  // weights are set up in passes of so many output channels
  int rounds;                // in which the threads load a tile's units
  int table;                 // of these units
  int slab_rows;             // input rows
  int slab_pitch;            // from row to row
  int slab;                  // one slab; 0: there are none
  int stage_row;             // contiguous: from row to row of a tile on its way out, in elements
  int stage_pitch;           // contiguous: from channel to channel
  bool stage_deals;          // contiguous: a store has channels two apart
  int stage_end;             // contiguous: places for results outside the tile
  int pixel_stage;           // channels_last: a warp's place for 32 pixels on their way out; 0: there is none
  int tiles_p, tiles_q;
  // Shared memory: the header, the weights, the stages with input, the slabs, the table of units, the places of positions,
  // the stages on the way out.
  int at_input, at_slabs, at_table, at_places, at_output;
  int shared_memory;

  FCB_HD int taps() const { return 8 >> slots_log2; }
  FCB_HD int w_bytes() const { return halves * k_steps * 2 * kHopperChannels * 16; }
};

// A unit of the filter: its place in a tile's units, and what it holds.
struct HopperUnit {
  int offset;
  int r, s, channel_block;
};

inline HopperUnit hopper_unit(const Conv2d& c, const HopperTile& t, int index) {
  HopperUnit u{};
  const int steps_s = static_cast<int>(ceil_div(c.S, t.taps()));
  u.channel_block = index % t.channel_blocks;
  u.s = index / t.channel_blocks % steps_s * t.taps();
  u.r = index / t.channel_blocks / steps_s;
  const int64_t h = u.r * c.dilation_h;
  const int64_t w = u.s * c.dilation_w;
  const int64_t phase = h % c.stride_h / t.phase_step_h * t.phases_w + w % c.stride_w / t.phase_step_w;
  u.offset = static_cast<int>(((phase * t.channel_blocks + u.channel_block) * t.x_rows + h / c.stride_h) * t.x_cols +
                              w / c.stride_w);
  return u;
}

inline HopperTile hopper_tile(const Conv2d& c, int p, int q) {
  HopperTile t{};
  t.p = p;
  t.q = q;
  t.slots_log2 = c.C == 1 ? 0 : (c.C == 2 ? 1 : (c.C <= 4 ? 2 : 3));
  t.channel_blocks = static_cast<int>(ceil_div(c.C, 8));
  const int64_t last_h = (c.R - 1) * c.dilation_h;
  const int64_t last_w = (c.S - 1) / t.taps() * t.taps() * c.dilation_w;
  t.phase_step_h = static_cast<int>(std::gcd(c.dilation_h, c.stride_h));
  t.phase_step_w = static_cast<int>(std::gcd(c.dilation_w * t.taps(), c.stride_w));
  t.phases_h = last_h == 0 ? 1 : static_cast<int>(c.stride_h / t.phase_step_h);
  t.phases_w = last_w == 0 ? 1 : static_cast<int>(c.stride_w / t.phase_step_w);
  t.x_rows = static_cast<int>(p + last_h / c.stride_h);
  t.x_cols = static_cast<int>(q + last_w / c.stride_w);
  t.x_units = int64_t{t.phases_h} * t.phases_w * t.channel_blocks * t.x_rows * t.x_cols;
  t.units = static_cast<int>(c.R * ceil_div(c.S, t.taps()) * t.channel_blocks);
  t.k_steps = (t.units + 1) / 2;
  t.halves = c.element_bytes == 4 ? 2 : 1;
  t.slab_rows = static_cast<int>((p - 1) * c.stride_h + last_h + 1);
  t.chunks = static_cast<int>(ceil_div(int64_t{p - 1} * t.x_cols + q, kHopperChunk));
  return t;
}

// Bytes of an input row in memory: of one channel, or of all where they are neighbours.
inline int64_t hopper_row_bytes(const Conv2d& c) { return c.W * (c.channels_last ? c.C : 1) * c.element_bytes; }

// Whether the image consists of units.
inline bool hopper_reads_units(const Conv2d& c) { return c.element_bytes == 2 && c.channels_last && c.C % 8 == 0; }

// The rest of a tile whose sizes are not out of all proportion; false if shared memory does not suffice.
// writes: the kernel writes results, which have to be staged; else it gathers moments.
inline bool hopper_layout(const Conv2d& c, const GpuTraits& gpu, bool writes, HopperTile& t) {
  int64_t most_offset = 0;
  for (int i = 0; i < t.units; ++i) {
    most_offset = std::max<int64_t>(most_offset, hopper_unit(c, t, i).offset);
  }
  // The last chunk reads on behind its last position.
  const int64_t positions = int64_t{t.chunks} * kHopperChunk;
  t.x_half = static_cast<int>(round_up(std::max<int64_t>(t.x_units, most_offset + positions) * 16, 128));
  int64_t outputs = 0;
  if (writes && !c.channels_last) {
    const int vector = 16 / c.element_bytes;
    t.stage_row = static_cast<int>(t.q == c.Q ? t.q : round_up(t.q, vector) + vector);
    t.stage_end = static_cast<int>(round_up(int64_t{t.p} * t.stage_row, 2));
    const int most_lead = t.q == c.Q ? kHopperRunAlign / c.element_bytes : 0;
    // A store of half a warp (float32) or a warp is four pairs of pixels of four or eight channels: they are to lie in different
    // banks. Where planes are an odd number of 16 bytes, every other channel is shifted by that (kHopperRunAlign), and
    // the four are all even, or all odd.
    t.stage_deals = c.element_bytes == 4 && c.P * c.Q % 8 == 4;
    const int wanted = t.stage_deals ? 12 : 8;  // elements: words (float32) or half of one
    const int line = 128 / c.element_bytes;
    t.stage_pitch = static_cast<int>(round_up(t.stage_end + kHopperOutside + most_lead - wanted, line) + wanted);
    outputs = hopper_takers(t.halves) * int64_t{kHopperChannels} * t.stage_pitch * c.element_bytes;
  }
  const int round = 128 * kHopperLoaders / hopper_teams(t.halves, writes && c.channels_last) *
                    hopper_units_at_once(t.halves, writes, c.channels_last);
  t.rounds = static_cast<int>(ceil_div(t.x_units, round));
  t.table = t.rounds * round * 8;
  const int64_t cols = (t.q - 1) * c.stride_w + (c.S - 1) * c.dilation_w + 1;
  if (cols >= 1 << 17 || t.slab_rows > 1 << 10) {  // they share words in the kernel's table
    return false;
  }
  if (!hopper_reads_units(c)) {
    // From a multiple of 16 bytes to another, unless it is the row's end.
    const int64_t row = round_up(hopper_row_bytes(c), 16);
    const int64_t part = round_up(cols * (hopper_row_bytes(c) / c.W), 16) + 16;
    t.slab_pitch = static_cast<int>(t.q == c.Q ? row : std::min(row, part));
    const int64_t slab = round_up((c.channels_last ? 1 : c.C) * t.slab_rows * int64_t{t.slab_pitch}, 128);
    if (slab > gpu.shared_memory_per_block) {
      return false;
    }
    t.slab = static_cast<int>(slab);
  }
  if (writes && c.element_bytes == 4 && c.channels_last && c.K <= kHopperChannels && c.K % 4 == 0) {
    t.pixel_stage = static_cast<int>(32 * c.K * c.element_bytes);
    outputs = hopper_takers(t.halves) * 4 * int64_t{t.pixel_stage};
  }
  // Who waits for a stage must not be more than one of its turns behind: a taker is not while there are as many as takers.
  const int64_t places = positions * hopper_place_bytes(c.channels_last);
  const int64_t others = kHopperHeader + t.w_bytes() + kHopperSlabs * int64_t{t.slab} + t.table + places + outputs;
  const int64_t stage = int64_t{t.halves} * t.x_half;
  t.stages = static_cast<int>(
      std::clamp<int64_t>((gpu.shared_memory_per_block - others) / stage, 0, kHopperMostStages));
  if (t.stages < hopper_takers(t.halves)) {
    return false;
  }
  // They lie in the second stage, and behind that.
  const int64_t w_channel = c.C * c.R * c.S * c.element_bytes;
  t.w_channels = static_cast<int>(std::min<int64_t>((t.stages - 1) * stage / w_channel / 8 * 8, kHopperChannels));
  if (t.w_channels == 0) {
    return false;
  }
  t.w_passes = static_cast<int>(ceil_div(kHopperChannels, t.w_channels));
  // The last tile of a block takes half as long, which counts where there are few: 16.7 -> 16.0 us for 3 -> 32 channels,
  // stride 2. A contiguous output is staged by the tile.
  t.takers_share = writes && c.channels_last && t.chunks >= std::max(3, hopper_takers(t.halves));
  t.at_input = kHopperHeader + t.w_bytes();
  t.at_slabs = static_cast<int>(t.at_input + t.stages * stage);
  t.at_table = t.at_slabs + kHopperSlabs * t.slab;
  t.at_places = t.at_table + t.table;
  t.at_output = static_cast<int>(t.at_places + places);
  t.shared_memory = static_cast<int>(t.at_output + outputs);
  t.tiles_p = static_cast<int>(ceil_div(c.P, t.p));
  t.tiles_q = static_cast<int>(ceil_div(c.Q, t.q));
  return true;
}

// Blocks that share the tiles, for each 64 output channels.
inline int64_t hopper_blocks(const Conv2d& c, const HopperTile& t, const GpuTraits& gpu) {
  const int64_t tiles = c.N * t.tiles_p * t.tiles_q;
  return std::min<int64_t>(tiles, std::max<int64_t>(1, gpu.multiprocessors / ceil_div(c.K, kHopperChannels)));
}

// Moments of each channel that the kernel gathers.
inline int64_t hopper_partials(const Conv2d& c, const HopperTile& t, const GpuTraits& gpu) {
  return hopper_blocks(c, t, gpu) * hopper_takers(t.halves);
}

// Tensor cores cut off what does not fit when they add to a float32 sum, and always towards 0: over long sums that adds up to
// more than twice what PyTorch's own float32 convolutions lose.
constexpr int64_t kHopperMostTerms = 256;

inline bool hopper_supports(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (!gpu.has_wgmma || c.element_bytes > 4 || c.groups != 1 || c.C > 64 || c.R * c.S > 256 ||
      !can_split_terms(c, kHopperMostTerms)) {
    return false;
  }
  return c.H <= 1 << 20 && c.W <= 1 << 20 && c.stride_h <= 1 << 10 && c.stride_w <= 1 << 10 && c.pad_h <= 1 << 20 &&
         c.pad_w <= 1 << 20 && c.dilation_h <= 1 << 10 && c.dilation_w <= 1 << 10 && c.K <= 1 << 20 &&
         c.C * c.H * c.W <= kLimit && c.K * c.P * c.Q <= kLimit && c.N * c.P * c.Q <= kLimit &&
         hopper_tile(c, 1, 8).units <= kHopperMostUnits;
}

// The tile that the blocks need least time for, by this count: a position's work, a chunk's, a tile's, and loading a unit,
// which other warps do meanwhile. Waves of blocks count as a whole.
inline bool hopper_best_tile(const Conv2d& c, const GpuTraits& gpu, bool writes, HopperTile& best) {
  constexpr int64_t kMostSplits = 16;
  double least = 0;
  bool found = false;
  const int64_t least_splits = ceil_div(c.Q, 512);
  for (int64_t splits = least_splits; splits < least_splits + kMostSplits && splits <= ceil_div(c.Q, 8); ++splits) {
    int64_t q = ceil_div(c.Q, splits);
    if (splits > 1) {
      q = round_up(q, 8);
    }
    for (int p = 1; p <= c.P && p <= 64; ++p) {
      HopperTile t = hopper_tile(c, p, static_cast<int>(q));
      if (int64_t{p} * t.x_cols > kHopperMostPositions) {
        break;
      }
      if (t.x_units > 8192 || !hopper_layout(c, gpu, writes, t)) {
        continue;
      }
      const int64_t groups = ceil_div(c.K, kHopperChannels);
      const int64_t tiles = c.N * t.tiles_p * t.tiles_q;
      const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(tiles, gpu.multiprocessors / groups));
      // A block's warpgroups take turns.
      const int64_t turns = ceil_div(tiles, blocks);
      const int64_t rounds = ceil_div(blocks * groups, gpu.multiprocessors);
      const double work = t.chunks * kHopperChunk + 0.3 * p * static_cast<double>(q) + 64;
      // float32 that takes more than one round is read twice. Rows that are not whole come one by one, which was measured for
      // channels_last; contiguous output has a cost of its own below.
      const int runs = t.slab == 0 || q == c.Q || !c.channels_last ? 0 : t.slab_rows;
      const double load = (c.element_bytes == 4 && t.rounds > 1 ? 0.1 : 0.0625) * t.table + 6.0 * runs + 128;
      double cost = static_cast<double>(rounds) * (static_cast<double>(turns) * std::max(work, load) + work + load);
      if (writes && !c.channels_last && q < c.Q) {
        cost *= 1.0 + 8.0 / static_cast<double>(q);  // short runs in many planes
      }
      if (!found || cost < least) {
        found = true;
        least = cost;
        best = t;
      }
    }
  }
  return found;
}

struct StemSm90 {
  static constexpr const char* kName = "stem_sm90";
  static constexpr bool kGathersMoments = true;

  HopperTile tile;          // to write results
  HopperTile moments_tile;  // to gather moments of them instead

  static std::optional<StemSm90> make(const Conv2d& c, const GpuTraits& gpu) {
    StemSm90 plan{};
    if (!hopper_supports(c, gpu) || !hopper_best_tile(c, gpu, true, plan.tile) ||
        !hopper_best_tile(c, gpu, false, plan.moments_tile)) {
      return std::nullopt;
    }
    return plan;
  }

  bool is_faster(const Conv2d& c) const {
    if (c.C > kStemMostChannels) {
      return false;
    }
    constexpr int64_t kLarge = 100000;  // pixels
    const int64_t pixels = c.N * c.P * c.Q;
    const int64_t taps = c.R * c.S;
    const int64_t terms = c.C * taps;
    const bool whole_rows = tile.q == c.Q;
    if (c.element_bytes == 2) {
      // Single channels of few taps leave nothing to multiply. Contiguous: parts of rows cannot be copied in bulk, up to 1.3
      // times; small problems of few terms are stem_sm80's.
      return c.channels_last ? c.C > 1 || taps >= 25
                             : whole_rows && taps > 1 && (pixels >= kLarge || terms >= 150 || (c.C == 1 && taps >= 25));
    }
    // Tiles of fewer pixels than a chunk has: up to 1.9 times. Few output channels leave half of the rows idle. Parts of
    // contiguous rows are worth it where stem_sm80 is not: 7x7/2 of an image 129 us, PyTorch 364.
    const bool parts_fit = c.channels_last ? tile.p * tile.q >= 64
                                           : tile.p * tile.q >= kHopperChunk && taps >= 25 &&
                                                 terms > kStemSm80MostTerms && pixels >= kLarge;
    const bool fits = whole_rows || parts_fit;
    const bool enough = c.C > 1 || taps >= 25 || pixels >= kLarge;
    const bool small = pixels < kLarge && c.C <= 2 && taps < 25 && c.K <= 64;
    return taps > 1 && fits && enough && !small && pixels >= 2000 &&
           (c.K >= 48 || (c.K >= 32 && (pixels < kLarge ? c.channels_last : c.stride_w > 1)));
  }

  ConvRequirements requirements(const Conv2d&) const { return {kHopperAlignment, true}; }

  std::string describe() const {
    return std::string(kName) + " " + std::to_string(tile.p) + "x" + std::to_string(tile.q) + " pixels";
  }

  // Moments of each channel that launch_moments() puts out.
  int64_t partials(const Conv2d& c, const GpuTraits& gpu) const { return hopper_partials(c, moments_tile, gpu); }

#if defined(__CUDACC__)
  template <typename T>
  cudaError_t launch(const ConvCall& call, cudaStream_t stream) const;
  template <typename T>
  cudaError_t launch_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const;
#endif
};

}  // namespace fused_conv_bn
