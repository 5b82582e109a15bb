// Convolutions of few input channels as an implicit GEMM on Hopper's tensor cores (compute capability 9.0a), with the
// epilogue in the same kernel.
//
// A block owns 64 output channels for good and takes one tile of output pixels after another. Input rows of the tiles to come
// are on their way to shared memory, by bulk copies where they begin at multiples of 16 bytes. Two warpgroups put them there
// into units (conv_hopper.h), of which wgmma reads any two at a time: im2col is a table of offsets. The others, two or three,
// take turns with the tiles, or with the chunks of each: while one multiplies, another writes.
//
// For a contiguous output the rows of the product are channels. A warp has 16 of them to itself, puts them into shared
// memory as they lie in the output, and starts copies of whole rows behind its next product. For a channels_last output
// the rows are pixels, and channels are dealt to the columns so that a thread ends up with 16 bytes of a pixel's. In 16 bits
// it writes them, and where there are at most 32 channels, no more are computed; float32 goes through shared memory too.
//
// For BatchNorm in training mode there are two passes: one that keeps the moments of each channel and writes nothing else
// (unless sums over the input take its place, conv_patches.h), and one with the affine that comes of them.
//
// float32 is split in two halves (split_float.cuh). A tile that does not split, or has Inf or NaN (which must not meet the
// zeros of half-filled units), is computed in plain float32 FMAs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/split_float.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/elementwise/memory_format.h"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/sm90a.h"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "plan.h"

namespace fused_conv_bn {

constexpr uint32_t kNoUnit = 0xffffffffu;
constexpr uint32_t kNoTile = 0xffffffffu;

enum class HopperOutput { planes, pixels, moments };

template <typename T>
struct HopperParams {
  const T* x;
  const T* w;
  AffineSource<T> affine;  // of moments: unused
  bool late_affine;        // the kernel before makes its tensors: center, scale and shift
  const T* residual;
  T* y;
  Moments* moments;                        // [blocks][takers][K]
  int w_stride_c, w_stride_r, w_stride_s;  // output channels follow each other
  int x_stride_c, x_stride_h, x_stride_w;
  int C, H, W, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  HopperTile tile;
  int x_units;
  int x_row_bytes, x_col_bytes,
      x_planes;                      // of the input: of a row, from column to column; channels apart from each other
  int unit_row_bytes, unit_channel;  // where units are read: bytes from row to row, from channel to channel
  FastDiv x_cols, x_rows, channel_blocks, phases_w, slab_rows, tiles_q, tiles_p, tile_p, run_vectors;
  uint32_t tiles;
  bool fetches;       // slabs come by bulk copies
  bool slab_vectors;  // float32: a unit's eight channels lie side by side in the slab
  bool w_vectors;     // float32: and in the weights
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool stage_pairs;   // contiguous: two neighbouring results can be staged with one store
  bool rows_aligned;  // contiguous, rows that are not whole: each starts at a multiple of 16 bytes
  bool bulk;  // contiguous: a channel's run starts and ends at multiples of 16 bytes; channels_last: pixels are staged
  bool streams;  // the output is larger than L2
  Activation activation;
  bool residual_last;
  bool activates_by_turns;  // the activation takes long
  float negative_slope;
  uint32_t steps[kHopperMostUnits / 2];  // operand_start() of each step, from the tile's first unit on
  uint32_t units[kHopperMostUnits];      // r, s and channel block of each step's two units; kNoUnit
};

// What shared memory begins with.
struct HopperHeader {
  uint64_t full[kHopperMostStages];
  uint64_t empty[kHopperMostStages];
  uint64_t slabs[kHopperSlabs];
  uint64_t weights;
  uint64_t multiplied[kHopperMostTakers];  // a turn is over: products are under way, or half of an activation is done
  // float32: whether the tile does not split, and the inverse of its scale. Else a byte for each loading warp: whether it has
  // met Inf or NaN.
  uint2 stages[kHopperMostStages];
  uint2 warps[4][4 * kHopperLoaders];  // of the loading warps: magnitudes
  uint32_t all_exact;                  // the weights, or their affines, do not split: nothing does
  uint32_t centered;                   // some of the centers are not 0
  int w_span;                          // the widest span of an output channel's weights
  int least_unscale, most_unscale;     // exponents among scaled_unscales[]
  // Four channels are read at a time.
  alignas(16) float scales[kHopperChannels];
  float shifts[kHopperChannels];
  float centers[kHopperChannels];
  float w_scales[kHopperChannels];         // float32: of the weights
  float unscales[kHopperChannels];         // their inverses
  float scaled_unscales[kHopperChannels];  // times the affine's scale
};
static_assert(sizeof(HopperHeader) <= kHopperHeader);

extern __shared__ __align__(128) unsigned char hopper_shared[];

// kChannels: output channels of a block. 32 is for pixels in 16 bits.
template <typename T, HopperOutput kOutput, int kChannels, bool kBounds>
class Hopper {
 public:
  static constexpr bool kLast = kOutput == HopperOutput::pixels;
  static constexpr bool kMoments = kOutput == HopperOutput::moments;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  using Half = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr int kHalves = kFloat ? 2 : 1;
  static constexpr int kRows = kHalves * kChannels;  // of weights, for each unit
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kLineBytes = 128;  // of L2
  // Units that a loading thread has in registers.
  static constexpr int kReadAtOnce = hopper_units_at_once(kHalves, !kMoments, kLast);
  static constexpr uint32_t kInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
  // A thread's own part of the product of a chunk.
  static constexpr int kSums = kChannels * kHopperChunk / 128;
  static constexpr int kOwnChannels = kLast ? kChannels / 4 : 2;
  static constexpr int kOwnPositions = kSums / kOwnChannels;
  static constexpr int kLoadThreads = 128 * kHopperLoaders;
  // Loading threads that have a tile together: all, or some that take turns with the tiles.
  static constexpr int kTeams = hopper_teams(kHalves, kLast);
  // Whether one warpgroup waits until the products of the other are under way: 168 -> 164 us for problem 73. Without it they
  // do the same at the same time. Elsewhere it gained nothing, or lost 2%.
  static constexpr bool kByTurns = kFloat && kLast;
  static constexpr int kTeamThreads = kLoadThreads / kTeams;
  static constexpr int kTakers = hopper_takers(kHalves);
  static constexpr int kTakeThreads = 128 * kTakers;
  using Sums = float[kSums];
  // Whether a unit is read from the slab as words: a pixel's channels lie side by side.
  template <int kSlots>
  static constexpr bool kPixelWords = kLast && !kFloat && kSlots == 4;
  // Barriers: who meets there.
  static constexpr int kLoadersMeet = 1;
  static constexpr int kTakersMeet = 2;
  static constexpr int kTeamMeets = 3;              // the first one; others follow
  static constexpr uint32_t kOutside = 0x7fff0000;  // as a row, below every other

  __device__ __forceinline__ explicit Hopper(const HopperParams<T>& params)
      : p(params),
        first_channel(blockIdx.y * kChannels),
        // The compiler shall see that a warp agrees: it keeps addresses in uniform registers then.
        warp_of_block(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)) {}

  __device__ __forceinline__ void run() {
    set_up_barriers();
    __syncthreads();
    const int warpgroup = warp_of_block / 4;
    if (warpgroup < kHopperLoaders) {
      give_registers_away<kFloat ? (kMoments ? 88 : 80) : 56>();
      load();
    } else {
      take_registers<kFloat ? (kMoments ? 168 : 176) : 120>();
      prefetch_weights();
      set_up_places();
      wait_unless_late();
      set_up_weights();
      if constexpr (!kMoments) {  // else small blocks come next, and would crowd where there is room first
        let_next_begin();
      }
      meet(kTakersMeet, kTakeThreads);
      if (threadIdx.x == kLoadThreads) {
        barrier_arrive(weights_there());
      }
      compute(warpgroup - kHopperLoaders);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x % 128 / 32; }  // of its warpgroup
  __device__ __forceinline__ int team() const { return kTeams == 1 ? 0 : warp_of_block / (kTeamThreads / 32); }
  static __device__ __forceinline__ int team_thread() { return kTeams == 1 ? threadIdx.x : threadIdx.x % kTeamThreads; }
  __device__ __forceinline__ int team_warp() const {
    return kTeams == 1 ? warp_of_block : warp_of_block % (kTeamThreads / 32);
  }
  __device__ __forceinline__ void meet_team() const { meet(kTeamMeets + team(), kTeamThreads); }
  // The row and the column group that a thread has in a product.
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  static __device__ __forceinline__ uint32_t shared() { return shared_address(hopper_shared); }
  static __device__ __forceinline__ HopperHeader& header() { return *reinterpret_cast<HopperHeader*>(hopper_shared); }
  static __device__ __forceinline__ uint32_t full(int stage) { return shared_address(&header().full[stage]); }
  static __device__ __forceinline__ uint32_t empty(int stage) { return shared_address(&header().empty[stage]); }
  static __device__ __forceinline__ uint32_t slab_full(int stage) { return shared_address(&header().slabs[stage]); }
  static __device__ __forceinline__ uint32_t weights_there() { return shared_address(&header().weights); }
  static __device__ __forceinline__ uint32_t multiplied(int taker) {
    return shared_address(&header().multiplied[taker]);
  }
  static __device__ __forceinline__ uint32_t weights() { return shared() + kHopperHeader; }
  __device__ __forceinline__ uint32_t input(int stage) const {
    return shared() + p.tile.at_input + stage * kHalves * p.tile.x_half;
  }
  __device__ __forceinline__ uint32_t slab(int stage) const { return shared() + p.tile.at_slabs + stage * p.tile.slab; }
  __device__ __forceinline__ uint32_t table() const { return shared() + p.tile.at_table; }
  __device__ __forceinline__ uint32_t places() const { return shared() + p.tile.at_places; }
  __device__ __forceinline__ uint32_t output(int taker) const {
    return shared() + p.tile.at_output + taker * (kHopperChannels * kBytes) * p.tile.stage_pitch;
  }
  // This warp's, for pixels.
  __device__ __forceinline__ uint32_t pixel_stage(int taker) const {
    return shared() + p.tile.at_output + (taker * 4 + warp()) * p.tile.pixel_stage;
  }

  // Where a thread's own channels and positions are in the product, and which they are.
  static __device__ __forceinline__ float& at(Sums& sums, int channel, int position) {
    return kLast ? sums[position / 2 * (kSums / 2) + channel / 2 * 4 + position % 2 * 2 + channel % 2]
                 : sums[position / 2 * 4 + channel * 2 + position % 2];
  }
  __device__ __forceinline__ int own_channel(int i) const {
    return kLast ? i / kVec * (4 * kVec) + t() * kVec + i % kVec : warp() * 16 + dealt(g()) + i * 8;
  }
  static __device__ __forceinline__ int own_position() { return kLast ? warp() * 16 + g() : t() * 2; }  // the first
  static __device__ __forceinline__ int position_step(int j) {  // from the first to another
    return kLast ? j / 2 * 64 + j % 2 * 8 : j / 2 * 8 + j % 2;
  }
  // Of eight neighbouring channels, even ones first where stages say so.
  __device__ __forceinline__ int dealt(int channel) const {
    return p.tile.stage_deals ? channel % 4 * 2 + channel / 4 : channel;
  }
  // The channel that a row of the weights has.
  __device__ __forceinline__ int row_channel(int row) const {
    const int i = row / 8 * 2 + row % 2;
    return kLast ? i / kVec * (4 * kVec) + row % 8 / 2 * kVec + i % kVec : row / 8 * 8 + dealt(row % 8);
  }

  template <typename F>
  static __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < kOwnChannels; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnPositions; ++j) {
        f(i, j);
      }
    }
  }

  // ---- tiles ----

  struct Tile {
    int image, p0, q0;
  };
  // Opaque to the compiler, so that it does not keep one call's result for the next.
  __device__ __forceinline__ Tile locate(uint32_t index) const {
    asm volatile("" : "+r"(index));
    const int row = p.tiles_q.div(index);
    const int image = p.tiles_p.div(row);
    return {image, (row - image * p.tile.tiles_p) * p.tile.p,
            static_cast<int>(index - row * p.tile.tiles_q) * p.tile.q};
  }
  __device__ __forceinline__ int rows(const Tile& tile) const { return min(p.tile.p, p.P - tile.p0); }
  __device__ __forceinline__ int cols(const Tile& tile) const { return min(p.tile.q, p.Q - tile.q0); }
  __device__ __forceinline__ bool whole_rows() const { return p.tile.q == p.Q; }
  __device__ __forceinline__ bool is_whole(const Tile& tile) const {
    return rows(tile) == p.tile.p && cols(tile) == p.tile.q;
  }
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    const int64_t start = static_cast<int64_t>(tile.image) * p.K * p.P * p.Q;
    const int pixel = tile.p0 * p.Q + tile.q0;
    return kLast ? start + pixel * p.K + first_channel : start + first_channel * (p.P * p.Q) + pixel;
  }

  // ---- once: weights, affines, tables ----

  __device__ __forceinline__ int terms() const { return p.C * p.R * p.S; }  // of an output channel
  __device__ __forceinline__ float weight(int k, int c, int r, int s) const {
    return to_acc(p.w[k * terms() + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s]);
  }

  __device__ __forceinline__ void set_up_barriers() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < p.tile.stages; ++stage) {
        barrier_init(full(stage), kTeamThreads / 32);
        barrier_init(empty(stage), p.tile.takers_share ? 4 * kTakers : 4);
      }
      for (int stage = 0; stage < kHopperSlabs; ++stage) {
        barrier_init(slab_full(stage), p.fetches ? 1 : kTeamThreads);
      }
      barrier_init(weights_there(), 1);
      for (int taker = 0; taker < kTakers; ++taker) {
        barrier_init(multiplied(taker), 4);
      }
      header().all_exact = 0;
      header().centered = 0;
      header().w_span = 0;
      header().least_unscale = 1 << 20;
      header().most_unscale = -(1 << 20);
    }
  }

  // Where the affines are late, the kernel before makes these and nothing else; otherwise it may make anything.
  __device__ __forceinline__ void wait_unless_late() const {
    if (!p.late_affine) {
      wait_for_previous();
    }
  }

  // By the warpgroups that multiply: where results of each position go.
  __device__ __forceinline__ void set_up_places() const {
    const int thread = threadIdx.x - kLoadThreads;
    for (int position = thread; position < p.tile.chunks * kHopperChunk; position += kTakeThreads) {
      const int row = p.x_cols.div(position);
      const int col = position - row * p.tile.x_cols;
      const bool inside = row < p.tile.p && col < p.tile.q;
      if constexpr (kLast) {
        store_shared(places() + position * 8, make_uint2(static_cast<uint32_t>(row * p.Q + col) * p.K * kBytes,
                                                         inside ? row << 16 | col : kOutside));
      } else if constexpr (!kMoments) {
        const int place = inside ? row * p.tile.stage_row + col : p.tile.stage_end + position % kHopperOutside;
        store_shared(places() + position * 2, static_cast<uint16_t>(place * kBytes));
      }
    }
    if constexpr (kMoments) {
      for (int i = thread; i < p.tile.chunks * 4; i += kTakeThreads) {
        store_shared(places() + i * 4, inside_of(i / 4 * kHopperChunk + i % 4 * 2, Tile{0, 0, 0}));
      }
    }
  }

  // A unit of the filter, and a row of its weights. A warp has four units of eight rows: a load for many channels is slow,
  // and so is a store for one.
  struct WeightRow {
    int unit, row;
  };
  static __device__ __forceinline__ WeightRow weight_row(int index) {
    constexpr int kEights = kChannels / 8;
    return {index / (32 * kEights) * 4 + index / 8 % 4, index / 32 % kEights * 8 + index % 8};
  }

  // By the same, while the others begin to load. Of some output channels after the other, which is mostly all, the weights
  // come to shared memory as they lie, to where the second tile's units will be: gathered from global memory, with a
  // distance between any two, those of a stem took 7 us.
  __device__ __forceinline__ void set_up_weights() {
#pragma unroll 1
    for (int pass = 0; pass < p.tile.w_passes; ++pass) {
      const int first = pass * p.tile.w_channels;
      const int channels = min(min(p.tile.w_channels, kChannels - first), p.K - first_channel - first);
      meet(kTakersMeet, kTakeThreads);  // the ones before are done with
      start_weights(first, channels);
      copy_async_commit();
      if (pass == 0 && !p.late_affine) {
        fold_affines();  // while the copies are under way
      }
      copy_async_wait_all_but<0>();
      meet(kTakersMeet, kTakeThreads);
      if constexpr (kFloat) {
        measure_weights(first, channels);
        meet(kTakersMeet, kTakeThreads);
      }
      build_weights(first);
    }
    if (p.late_affine) {
      wait_for_previous();
      fold_affines();
    }
    meet(kTakersMeet, kTakeThreads);
    finish_affines();
    fence_async();
  }

  // Before it is known whether they are there: L2 sees who writes to them yet.
  __device__ __forceinline__ void prefetch_weights() const {
    const int bytes = min(kChannels, p.K - first_channel) * terms() * kBytes;
    const auto* const source = reinterpret_cast<const unsigned char*>(p.w) +
                               static_cast<int64_t>(first_channel) * terms() * kBytes;
    for (int i = (threadIdx.x - kLoadThreads) * kLineBytes; i < bytes; i += kTakeThreads * kLineBytes) {
      prefetch_l2(source + i);
    }
    if (!kMoments && threadIdx.x == kLoadThreads && !p.late_affine) {
      const int first = first_channel * (p.affine.wide ? static_cast<int>(sizeof(float)) : kBytes);
      for (const void* values : {p.affine.mean, p.affine.var, p.affine.weight, p.affine.bias, p.affine.conv_bias}) {
        if (values != nullptr) {
          prefetch_l2(static_cast<const unsigned char*>(values) + first);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t raw_weights() const { return input(1); }

  __device__ __forceinline__ void start_weights(int first, int channels) const {
    const int bytes = max(channels, 0) * terms() * kBytes;
    const int whole = bytes & -kVecBytes;
    const auto* const source = reinterpret_cast<const unsigned char*>(p.w) +
                               static_cast<int64_t>(first_channel + first) * terms() * kBytes;
    const int thread = threadIdx.x - kLoadThreads;
    for (int i = thread * kVecBytes; i < whole; i += kTakeThreads * kVecBytes) {
      copy_async(raw_weights() + i, source + i, true);
    }
    // The last values one by one: 16 bytes would reach past the end of the tensor.
    if (const int i = whole + thread * kBytes; i < bytes) {
      if constexpr (kFloat) {
        copy_async_1(raw_weights() + i, source + i);
      } else {
        store_shared(raw_weights() + i, *reinterpret_cast<const uint16_t*>(source + i));
      }
    }
  }

  // float32: the magnitudes of an output channel's weights, by neighbouring threads.
  __device__ __forceinline__ void measure_weights(int first, int channels) const {
    constexpr int kSharers = kTakeThreads / kChannels;
    const int thread = threadIdx.x - kLoadThreads;
    const int channel = thread / kSharers - first;
    const bool measured = channel >= 0 && channel < p.tile.w_channels;
    Magnitudes m;
    const int end = measured && channel < channels ? terms() : 0;
    const uint32_t start = raw_weights() + channel * terms() * kBytes;
#pragma unroll 4
    for (int i = thread % kSharers; i < end; i += kSharers) {
      m.add(__uint_as_float(load_shared_1(start + i * kBytes)));
    }
#pragma unroll
    for (int other = 1; other < kSharers; other *= 2) {
      m.merge(__shfl_xor_sync(0xffffffffu, m.most, other), __shfl_xor_sync(0xffffffffu, m.least, other));
    }
    if (measured && thread % kSharers == 0) {
      header().w_scales[first + channel] = m.scale();
      header().unscales[first + channel] = m.inverse();
      if (!m.has_scale() || m.span() > kMaxSpan) {
        set(header().all_exact);
      }
      atomicMax(&header().w_span, m.span());
    }
  }

  // Of each step, the first unit of all channels, then the second; float32: of each, the high halves, then the low ones.
  __device__ __forceinline__ void build_weights(int first) const {
    const int rows = (p.tile.k_steps + 1) / 2 * 4 * kChannels;
    const int last_slot = (1 << p.tile.slots_log2) - 1;
#pragma unroll 2
    for (int index = threadIdx.x - kLoadThreads; index < rows; index += kTakeThreads) {
      const WeightRow w = weight_row(index);
      const int channel = row_channel(w.row) - first;
      if (w.unit >= p.tile.k_steps * 2 || channel < 0 || channel >= p.tile.w_channels) {
        continue;
      }
      const uint32_t unit = p.units[w.unit];
      const int r = static_cast<int>(unit >> 16);
      const int s = static_cast<int>(unit >> 8 & 255);
      const int c = static_cast<int>(unit & 255) * 8;
      const int present = unit != kNoUnit && first_channel + first + channel < p.K ? p.C - c : 0;
      const uint32_t start = raw_weights() + (channel * terms() + c * p.w_stride_c + r * p.w_stride_r) * kBytes;
      uint32_t v[8];
      if (kFloat && p.w_vectors) {
        const uint32_t address = start + s * p.w_stride_s * kBytes;
        const uint4 a = present > 0 ? load_shared_4(address) : make_uint4(0, 0, 0, 0);
        const uint4 b = present > 0 ? load_shared_4(address + 16) : make_uint4(0, 0, 0, 0);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int slot = i & last_slot;
          const int tap = s + (i >> p.tile.slots_log2);
          v[i] = load_shared_if_less<kBytes>(start + (slot * p.w_stride_c + tap * p.w_stride_s) * kBytes, slot,
                                             tap < p.S ? present : 0);
        }
      }
      const uint32_t target = weights() + (w.unit * kRows + w.row) * 16;
      if constexpr (kFloat) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          split(__uint_as_float(v[2 * i]), __uint_as_float(v[2 * i + 1]), header().w_scales[first + channel], high[i],
                low[i]);
        }
        store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
        store_shared(target + kChannels * 16, make_uint4(low[0], low[1], low[2], low[3]));
      } else {
        store_shared(target, make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
                                        __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410)));
      }
    }
  }

  // A mean stays apart, as the center, only where the affines are late: results of a convolution have roundings of their own.
  __device__ __forceinline__ void fold_affines() const {
    const int channel = threadIdx.x - kLoadThreads;
    const int k = first_channel + channel;
    if (!kMoments && channel < kChannels) {
      const Affine<float> affine = k >= p.K        ? Affine<float>{0, 0, 0}
                                   : p.late_affine ? p.affine.centered(k)
                                                   : p.affine.pair(k);
      header().centers[channel] = affine.center;
      header().scales[channel] = affine.scale;
      header().shifts[channel] = affine.shift;
    }
  }

  // What several threads may do at once.
  static __device__ __forceinline__ void set(uint32_t& flag) { atomicOr(&flag, 1u); }

  // Looks for centers. float32: what the weights' scales have to be undone by, with the affine's scale where that is all.
  __device__ __forceinline__ void finish_affines() const {
    const int channel = threadIdx.x - kLoadThreads;
    const bool own = channel < kChannels;
    const float scale = own && !kMoments ? header().scales[channel] : 1.0f;
    const bool centered = own && !kMoments && header().centers[channel] != 0;
    if (centered) {
      set(header().centered);
    }
    if constexpr (kFloat) {
      const float unscale = own ? header().unscales[channel] : 1.0f;
      // What PyTorch would have it be at any scale, 0, Inf or NaN, does not count.
      const int exponent = static_cast<int>(__float_as_uint(scale) >> 23 & 255);
      if (own && scale != 0 && exponent < 255) {
        const int product = exponent + static_cast<int>(__float_as_uint(unscale) >> 23) - 127;
        if (product < 2 || product > 250) {
          set(header().all_exact);
        }
        atomicMin(&header().least_unscale, product);
        atomicMax(&header().most_unscale, product);
      }
      if (own) {
        header().scaled_unscales[channel] = unscale * scale;
      }
    }
  }

  // ---- the warpgroups that load ----

  // Where the tile's input begins: it may lie outside of the image.
  struct Patch {
    const unsigned char* image;
    int h0, w0;
    int end;          // past the last column that a tap of the tile meets in the image
    int first, last;  // of an input row, the bytes that are in a slab
  };
  __device__ __forceinline__ Patch patch(uint32_t index) const {
    const Tile tile = locate(index);
    const int w0 = tile.q0 * p.stride_w - p.pad_w;
    const int end = max(0, min(p.W, w0 + (p.tile.q - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1));
    const bool whole = whole_rows();
    return {reinterpret_cast<const unsigned char*>(p.x) + static_cast<int64_t>(tile.image) * p.C * p.H * p.W * kBytes,
            tile.p0 * p.stride_h - p.pad_h,
            w0,
            end,
            whole ? 0 : max(0, w0) * p.x_col_bytes & ~15,
            whole ? p.x_row_bytes : min(p.x_row_bytes, (end * p.x_col_bytes + 15) & ~15)};
  }

  // What a loading thread has to know of a unit is the same for every tile, so it is worked out once. A thread of a team has
  // the same units every time. x: the bytes from the patch's first value to the unit's first.
  // y: columns to the right, rows down << 17, how many channels there are << 27.
  __device__ __forceinline__ void make_table() const {
#pragma unroll 2
    for (int index = threadIdx.x; index * 8 < p.tile.table; index += kLoadThreads) {
      const int line = p.x_cols.div(index);
      const int col = index - line * p.tile.x_cols;
      const int plane = p.x_rows.div(line);
      const int row = line - plane * p.tile.x_rows;
      const int phase = p.channel_blocks.div(plane);
      const int phase_h = p.phases_w.div(phase);
      const int phase_w = phase - phase_h * p.tile.phases_w;
      const int down = row * p.stride_h + phase_h * p.tile.phase_step_h;
      const int right = col * p.stride_w + phase_w * p.tile.phase_step_w;
      const int c0 = (plane - phase * p.tile.channel_blocks) * 8;
      const bool exists = index < p.x_units && down < p.tile.slab_rows;
      store_shared(table() + index * 8,
                   make_uint2(down * p.unit_row_bytes + right * p.x_col_bytes + c0 * p.unit_channel,
                              exists ? right | down << 17 | min(8, p.C - c0) << 27 : 0));
    }
  }
  struct UnitPlace {
    uint32_t offset;
    int w;
    int channels;  // 0: its row is outside of the image
  };
  __device__ __forceinline__ UnitPlace unit_place(int index, const Patch& patch) const {
    const uint2 entry = load_shared_2(table() + index * 8);
    const int h = patch.h0 + static_cast<int>(entry.y >> 17 & 1023);
    return {entry.x, patch.w0 + static_cast<int>(entry.y & 0x1ffff),
            static_cast<unsigned>(h) < static_cast<unsigned>(p.H) ? static_cast<int>(entry.y >> 27) : 0};
  }

  // Goes round the stages, or the slabs.
  struct Turn {
    int stage;
    uint32_t parity;
  };
  static __device__ __forceinline__ void advance(Turn& turn, int by, int stages) {
    turn.stage += by;
    if (turn.stage >= stages) {
      turn.stage -= stages;
      turn.parity ^= 1;
    }
  }

  __device__ __forceinline__ void load() const {
    make_table();
    if constexpr (kTeams > 1) {
      meet(kLoadersMeet, kLoadThreads);
    }
    wait_unless_late();
    if constexpr (kFloat) {
      load_through_slabs();
    } else {
      if (p.tile.slab == 0) {
        load_units();
      } else {
        load_through_slabs();
      }
    }
  }
  __device__ __forceinline__ void load_through_slabs() const {
    switch (p.tile.slots_log2) {
      case 0:
        return load_through_slabs_of<1>();
      case 1:
        return load_through_slabs_of<2>();
      case 2:
        return load_through_slabs_of<4>();
      default:
        return load_through_slabs_of<8>();
    }
  }

  // Until a stage is free. All but the first have raw weights in them at first.
  __device__ __forceinline__ void wait_for_stage(const Turn& turn) const {
    if (turn.parity == 0 && turn.stage > 0) {
      barrier_wait(weights_there(), 0);
    }
    barrier_wait(empty(turn.stage), turn.parity ^ 1);
  }

  template <int kSlots>
  __device__ __forceinline__ void load_through_slabs_of() const {
    for (int i = team(); i < kHopperSlabs; i += kTeams) {
      fill(blockIdx.x + i * gridDim.x, i);
    }
    // float32 needs the values twice. Where they are few enough they stay in registers.
    const bool kept = kFloat && p.tile.rounds == 1;
    Turn turn{team(), 0}, from{team(), 0};
    for (uint32_t index = blockIdx.x + team() * gridDim.x; index < p.tiles; index += kTeams * gridDim.x) {
      const Patch patch = this->patch(index);
      const uint32_t next = index + kHopperSlabs * gridDim.x;
      Values v;
      barrier_wait(slab_full(from.stage), from.parity);
      if constexpr (kFloat) {
        const Scaling scaling = measure_units<kSlots>(patch, slab(from.stage), v, kept,
                                                      kTeams == 1 ? from.stage : static_cast<int>(from.parity));
        wait_for_stage(turn);
        if (team_thread() == 0) {
          header().stages[turn.stage] = make_uint2(scaling.exact, __float_as_uint(scaling.inverse));
        }
        build_units<kSlots>(patch, slab(from.stage), v, kept, turn.stage, scaling.scale);
      } else {
        wait_for_stage(turn);
        report(turn.stage, build_units<kSlots>(patch, slab(from.stage), v, false, turn.stage, 1.0f));
      }
      fence_async();
      __syncwarp();
      if (lane() == 0) {
        barrier_arrive(full(turn.stage));
      }
      if (!kept) {
        meet_team();  // nobody reads the slab any more
      }
      fill(next, from.stage);
      advance(turn, kTeams, p.tile.stages);
      advance(from, kTeams, kHopperSlabs);
    }
  }

  // Starts the copies of a tile's input rows into a slab.
  __device__ __forceinline__ void fill(uint32_t index, int stage) const {
    const int copies = p.x_planes * (whole_rows() ? 1 : p.tile.slab_rows);
    if (index >= p.tiles || (p.fetches && team_warp() >= copies)) {
      return;
    }
    const Patch patch = this->patch(index);
    const int above = max(0, -patch.h0);  // rows outside of the image
    const int rows = max(0, min(p.tile.slab_rows, p.H - patch.h0) - above);
    const int bytes = max(0, patch.last - patch.first);
    const uint32_t target = slab(stage) + above * p.tile.slab_pitch;
    const unsigned char* const source = patch.image + static_cast<int64_t>(patch.h0 + above) * p.x_row_bytes +
                                        patch.first;
    if (p.fetches) {
      if (team_thread() == 0) {
        barrier_arrive_expect(slab_full(stage), p.x_planes * rows * bytes);
      }
      // Whole rows follow each other in memory and in the slab. The warps share the copies: starting one takes long.
      const int run = whole_rows() ? rows * bytes : bytes;
      for (int i = team_warp() + kTeamThreads / 32 * lane(); i < copies && run > 0; i += kTeamThreads) {
        const int plane = whole_rows() ? i : static_cast<int>(p.slab_rows.div(i));
        const int row = whole_rows() ? 0 : i - plane * p.tile.slab_rows;
        if (row < rows) {
          fetch_bulk(target + (plane * p.tile.slab_rows + row) * p.tile.slab_pitch,
                     source + (static_cast<int64_t>(plane) * p.H + row) * p.x_row_bytes, run, slab_full(stage));
        }
      }
      return;
    }
    // Four bytes at a time, or two where rows begin at odd multiples of them.
    const bool odd = p.x_row_bytes % 4 != 0;
    for (int i = team_warp(); i < p.x_planes * p.tile.slab_rows; i += kTeamThreads / 32) {
      const int plane = p.slab_rows.div(i);
      const int row = i - plane * p.tile.slab_rows;
      const unsigned char* const start = source + (static_cast<int64_t>(plane) * p.H + row) * p.x_row_bytes;
      if (row >= rows) {
        continue;
      }
      if (!odd) {
        for (int e = lane() * 4; e < bytes; e += 32 * 4) {
          copy_async_1(target + i * p.tile.slab_pitch + e, start + e);
        }
      } else if constexpr (!kFloat) {
        for (int e = lane() * 2; e < bytes; e += 32 * 2) {
          store_shared(target + i * p.tile.slab_pitch + e, __ldg(reinterpret_cast<const uint16_t*>(start + e)));
        }
      }
    }
    if (odd) {
      barrier_arrive(slab_full(stage));
    } else {
      barrier_arrive_behind_copies(slab_full(stage));
    }
  }

  using Unit = uint32_t[kFloat ? 8 : 4];  // values as bits, in 16 bits two to a word
  using Values = Unit[kReadAtOnce];

  // 0 for what is outside of the image, the patch or the channels, and behind the last unit.
  template <int kSlots>
  __device__ __forceinline__ void read_unit(int index, const Patch& patch, uint32_t slab, Unit& v) const {
    const UnitPlace place = unit_place(index, patch);
    const uint32_t address = slab + place.offset + (patch.w0 * p.x_col_bytes - patch.first);
    uint32_t values[8];
#pragma unroll
    for (int tap = 0; tap < 8 / kSlots; ++tap) {
      const bool inside = static_cast<unsigned>(place.w + tap * p.dilation_w) < static_cast<unsigned>(patch.end);
      const int channels = inside ? place.channels : 0;
      const uint32_t start = address + tap * p.dilation_w * p.x_col_bytes;
      if constexpr (kFloat && kSlots == 8) {
        if (p.slab_vectors) {
          const uint4 a = channels > 0 ? load_shared_4(start) : make_uint4(0, 0, 0, 0);
          const uint4 b = channels > 0 ? load_shared_4(start + 16) : make_uint4(0, 0, 0, 0);
          values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
          values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
          continue;
        }
      }
      if constexpr (kPixelWords<kSlots>) {
        // Three or four channels lie in two words, every other three from the first word's second half on.
        const uint32_t first = load_shared_if_less<4>(start & ~3u, 0, channels);
        const uint32_t second = load_shared_if_less<4>((start & ~3u) + 4, 0, channels);
        const uint32_t half = start & 2;
        v[tap * 2] = __byte_perm(first, second, 0x3210 + half * 0x1111);
        v[tap * 2 + 1] = __byte_perm(second, 0, p.C == 4 ? 0x3210 : 0x4410 + half * 0x11);
      } else {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          values[tap * kSlots + slot] = load_shared_if_less<kBytes>(start + slot * p.unit_channel, slot, channels);
        }
      }
    }
    if constexpr (kFloat) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = values[i];
      }
    } else if constexpr (!kPixelWords<kSlots>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = __byte_perm(values[2 * i], values[2 * i + 1], 0x5410);
      }
    }
  }

  // f(index, values) for this thread's units, some at once. there: they are in `v` already.
  template <int kSlots, typename F>
  __device__ __forceinline__ void for_each_unit(const Patch& patch, uint32_t slab, Values& v, bool there, F&& f) const {
#pragma unroll 1
    for (int first = team_thread(); first < p.x_units; first += kReadAtOnce * kTeamThreads) {
      if (!there) {
#pragma unroll
        for (int i = 0; i < kReadAtOnce; ++i) {
          read_unit<kSlots>(first + i * kTeamThreads, patch, slab, v[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kReadAtOnce; ++i) {
        f(first + i * kTeamThreads, v[i]);
      }
    }
  }

  // float32: how a tile is split, or that it is not.
  struct Scaling {
    uint32_t exact;
    float scale, inverse;
  };

  // Of all values of a team. Between two calls with the same `place` there is one with another.
  __device__ __forceinline__ Magnitudes of_all(const Magnitudes& own, int place) const {
    const uint32_t most = __reduce_max_sync(0xffffffffu, own.most);
    const uint32_t least = __reduce_min_sync(0xffffffffu, own.least);
    if (lane() == 0) {
      header().warps[place][threadIdx.x / 32] = make_uint2(most, least);
    }
    meet_team();
    constexpr int kWarps = kTeamThreads / 32;
    const uint2 other = header().warps[place][team() * kWarps + lane() % kWarps];
    Magnitudes all;
    all.merge(__reduce_max_sync(0xffffffffu, other.x), __reduce_min_sync(0xffffffffu, other.y));
    return all;
  }

  // What decides is the largest magnitude of each pixel's four or eight channels, and the weights; only if that is not
  // enough, or there are fewer channels, every single value.
  template <int kSlots>
  __device__ __forceinline__ Scaling measure_units(const Patch& patch, uint32_t slab, Values& v, bool kept,
                                                   int side) const {
    constexpr int kGroup = kSlots < 4 ? 1 : kSlots;
    Magnitudes groups;
    for_each_unit<kSlots>(patch, slab, v, false, [&](int, const Unit& unit) {
#pragma unroll
      for (int first = 0; first < 8; first += kGroup) {
        float most = fabsf(__uint_as_float(unit[first]));
#pragma unroll
        for (int i = 1; i < kGroup; ++i) {
          most = larger_or_nan(most, fabsf(__uint_as_float(unit[first + i])));
        }
        groups.add(most);
      }
    });
    groups = of_all(groups, side);
    barrier_wait(weights_there(), 0);  // and how they split
    // The affine's scale takes both inverses in, and is to stay clear of float32's limits.
    bool splits = groups.has_scale() && header().least_unscale + groups.inverse_exponent() > 1 &&
                  header().most_unscale + groups.inverse_exponent() < 250;
    if (splits && groups.span() + (kGroup > 1 ? header().w_span : 0) > kMaxSpan) {
      Magnitudes all = groups;
      if constexpr (kGroup > 1) {
        for_each_unit<kSlots>(patch, slab, v, kept, [&](int, const Unit& unit) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            all.add(__uint_as_float(unit[i]));
          }
        });
        all = of_all(all, 2 + side);
      }
      splits = all.span() <= kMaxSpan;
    }
    return {header().all_exact != 0 || !splits ? 1u : 0u, groups.scale(), groups.inverse()};
  }
  static __device__ __forceinline__ float larger_or_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
  }

  // From a slab to a stage's units. float32: scaled and split. Else: the largest magnitudes, as a pair of bits.
  template <int kSlots>
  __device__ __forceinline__ uint32_t build_units(const Patch& patch, uint32_t slab, Values& values, bool there,
                                                  int stage, float scale) const {
    uint32_t most = 0;
    for_each_unit<kSlots>(patch, slab, values, there, [&](int index, const Unit& v) {
      const uint32_t target = input(stage) + index * 16;
      if constexpr (kFloat) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          split(__uint_as_float(v[2 * k]), __uint_as_float(v[2 * k + 1]), scale, high[k], low[k]);
        }
        if (index < p.x_units) {
          store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
          store_shared(target + p.tile.x_half, make_uint4(low[0], low[1], low[2], low[3]));
        }
      } else {
        const uint4 unit = make_uint4(v[0], v[1], v[2], v[3]);
        most = most_of(most, unit);
        if (index < p.x_units) {
          store_shared(target, unit);
        }
      }
    });
    return most;
  }

  // float16 and bfloat16 whose image consists of units: they go to their places by themselves. The copies of the next tile are
  // under way while this one is looked at.
  __device__ __forceinline__ void load_units() const {
    Turn turn{0, 0}, next{0, 0};
    const auto start = [&](uint32_t index) {
      if (index < p.tiles) {
        wait_for_stage(next);
        const Patch patch = this->patch(index);
        const unsigned char* const start = patch.image + static_cast<int64_t>(patch.h0) * p.x_row_bytes +
                                           patch.w0 * p.x_col_bytes;
#pragma unroll 2
        for (int i = threadIdx.x; i < p.x_units; i += kLoadThreads) {
          const UnitPlace place = unit_place(i, patch);
          const bool exists = place.channels > 0 && static_cast<unsigned>(place.w) < static_cast<unsigned>(patch.end);
          const auto* const from = exists ? start + place.offset : patch.image;
          copy_async(input(next.stage) + i * 16, from, exists);
        }
        advance(next, 1, p.tile.stages);
      }
      copy_async_commit();
    };
    start(blockIdx.x);
    for (uint32_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      start(index + gridDim.x);
      copy_async_wait_all_but<1>();
      uint32_t most = 0;
      for (int i = threadIdx.x; i < p.x_units; i += kLoadThreads) {
        most = most_of(most, load_shared_4(input(turn.stage) + i * 16));
      }
      report(turn.stage, most);
      fence_async();
      __syncwarp();
      if (lane() == 0) {
        barrier_arrive(full(turn.stage));
      }
      advance(turn, 1, p.tile.stages);
    }
  }

  // Whether this warp has met Inf or NaN.
  __device__ __forceinline__ void report(int stage, uint32_t most) const {
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, max(most & 0xffff, most >> 16));
    if (lane() == 0) {
      reinterpret_cast<unsigned char*>(&header().stages[stage])[threadIdx.x / 32] = of_warp >= kInfinity;
    }
  }
  static __device__ __forceinline__ uint32_t most_of(uint32_t most, const uint4& v) {
    const uint32_t a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
    const uint32_t b = __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu);
    return __vmaxu2(most, __vmaxu2(a, b));
  }

  // ---- the warpgroups that multiply and write ----

  __device__ __forceinline__ void compute(int taker) const {
    const bool share = p.tile.takers_share;
    const int chunk_step = share ? kTakers : 1, tile_step = share ? 1 : kTakers;
    int first_chunk = share ? taker : 0;
    Turn turn{share ? 0 : taker, 0};
    Gathered gathered;
    // Turns go round: each waits for that of the warpgroup before, and the first one's for the last in the round before. The
    // first ones may have more turns than the others, which are left out then: nobody gets ahead by more than a turn.
    const auto tiles = static_cast<int>((p.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
    const auto turns_of = [&](int other) {
      return share ? (tiles * p.tile.chunks + kTakers - 1 - other) / kTakers
                   : (tiles + kTakers - 1 - other) / kTakers * p.tile.chunks;
    };
    int turns = 0;  // that are over
    const auto wait_for_turn = [&] {
      int other = taker - 1, turn = turns;
      if (taker == 0) {
        turn = turns - 1;
        other = kTakers - 1;
        while (other > 0 && turn >= turns_of(other)) {
          --other;
        }
      }
      if (turn >= 0 && other != taker) {
        barrier_wait(multiplied(other), turn & 1);
      }
    };
    const auto end_turn = [&] {
      const bool next_waits = taker + 1 < kTakers && turns < turns_of(taker + 1);
      if (next_waits || (taker > 0 && turns + 1 < turns_of(0))) {
        __syncwarp();
        if (lane() == 0) {
          barrier_arrive(multiplied(taker));
        }
      }
      ++turns;
    };
    uint32_t staged = kNoTile;  // a tile that has to be copied
    const auto copy_staged = [&] {
      if constexpr (kOutput == HopperOutput::planes) {
        if (staged != kNoTile) {
          copy_planes(locate(staged), taker);
          copy_bulk_commit();
          staged = kNoTile;
        }
      }
    };
    for (uint32_t index = blockIdx.x + turn.stage * gridDim.x; index < p.tiles; index += tile_step * gridDim.x) {
      const int stage = turn.stage;
      barrier_wait(full(stage), turn.parity);
      advance(turn, tile_step, p.tile.stages);
      const uint2 info = header().stages[stage];
      const bool exact = kFloat ? info.x != 0 : (info.x | info.y) != 0;
      const float inverse = kFloat && !exact ? __uint_as_float(info.y) : 1.0f;
      const bool whole = kMoments && is_whole(locate(index));
      const uint2 targets = kOutput == HopperOutput::planes ? stage_targets(locate(index), taker) : make_uint2(0, 0);
      Pixels of_tile{};
      if constexpr (kLast) {
        of_tile = pixels(locate(index));
      }
#pragma unroll 1
      for (int chunk = first_chunk; chunk < p.tile.chunks; chunk += chunk_step) {
        Sums sums;
        const bool products_by_turns = kByTurns && !p.activates_by_turns;
        if (products_by_turns) {
          wait_for_turn();
        }
        multiply(sums, input(stage) + chunk * (kHopperChunk * 16), [&] {
          if (products_by_turns) {
            end_turn();
          }
          copy_staged();
        });
        if (chunk + chunk_step >= p.tile.chunks) {
          __syncwarp();
          if (lane() == 0) {
            barrier_arrive(empty(stage));
          }
        }
        if (exact) [[unlikely]] {
          multiply_exactly(sums, locate(index), chunk * kHopperChunk);
        }
        if constexpr (kMoments) {
          const uint32_t inside = whole ? load_shared_1(places() + (chunk * 4 + t()) * 4)
                                        : inside_of(chunk * kHopperChunk + t() * 2, locate(index));
          gather(gathered, sums, inside, exact, inverse);
          continue;
        }
        apply_affine(sums, exact, inverse);
        const bool residual_last = p.residual != nullptr && p.residual_last;
        if (p.residual != nullptr && !residual_last) {
          add_residual(sums, locate(index), chunk * kHopperChunk);
        }
        if constexpr (!kBounds) {
          // While one warpgroup does this, the other waits for input, multiplies and writes. In step, both would wait for the
          // special-function units, and leave them idle afterwards.
          if (p.activates_by_turns) {
            wait_for_turn();
          }
          activate_all<T, false>(p.activation, p.negative_slope, sums, [&] {
            if (p.activates_by_turns) {
              end_turn();
            }
          });
        } else if (kFloat || residual_last) {
          activate_all<T, true>(p.activation, p.negative_slope, sums);
        }
        if (residual_last) [[unlikely]] {
          add_residual(sums, locate(index), chunk * kHopperChunk);
        }
        if (p.bulk && (kLast || chunk == 0)) {
          copy_bulk_wait_read();  // of what this warp had staged before
          __syncwarp();
        }
        const auto write = [&](auto bound) {
          constexpr Activation kBound = bound();
          if constexpr (kLast) {
            if constexpr (kFloat) {
              if (p.bulk) {
                stage_pixels(sums, taker);
                fence_async();
                __syncwarp();
                copy_pixels(of_tile, chunk * kHopperChunk, taker);
                copy_bulk_commit();
                return;
              }
            }
            if (p.y_vectors) {
              write_pixels<true, kBound>(sums, of_tile, chunk * kHopperChunk);
            } else {
              write_pixels<false, kBound>(sums, of_tile, chunk * kHopperChunk);
            }
          } else if (p.stage_pairs) {
            stage_planes<true, kBound>(sums, targets, chunk * kHopperChunk);
          } else {
            stage_planes<false, kBound>(sums, targets, chunk * kHopperChunk);
          }
        };
        // In 16 bits bounds come with the rounding, at little or no cost.
        if constexpr (kBounds && !kFloat) {
          dispatch_bound(residual_last ? Activation::none : p.activation, write);
        } else {
          write(std::integral_constant<Activation, Activation::none>{});
        }
      }
      if constexpr (kOutput == HopperOutput::planes) {
        if (p.bulk) {
          fence_async();
          __syncwarp();
          staged = index;
        } else {
          write_planes(locate(index), taker);
        }
      }
      if (share) {
        // Chunks are dealt round all tiles.
        first_chunk = (first_chunk + kTakers - p.tile.chunks % kTakers) % kTakers;
      }
    }
    copy_staged();
    if constexpr (kMoments) {
      write_moments(gathered, taker);
    } else if (p.bulk) {
      copy_bulk_wait();
    }
  }

  // x: the chunk's first unit. meanwhile(): what there is to do while the tensor cores are busy with the last products.
  template <typename F>
  __device__ __forceinline__ void multiply(Sums& sums, uint32_t x, F&& meanwhile) const {
    const uint32_t w_start = operand_start(weights(), kRows * 16);
    constexpr uint32_t kStep = 2 * kRows * 16 >> 4;
    // f(the step's pixels, its weights, whether there is something to add to)
    const auto for_each_step = [&](uint32_t units, auto&& f) {
      f((units >> 4) + p.steps[0], w_start, std::false_type{});
#pragma unroll 1
      for (int step = 1; step < p.tile.k_steps; ++step) {
        f((units >> 4) + p.steps[step], w_start + step * kStep, std::true_type{});
      }
    };
    const uint32_t x_low = p.tile.x_half >> 4;  // float32: from high halves to low ones
    constexpr uint32_t w_low = kChannels * 16 >> 4;
    if constexpr (kFloat && kLast) {
      // High and low halves of the weights, side by side, are columns of one product: the pixels are read once for both.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Sums both;
        float low[32];
        product_fence();
        for_each_step(x + half * (64 * 16), [&](uint32_t units, uint32_t w, auto more) {
          product_m64n128k16<Half, more()>(both, operand(units), operand(w));
          product_m64n64k16<Half, more()>(low, operand(units + x_low), operand(w));
        });
        product_commit();
        if (half == 1) {
          meanwhile();
        }
        product_wait<0>();
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          sums[half * 32 + e] = fmaf(both[32 + e] + low[e], 1 / kLowScale, both[e]);
        }
      }
    } else {
      Sums low;
      product_fence();
      for_each_step(x, [&](uint32_t units, uint32_t w, auto more) {
        if constexpr (kLast) {
          product_half<Half, 0, more()>(sums, operand(units), operand(w));
          product_half<Half, 1, more()>(sums, operand(units + 64), operand(w));
        } else if constexpr (kFloat) {
          product_m64n128k16<Half, more()>(low, operand(w + w_low), operand(units));
          product_m64n128k16<Half, more()>(sums, operand(w), operand(units));
          product_m64n128k16<Half, true>(low, operand(w), operand(units + x_low));
        } else {
          product_m64n128k16<Half, more()>(sums, operand(w), operand(units));
        }
      });
      product_commit();
      meanwhile();
      product_wait<0>();
      if constexpr (kFloat) {
#pragma unroll
        for (int e = 0; e < kSums; ++e) {
          sums[e] = fmaf(low[e], 1 / kLowScale, sums[e]);
        }
      }
    }
  }

  // In FMAs, from global memory: for values that do not split, and for Inf and NaN.
  __device__ __forceinline__ void multiply_exactly(Sums& sums, const Tile& tile, int first_position) const {
    const T* const image = p.x + static_cast<int64_t>(tile.image) * (p.C * p.H * p.W);
    constexpr int kBatch = kOwnPositions < 8 ? kOwnPositions : 8;
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      sums[e] = 0;
    }
    // One copy of the code for some of the positions, through which the others go by turns.
#pragma unroll 1
    for (int first = 0; first < kOwnPositions; first += kBatch) {
#pragma unroll 1
      for (int tap = 0; tap < p.R * p.S; ++tap) {
        const int r = tap / p.S;
        const int s = tap - r * p.S;
        int base = first_position + own_position() + position_step(first);
        asm volatile("" : "+r"(base));  // the compiler shall not keep all rows and columns in registers
        int offsets[kBatch];            // -1: past the image
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int position = base + position_step(j);
          const int row = p.x_cols.div(position);
          const int h = (tile.p0 + row) * p.stride_h - p.pad_h + r * p.dilation_h;
          const int w = (tile.q0 + position - row * p.tile.x_cols) * p.stride_w - p.pad_w + s * p.dilation_w;
          const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(p.H) &&
                              static_cast<unsigned>(w) < static_cast<unsigned>(p.W);
          offsets[j] = inside ? h * p.x_stride_h + w * p.x_stride_w : -1;
        }
#pragma unroll 1
        for (int c = 0; c < p.C; ++c) {
          float v[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            v[j] = offsets[j] < 0 ? 0.0f : to_acc(image[offsets[j] + c * p.x_stride_c]);
          }
#pragma unroll
          for (int i = 0; i < kOwnChannels; ++i) {
            int k = first_channel + own_channel(i);
            asm volatile("" : "+r"(k));
            const float w = k < p.K ? weight(k, c, r, s) : 0.0f;
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
              at(sums, i, j) = fmaf(w, v[j], at(sums, i, j));
            }
          }
        }
      }
      rotate<kOwnChannels * kBatch>(sums);
    }
  }

  // What comes behind the first so many comes to the front, and these to the end.
  template <int kFirst>
  static __device__ __forceinline__ void rotate(Sums& sums) {
    if constexpr (kFirst < kSums) {
      float first[kFirst];
#pragma unroll
      for (int e = 0; e < kFirst; ++e) {
        first[e] = sums[e];
      }
#pragma unroll
      for (int e = 0; e < kSums - kFirst; ++e) {
        sums[e] = sums[e + kFirst];
      }
#pragma unroll
      for (int e = 0; e < kFirst; ++e) {
        sums[kSums - kFirst + e] = first[e];
      }
    }
  }

  // ---- moments ----

  // Of a thread's own channels: sums of the distances from a pivot and of their squares. The pivot is the mean of the first
  // values: the distances are about as large as the deviation, however large the mean is. From time to time they go into
  // moments in float64.
  struct Gathered {
    float count = 0;
    float pivots[2] = {0, 0};
    float sums[2] = {0, 0};
    float squares[2] = {0, 0};
    Moments all[2] = {};
  };
  static constexpr float kMostGathered = 8192;

  // Of a thread's positions from `first` on, a bit each: whether it is one of the tile's.
  __device__ __forceinline__ uint32_t inside_of(int first, const Tile& tile) const {
    uint32_t inside = 0;
#pragma unroll 1
    for (int j = 0; j < 32; ++j) {
      const int position = first + position_step(j);
      const int row = p.x_cols.div(position);
      inside |= (row < rows(tile) && position - row * p.tile.x_cols < cols(tile) ? 1u : 0u) << j;
    }
    return inside;
  }

  // inside: which of the positions count.
  __device__ __forceinline__ void gather(Gathered& own, const Sums& sums, uint32_t inside, bool exact,
                                         float inverse) const {
    const auto count = static_cast<float>(__popc(inside));
    if (count == 0) {
      return;
    }
    const auto value = [&](int i, int j) { return sums[j / 2 * 4 + i * 2 + j % 2]; };
    // What was scaled is unscaled on the way: that is a power of two.
    float factors[2] = {1, 1};
    if (kFloat && !exact) {
      factors[0] = header().unscales[own_channel(0)] * inverse;
      factors[1] = header().unscales[own_channel(1)] * inverse;
    }
    if (own.count == 0) {
      const float share = 1 / count;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        own.pivots[i] = 0;
#pragma unroll
        for (int j = 0; j < kOwnPositions; ++j) {
          own.pivots[i] += inside >> j & 1 ? value(i, j) * factors[i] * share : 0.0f;
        }
      }
    }
    // Sums of few at first: fewer roundings, and shorter chains.
    float sum[2][2] = {}, squares[2][2] = {};
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float distance = inside >> j & 1 ? fmaf(value(i, j), factors[i], -own.pivots[i]) : 0.0f;
        sum[i][j % 2] += distance;
        squares[i][j % 2] = fmaf(distance, distance, squares[i][j % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own.sums[i] += sum[i][0] + sum[i][1];
      own.squares[i] += squares[i][0] + squares[i][1];
    }
    own.count += count;
    if (own.count >= kMostGathered) {
      settle(own);
    }
  }

  static __device__ __forceinline__ void settle(Gathered& own) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own.all[i] = merge(own.all[i], from_sums(own.count, own.pivots[i], own.sums[i], own.squares[i]));
      own.sums[i] = own.squares[i] = 0;
    }
    own.count = 0;
  }

  // By the first of the four threads that share the channels.
  __device__ __forceinline__ void write_moments(Gathered& own, int taker) const {
    settle(own);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Moments m = own.all[i];
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        const Moments theirs{__shfl_xor_sync(0xffffffffu, m.count, other), __shfl_xor_sync(0xffffffffu, m.mean, other),
                             __shfl_xor_sync(0xffffffffu, m.m2, other)};
        m = merge(m, theirs);
      }
      const int k = first_channel + own_channel(i);
      if (t() == 0 && k < p.K) {
        p.moments[static_cast<int64_t>(blockIdx.x * kTakers + taker) * p.K + k] = m;
      }
    }
  }

  // What was scaled is unscaled on the way: that is a power of two, and can go into the affine's scale.
  __device__ __forceinline__ void apply_affine(Sums& sums, bool exact, float inverse) const {
    if (p.late_affine && header().centered != 0) {  // the parameter first: it is there at once
#pragma unroll
      for (int i = 0; i < kOwnChannels; ++i) {
        const int channel = own_channel(i);
        const float factor = kFloat && !exact ? header().unscales[channel] * inverse : 1.0f;
        const Affine<float> affine{0, header().scales[channel], header().shifts[channel]};
#pragma unroll
        for (int j = 0; j < kOwnPositions; ++j) {
          at(sums, i, j) = fused_conv_bn::apply_affine(fmaf(at(sums, i, j), factor, -header().centers[channel]),
                                                       affine);
        }
      }
      return;
    }
    const float* const source = kFloat && !exact ? header().scaled_unscales : header().scales;
#pragma unroll
    for (int i = 0; i < kOwnChannels; ++i) {
      const int channel = own_channel(i);
      const Affine<float> affine{0, kFloat ? source[channel] * inverse : source[channel], header().shifts[channel]};
#pragma unroll
      for (int j = 0; j < kOwnPositions; ++j) {
        at(sums, i, j) = fused_conv_bn::apply_affine(at(sums, i, j), affine);
      }
    }
  }

  __device__ __forceinline__ void add_residual(Sums& sums, const Tile& tile, int first_position) const {
    const T* const start = p.residual + y_offset(tile) + own_channel(0) * (kLast ? 1 : p.P * p.Q);
    const int channels = p.K - first_channel - own_channel(0);
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
      int position = first_position + own_position() + position_step(j);
      asm volatile("" : "+r"(position));
      const int row = p.x_cols.div(position);
      const int col = position - row * p.tile.x_cols;
      if (row < rows(tile) && col < cols(tile)) {
        const T* const source = start + (row * p.Q + col) * (kLast ? p.K : 1);
#pragma unroll
        for (int i = 0; i < kOwnChannels; ++i) {
          const int beyond = kLast ? i / kVec * (4 * kVec) + i % kVec : i * 8;
          if (beyond < channels) {
            at(sums, i, j) += to_acc(source[kLast ? beyond : beyond * (p.P * p.Q)]);
          }
        }
      }
    }
  }

  // A tile of a channels_last output: its first pixel, from `first_channel` on, and its rows (<< 16) and columns.
  struct Pixels {
    unsigned char* start;
    uint32_t rows, cols;
  };
  __device__ __forceinline__ Pixels pixels(const Tile& tile) const {
    return {reinterpret_cast<unsigned char*>(p.y + y_offset(tile)), static_cast<uint32_t>(rows(tile)) << 16,
            static_cast<uint32_t>(cols(tile))};
  }

  // 16 bytes of a pixel's channels at a time; threads of the same t write 64 bytes side by side.
  template <bool kVectors, Activation kBound>
  __device__ __forceinline__ void write_pixels(const Sums& sums, const Pixels& pixels, int first_position) const {
    unsigned char* const start = pixels.start + t() * kVecBytes;
    const int channels = p.K - first_channel - t() * kVec;
    const uint32_t table = places() + (first_position + own_position()) * 8;
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
      const uint2 place = load_shared_2(table + position_step(j) * 8);
      const bool inside = place.y < pixels.rows && (place.y & 0xffff) < pixels.cols;
      T* const target = reinterpret_cast<T*>(start + place.x);
#pragma unroll
      for (int i = 0; i < kOwnChannels; i += kVec) {
        const int first = i / kVec * (4 * kVec);
        const auto value = [&](int v) { return sums[j / 2 * (kSums / 2) + (i + v) / 2 * 4 + j % 2 * 2 + v % 2]; };
        if constexpr (kVectors) {
          uint32_t words[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            if constexpr (kFloat) {
              words[v] = __float_as_uint(value(v));
            } else {
              words[v] = pack_pair_bounded<kBound>(T(), value(2 * v), value(2 * v + 1));
            }
          }
          store_words_if(inside && first < channels, target + first, words);
        } else {
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            if (inside && first + v < channels) {
              target[first + v] = from_acc<T>(activate<kBound, T>(value(v), 0.0f));
            }
          }
        }
      }
    }
  }

  // On the way to bulk copies: two times 16 pixels. Pixels are a multiple of 128 bytes where it matters, so that neighbours
  // would share banks: odd ones begin with another of their vectors.
  __device__ __forceinline__ void stage_pixels(const Sums& sums, int taker) const {
    const uint32_t pitch = p.K * kBytes;
    const uint32_t start = pixel_stage(taker) + g() * pitch + t() * kVecBytes;
    const bool odd = g() % 2 != 0;
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
      const uint32_t target = start + (j / 2 * 16 + j % 2 * 8) * pitch;
#pragma unroll
      for (int i = 0; i < kOwnChannels; i += 2 * kVec) {
        const auto value = [&](int v) {
          return __float_as_uint(sums[j / 2 * 32 + (i + v) / 2 * 4 + j % 2 * 2 + v % 2]);
        };
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const int vector = i / kVec + (odd ? 1 - turn : turn);
          const int a = turn * kVec, b = (1 - turn) * kVec;
          const uint4 words = make_uint4(odd ? value(b) : value(a), odd ? value(b + 1) : value(a + 1),
                                         odd ? value(b + 2) : value(a + 2), odd ? value(b + 3) : value(a + 3));
          if (vector * (4 * kVec) + t() * kVec < p.K) {
            store_shared(target + vector * 64, words);
          }
        }
      }
    }
  }

  // A lane looks after one of the 32 pixels that its warp has staged. A run of neighbours in the output begins behind a pixel
  // that is not there, in another row, or among the other 16.
  __device__ __forceinline__ void copy_pixels(const Pixels& pixels, int first_position, int taker) const {
    const uint32_t pitch = p.K * kBytes;
    const uint2 place = load_shared_2(places() + (first_position + lane() / 16 * 64 + warp() * 16 + lane() % 16) * 8);
    const uint32_t col = place.y & 0xffff;
    const bool inside = place.y < pixels.rows && col < pixels.cols;
    const uint32_t there = __ballot_sync(0xffffffffu, inside);
    const bool follows = lane() % 16 > 0 && (there >> (lane() - 1) & 1) != 0 && col > 0;
    const uint32_t begins = __ballot_sync(0xffffffffu, inside && !follows);
    if (begins >> lane() & 1) {
      const uint32_t behind = (~there | begins) & (0xfffffffeu << lane());
      const int length = (behind == 0 ? 32 : __ffs(static_cast<int>(behind)) - 1) - lane();
      copy_bulk(pixels.start + place.x, pixel_stage(taker) + lane() * pitch, length * pitch, L2Policy::once(p.streams));
    }
  }
  static __device__ __forceinline__ void store_words_if(bool condition, void* address, const uint32_t (&w)[4]) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(address),
        "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(static_cast<int>(condition))
        : "memory");
  }

  // The bytes by which a channel's run is shifted in its stage, so that it starts there where it does in memory, modulo
  // kHopperRunAlign: bulk copies are faster then.
  __device__ __forceinline__ uint32_t lead(int channel, int64_t offset) const {
    const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.y + offset));
    return whole_rows() ? (address - channel * p.tile.stage_pitch * kBytes) % kHopperRunAlign : 0;
  }

  // Where a thread's own channels begin in their stage.
  __device__ __forceinline__ uint2 stage_targets(const Tile& tile, int taker) const {
    uint32_t targets[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      targets[i] = output(taker) + own_channel(i) * p.tile.stage_pitch * kBytes +
                   lead(own_channel(i), y_offset(tile) + own_channel(i) * (p.P * p.Q));
    }
    return make_uint2(targets[0], targets[1]);
  }

  template <bool kPairs, Activation kBound>
  __device__ __forceinline__ void stage_planes(const Sums& sums, uint2 own, int first_position) const {
    const uint32_t targets[2] = {own.x, own.y};
    const uint32_t table = places() + (first_position + own_position()) * 2;
    // All of them first: a store would wait for its own.
    uint32_t positions[kOwnPositions / 2];
#pragma unroll
    for (int j = 0; j < kOwnPositions / 2; ++j) {
      positions[j] = kPairs ? load_shared_half(table + j * 16) : load_shared_1(table + j * 16);
    }
#pragma unroll
    for (int j = 0; j < kOwnPositions; j += 2) {
      const uint32_t place = kPairs ? positions[j / 2] : positions[j / 2] & 0xffff;
      const uint32_t next = kPairs ? 0 : positions[j / 2] >> 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a = sums[j * 2 + i * 2];
        const float b = sums[j * 2 + i * 2 + 1];
        if constexpr (kFloat) {
          if constexpr (kPairs) {
            store_shared(targets[i] + place, make_uint2(__float_as_uint(a), __float_as_uint(b)));
          } else {
            store_shared(targets[i] + place, __float_as_uint(a));
            store_shared(targets[i] + next, __float_as_uint(b));
          }
        } else {
          const uint32_t both = pack_pair_bounded<kBound>(T(), a, b);
          if constexpr (kPairs) {
            store_shared(targets[i] + place, both);
          } else {
            store_shared(targets[i] + place, static_cast<uint16_t>(both));
            store_shared(targets[i] + next, static_cast<uint16_t>(both >> 16));
          }
        }
      }
    }
  }

  // Starts bulk copies of the channels that this warp has staged: nobody else to wait for. A lane has a channel.
  __device__ __forceinline__ void copy_planes(const Tile& tile, int taker) const {
    const int channel = warp() * 16 + lane();
    if (lane() < 16 && first_channel + channel < p.K) {
      const int64_t own = y_offset(tile) + channel * (p.P * p.Q);
      copy_bulk(p.y + own, output(taker) + channel * p.tile.stage_pitch * kBytes + lead(channel, own),
                rows(tile) * p.Q * kBytes, L2Policy::once(p.streams));
    }
  }

  // Without bulk copies a warp writes the channels that it has staged: nobody else to wait for.
  __device__ __forceinline__ void write_planes(const Tile& tile, int taker) const {
    const int channels = min(16, p.K - first_channel - warp() * 16);
    const uint32_t pitch = p.tile.stage_pitch * kBytes;
    const uint32_t source = output(taker) + warp() * 16 * pitch;
    const int64_t offset = y_offset(tile) + warp() * 16 * (p.P * p.Q);
    __syncwarp();
    // Vector by vector of all runs: a run is a channel's, or where rows are not whole, a row's.
    const bool whole = whole_rows();
    const int runs = channels * (whole ? 1 : p.tile.p);
    const int length = (whole ? rows(tile) * p.Q : cols(tile)) * kBytes;
    const int vectors = static_cast<int>(p.run_vectors.divisor);
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int first = lane(); first < runs * vectors; first += 32 * kBatch) {
      uint4 words[kBatch];
      unsigned char* targets[kBatch];
      int begins[kBatch], ends[kBatch];  // of the run, from the vector on
      uint32_t sources[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = first + i * 32;
        const int run = p.run_vectors.div(index);
        const int channel = whole ? run : static_cast<int>(p.tile_p.div(run));
        const int row = run - channel * (whole ? 1 : p.tile.p);
        const int64_t start = offset + (channel * (p.P * p.Q) + row * p.Q);
        const int skipped = static_cast<int>(lead(channel, start));
        const int at = (index - run * vectors) * kVecBytes - skipped;
        targets[i] = reinterpret_cast<unsigned char*>(p.y + start) + at;
        sources[i] = source + channel * pitch + row * p.tile.stage_row * kBytes + skipped + at;
        begins[i] = -at;
        ends[i] = run < runs && row < rows(tile) ? length - at : -1;
        words[i] = make_uint4(0, 0, 0, 0);
        if (begins[i] < kVecBytes && ends[i] > 0) {
          words[i] = load_shared_4(sources[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begins[i] <= 0 && ends[i] >= kVecBytes && (whole || p.rows_aligned)) {
          store_words(targets[i], words[i]);
        } else if (begins[i] < kVecBytes && ends[i] > 0) {
#pragma unroll 1
          for (int e = max(begins[i], 0); e < min(ends[i], kVecBytes); e += kBytes) {
            if constexpr (kFloat) {
              *reinterpret_cast<uint32_t*>(targets[i] + e) = load_shared_1(sources[i] + e);
            } else {
              *reinterpret_cast<uint16_t*>(targets[i] + e) = static_cast<uint16_t>(load_shared_half(sources[i] + e));
            }
          }
        }
      }
    }
    __syncwarp();
  }

  const HopperParams<T>& p;
  const int first_channel, warp_of_block;
};

template <typename T, HopperOutput kOutput, int kChannels, bool kBounds>
__global__ void __launch_bounds__(hopper_threads(Hopper<T, kOutput, kChannels, kBounds>::kHalves), 1)
    stem_sm90_kernel(const __grid_constant__ HopperParams<T> params) {
#if defined(FCB_SM90A)
  Hopper<T, kOutput, kChannels, kBounds>(params).run();
#endif
}

// Whether the warpgroups that multiply take turns with the activation. Measured on an H200 with problem 73 and four stems in both
// layouts, times with turns over times without. 16 bits: 0.77 to 1.0, but up to 1.13 for short activations of contiguous outputs.
// float32: SiLU 0.8 to 0.97 where the product is short, and 1.04 to 1.1 where it is long (two warpgroups are enough to keep the
// units busy with both then); short ones 0.98 to 1.14.
inline bool hopper_activates_by_turns(Activation activation, const HopperTile& tile, bool channels_last) {
  constexpr int kLongProduct = 8;
  if (tile.halves == 1 && channels_last) {
    return !is_bound(activation);
  }
  return !is_short(activation) && (tile.halves == 1 || tile.k_steps < kLongProduct);
}

// The tile was made for the problem. moments: nullptr, or where they go instead of an output.
template <typename T>
cudaError_t launch_stem_sm90(const ConvCall& call, const HopperTile& tile, Moments* moments, cudaStream_t stream) {
  const auto& [c, operands, gpu, epilogue] = call;
  HopperParams<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.affine = AffineSource<T>(operands.affine);
  p.late_affine = operands.late_affine;
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.moments = moments;
  p.w_stride_c = static_cast<int>(operands.w_stride_c);
  p.w_stride_r = static_cast<int>(operands.w_stride_r);
  p.w_stride_s = static_cast<int>(operands.w_stride_s);
  p.C = static_cast<int>(c.C), p.H = static_cast<int>(c.H), p.W = static_cast<int>(c.W);
  p.K = static_cast<int>(c.K), p.R = static_cast<int>(c.R), p.S = static_cast<int>(c.S);
  p.P = static_cast<int>(c.P), p.Q = static_cast<int>(c.Q);
  p.x_stride_c = c.channels_last ? 1 : p.H * p.W;
  p.x_stride_h = c.channels_last ? p.W * p.C : p.W;
  p.x_stride_w = c.channels_last ? p.C : 1;
  p.stride_h = static_cast<int>(c.stride_h), p.stride_w = static_cast<int>(c.stride_w);
  p.pad_h = static_cast<int>(c.pad_h), p.pad_w = static_cast<int>(c.pad_w);
  p.dilation_h = static_cast<int>(c.dilation_h), p.dilation_w = static_cast<int>(c.dilation_w);
  p.tile = tile;
  p.x_cols = FastDiv(tile.x_cols);
  p.x_rows = FastDiv(tile.x_rows);
  p.channel_blocks = FastDiv(tile.channel_blocks);
  p.slab_rows = FastDiv(tile.slab_rows);
  p.phases_w = FastDiv(tile.phases_w);
  p.tiles_q = FastDiv(tile.tiles_q);
  p.tiles_p = FastDiv(tile.tiles_p);
  p.tile_p = FastDiv(tile.p);
  p.tiles = static_cast<uint32_t>(c.N * tile.tiles_p * tile.tiles_q);
  constexpr int64_t kBytes = sizeof(T);
  const auto aligned = [](const void* address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  const bool whole = tile.q == c.Q;
  const int64_t run = (whole ? tile.p * c.Q : tile.q) * kBytes;
  p.run_vectors = FastDiv(static_cast<uint32_t>((run + (whole ? kHopperRunAlign : 0) + kVecBytes - 1) / kVecBytes));
  p.x_units = static_cast<int>(tile.x_units);
  p.x_row_bytes = static_cast<int>(hopper_row_bytes(c));
  p.x_col_bytes = p.x_row_bytes / p.W;
  p.x_planes = c.channels_last ? 1 : p.C;
  p.unit_row_bytes = tile.slab == 0 ? p.x_row_bytes : tile.slab_pitch;
  p.unit_channel = c.channels_last ? static_cast<int>(kBytes) : tile.slab_rows * tile.slab_pitch;
  p.fetches = p.x_row_bytes % 16 == 0;
  p.slab_vectors = c.channels_last && c.C % 8 == 0;
  p.w_vectors = operands.w_stride_c == 1 && c.C % 8 == 0;
  p.y_vectors = c.channels_last && c.K * kBytes % kVecBytes == 0 && aligned(p.y, kVecBytes);
  p.stage_pairs = tile.q % 2 == 0 && tile.x_cols % 2 == 0 && c.Q % 2 == 0 && aligned(p.y, 2 * kBytes);
  p.rows_aligned = c.Q * kBytes % kVecBytes == 0 && aligned(p.y, kVecBytes);
  p.bulk = aligned(p.y, kVecBytes) &&
           (c.channels_last ? tile.pixel_stage > 0
                            : whole && c.P * c.Q * kBytes % kVecBytes == 0 && tile.p * c.Q * kBytes % kVecBytes == 0);
  p.streams = c.N * c.K * c.P * c.Q * kBytes > kHopperL2Bytes;
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.activates_by_turns = hopper_activates_by_turns(epilogue.activation, tile, c.channels_last);
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  std::vector<HopperUnit> units;
  for (int i = 0; i < tile.units; ++i) {
    units.push_back(hopper_unit(c, tile, i));
  }
  // So that the second unit of a step never lies before the first.
  std::stable_sort(units.begin(), units.end(),
                   [](const HopperUnit& a, const HopperUnit& b) { return a.offset < b.offset; });
  for (int step = 0; step < tile.k_steps; ++step) {
    const HopperUnit& a = units[2 * step];
    const bool half = 2 * step + 1 == tile.units;
    const HopperUnit& b = half ? a : units[2 * step + 1];  // an odd last one is there twice, once with weights of 0
    p.steps[step] = operand_start(a.offset * 16, (b.offset - a.offset) * 16);
    p.units[2 * step] = a.r << 16 | a.s << 8 | a.channel_block;
    p.units[2 * step + 1] = half ? kNoUnit : b.r << 16 | b.s << 8 | b.channel_block;
  }
  constexpr int kFewChannels = sizeof(T) == 2 ? kHopperChannels / 2 : kHopperChannels;
  const auto kernel_of = [&](auto bounds) {
    return !c.channels_last      ? stem_sm90_kernel<T, HopperOutput::planes, kHopperChannels, bounds()>
           : c.K <= kFewChannels ? stem_sm90_kernel<T, HopperOutput::pixels, kFewChannels, bounds()>
                                 : stem_sm90_kernel<T, HopperOutput::pixels, kHopperChannels, bounds()>;
  };
  const auto kernel = moments != nullptr ? stem_sm90_kernel<T, HopperOutput::moments, kHopperChannels, true>
                      : is_bound(epilogue.activation) ? kernel_of(std::true_type{})
                                                      : kernel_of(std::false_type{});
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  tile.shared_memory);
  if (status != cudaSuccess) {
    return status;
  }
  const int64_t groups = ceil_div(c.K, kHopperChannels);
  const int64_t blocks = hopper_blocks(c, tile, gpu);
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
                       hopper_threads(tile.halves), tile.shared_memory, true, stream, p);
}

template <typename T>
cudaError_t StemSm90::launch(const ConvCall& call, cudaStream_t stream) const {
  return launch_stem_sm90<T>(call, tile, nullptr, stream);
}

template <typename T>
cudaError_t StemSm90::launch_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const {
  return launch_stem_sm90<T>(call, moments_tile, moments, stream);
}

}  // namespace fused_conv_bn
