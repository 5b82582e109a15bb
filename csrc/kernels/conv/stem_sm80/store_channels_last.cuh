// Results to a channels_last output.
#pragma once

#include <cstdint>

#include "block.cuh"

namespace fused_conv_bn::stem_sm80 {

template <typename K>
__device__ __forceinline__ void store_chunk(typename K::Element* target, const float (&values)[K::kChunk]) {
  using T = typename K::Element;
  if constexpr (K::kChunk == K::kVec) {
    Vec<T> vector;
    pack(values, vector);
    store_words(target, vector.words);
  } else {
    static_assert(K::kChunk * K::kBytes == 8);
    *reinterpret_cast<uint2*>(target) = {pack_pair(T(), values[0], values[1]), pack_pair(T(), values[2], values[3])};
  }
}

template <typename K, typename F>
__device__ __forceinline__ void write_pixels_by(const Block<K>& b, const typename K::Accumulator& acc, const Tile& tile,
                                                F&& write) {
  using T = typename K::Element;
  const auto& p = b.p;
  unsigned char* const start = reinterpret_cast<unsigned char*>(p.y + b.y_offset(tile) + b.g() * K::kChunk);
  const int channels = p.c.K - b.first_channel - b.g() * K::kChunk;
  const int rows_16 = b.tiles().rows(tile, p.c) << 16;
  const int cols = b.tiles().cols(tile, p.c);
#pragma unroll
  for (int j = 0; j < K::kOwnPixels; ++j) {
    const int2 output = b.header().output_offsets[b.own_pixel(j, b.t())];
    if (is_inside(output.y, rows_16, cols)) {
      T* const target = reinterpret_cast<T*>(start + static_cast<uint32_t>(output.x));
#pragma unroll
      for (int chunk = 0; chunk < K::kOwnChannels / K::kChunk; ++chunk) {
        float values[K::kChunk];
#pragma unroll
        for (int v = 0; v < K::kChunk; ++v) {
          const int i = chunk * K::kChunk + v;
          values[v] = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
        }
        const int first = chunk * 8 * K::kChunk;
        write(target + first, values, channels - first);
      }
    }
  }
}

// A chunk of a pixel's channels at a time; threads of the same t write 128 bytes side by side.
template <typename K>
__device__ __forceinline__ void write_pixels(const Block<K>& b, const typename K::Accumulator& acc, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  if (p.y_vectors) {
    write_pixels_by(b, acc, tile, [](T* target, const float (&values)[K::kChunk], int channels) {
      if (channels > 0) {
        store_chunk<K>(target, values);
      }
    });
  } else {
    write_pixels_by(b, acc, tile, [](T* target, const float (&values)[K::kChunk], int channels) {
#pragma unroll
      for (int v = 0; v < K::kChunk; ++v) {
        if (v < channels) {
          target[v] = from_acc<T>(values[v]);
        }
      }
    });
  }
}

}  // namespace fused_conv_bn::stem_sm80
