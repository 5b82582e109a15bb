// How stem_sm90 cuts a convolution into tiles, and how a block's shared memory is laid out: host code without CUDA, for
// select_plan() and its tests. The kernel reads the same numbers.
//
// Raw rows are the input rows that a tile needs, as they lie in the image. They come to shared memory first, unless the image
// itself consists of units. Producers make units of them: 16 bytes, eight values of k for one output column. A unit has the
// same column of `taps` neighbouring taps of a filter row, `slots` channels each; 8 = taps * slots.
//
// Units of neighbouring output columns lie side by side, and those of the next output row one pitch further, whatever the
// strides: rows and columns of the image go into planes by their phase (their number modulo the stride). So a unit of the
// filter is nothing but an offset, the same for every output pixel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "kernels/common/scalar.h"
#include "kernels/conv/problem.h"

namespace fused_conv_bn::stem_sm90 {

constexpr int kProducerWarpgroups = 2;
// Consumers are warpgroups that multiply and write. With a third, SiLU took 1.26 times ReLU's time where it had taken 1.47
// (problem 73, float16 channels_last), and ReLU no longer than before. In float32 there are no registers for it.
constexpr int kMaxConsumers = 3;
FCB_HD constexpr int consumers(int splits) { return splits == 2 ? 2 : kMaxConsumers; }
FCB_HD constexpr int block_threads(int splits) { return 128 * (kProducerWarpgroups + consumers(splits)); }
// Units of the input that a producer thread has in registers at once. With four, problem 73 took 177 us in float16 NCHW, with
// two 169.
FCB_HD constexpr int units_in_registers(int splits, bool writes, bool channels_last) {
  return (writes ? channels_last : splits == 2) ? 4 : 2;
}
// Groups of producer threads, each with every other tile. float32 has to be looked at before it can be split, and a group waits
// most of that time. For contiguous outputs two groups were slower (176 -> 182 us for problem 73).
FCB_HD constexpr int producer_groups(int splits, bool writes_channels_last) {
  return splits == 2 && writes_channels_last ? kProducerWarpgroups : 1;
}
FCB_HD constexpr int output_offset_bytes(bool channels_last) { return channels_last ? 8 : 2; }
constexpr int kBlockChannels = 64;   // output channels of a block, at most
constexpr int kChunk = 128;          // positions that a consumer multiplies at a time
constexpr int kMaxUnits = 128;       // of a filter
constexpr int kMaxPositions = 1024;  // of a tile
constexpr int kMaxStages = 4;        // tiles of units in shared memory
constexpr int kRawStages = 2;        // tiles of raw rows in shared memory
constexpr int kDiscarded = 8;        // elements of a channel's output buffer that take results outside the tile
constexpr int kHeaderBytes = 2048;
constexpr int64_t kL2Bytes = int64_t{60} << 20;  // of L2, at most
constexpr int kAlignment = 16;                   // of input and weights in memory
// A run of the output starts in its buffer where it starts in memory, modulo so many bytes.
constexpr int kRunAlignment = 32;

// A block's tile, and the layout of shared memory for it. Bytes, unless it says otherwise.
struct TileLayout {
  int p, q;                        // output rows and columns
  int slots_log2;                  // slots: channels of a tap in a unit
  int c_blocks;                    // units that the channels of a tap take
  int phase_step_h, phase_step_w;  // phases that occur are multiples of these
  int phases_h, phases_w;
  int x_rows, x_cols;  // of a plane, in units
  int64_t x_units;     // of all planes
  int units;           // of the filter
  int k_steps;         // of two units each
  int splits;          // float16 numbers that a factor is made of: 2 (high and low) for float32, else 1
  int chunks;
  int x_split;  // the units of one split
  int stages;
  bool consumers_share;      // consumers share a tile's chunks; else each has tiles of its own
  int w_passes, w_channels;  // weights are set up in passes of so many output channels
  int rounds;                // in which producer threads load a tile's units
  int unit_table;            // of these units
  int raw_rows;              // rows
  int raw_pitch;             // from row to row
  int raw_stage;             // the raw rows of one tile; 0: there are none
  int out_row;               // contiguous: from row to row of the output buffer, in elements
  int out_pitch;             // contiguous: from channel to channel, in elements
  bool out_interleaves;      // contiguous: channels that a store has are two apart
  int out_end;               // contiguous: where results outside the tile go, in elements
  int out_pixels;            // channels_last: a warp's output buffer, for 32 pixels; 0: there is none
  int tiles_p, tiles_q;
  // Shared memory: the header, the weights, the stages, the raw stages, the table of units, that of output offsets, the
  // output buffers.
  int at_input, at_raw, at_unit_table, at_output_offsets, at_output;
  int shared_memory;

  FCB_HD int taps() const { return 8 >> slots_log2; }
  FCB_HD int w_bytes() const { return splits * k_steps * 2 * kBlockChannels * 16; }
};

// A unit of the filter: its offset among a tile's units, and what it holds.
struct FilterUnit {
  int offset;
  int r, s, c_block;
};

inline FilterUnit filter_unit(const Conv2d& c, const TileLayout& t, int index) {
  FilterUnit u{};
  const int steps_s = static_cast<int>(ceil_div(c.S, t.taps()));
  u.c_block = index % t.c_blocks;
  u.s = index / t.c_blocks % steps_s * t.taps();
  u.r = index / t.c_blocks / steps_s;
  const int64_t h = u.r * c.dilation_h;
  const int64_t w = u.s * c.dilation_w;
  const int64_t phase = h % c.stride_h / t.phase_step_h * t.phases_w + w % c.stride_w / t.phase_step_w;
  u.offset = static_cast<int>(((phase * t.c_blocks + u.c_block) * t.x_rows + h / c.stride_h) * t.x_cols +
                              w / c.stride_w);
  return u;
}

// Sizes that follow from the tile's rows and columns alone.
inline TileLayout tile_of(const Conv2d& c, int p, int q) {
  TileLayout t{};
  t.p = p;
  t.q = q;
  t.slots_log2 = c.C == 1 ? 0 : (c.C == 2 ? 1 : (c.C <= 4 ? 2 : 3));
  t.c_blocks = static_cast<int>(ceil_div(c.C, 8));
  const int64_t last_h = (c.R - 1) * c.dilation_h;
  const int64_t last_w = (c.S - 1) / t.taps() * t.taps() * c.dilation_w;
  t.phase_step_h = static_cast<int>(std::gcd(c.dilation_h, c.stride_h));
  t.phase_step_w = static_cast<int>(std::gcd(c.dilation_w * t.taps(), c.stride_w));
  t.phases_h = last_h == 0 ? 1 : static_cast<int>(c.stride_h / t.phase_step_h);
  t.phases_w = last_w == 0 ? 1 : static_cast<int>(c.stride_w / t.phase_step_w);
  t.x_rows = static_cast<int>(p + last_h / c.stride_h);
  t.x_cols = static_cast<int>(q + last_w / c.stride_w);
  t.x_units = int64_t{t.phases_h} * t.phases_w * t.c_blocks * t.x_rows * t.x_cols;
  t.units = static_cast<int>(c.R * ceil_div(c.S, t.taps()) * t.c_blocks);
  t.k_steps = (t.units + 1) / 2;
  t.splits = c.element_bytes == 4 ? 2 : 1;
  t.raw_rows = static_cast<int>((p - 1) * c.stride_h + last_h + 1);
  t.chunks = static_cast<int>(ceil_div(int64_t{p - 1} * t.x_cols + q, kChunk));
  return t;
}

// Bytes of an input row in memory: of one channel, or of all where they are neighbours.
inline int64_t row_bytes(const Conv2d& c) { return c.W * (c.channels_last ? c.C : 1) * c.element_bytes; }

// Whether the image consists of units.
inline bool reads_units(const Conv2d& c) { return c.element_bytes == 2 && c.channels_last && c.C % 8 == 0; }

// The output buffers, and their bytes. writes: the kernel writes results; else it gathers moments and needs none.
inline int64_t lay_out_output(const Conv2d& c, bool writes, TileLayout& t) {
  if (writes && !c.channels_last) {
    const int vector = 16 / c.element_bytes;
    t.out_row = static_cast<int>(t.q == c.Q ? t.q : round_up(t.q, vector) + vector);
    t.out_end = static_cast<int>(round_up(int64_t{t.p} * t.out_row, 2));
    const int most_lead = t.q == c.Q ? kRunAlignment / c.element_bytes : 0;
    // A store of 16 threads (float32) or a warp is four pairs of pixels of four or eight channels: they are to lie in different
    // banks. Where the output's planes are an odd number of 16 bytes, every other channel is shifted by that (kRunAlignment),
    // and the four are all even, or all odd.
    t.out_interleaves = c.element_bytes == 4 && c.P * c.Q % 8 == 4;
    const int wanted = t.out_interleaves ? 12 : 8;  // elements: 4 bytes each (float32) or 2
    const int line = 128 / c.element_bytes;
    t.out_pitch = static_cast<int>(round_up(t.out_end + kDiscarded + most_lead - wanted, line) + wanted);
    return consumers(t.splits) * int64_t{kBlockChannels} * t.out_pitch * c.element_bytes;
  }
  if (writes && c.element_bytes == 4 && c.channels_last && c.K <= kBlockChannels && c.K % 4 == 0) {
    t.out_pixels = static_cast<int>(32 * c.K * c.element_bytes);
    return consumers(t.splits) * 4 * int64_t{t.out_pixels};
  }
  return 0;
}

// The raw rows; false if they do not fit. cols: input columns of the tile.
inline bool lay_out_raw_rows(const Conv2d& c, const GpuTraits& gpu, int64_t cols, TileLayout& t) {
  if (reads_units(c)) {
    return true;
  }
  // From a multiple of 16 bytes to another, unless it is the row's end.
  const int64_t row = round_up(row_bytes(c), 16);
  const int64_t part = round_up(cols * (row_bytes(c) / c.W), 16) + 16;
  t.raw_pitch = static_cast<int>(t.q == c.Q ? row : std::min(row, part));
  const int64_t stage = round_up((c.channels_last ? 1 : c.C) * t.raw_rows * int64_t{t.raw_pitch}, 128);
  if (stage > gpu.shared_memory_per_block) {
    return false;
  }
  t.raw_stage = static_cast<int>(stage);
  return true;
}

// The rest of a tile whose sizes are not out of all proportion; false if shared memory does not suffice.
// writes: the kernel writes results, through output buffers; else it gathers moments.
inline bool lay_out(const Conv2d& c, const GpuTraits& gpu, bool writes, TileLayout& t) {
  int64_t most_offset = 0;
  for (int i = 0; i < t.units; ++i) {
    most_offset = std::max<int64_t>(most_offset, filter_unit(c, t, i).offset);
  }
  // The last chunk reads on behind its last position.
  const int64_t positions = int64_t{t.chunks} * kChunk;
  t.x_split = static_cast<int>(round_up(std::max<int64_t>(t.x_units, most_offset + positions) * 16, 128));
  const int64_t outputs = lay_out_output(c, writes, t);
  const int round = 128 * kProducerWarpgroups / producer_groups(t.splits, writes && c.channels_last) *
                    units_in_registers(t.splits, writes, c.channels_last);
  t.rounds = static_cast<int>(ceil_div(t.x_units, round));
  t.unit_table = t.rounds * round * 8;
  const int64_t cols = (t.q - 1) * c.stride_w + (c.S - 1) * c.dilation_w + 1;
  if (cols >= 1 << 17 || t.raw_rows > 1 << 10) {  // they share words in the kernel's table of units
    return false;
  }
  if (!lay_out_raw_rows(c, gpu, cols, t)) {
    return false;
  }
  // Whoever waits for a stage must not be more than one of its uses behind: consumers are not while stages are as many.
  const int64_t offsets = positions * output_offset_bytes(c.channels_last);
  const int64_t others = kHeaderBytes + t.w_bytes() + kRawStages * int64_t{t.raw_stage} + t.unit_table + offsets +
                         outputs;
  const int64_t stage = int64_t{t.splits} * t.x_split;
  t.stages = static_cast<int>(std::clamp<int64_t>((gpu.shared_memory_per_block - others) / stage, 0, kMaxStages));
  if (t.stages < consumers(t.splits)) {
    return false;
  }
  // Raw weights lie in the second stage, and behind that.
  const int64_t w_channel = c.C * c.R * c.S * c.element_bytes;
  t.w_channels = static_cast<int>(std::min<int64_t>((t.stages - 1) * stage / w_channel / 8 * 8, kBlockChannels));
  if (t.w_channels == 0) {
    return false;
  }
  t.w_passes = static_cast<int>(ceil_div(kBlockChannels, t.w_channels));
  // Sharing halves the time of a block's last tile, which counts where there are few: 16.7 -> 16.0 us for 3 -> 32 channels,
  // stride 2. A contiguous output is buffered by the tile.
  t.consumers_share = writes && c.channels_last && t.chunks >= std::max(3, consumers(t.splits));
  t.at_input = kHeaderBytes + t.w_bytes();
  t.at_raw = static_cast<int>(t.at_input + t.stages * stage);
  t.at_unit_table = t.at_raw + kRawStages * t.raw_stage;
  t.at_output_offsets = t.at_unit_table + t.unit_table;
  t.at_output = static_cast<int>(t.at_output_offsets + offsets);
  t.shared_memory = static_cast<int>(t.at_output + outputs);
  t.tiles_p = static_cast<int>(ceil_div(c.P, t.p));
  t.tiles_q = static_cast<int>(ceil_div(c.Q, t.q));
  return true;
}

// Blocks that share the tiles, for each 64 output channels.
inline int64_t blocks(const Conv2d& c, const TileLayout& t, const GpuTraits& gpu) {
  const int64_t tiles = c.N * t.tiles_p * t.tiles_q;
  return std::min<int64_t>(tiles, std::max<int64_t>(1, gpu.multiprocessors / ceil_div(c.K, kBlockChannels)));
}

}  // namespace fused_conv_bn::stem_sm90
