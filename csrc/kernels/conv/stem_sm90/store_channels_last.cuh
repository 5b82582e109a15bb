// Results of a chunk on their way to a channels_last output. In 16 bits threads write 16 bytes of a pixel's channels; float32 goes
// through a warp's output buffer, and from there by bulk copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/common/activation.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

__device__ __forceinline__ void store_words_if(bool condition, void* address, const uint32_t (&w)[4]) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(address),
               "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(static_cast<int>(condition))
               : "memory");
}

// A tile of the output: its first pixel, from the block's first channel on, 2^16 times its rows, and its columns.
struct Pixels {
  unsigned char* start;
  int rows_16, cols;
};

template <typename C>
struct ChannelsLastStore {
  static constexpr int kVec = C::kVec;

  const Block<C>& block;
  const int consumer;
  const Params<typename C::T>& p = block.p;

  __device__ __forceinline__ Pixels pixels(const Tile& tile) const {
    return {reinterpret_cast<unsigned char*>(p.y + block.y_offset(tile)), block.tiles().rows(tile, p) << 16,
            block.tiles().cols(tile, p)};
  }

  // 16 bytes of a pixel's channels at a time; threads of the same column group write 64 bytes side by side.
  template <bool kVectors, Activation kBound>
  __device__ __forceinline__ void write(const typename C::Accumulators& acc, const Pixels& pixels,
                                        int first_position) const {
    using T = typename C::T;
    unsigned char* const start = pixels.start + fragment_col() * kVecBytes;
    const int channels = p.K - block.first_channel - fragment_col() * kVec;
    const uint32_t table = block.shared.output_offsets() + (first_position + Fragment<C>::own_position()) * 8;
#pragma unroll
    for (int j = 0; j < C::kOwnPositions; ++j) {
      const uint2 offset = load_shared_2(table + Fragment<C>::position_step(j) * 8);
      const bool inside = is_inside(static_cast<int>(offset.y), pixels.rows_16, pixels.cols);
      T* const target = reinterpret_cast<T*>(start + offset.x);
#pragma unroll
      for (int i = 0; i < C::kOwnChannels; i += kVec) {
        const int first = i / kVec * (4 * kVec);
        const auto value = [&](int v) { return Fragment<C>::at(acc, i + v, j); };
        if constexpr (kVectors) {
          uint32_t words[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            if constexpr (C::kFloat32) {
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

  // float32, into the warp's output buffer: two times 16 pixels. Pixels are a multiple of 128 bytes where it matters, so that
  // neighbours would share banks: odd ones begin with another of their vectors.
  __device__ __forceinline__ void put(const typename C::Accumulators& acc) const {
    const uint32_t pitch = p.K * C::kBytes;
    const uint32_t start = block.shared.output_pixels(consumer, warp()) + fragment_row() * pitch +
                           fragment_col() * kVecBytes;
    const bool odd = fragment_row() % 2 != 0;
#pragma unroll
    for (int j = 0; j < C::kOwnPositions; ++j) {
      const uint32_t target = start + (j / 2 * 16 + j % 2 * 8) * pitch;
#pragma unroll
      for (int i = 0; i < C::kOwnChannels; i += 2 * kVec) {
        const auto value = [&](int v) { return __float_as_uint(Fragment<C>::at(acc, i + v, j)); };
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int vector = i / kVec + (odd ? 1 - step : step);
          const int a = step * kVec, b = (1 - step) * kVec;
          const uint4 words = make_uint4(odd ? value(b) : value(a), odd ? value(b + 1) : value(a + 1),
                                         odd ? value(b + 2) : value(a + 2), odd ? value(b + 3) : value(a + 3));
          if (vector * (4 * kVec) + fragment_col() * kVec < p.K) {
            store_shared(target + vector * 64, words);
          }
        }
      }
    }
  }

  // Starts bulk copies from there. A lane looks after one of the 32 pixels. A run of neighbours in the output begins behind a
  // pixel that is not there, in another row, or among the other 16.
  __device__ __forceinline__ void start_copies(const Pixels& pixels, int first_position) const {
    const uint32_t pitch = p.K * C::kBytes;
    const uint2 offset = load_shared_2(block.shared.output_offsets() +
                                       (first_position + lane() / 16 * 64 + warp() * 16 + lane() % 16) * 8);
    const bool inside = is_inside(static_cast<int>(offset.y), pixels.rows_16, pixels.cols);
    const uint32_t there = __ballot_sync(0xffffffffu, inside);
    const bool follows = lane() % 16 > 0 && (there >> (lane() - 1) & 1) != 0 && (offset.y & 0xffff) > 0;
    const uint32_t begins = __ballot_sync(0xffffffffu, inside && !follows);
    if (begins >> lane() & 1) {
      const uint32_t behind = (~there | begins) & (0xfffffffeu << lane());
      const int length = (behind == 0 ? 32 : __ffs(static_cast<int>(behind)) - 1) - lane();
      copy_bulk(pixels.start + offset.x, block.shared.output_pixels(consumer, warp()) + lane() * pitch, length * pitch,
                L2Policy::once(p.streams));
    }
  }
};

}  // namespace fused_conv_bn::stem_sm90
