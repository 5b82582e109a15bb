// A tile's input: its rows are copied as they lie in memory, measured, and made into units, each a tile ahead of the other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ptx/cp_async.cuh"
#include "params.cuh"

namespace fused_conv_bn::wgrad_stem_sm80 {

template <typename C>
struct Window {
  using T = typename C::T;

  const Block<C>& block;
  const Params<T>& p = block.p;

  // Rows and columns of the image that a raw stage has.
  struct Raw {
    const T* image;
    int h0, w0;          // of the window, maybe outside of the image
    int above, rows;     // rows of the window outside of the image, and those inside behind them
    int first, columns;  // inside of the image; the first is even

    __device__ __forceinline__ bool has_row(int row) const { return row >= above && row < above + rows; }
  };
  __device__ __forceinline__ Raw raw_of(uint32_t number) const {
    const Tile tile = block.tiles().locate(block.tile_index(number));
    const InputWindow at = input_window(tile, p);
    const int above = min(max(0, -at.h0), p.tile.x_rows);
    const int first = min(max(0, at.w0), p.W) & ~1;
    return {
        input_image(p.x, tile, p),        at.h0, at.w0, above, max(0, min(p.tile.x_rows, p.H - at.h0) - above), first,
        min(p.W - first, p.tile.raw_cols)};
  }
  __device__ __forceinline__ bool exists(uint32_t number) const { return block.tile_index(number) < p.tiles; }

  // A raw stage: [channel][row][column], or [row][column][channel]. By all threads; they wait for their copies together.
  __device__ __forceinline__ void start_copies(uint32_t number) const {
    if (!exists(number)) {
      return;
    }
    const Raw raw = raw_of(number);
    const int lines = (C::kChannelsLast ? 1 : p.C) * p.tile.x_rows;
    const int length = raw.columns * (C::kChannelsLast ? p.C : 1);  // of a line, elements
    const int pitch = p.tile.raw_cols * (C::kChannelsLast ? p.C : 1);
    for (int line = block.warp(); line < lines; line += blockDim.x / 32) {
      const int channel = C::kChannelsLast ? 0 : p.raw_row.div(line);
      const int row = line - channel * p.tile.x_rows;
      if (!raw.has_row(row)) {
        continue;
      }
      const T* const source = raw.image + (C::kChannelsLast
                                               ? (int64_t{raw.h0 + row} * p.W + raw.first) * p.C
                                               : (int64_t{channel} * p.H + raw.h0 + row) * p.W + raw.first);
      const uint32_t target = block.raw(number) + (channel * p.tile.x_rows + row) * pitch * C::kBytes;
      if (p.x_words) {
        for (int e = block.lane() * (4 / C::kBytes); e < length; e += 32 * (4 / C::kBytes)) {
          if (C::kBytes == 4 || e + 1 < length) {
            copy_async_1(target + e * C::kBytes, source + e);
          } else {
            store_shared(target + e * 2, reinterpret_cast<const uint16_t*>(source)[e]);
          }
        }
      } else if constexpr (C::kBytes == 2) {
        for (int e = block.lane(); e < length; e += 32) {
          store_shared(target + e * 2, __ldg(reinterpret_cast<const uint16_t*>(source) + e));
        }
      }
    }
  }

  // float32: the largest magnitude of each channel.
  __device__ __forceinline__ void measure(uint32_t number) const {
    if (!C::kFloat32 || !exists(number)) {
      return;
    }
    const Raw raw = raw_of(number);
    uint32_t* const most = block.most(number);
    if constexpr (C::kChannelsLast) {
      // A lane keeps to a channel.
      const int lanes = p.C > 32 ? 32 : 32 / p.C * p.C;
      const int length = raw.columns * p.C, pitch = p.tile.raw_cols * p.C;
      if (block.lane() < lanes) {
        uint32_t own = 0;
        for (int row = block.warp(); row < raw.rows; row += blockDim.x / 32) {
          for (int e = block.lane(); e < length; e += lanes) {
            own = max(own, load_shared_1(block.raw(number) + ((row + raw.above) * pitch + e) * 4) & 0x7fffffffu);
          }
        }
        atomicMax(&most[block.lane() % p.C], own);
      }
    } else {
      for (int line = block.warp(); line < p.C * p.tile.x_rows; line += blockDim.x / 32) {
        const int channel = p.raw_row.div(line);
        const int row = line - channel * p.tile.x_rows;
        if (!raw.has_row(row)) {
          continue;
        }
        const uint32_t start = block.raw(number) + (channel * p.tile.x_rows + row) * p.tile.raw_cols * 4;
        uint32_t own = 0;
        for (int e = block.lane(); e < raw.columns; e += 32) {
          own = max(own, load_shared_1(start + e * 4) & 0x7fffffffu);
        }
        own = __reduce_max_sync(0xffffffffu, own);
        if (block.lane() == 0) {
          atomicMax(&most[channel], own);
        }
      }
    }
  }

  // Units of a window, which was measured: [block of channels][row][column by its phase], in each term.
  __device__ __forceinline__ void build(uint32_t number) const {
    if (!exists(number)) {
      return;
    }
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

 private:
  template <int kSlots>
  __device__ __forceinline__ void build_of(uint32_t number) const {
    const Raw raw = raw_of(number);
    const uint32_t source = block.raw(number), target = block.window(number);
    const int units = static_cast<int>(p.x_plane.divisor) * p.tile.blocks;
    const int raw_pitch = p.tile.raw_cols;
    float scales[kSlots];
    int scaled_block = -1;
#pragma unroll 1
    for (int i = threadIdx.x; i < units; i += blockDim.x) {
      const int channel_block = p.x_plane.div(i);
      const int of_block = i - channel_block * p.x_plane.divisor;
      const int row = p.x_pitch.div(of_block);
      const int place = of_block - row * p.x_pitch.divisor;
      const int phase = p.phase_cols.div(place);
      const int col = (place - phase * static_cast<int>(p.phase_cols.divisor)) * p.stride_w + phase;
      const bool row_exists = raw.has_row(row);
      uint32_t values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int channel = channel_block * 8 + e % kSlots;
        const int w = raw.w0 + col + e / kSlots * p.dilation_w;
        const int at = w - raw.first;
        const bool there = row_exists && channel < p.C && w >= 0 && w < p.W && at < raw.columns;
        const int element = C::kChannelsLast ? (row * raw_pitch + at) * p.C + channel
                                             : (channel * p.tile.x_rows + row) * raw_pitch + at;
        values[e] = load_shared_if_less<C::kBytes>(source + element * C::kBytes, there ? 0 : 1, 1);
      }
      if constexpr (C::kFloat32) {
        if (channel_block != scaled_block) {
          scaled_block = channel_block;
#pragma unroll
          for (int e = 0; e < kSlots; ++e) {
            scales[e] = scale(number, min(channel_block * 8 + e, p.C - 1));
          }
        }
        uint32_t high[4], low[4];
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          split_two(__uint_as_float(values[e]) * scales[e % kSlots],
                    __uint_as_float(values[e + 1]) * scales[(e + 1) % kSlots], high[e / 2], low[e / 2]);
        }
        store_shared(target + i * 16, make_uint4(high[0], high[1], high[2], high[3]));
        store_shared(target + p.tile.x_term + i * 16, make_uint4(low[0], low[1], low[2], low[3]));
      } else {
        store_shared(target + i * 16,
                     make_uint4(__byte_perm(values[0], values[1], 0x5410), __byte_perm(values[2], values[3], 0x5410),
                                __byte_perm(values[4], values[5], 0x5410), __byte_perm(values[6], values[7], 0x5410)));
      }
    }
  }

  __device__ __forceinline__ float scale(uint32_t number, int channel) const {
    return exp2_of(scale_exponent(load_shared_1(shared_address(block.most(number) + channel))));
  }
};

}  // namespace fused_conv_bn::wgrad_stem_sm80
