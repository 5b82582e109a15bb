// Convolutions of few input channels as an implicit GEMM on Hopper's tensor cores (compute capability 9.0a), with the
// epilogue in the same kernel.
//
// A block owns 64 output channels for good and takes one tile of output pixels after another. Two warpgroups read the input
// of the tiles to come and put it into shared memory as units (conv_hopper.h), of which wgmma reads any two at a time: im2col
// is a table of offsets. The other two take turns with the tiles: while one multiplies, the other writes.
//
// For a contiguous output the rows of the product are channels. A warp has 16 of them to itself, puts them into shared
// memory as they lie in the output, and writes whole rows. For a channels_last output the rows are pixels, and channels are
// dealt to the columns so that a thread ends up with 16 bytes of a pixel's, which it writes.
//
// For BatchNorm in training mode there are two passes: one that keeps the moments of each channel and writes nothing else,
// and one with the affine that comes of them.
//
// float32 is split in two halves (split_float.cuh). A tile that does not split, or has Inf or NaN (which must not meet the
// zeros of half-filled units), is computed in plain float32 FMAs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "conv_hopper.h"
#include "copy_async.cuh"
#include "epilogue.h"
#include "hopper.cuh"
#include "memory_format.h"
#include "moments.h"
#include "shared_memory.cuh"
#include "split_float.cuh"
#include "vec.cuh"

namespace fused_conv_bn {

constexpr uint32_t kNoUnit = 0xffffffffu;

enum class HopperOutput { planes, pixels, moments };

template <typename T>
struct HopperParams {
  const T* x;
  const T* w;
  const float* center;  // nullptr: 0
  const float* scale;   // of moments: nullptr, and so are the others
  const float* shift;
  const T* residual;
  T* y;
  Moments* moments;  // [blocks][takers][K]
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  int x_stride_c, x_stride_h, x_stride_w;
  int C, H, W, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  HopperTile tile;
  FastDiv x_cols, x_rows, channel_blocks, phases_w, tiles_q, tiles_p, tile_p, run_vectors;
  uint32_t tiles;
  bool plain_units;   // of eight channels of one pixel each
  bool x_vectors;     // channels_last: a unit can be read as a whole
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool stage_pairs;   // contiguous: two neighbouring results can be staged with one store
  bool rows_aligned;  // contiguous, rows that are not whole: each starts at a multiple of 16 bytes
  bool bulk;          // contiguous: a channel's run starts and ends at multiples of 16 bytes
  Activation activation;
  uint32_t steps[kHopperMostUnits / 2];  // operand_start() of each step, from the tile's first unit on
  uint32_t units[kHopperMostUnits];      // r, s and channel block of each step's two units; kNoUnit
};

// What shared memory begins with.
struct HopperHeader {
  uint64_t full[kHopperMostStages];
  uint64_t empty[kHopperMostStages];
  // float32: whether the tile does not split, and the inverse of its scale. Else a byte for each loading warp: whether it has
  // met Inf or NaN.
  uint2 stages[kHopperMostStages];
  uint4 warps[2][4 * kHopperLoaders];  // of the loading warps: magnitudes, by turns
  uint32_t all_exact;                  // the weights, or their affines, do not split: nothing does
  int w_span;                          // the widest span of an output channel's weights
  int least_unscale, most_unscale;     // exponents among unscales[]
  float scales[kHopperChannels];
  float shifts[kHopperChannels];
  float centers[kHopperChannels];
  float unscales
      [kHopperChannels];  // the inverse of the weights' scale, and where there are no centers, the affine's scale
  float w_scales[kHopperChannels];
};
static_assert(sizeof(HopperHeader) <= kHopperHeader);

extern __shared__ __align__(128) unsigned char hopper_shared[];

template <typename T, HopperOutput kOutput>
class Hopper {
 public:
  static constexpr bool kLast = kOutput == HopperOutput::pixels;
  static constexpr bool kMoments = kOutput == HopperOutput::moments;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  using Half = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr int kHalves = kFloat ? 2 : 1;
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kKept = 5;  // units that a loading thread has in registers at once
  static constexpr uint32_t kInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
  // A thread's own part of the product of a chunk.
  static constexpr int kOwnChannels = kLast ? 16 : 2;
  static constexpr int kOwnPositions = 64 / kOwnChannels;
  static constexpr int kLoadThreads = 128 * kHopperLoaders;
  static constexpr int kTakeThreads = 128 * kHopperTakers;
  using Sums = float[64];
  // Of each position of a tile. channels_last: its offset in the image, row and column. Else: its offset in the stage.
  static constexpr int kPlaceBytes = hopper_place_bytes(kLast);
  // Barriers: who meets there.
  static constexpr int kLoadersMeet = 1;
  static constexpr int kTakersMeet = 2;
  static constexpr int kWeightsAreThere = 3;
  static constexpr int kNowhere = 0xffff;
  static constexpr uint32_t kOutside = 0x7fff0000;  // as a row, below every other

  __device__ __forceinline__ explicit Hopper(const HopperParams<T>& params)
      : p(params), first_channel(blockIdx.y * kHopperChannels) {}

  __device__ __forceinline__ void run() {
    set_up_barriers();
    __syncthreads();
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the compiler shall see that a warp agrees
    if (warpgroup < kHopperLoaders) {
      give_registers_away<kFloat ? 80 : 112>();
      load();
    } else {
      take_registers<kFloat ? 176 : 144>();
      set_up_weights();
      // Loaders of float32 need to know about the weights.
      meet(kWeightsAreThere, kFloat ? kHopperThreads : kTakeThreads);
      compute(warpgroup - kHopperLoaders);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x % 128 / 32; }  // of its warpgroup
  // The row and the column group that a thread has in a product.
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  // Shared memory: the header, the weights, the stages with input, and where the output is contiguous, positions in it and two
  // stages on the way out.
  static __device__ __forceinline__ HopperHeader& header() { return *reinterpret_cast<HopperHeader*>(hopper_shared); }
  static __device__ __forceinline__ uint32_t full(int stage) { return shared_address(&header().full[stage]); }
  static __device__ __forceinline__ uint32_t empty(int stage) { return shared_address(&header().empty[stage]); }
  static __device__ __forceinline__ uint32_t weights() { return shared_address(hopper_shared) + kHopperHeader; }
  __device__ __forceinline__ uint32_t input(int stage) const {
    return weights() + kHalves * p.tile.w_half() + stage * kHalves * p.tile.x_half;
  }
  __device__ __forceinline__ uint32_t places() const { return input(p.tile.stages); }
  __device__ __forceinline__ uint32_t output(int taker) const {
    return places() + p.tile.chunks * (kHopperChunk * kPlaceBytes) +
           taker * (kHopperChannels * kBytes) * p.tile.stage_pitch;
  }

  // Where a thread's own channels and positions are in the product, and which they are.
  static __device__ __forceinline__ float& at(Sums& sums, int channel, int position) {
    return kLast ? sums[position / 2 * 32 + channel / 2 * 4 + position % 2 * 2 + channel % 2]
                 : sums[position / 2 * 4 + channel * 2 + position % 2];
  }
  static __device__ __forceinline__ int own_channel(int i) {
    return kLast ? i / kVec * (4 * kVec) + t() * kVec + i % kVec : warp() * 16 + g() + i * 8;
  }
  static __device__ __forceinline__ int own_position() { return kLast ? warp() * 16 + g() : t() * 2; }  // the first
  static __device__ __forceinline__ int position_step(int j) {  // from the first to another
    return kLast ? j / 2 * 64 + j % 2 * 8 : j / 2 * 8 + j % 2;
  }
  // The channel that a row of the weights has.
  static __device__ __forceinline__ int row_channel(int row) {
    const int i = row / 8 * 2 + row % 2;
    return kLast ? i / kVec * (4 * kVec) + row % 8 / 2 * kVec + i % kVec : row;
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
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    const int64_t start = static_cast<int64_t>(tile.image) * p.K * p.P * p.Q;
    const int pixel = tile.p0 * p.Q + tile.q0;
    return kLast ? start + pixel * p.K + first_channel : start + first_channel * (p.P * p.Q) + pixel;
  }

  // ---- once: weights, affines, tables ----

  __device__ __forceinline__ float weight(int k, int c, int r, int s) const {
    return to_acc(p.w[k * p.w_stride_k + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s]);
  }

  __device__ __forceinline__ void set_up_barriers() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < p.tile.stages; ++stage) {
        barrier_init(full(stage), 4 * kHopperLoaders);
        barrier_init(empty(stage), 4);
      }
      header().all_exact = 0;
      header().w_span = 0;
      header().least_unscale = 1 << 20;
      header().most_unscale = -(1 << 20);
    }
  }

  // By the warpgroups that multiply, while the others begin to load.
  __device__ __forceinline__ void set_up_weights() {
    const int thread = threadIdx.x - kLoadThreads;
    // The magnitudes of an output channel's weights, by neighbouring threads.
    constexpr int kSharers = kTakeThreads / kHopperChannels;
    {
      const int channel = thread / kSharers;
      const int k = first_channel + channel;
      const float scale = k < p.K ? (kMoments ? 1.0f : p.scale[k]) : 0.0f;
      if constexpr (kFloat) {
        Magnitudes m;
        const int terms = k < p.K ? p.C * p.R * p.S : 0;
        constexpr int kBatch = 8;  // loads under way
        for (int first = thread % kSharers; first < terms; first += kSharers * kBatch) {
          float v[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int e = first + i * kSharers;
            const int c = e / (p.R * p.S);
            const int tap = e - c * (p.R * p.S);
            const int r = tap / p.S;
            v[i] = e < terms ? weight(k, c, r, tap - r * p.S) : 0.0f;
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            m.add(v[i]);
          }
        }
#pragma unroll
        for (int other = 1; other < kSharers; other *= 2) {
          m.merge(__shfl_xor_sync(0xffffffffu, m.most, other), __shfl_xor_sync(0xffffffffu, m.least, other));
        }
        const float unscaled = p.center == nullptr ? scale * m.inverse() : m.inverse();
        if (thread % kSharers == 0) {
          header().w_scales[channel] = m.scale();
          header().unscales[channel] = unscaled;
          if (!m.has_scale() || m.span() > kMaxSpan) {
            header().all_exact = 1;
          }
          atomicMax(&header().w_span, m.span());
          // What PyTorch would have it be at any scale, 0, Inf or NaN, does not count.
          const int exponent = static_cast<int>(__float_as_uint(scale) >> 23 & 255);
          if (scale != 0 && exponent < 255) {
            if (exponent + m.inverse_exponent() < 2 || exponent + m.inverse_exponent() > 250) {
              header().all_exact = 1;
            }
            atomicMin(&header().least_unscale, exponent + m.inverse_exponent());
            atomicMax(&header().most_unscale, exponent + m.inverse_exponent());
          }
        }
      }
      if (thread % kSharers == 0) {
        header().scales[channel] = scale;
        header().shifts[channel] = k < p.K && !kMoments ? p.shift[k] : 0.0f;
        header().centers[channel] = k < p.K && p.center != nullptr ? p.center[k] : 0.0f;
      }
    }
    meet(kTakersMeet, kTakeThreads);
    // Of each step, the first unit of all channels, then the second.
    for (int e = thread; e < p.tile.k_steps * 2 * kHopperChannels; e += kTakeThreads) {
      const int row = e % kHopperChannels;
      const int channel = row_channel(row);
      const int k = first_channel + channel;
      const uint32_t unit = p.units[e / kHopperChannels];
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int s = static_cast<int>(unit >> 8 & 255) + (i >> p.tile.slots_log2);
        const int c = static_cast<int>(unit & 255) * 8 + (i & ((1 << p.tile.slots_log2) - 1));
        const bool inside = unit != kNoUnit && s < p.S && c < p.C && k < p.K;
        v[i] = inside ? weight(k, c, static_cast<int>(unit >> 16), s) : 0.0f;
      }
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kFloat) {
          split(v[2 * i], v[2 * i + 1], header().w_scales[channel], high[i], low[i]);
        } else {
          high[i] = pack_pair(T(), v[2 * i], v[2 * i + 1]);
        }
      }
      store_shared(weights() + e * 16, make_uint4(high[0], high[1], high[2], high[3]));
      if constexpr (kFloat) {
        store_shared(weights() + p.tile.w_half() + e * 16, make_uint4(low[0], low[1], low[2], low[3]));
      }
    }
    for (int position = thread; position < p.tile.chunks * kHopperChunk; position += kTakeThreads) {
      const int row = p.x_cols.div(position);
      const int col = position - row * p.tile.x_cols;
      const bool inside = row < p.tile.p && col < p.tile.q;
      if constexpr (kLast) {
        store_shared(places() + position * 8, make_uint2(static_cast<uint32_t>(row * p.Q + col) * p.K * kBytes,
                                                         inside ? row << 16 | col : kOutside));
      } else if constexpr (kMoments) {
        store_shared(places() + position * 2, static_cast<uint16_t>(inside ? row << 10 | col : kNowhere));
      } else {
        store_shared(places() + position * 2,
                     static_cast<uint16_t>((inside ? row * p.tile.stage_row + col : p.tile.stage_end) * kBytes));
      }
    }
    fence_async();
  }

  // ---- the warpgroup that loads ----

  using Bits = std::conditional_t<kFloat, uint32_t, uint16_t>;

  // Where the tile's input begins: it may lie outside of the image.
  struct Patch {
    const T* image;
    int h0, w0;
    int end;  // past the last column that a tap of the tile meets in the image
  };
  __device__ __forceinline__ Patch patch(const Tile& tile) const {
    const int w0 = tile.q0 * p.stride_w - p.pad_w;
    return {p.x + static_cast<int64_t>(tile.image) * (p.C * p.H * p.W), tile.p0 * p.stride_h - p.pad_h, w0,
            max(0, min(p.W, w0 + (p.tile.q - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1))};
  }

  // f(source, exists) for unit number `index` of the tile's: source(i) is value i's address, exists(i) whether it is in the
  // image, the patch and the channels. Values of x_vectors exist together.
  template <typename F>
  __device__ __forceinline__ void with_unit(int index, const Patch& patch, F&& f) const {
    const int line = p.x_cols.div(index);
    const int col = index - line * p.tile.x_cols;
    const int plane = p.x_rows.div(line);
    const int row = line - plane * p.tile.x_rows;
    const int phase = p.channel_blocks.div(plane);
    const int c0 = (plane - phase * p.tile.channel_blocks) * 8;
    const int phase_h = p.phases_w.div(phase);
    const int phase_w = phase - phase_h * p.tile.phases_w;
    const int down = row * p.stride_h + phase_h * p.tile.phase_step_h;
    const int h = patch.h0 + down;
    const int w = patch.w0 + col * p.stride_w + phase_w * p.tile.phase_step_w;
    const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(p.H) &&
                        down <= (p.tile.p - 1) * p.stride_h + (p.R - 1) * p.dilation_h;
    const Bits* const source = reinterpret_cast<const Bits*>(patch.image) +
                               (h * p.x_stride_h + w * p.x_stride_w + c0 * p.x_stride_c);
    if (p.plain_units) {
      const bool exists = inside && static_cast<unsigned>(w) < static_cast<unsigned>(patch.end);
      f([&](int i) { return source + i * p.x_stride_c; }, [&](int) { return exists; });
    } else {
      const int channels = inside ? p.C - c0 : 0;
      const int mask = (1 << p.tile.slots_log2) - 1;
      f(
          [&](int i) {
            return source + ((i >> p.tile.slots_log2) * p.dilation_w * p.x_stride_w + (i & mask) * p.x_stride_c);
          },
          [&](int i) {
            return static_cast<unsigned>(w + (i >> p.tile.slots_log2) * p.dilation_w) <
                       static_cast<unsigned>(patch.end) &&
                   (i & mask) < channels;
          });
    }
  }

  // Whether input goes to its place in shared memory by itself; else through registers. Copies are of 4 bytes at least.
  __device__ __forceinline__ bool copies() const { return kFloat || p.x_vectors; }

  // Starts the copies of a tile's input. float32 lies there as it is first, a unit in both of its halves' places.
  __device__ __forceinline__ void start_copies(const Patch& patch, int stage) const {
#pragma unroll 1
    for (int index = threadIdx.x; index < p.tile.x_units(); index += kLoadThreads) {
      const uint32_t target = input(stage) + index * 16;
      with_unit(index, patch, [&](auto source, auto exists) {
        if (p.x_vectors) {
#pragma unroll
          for (int i = 0; i < kHalves; ++i) {
            copy_async(target + i * p.tile.x_half, source(0) + i * 4, exists(0));
          }
        } else if constexpr (kFloat) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            copy_async_1(target + i / 4 * p.tile.x_half + i % 4 * 4, source(i), exists(i));
          }
        }
      });
    }
  }

  // Goes round the stages.
  struct Turn {
    int stage;
    uint32_t parity;
  };
  __device__ __forceinline__ void advance(Turn& turn, int by) const {
    turn.stage += by;
    if (turn.stage >= p.tile.stages) {
      turn.stage -= p.tile.stages;
      turn.parity ^= 1;
    }
  }

  // The copies of the next tile are under way while this one is worked on.
  __device__ __forceinline__ void load() const {
    Turn turn{0, 0};
    Turn next{0, 0};
    const auto start = [&](uint32_t index) {
      if (index < p.tiles) {
        barrier_wait(empty(next.stage), next.parity ^ 1);
        if (copies()) {
          start_copies(patch(locate(index)), next.stage);
        }
        advance(next, 1);
      }
      copy_async_commit();
    };
    start(blockIdx.x);
    if constexpr (kFloat) {
      meet(kWeightsAreThere, kHopperThreads);
    }
    uint32_t side = 0;
    for (uint32_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      start(index + gridDim.x);
      copy_async_wait_all_but<1>();
      if constexpr (kFloat) {
        side ^= 1;
        split_units(turn.stage, side);
      } else {
        const uint32_t most = copies() ? most_of_units(turn.stage) : read_units(patch(locate(index)), turn.stage);
        const uint32_t of_warp = __reduce_max_sync(0xffffffffu, max(most & 0xffff, most >> 16));
        if (lane() == 0) {
          reinterpret_cast<unsigned char*>(&header().stages[turn.stage])[threadIdx.x / 32] = of_warp >= kInfinity;
        }
      }
      fence_async();
      __syncwarp();
      if (lane() == 0) {
        barrier_arrive(full(turn.stage));
      }
      advance(turn, 1);
    }
  }

  // float32: from values as they are to halves, in place. A thread has the units that it has copied.
  __device__ __forceinline__ void split_units(int stage, uint32_t side) const {
    const uint32_t base = input(stage);
    Magnitudes all, groups;  // groups: of the largest in each pixel's eight, or four, channels
    for (int index = threadIdx.x; index < p.tile.x_units(); index += kLoadThreads) {
      const uint4 a = load_shared_4(base + index * 16);
      const uint4 b = load_shared_4(base + p.tile.x_half + index * 16);
      const uint32_t v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      measure(v, all, groups);
    }
    all.most = __reduce_max_sync(0xffffffffu, all.most);
    all.least = __reduce_min_sync(0xffffffffu, all.least);
    groups.least = __reduce_min_sync(0xffffffffu, groups.least);
    if (lane() == 0) {
      header().warps[side][threadIdx.x / 32] = make_uint4(all.most, all.least, groups.least, 0);
    }
    meet(kLoadersMeet, kLoadThreads);
    const uint4 other = header().warps[side][lane() % (kLoadThreads / 32)];
    all.most = __reduce_max_sync(0xffffffffu, other.x);
    all.least = __reduce_min_sync(0xffffffffu, other.y);
    groups.least = __reduce_min_sync(0xffffffffu, other.z);
    groups.most = all.most;
    // The affine's scale takes both inverses in, and is to stay clear of float32's limits.
    const bool in_range = all.has_scale() && header().least_unscale + all.inverse_exponent() > 1 &&
                          header().most_unscale + all.inverse_exponent() < 250;
    const bool splits = in_range && (all.span() <= kMaxSpan ||
                                     (p.tile.slots_log2 >= 2 && groups.span() + header().w_span <= kMaxSpan));
    if (threadIdx.x == 0) {
      header().stages[stage] = make_uint2(header().all_exact != 0 || !splits, __float_as_uint(all.inverse()));
    }
    const float scale = all.scale();
    for (int index = threadIdx.x; index < p.tile.x_units(); index += kLoadThreads) {
      const uint32_t target = base + index * 16;
      const uint4 a = load_shared_4(target);
      const uint4 b = load_shared_4(target + p.tile.x_half);
      const uint32_t v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      uint32_t high[4], low[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        split(__uint_as_float(v[2 * k]), __uint_as_float(v[2 * k + 1]), scale, high[k], low[k]);
      }
      store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
      store_shared(target + p.tile.x_half, make_uint4(low[0], low[1], low[2], low[3]));
    }
  }

  // float16 and bfloat16: the largest magnitudes of this thread's units, as a pair of bits.
  __device__ __forceinline__ uint32_t most_of_units(int stage) const {
    uint32_t most = 0;
    for (int index = threadIdx.x; index < p.tile.x_units(); index += kLoadThreads) {
      most = most_of(most, load_shared_4(input(stage) + index * 16));
    }
    return most;
  }
  static __device__ __forceinline__ uint32_t most_of(uint32_t most, const uint4& v) {
    const uint32_t a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
    const uint32_t b = __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu);
    return __vmaxu2(most, __vmaxu2(a, b));
  }

  // The same while they are read, value by value.
  __device__ __forceinline__ uint32_t read_units(const Patch& patch, int stage) const {
    uint32_t most = 0;
#pragma unroll 1
    for (int first = threadIdx.x; first < p.tile.x_units(); first += kKept * kLoadThreads) {
      uint4 units[kKept];
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int index = first + i * kLoadThreads;
        if (index < p.tile.x_units()) {
          with_unit(index, patch, [&](auto source, auto exists) {
            uint32_t v[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
              v[k] = load_or_zero(source(k), exists(k));
            }
            units[i] = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
          });
        }
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int index = first + i * kLoadThreads;
        if (index < p.tile.x_units()) {
          store_shared(input(stage) + index * 16, units[i]);
          most = most_of(most, units[i]);
        }
      }
    }
    return most;
  }
  template <typename Source>
  static __device__ __forceinline__ uint32_t load_or_zero(const Source* source, bool exists) {
    uint32_t v = 0;
    if constexpr (!kFloat) {
      asm volatile(
          "{\n.reg .pred p;\n.reg .u16 h;\nsetp.ne.b32 p, %2, 0;\nmov.u16 h, 0;\n@p ld.global.nc.u16 h, [%1];\n"
          "cvt.u32.u16 %0, h;\n}"
          : "=r"(v)
          : "l"(source), "r"(static_cast<int>(exists)));
    }
    return v;
  }

  __device__ __forceinline__ void measure(const uint32_t (&v)[8], Magnitudes& all, Magnitudes& groups) const {
    uint32_t most[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = v[i] & 0x7fffffffu;
      most[i / 4] = max(most[i / 4], bits);
      all.least = min(all.least, bits - 1);
    }
    const uint32_t both = max(most[0], most[1]);
    all.most = max(all.most, both);
    const bool eight = p.tile.slots_log2 == 3;
    groups.least = min(groups.least, (eight ? both : most[0]) - 1);
    groups.least = min(groups.least, (eight ? both : most[1]) - 1);
  }

  // ---- the warpgroups that multiply and write ----

  __device__ __forceinline__ void compute(int taker) const {
    Turn turn{taker, 0};
    Gathered gathered;
    for (uint32_t index = blockIdx.x + taker * gridDim.x; index < p.tiles; index += kHopperTakers * gridDim.x) {
      const int stage = turn.stage;
      barrier_wait(full(stage), turn.parity);
      advance(turn, kHopperTakers);
      const uint2 info = header().stages[stage];
      const bool exact = kFloat ? info.x != 0 : (info.x | info.y) != 0;
      const float inverse = kFloat && !exact ? __uint_as_float(info.y) : 1.0f;
      const uint2 targets = kOutput == HopperOutput::planes ? stage_targets(locate(index), taker) : make_uint2(0, 0);
#pragma unroll 1
      for (int chunk = 0; chunk < p.tile.chunks; ++chunk) {
        Sums sums;
        multiply(sums, input(stage) + chunk * (kHopperChunk * 16));
        if (chunk == p.tile.chunks - 1) {
          __syncwarp();
          if (lane() == 0) {
            barrier_arrive(empty(stage));
          }
        }
        if (exact) {
          multiply_exactly(sums, locate(index), chunk * kHopperChunk);
        }
        apply_affine(sums, exact, inverse);
        if constexpr (kMoments) {
          gather(gathered, sums, locate(index), chunk * kHopperChunk);
          continue;
        }
        if (p.residual != nullptr) {
          add_residual(sums, locate(index), chunk * kHopperChunk);
        }
        // float16 and bfloat16: where they are rounded, ReLU costs nothing.
        const bool relu = !kFloat && p.activation == Activation::relu;
        if (!relu) {
          dispatch_activation(p.activation, [&](auto a) { apply_activation<decltype(a)::value>(sums); });
        }
        if constexpr (!kLast) {
          if (p.bulk && chunk == 0) {
            copy_bulk_wait_read();  // of this warp's last tile
            __syncwarp();
          }
        }
        const auto write = [&](auto relu_) {
          constexpr bool kRelu = relu_();
          if constexpr (kLast) {
            if (p.y_vectors) {
              write_pixels<true, kRelu>(sums, locate(index), chunk * kHopperChunk);
            } else {
              write_pixels<false, kRelu>(sums, locate(index), chunk * kHopperChunk);
            }
          } else if (p.stage_pairs) {
            stage_planes<true, kRelu>(sums, targets, chunk * kHopperChunk);
          } else {
            stage_planes<false, kRelu>(sums, targets, chunk * kHopperChunk);
          }
        };
        if (relu) {
          write(std::bool_constant<!kFloat>{});
        } else {
          write(std::false_type{});
        }
      }
      if constexpr (kOutput == HopperOutput::planes) {
        write_planes(locate(index), taker);
      }
    }
    if constexpr (kMoments) {
      write_moments(gathered, taker);
    } else if constexpr (!kLast) {
      if (p.bulk) {
        copy_bulk_wait();
      }
    }
  }

  // x: the chunk's first unit.
  __device__ __forceinline__ void multiply(Sums& sums, uint32_t x) const {
    const uint32_t w_start = operand_start(weights(), kHopperChannels * 16);
    const uint32_t w_step = 2 * kHopperChannels * 16 >> 4;
    const uint32_t x_start = x >> 4;
    const auto add = [&](Sums& to, uint32_t w, uint32_t units, auto more) {
      if constexpr (kLast) {
        product_m64n64k16<Half, 0, more()>(to, operand(units), operand(w));
        product_m64n64k16<Half, 32, more()>(to, operand(units + 64), operand(w));
      } else {
        product_m64n128k16<Half, more()>(to, operand(w), operand(units));
      }
    };
    if constexpr (kFloat) {
      Sums low;
      const auto add_step = [&](int step, auto more) {
        const uint32_t units = x_start + p.steps[step];
        const uint32_t w = w_start + step * w_step;
        add(low, w + (p.tile.w_half() >> 4), units, more);
        add(sums, w, units, more);
        add(low, w, units + (p.tile.x_half >> 4), std::true_type{});
      };
      product_fence();
      add_step(0, std::false_type{});
#pragma unroll 1
      for (int step = 1; step < p.tile.k_steps; ++step) {
        add_step(step, std::true_type{});
      }
      product_commit();
      product_wait<0>();
#pragma unroll
      for (int e = 0; e < 64; ++e) {
        sums[e] = fmaf(low[e], 1 / kLowScale, sums[e]);
      }
    } else {
      product_fence();
      add(sums, w_start, x_start + p.steps[0], std::false_type{});
#pragma unroll 1
      for (int step = 1; step < p.tile.k_steps; ++step) {
        add(sums, w_start + step * w_step, x_start + p.steps[step], std::true_type{});
      }
      product_commit();
      product_wait<0>();
    }
  }
  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int e = 0; e < 64; ++e) {
      sums[e] = 0;
    }
  }

  // In FMAs, from global memory: for values that do not split, and for Inf and NaN.
  __device__ __forceinline__ void multiply_exactly(Sums& sums, const Tile& tile, int first_position) const {
    const T* const image = p.x + static_cast<int64_t>(tile.image) * (p.C * p.H * p.W);
    constexpr int kBatch = kOwnPositions < 8 ? kOwnPositions : 8;
#pragma unroll
    for (int e = 0; e < 64; ++e) {
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

  template <Activation A>
  static __device__ __forceinline__ void apply_activation(Sums& sums) {
    // Divisions are long: one copy of them for some of the sums, through which the others go by turns.
    constexpr int kTurn = A == Activation::silu || A == Activation::hardswish ? 8 : 64;
#pragma unroll 1
    for (int first = 0; first < 64; first += kTurn) {
#pragma unroll
      for (int e = 0; e < kTurn; ++e) {
        sums[e] = activate<A>(sums[e]);
      }
      rotate<kTurn>(sums);
    }
  }
  // What comes behind the first so many comes to the front, and these to the end.
  template <int kFirst>
  static __device__ __forceinline__ void rotate(Sums& sums) {
    if constexpr (kFirst < 64) {
      float first[kFirst];
#pragma unroll
      for (int e = 0; e < kFirst; ++e) {
        first[e] = sums[e];
      }
#pragma unroll
      for (int e = 0; e < 64 - kFirst; ++e) {
        sums[e] = sums[e + kFirst];
      }
#pragma unroll
      for (int e = 0; e < kFirst; ++e) {
        sums[64 - kFirst + e] = first[e];
      }
    }
  }

  // ---- moments ----

  // Of a thread's own channels: of the distances from a pivot, its first value, in float32. They are about as large as the
  // deviation, however large the mean is.
  struct Gathered {
    float count = 0;
    float pivot[2] = {0, 0};
    float mean[2] = {0, 0};
    float m2[2] = {0, 0};
  };

  __device__ __forceinline__ void gather(Gathered& all, const Sums& sums, const Tile& tile, int first_position) const {
    const uint32_t table = places() + (first_position + own_position()) * 2;
    const uint32_t last_row = rows(tile) << 10;
    const uint32_t last_col = cols(tile);
    uint32_t inside = 0;
#pragma unroll
    for (int j = 0; j < kOwnPositions; j += 2) {
      const uint32_t pair = load_shared_1(table + j * 8);
      const uint32_t a = pair & 0xffff, b = pair >> 16;
      inside |= (a != kNowhere && a < last_row && (a & 1023) < last_col ? 1u : 0u) << j;
      inside |= (b != kNowhere && b < last_row && (b & 1023) < last_col ? 2u : 0u) << j;
    }
    const auto count = static_cast<float>(__popc(inside));
    if (count == 0) {
      return;
    }
    const float share = 1 / (all.count + count);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (all.count == 0) {
#pragma unroll
        for (int j = kOwnPositions - 1; j >= 0; --j) {
          all.pivot[i] = inside >> j & 1 ? sums[j / 2 * 4 + i * 2 + j % 2] : all.pivot[i];
        }
      }
      float sum = 0, squares = 0;
#pragma unroll
      for (int j = 0; j < kOwnPositions; ++j) {
        const float distance = inside >> j & 1 ? sums[j / 2 * 4 + i * 2 + j % 2] - all.pivot[i] : 0.0f;
        sum += distance;
        squares = fmaf(distance, distance, squares);
      }
      const float mean = sum / count;
      const float delta = mean - all.mean[i];
      all.m2[i] += fmaxf(squares - sum * mean, 0.0f * squares) + delta * delta * (all.count * count * share);
      all.mean[i] += delta * (count * share);
    }
    all.count += count;
  }

  // By the first of the four threads that share the channels.
  __device__ __forceinline__ void write_moments(const Gathered& own, int taker) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Moments m{own.count, static_cast<double>(own.pivot[i]) + own.mean[i], own.m2[i]};
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        const Moments theirs{__shfl_xor_sync(0xffffffffu, m.count, other), __shfl_xor_sync(0xffffffffu, m.mean, other),
                             __shfl_xor_sync(0xffffffffu, m.m2, other)};
        m = merge(m, theirs);
      }
      const int k = first_channel + own_channel(i);
      if (t() == 0 && k < p.K) {
        p.moments[static_cast<int64_t>(blockIdx.x * kHopperTakers + taker) * p.K + k] = m;
      }
    }
  }

  // What was scaled is unscaled on the way: that is a power of two, and can go into the affine's scale.
  __device__ __forceinline__ void apply_affine(Sums& sums, bool exact, float inverse) const {
    if (p.center != nullptr) {
#pragma unroll
      for (int i = 0; i < kOwnChannels; ++i) {
        const int channel = own_channel(i);
        const float factor = kFloat && !exact ? header().unscales[channel] * inverse : 1.0f;
        const Affine<float> affine{0, header().scales[channel], header().shifts[channel]};
#pragma unroll
        for (int j = 0; j < kOwnPositions; ++j) {
          at(sums, i, j) = epilogue<Activation::none>(fmaf(at(sums, i, j), factor, -header().centers[channel]), affine);
        }
      }
      return;
    }
    const float* const source = kFloat && !exact ? header().unscales : header().scales;
#pragma unroll
    for (int i = 0; i < kOwnChannels; ++i) {
      const int channel = own_channel(i);
      const Affine<float> affine{0, kFloat ? source[channel] * inverse : source[channel], header().shifts[channel]};
#pragma unroll
      for (int j = 0; j < kOwnPositions; ++j) {
        at(sums, i, j) = epilogue<Activation::none>(at(sums, i, j), affine);
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

  // 16 bytes of a pixel's channels at a time; threads of the same t write 64 bytes side by side.
  template <bool kVectors, bool kRelu>
  __device__ __forceinline__ void write_pixels(const Sums& sums, const Tile& tile, int first_position) const {
    unsigned char* const start = reinterpret_cast<unsigned char*>(p.y + y_offset(tile) + t() * kVec);
    const int channels = p.K - first_channel - t() * kVec;
    const uint32_t last_row = rows(tile) << 16;
    const uint32_t last_col = cols(tile);
    const uint32_t table = places() + (first_position + own_position()) * 8;
#pragma unroll
    for (int j = 0; j < kOwnPositions; ++j) {
      const uint2 place = load_shared_2(table + position_step(j) * 8);
      const bool inside = place.y < last_row && (place.y & 0xffff) < last_col;
      T* const target = reinterpret_cast<T*>(start + place.x);
#pragma unroll
      for (int i = 0; i < kOwnChannels; i += kVec) {
        const int first = i / kVec * (4 * kVec);
        const auto value = [&](int v) { return sums[j / 2 * 32 + (i + v) / 2 * 4 + j % 2 * 2 + v % 2]; };
        if constexpr (kVectors) {
          uint32_t words[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            if constexpr (kFloat) {
              words[v] = __float_as_uint(value(v));
            } else if constexpr (kRelu) {
              words[v] = pack_pair_relu(T(), value(2 * v), value(2 * v + 1));
            } else {
              words[v] = pack_pair(T(), value(2 * v), value(2 * v + 1));
            }
          }
          store_words_if(inside && first < channels, target + first, words);
        } else {
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            if (inside && first + v < channels) {
              target[first + v] = from_acc<T>(kRelu ? at_least(value(v), 0.0f) : value(v));
            }
          }
        }
      }
    }
  }
  static __device__ __forceinline__ void store_words_if(bool condition, void* address, const uint32_t (&w)[4]) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(address),
        "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(static_cast<int>(condition))
        : "memory");
  }

  // The bytes by which a channel's run is shifted in its stage.
  __device__ __forceinline__ uint32_t lead(int64_t offset) const {
    return whole_rows() ? static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.y + offset)) % kHopperRunAlign : 0;
  }

  // Where a thread's own channels begin in their stage.
  __device__ __forceinline__ uint2 stage_targets(const Tile& tile, int taker) const {
    uint32_t targets[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      targets[i] = output(taker) + own_channel(i) * p.tile.stage_pitch * kBytes +
                   lead(y_offset(tile) + own_channel(i) * (p.P * p.Q));
    }
    return make_uint2(targets[0], targets[1]);
  }

  template <bool kPairs, bool kRelu>
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
          const uint32_t both = kRelu ? pack_pair_relu(T(), a, b) : pack_pair(T(), a, b);
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

  // A warp writes the channels that it has staged: nobody else to wait for.
  __device__ __forceinline__ void write_planes(const Tile& tile, int taker) const {
    const int channels = min(16, p.K - first_channel - warp() * 16);
    const uint32_t pitch = p.tile.stage_pitch * kBytes;
    const uint32_t source = output(taker) + warp() * 16 * pitch;
    const int64_t offset = y_offset(tile) + warp() * 16 * (p.P * p.Q);
    if (p.bulk) {
      fence_async();
      __syncwarp();
      if (lane() < channels) {
        const int64_t own = offset + lane() * (p.P * p.Q);
        copy_bulk(p.y + own, source + lane() * pitch + lead(own), rows(tile) * p.Q * kBytes);
        copy_bulk_commit();
      }
      return;
    }
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
        const int skipped = static_cast<int>(lead(start));
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
  const int first_channel;
};

template <typename T, HopperOutput kOutput>
__global__ void __launch_bounds__(kHopperThreads, 1)
    conv_hopper_kernel(const __grid_constant__ HopperParams<T> params) {
#if defined(FCB_HOPPER)
  Hopper<T, kOutput>(params).run();
#endif
}

// The problem is in hopper_supports(), and the tile was made for it. moments: nullptr, or where they go instead of an output.
template <typename T>
cudaError_t launch_conv_hopper(const ConvProblem& c, const ConvOperands& operands, const HopperTile& tile,
                               const GpuTraits& gpu, Activation activation, Moments* moments, cudaStream_t stream) {
  HopperParams<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.center = static_cast<const float*>(operands.center);
  p.scale = static_cast<const float*>(operands.scale);
  p.shift = static_cast<const float*>(operands.shift);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.moments = moments;
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_c = operands.w_stride_c;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
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
  p.plain_units = c.C % 8 == 0;
  p.x_vectors = c.channels_last && c.C % 8 == 0 && aligned(p.x, kVecBytes);
  p.y_vectors = c.channels_last && c.K * kBytes % kVecBytes == 0 && aligned(p.y, kVecBytes);
  p.stage_pairs = tile.q % 2 == 0 && tile.x_cols % 2 == 0 && c.Q % 2 == 0 && aligned(p.y, 2 * kBytes);
  p.rows_aligned = c.Q * kBytes % kVecBytes == 0 && aligned(p.y, kVecBytes);
  p.bulk = !c.channels_last && whole && aligned(p.y, kVecBytes) && c.P * c.Q * kBytes % kVecBytes == 0 &&
           tile.p * c.Q * kBytes % kVecBytes == 0;
  p.activation = activation;
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
  const auto kernel = moments != nullptr ? conv_hopper_kernel<T, HopperOutput::moments>
                      : c.channels_last  ? conv_hopper_kernel<T, HopperOutput::pixels>
                                         : conv_hopper_kernel<T, HopperOutput::planes>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  tile.shared_memory);
  if (status != cudaSuccess) {
    return status;
  }
  const int64_t groups = ceil_div(c.K, kHopperChannels);
  const int64_t blocks = hopper_blocks(c, tile, gpu);
  kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)), kHopperThreads, tile.shared_memory,
           stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fused_conv_bn
