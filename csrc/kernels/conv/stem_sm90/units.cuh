// Units of a tile's input, made of its raw rows by a producer group. float32 is measured first, then scaled and split in two;
// in 16 bits the kernel looks for Inf and NaN on the way.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "input_window.cuh"
#include "kernels/common/split_float.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

// float32: how a tile is split, or that it is not.
struct Scaling {
  uint32_t exact;
  float scale, inverse;
};

__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// The largest magnitudes of 16-bit values, as a pair of bits.
__device__ __forceinline__ uint32_t most_of(uint32_t most, const uint4& v) {
  const uint32_t a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
  const uint32_t b = __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu);
  return __vmaxu2(most, __vmaxu2(a, b));
}

// 16 bits: whether this warp has met Inf or NaN, for the consumers of the stage.
template <typename C>
__device__ __forceinline__ void report_infinity(const Block<C>& block, int stage, uint32_t most) {
  constexpr uint32_t kInfinity = std::is_same_v<typename C::T, bfloat16> ? 0x7f80 : 0x7c00;
  const uint32_t of_warp = __reduce_max_sync(0xffffffffu, max(most & 0xffff, most >> 16));
  if (lane() == 0) {
    reinterpret_cast<unsigned char*>(&block.shared.header().stages[stage])[threadIdx.x / 32] = of_warp >= kInfinity;
  }
}

// kSlots: channels of a tap in a unit.
template <typename C, int kSlots>
struct UnitBuilder {
  static constexpr int kAtOnce = C::kUnitsInRegisters;
  // Whether a unit is read from the raw rows as words: a pixel's channels lie side by side.
  static constexpr bool kPixelWords = C::kChannelsLast && !C::kFloat32 && kSlots == 4;
  using Unit = uint32_t[C::kFloat32 ? 8 : 4];  // values as bits, in 16 bits two to a word
  using Values = Unit[kAtOnce];

  const Block<C>& block;
  const Params<typename C::T>& p = block.p;
  const UnitTable<C> table{block};

  // 0 for what is outside of the image, the window or the channels, and behind the last unit.
  // raw: the address of the raw rows.
  __device__ __forceinline__ void read(int index, const TileInput& window, uint32_t raw, Unit& v) const {
    const UnitSource from = table.source(index, window);
    const uint32_t address = raw + from.offset + (window.w0 * p.x_col_bytes - window.first);
    uint32_t values[8];
#pragma unroll
    for (int tap = 0; tap < 8 / kSlots; ++tap) {
      const bool inside = exists(from.w + tap * p.dilation_w, window.end);
      const int channels = inside ? from.channels : 0;
      const uint32_t start = address + tap * p.dilation_w * p.x_col_bytes;
      if constexpr (C::kFloat32 && kSlots == 8) {
        if (p.raw_vectors) {
          const uint4 a = channels > 0 ? load_shared_4(start) : make_uint4(0, 0, 0, 0);
          const uint4 b = channels > 0 ? load_shared_4(start + 16) : make_uint4(0, 0, 0, 0);
          values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
          values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
          continue;
        }
      }
      if constexpr (kPixelWords) {
        // Three or four channels lie in two words, every other three from the first word's second value on.
        const uint32_t first = load_shared_if_less<4>(start & ~3u, 0, channels);
        const uint32_t second = load_shared_if_less<4>((start & ~3u) + 4, 0, channels);
        const uint32_t shift = start & 2;
        v[tap * 2] = __byte_perm(first, second, 0x3210 + shift * 0x1111);
        v[tap * 2 + 1] = __byte_perm(second, 0, p.C == 4 ? 0x3210 : 0x4410 + shift * 0x11);
      } else {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          values[tap * kSlots + slot] = load_shared_if_less<C::kBytes>(start + slot * p.unit_channel, slot, channels);
        }
      }
    }
    if constexpr (C::kFloat32) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = values[i];
      }
    } else if constexpr (!kPixelWords) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = __byte_perm(values[2 * i], values[2 * i + 1], 0x5410);
      }
    }
  }

  // f(index, values) for this thread's units, some at once. loaded: they are in `v` already.
  template <typename F>
  __device__ __forceinline__ void for_each(const TileInput& window, uint32_t raw, Values& v, bool loaded, F&& f) const {
#pragma unroll 1
    for (int first = block.group_thread(); first < p.x_units; first += kAtOnce * C::kGroupThreads) {
      if (!loaded) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          read(first + i * C::kGroupThreads, window, raw, v[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        f(first + i * C::kGroupThreads, v[i]);
      }
    }
  }

  // Of all values of a producer group. Between two calls with the same `slot` there is one with another.
  __device__ __forceinline__ Magnitudes of_group(const Magnitudes& own, int slot) const {
    constexpr int kWarps = C::kGroupThreads / 32;
    auto& warps = block.shared.header().magnitudes[slot];
    return merge_warps<kWarps>(own, warps[threadIdx.x / 32], warps + block.group() * kWarps,
                               [&] { block.sync_group(); });
  }

  // What decides is the largest magnitude of each pixel's four or eight channels, and the weights; only if that is not
  // enough, or there are fewer channels, every single value. side: 0 and 1 by turns.
  __device__ __forceinline__ Scaling measure(const TileInput& window, uint32_t raw, Values& v, bool kept,
                                             int side) const {
    constexpr int kPixelValues = kSlots < 4 ? 1 : kSlots;
    Header& header = block.shared.header();
    Magnitudes largest;
    for_each(window, raw, v, false, [&](int, const Unit& unit) {
#pragma unroll
      for (int first = 0; first < 8; first += kPixelValues) {
        float most = fabsf(__uint_as_float(unit[first]));
#pragma unroll
        for (int i = 1; i < kPixelValues; ++i) {
          most = larger_or_nan(most, fabsf(__uint_as_float(unit[first + i])));
        }
        largest.add(most);
      }
    });
    largest = of_group(largest, side);
    barrier_wait(block.shared.weights_ready(), 0);  // and how they split
    // The affine's scale takes both inverses in, and is to stay clear of float32's limits.
    bool splits = largest.has_scale() && header.least_unscale + largest.inverse_exponent() > 1 &&
                  header.most_unscale + largest.inverse_exponent() < 250;
    if (splits && largest.span() + (kPixelValues > 1 ? header.w_span : 0) > kMaxSpan) {
      Magnitudes all = largest;
      if constexpr (kPixelValues > 1) {
        for_each(window, raw, v, kept, [&](int, const Unit& unit) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            all.add(__uint_as_float(unit[i]));
          }
        });
        all = of_group(all, 2 + side);
      }
      splits = all.span() <= kMaxSpan;
    }
    return {header.all_exact != 0 || !splits ? 1u : 0u, largest.scale(), largest.inverse()};
  }

  // From raw rows to a stage. float32: scaled and split. Else: the largest magnitudes, as most_of() has them.
  __device__ __forceinline__ uint32_t build(const TileInput& window, uint32_t raw, Values& values, bool loaded,
                                            int stage, float scale) const {
    uint32_t most = 0;
    for_each(window, raw, values, loaded, [&](int index, const Unit& v) {
      const uint32_t target = block.shared.input(stage) + index * 16;
      if constexpr (C::kFloat32) {
        uint32_t high[4], low[4];
        split(v, scale, high, low);
        if (index < p.x_units) {
          store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
          store_shared(target + p.tile.x_split, make_uint4(low[0], low[1], low[2], low[3]));
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
};

}  // namespace fused_conv_bn::stem_sm90
