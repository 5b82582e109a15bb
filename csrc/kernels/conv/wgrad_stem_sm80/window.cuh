// The producers: a tile's input is copied as its rows lie in memory, measured, and made into units.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "params.cuh"

namespace fused_conv_bn::wgrad_stem_sm80 {

template <typename C>
struct Producer {
  using T = typename C::T;

  const Block<C>& block;
  const Params<T>& p = block.p;

  __device__ __forceinline__ void run() const {
    wait_for_previous();
    start_copies(0);
#pragma unroll 1
    for (uint32_t number = 0; block.exists(number); ++number) {
      if (C::kFloat32 && threadIdx.x < kMostChannels) {
        block.most(number)[threadIdx.x] = 0;
      }
      copy_async_wait_all_but<0>();
      block.sync_producers();
      if constexpr (C::kFloat32) {
        measure(number);
        block.sync_producers();
      }
      build(number);
      block.sync_producers();
      start_copies(number + 1);
      block.hand_over();
    }
  }

 private:
  __device__ __forceinline__ int threads() const { return 32 * p.tile.producers; }
  // From channel to channel of a pixel, and from pixel to pixel, in the rows as they lie in memory.
  __device__ __forceinline__ int channel_step() const {
    return C::kChannelsLast ? 1 : p.tile.x_rows * p.tile.raw_pitch;
  }
  __device__ __forceinline__ int pixel_step() const { return C::kChannelsLast ? p.C : 1; }

  // Where the window begins in a row, and how far behind a multiple of 16 bytes from the row's start: copies begin there.
  __device__ __forceinline__ int row_start(const InputWindow& at) const { return at.w0 * pixel_step(); }
  static __device__ __forceinline__ int misalignment(int start) { return start & (16 / C::kBytes - 1); }

  // [channel][row][column], or [row][column][channel], zeros outside of the image.
  __device__ __forceinline__ void start_copies(uint32_t number) const {
    if (block.exists(number)) {
      switch (p.input_copy_bytes) {
        case 16:
          start_copies_by<16>(number);
          break;
        case 8:
          start_copies_by<8>(number);
          break;
        case 4:
          start_copies_by<4>(number);
          break;
        default:
          start_copies_by<C::kBytes>(number);
      }
    }
    copy_async_commit();
  }
  template <int kCopy>
  __device__ __forceinline__ void start_copies_by(uint32_t number) const {
    constexpr int kElements = kCopy / C::kBytes;
    const Tile tile = block.tiles().locate(block.tile_index(number));
    const InputWindow at = input_window(tile, p);
    const int start = row_start(at), first = start - misalignment(start);
    const T* const image = input_image(p.x, tile, p);
    const int row_length = p.W * pixel_step();
    const int pieces = (C::kChannelsLast ? 1 : p.C) * p.tile.x_rows * p.raw_pieces.divisor;
#pragma unroll 4
    for (int i = threadIdx.x; i < pieces; i += threads()) {
      const int line = p.raw_pieces.div(i);
      const int piece = (i - line * static_cast<int>(p.raw_pieces.divisor)) * kElements;
      const int channel = C::kChannelsLast ? 0 : p.raw_rows.div(line);
      const int h = at.h0 + line - channel * p.tile.x_rows, element = first + piece;
      const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(p.H) &&
                          static_cast<unsigned>(element) < static_cast<unsigned>(row_length);
      copy_piece<kCopy>(block.raw() + (line * p.tile.raw_pitch + piece) * C::kBytes,
                        exists ? image + (channel * p.H + h) * row_length + element : p.x, exists);
    }
  }

  // float32: the largest magnitude of each channel.
  __device__ __forceinline__ void measure(uint32_t number) const {
    const int start = row_start(input_window(block.tiles().locate(block.tile_index(number)), p));
    const uint32_t from = block.raw() + misalignment(start) * 4;
    const auto most_of = [&](uint32_t line, int first, int length, int step) {
      uint32_t most = 0;
#pragma unroll 4
      for (int e = first; e < length; e += step) {
        most = max(most, load_shared_1(line + e * 4) & 0x7fffffffu);
      }
      return most;
    };
    uint32_t own = 0;
    if constexpr (C::kChannelsLast) {
      // A lane keeps to a channel.
      const int lanes = 32 / p.C * p.C;
      if (block.lane() < lanes) {
        for (int row = block.warp(); row < p.tile.x_rows; row += p.tile.producers) {
          own = max(own, most_of(from + row * p.tile.raw_pitch * 4, block.lane(), p.tile.raw_cols * p.C, lanes));
        }
        atomicMax(&block.most(number)[block.lane() % p.C], own);
      }
    } else {
      // A warp keeps to a channel as long as it can.
      const int lines = p.C * p.tile.x_rows, share = (lines + p.tile.producers - 1) / p.tile.producers;
      const int first = block.warp() * share, end = min(lines, first + share);
#pragma unroll 1
      for (int line = first; line < end; ++line) {
        own = max(own, most_of(from + line * p.tile.raw_pitch * 4, block.lane(), p.tile.raw_cols, 32));
        const int channel = p.raw_rows.div(line);
        if (line + 1 == end || line + 1 == (channel + 1) * p.tile.x_rows) {
          own = __reduce_max_sync(0xffffffffu, own);
          if (block.lane() == 0) {
            atomicMax(&block.most(number)[channel], own);
          }
          own = 0;
        }
      }
    }
  }

  // Units: [block of channels][row][column by its phase], in each term.
  __device__ __forceinline__ void build(uint32_t number) const {
    switch (p.tile.slots) {
      case 1:
        return build_of<1>(number);
      case 2:
        return build_of<2>(number);
      case 4:
        return build_of<4>(number);
      default:
        return build_of<8>(number);
    }
  }
  template <int kSlots>
  __device__ __forceinline__ void build_of(uint32_t number) const {
    const int start = row_start(input_window(block.tiles().locate(block.tile_index(number)), p));
    const uint32_t from = block.raw() + misalignment(start) * C::kBytes;
    const int tap_step = p.dilation_w * pixel_step() * C::kBytes, row_pitch = p.tile.raw_pitch * C::kBytes;
    // A tap's values lie side by side, at multiples of 16 bytes.
    const bool wide = C::kChannelsLast && kSlots * C::kBytes >= 16 && p.C % kSlots == 0;
#pragma unroll 1
    for (int channel_block = 0; channel_block < p.tile.blocks; ++channel_block) {
      const int channels = p.C - channel_block * 8;  // or more than 8
      float scales[kSlots];
      uint32_t of_slot[kSlots];  // from the first one, in bytes; those that do not exist have the last one's
#pragma unroll
      for (int e = 0; e < kSlots; ++e) {
        const int channel = channel_block * 8 + min(e, channels - 1);
        scales[e] = C::kFloat32 ? scale(number, channel) : 1;
        of_slot[e] = channel * channel_step() * C::kBytes;
      }
#pragma unroll 1
      for (int row = block.warp(); row < p.tile.x_rows; row += p.tile.producers) {
        const uint32_t target = block.window(number) + (channel_block * p.tile.x_rows + row) * p.tile.x_pitch * 16;
#pragma unroll 1
        for (int i = block.lane(); i < p.tile.x_pitch; i += 32) {
          const int phase = p.phase_cols.div(i);
          const int col = (i - phase * static_cast<int>(p.phase_cols.divisor)) * p.stride_w + phase;
          const uint32_t at = from + row * row_pitch + col * pixel_step() * C::kBytes;
          uint32_t values[8];
          if (wide) {
            load_wide<kSlots>(values, at + of_slot[0], tap_step);
          } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              values[e] = load_shared_if_less<C::kBytes>(at + of_slot[e % kSlots] + e / kSlots * tap_step, e % kSlots,
                                                         channels);
            }
            if constexpr (!C::kFloat32) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                values[e] = __byte_perm(values[2 * e], values[2 * e + 1], 0x5410);
              }
            }
          }
          store_unit<kSlots>(target + i * 16, values, scales);
        }
      }
    }
  }

  // float32: 8 values. 16 bits: 4 pairs.
  template <int kSlots>
  __device__ __forceinline__ void load_wide(uint32_t (&values)[8], uint32_t at, int tap_step) const {
#pragma unroll
    for (int i = 0; i < 2 && i * 16 < 8 * C::kBytes; ++i) {
      constexpr int kTap = kSlots * C::kBytes;
      const uint4 v = load_shared_4(at + (i * 16 / kTap) * tap_step + i * 16 % kTap);
      values[i * 4] = v.x, values[i * 4 + 1] = v.y, values[i * 4 + 2] = v.z, values[i * 4 + 3] = v.w;
    }
  }
  template <int kSlots>
  __device__ __forceinline__ void store_unit(uint32_t target, const uint32_t (&values)[8],
                                             const float (&scales)[kSlots]) const {
    if constexpr (C::kFloat32) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        split_two(__uint_as_float(values[e]) * scales[e % kSlots],
                  __uint_as_float(values[e + 1]) * scales[(e + 1) % kSlots], high[e / 2], low[e / 2]);
      }
      store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
      store_shared(target + p.tile.x_term, make_uint4(low[0], low[1], low[2], low[3]));
    } else {
      store_shared(target, make_uint4(values[0], values[1], values[2], values[3]));
    }
  }

  __device__ __forceinline__ float scale(uint32_t number, int channel) const {
    return exp2_of(scale_exponent(load_shared_1(shared_address(block.most(number) + channel))));
  }
};

}  // namespace fused_conv_bn::wgrad_stem_sm80
