// Results to a contiguous output, by way of shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block.cuh"
#include "kernels/conv/epilogue/staging.cuh"

namespace fused_conv_bn::stem_sm80 {

// Into the staging buffer, as [channel][pixel]: each run of the output starts there where it starts in memory, modulo
// 16 bytes. kPairs: two neighbours with one store. kWhole: rows are whole, so that one run has them all. kAligned: at a
// multiple of 16 bytes.
template <bool kPairs, bool kWhole, bool kAligned = false, typename K>
__device__ __forceinline__ void stage_planes(const Block<K>& b, const typename K::Accumulator& acc, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  int2 offsets[K::kN];
#pragma unroll
  for (int j = 0; j < K::kN; ++j) {
    offsets[j] = b.header().output_offsets[b.own_pixel(2 * j, b.t())];
  }
  // 8 planes on.
  const uint32_t plane = 8 * p.c.P * p.c.Q * K::kBytes;
  uint32_t lead = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.y)) +
                  static_cast<uint32_t>(b.y_offset(tile) + b.g() * (p.c.P * p.c.Q)) * K::kBytes;
  uint32_t target = b.window() + b.g() * p.tile.staging_pitch * K::kBytes;
#pragma unroll
  for (int i = 0; i < 2 * K::kM; ++i) {
#pragma unroll
    for (int j = 0; j < K::kN; ++j) {
      const uint32_t address = target + offsets[j].x +
                               (kAligned ? 0 : (lead + (kWhole ? 0 : offsets[j].y)) % kVecBytes);
      const float first = acc[i / 2][j][i % 2 * 2];
      const float second = acc[i / 2][j][i % 2 * 2 + 1];
      stage_two<T, kPairs>(address, address + K::kBytes, first, second);
    }
    lead += plane;
    target += 8 * p.tile.staging_pitch * K::kBytes;
  }
}

// From the staging buffer: `length` bytes in a row, by as many lanes as 2^run_shift.
template <typename K>
__device__ __forceinline__ void write_run(const Block<K>& b, unsigned char* target, uint32_t source, int length) {
  const auto& p = b.p;
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(target)) & (kVecBytes - 1);
  const int end = lead + length;
  target -= lead;
  for (int at = (b.thread() & ((1 << p.run_shift) - 1)) * kVecBytes; at < end; at += kVecBytes << p.run_shift) {
    if (at >= lead && at + kVecBytes <= end) {
      store_words(target + at, load_shared_4(source + at));
    } else {
      write_elements<K::kBytes>(target, source, max(at, lead), min(at + kVecBytes, end));
    }
  }
}

// Below 9.0 a block that has a tile at a time lacks the registers for it.
template <typename K>
__device__ __forceinline__ bool writes_vectors(const Block<K>& b) {
  const auto& p = b.p;
#if __CUDA_ARCH__ >= 900
  return p.run_vectors;
#else
  return K::kAlternating && p.run_vectors;
#endif
}

// All rows of the tile together, channel by channel, where runs are whole vectors.
template <typename K>
__device__ __forceinline__ void write_vectors(const Block<K>& b, const Tile& tile) {
  const auto& p = b.p;
  const int length = b.tiles().rows(tile, p.c) * p.c.Q * K::kBytes;
  const int channels = min(K::kChannels, p.c.K - b.first_channel);
  const int64_t plane = static_cast<int64_t>(p.c.P * p.c.Q) * K::kBytes;
  const int pitch = p.tile.staging_pitch * K::kBytes;
  unsigned char* target = reinterpret_cast<unsigned char*>(p.y + b.y_offset(tile));
  uint32_t source = b.window();
#if __CUDA_ARCH__ >= 900
  // Each by one thread; all warps have as many of them.
  const int channel = b.lane() * K::kWarps + b.warp();
  if (b.lane() < K::kChannels / K::kWarps && channel < channels) {
    copy_bulk(target + channel * plane, source + channel * pitch, length);
    copy_bulk_commit();
  }
#else
  constexpr int kVectors = kTilePixels * K::kBytes / kVecBytes / 32;  // a lane's part of a run, at most
  const int first = b.lane() * kVecBytes;
  target += b.warp() * plane + first;
  source += b.warp() * pitch + first;
#pragma unroll 4
  for (int channel = b.warp(); channel < channels; channel += K::kWarps) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = 32 * v * kVecBytes;
      if (first + at < length) {
        store_words(target + at, load_shared_4(source + at));
      }
    }
    target += K::kWarps * plane;
    source += K::kWarps * pitch;
  }
#endif
}

// All rows of the tile together, channel by channel.
template <typename K>
__device__ __forceinline__ void write_whole_planes(const Block<K>& b, const Tile& tile) {
  const auto& p = b.p;
  const int first = b.thread() >> p.run_shift;
  const int parallel = K::kThreads >> p.run_shift;
  const int64_t plane = static_cast<int64_t>(p.c.P * p.c.Q) * K::kBytes;
  const int pitch = p.tile.staging_pitch * K::kBytes;
  const int length = b.tiles().rows(tile, p.c) * p.c.Q * K::kBytes;
  const int channels = min(K::kChannels, p.c.K - b.first_channel);
  unsigned char* target = reinterpret_cast<unsigned char*>(p.y + b.y_offset(tile)) + first * plane;
  uint32_t source = b.window() + first * pitch;
  for (int channel = first; channel < channels; channel += parallel) {
    write_run(b, target, source, length);
    target += parallel * plane;
    source += parallel * pitch;
  }
}

// Row by row.
template <typename K>
__device__ __forceinline__ void write_rows(const Block<K>& b, const Tile& tile) {
  const auto& p = b.p;
  const int channels = min(K::kChannels, p.c.K - b.first_channel);
  const int last_row = b.tiles().rows(tile, p.c);
  const int length = b.tiles().cols(tile, p.c) * K::kBytes;
  unsigned char* const start = reinterpret_cast<unsigned char*>(p.y + b.y_offset(tile));
  for (int run = b.thread() >> p.run_shift; run < channels * b.tiles().p; run += K::kThreads >> p.run_shift) {
    const int channel = p.tile_p.div(run);
    const int row = run - channel * b.tiles().p;
    if (row < last_row) {
      const uint32_t offset = channel * (p.c.P * p.c.Q) + row * p.c.Q;
      write_run(b, start + static_cast<uint64_t>(offset) * K::kBytes,
                b.window() + (channel * p.tile.staging_pitch + row * p.tile.staging_row) * K::kBytes, length);
    }
  }
}

}  // namespace fused_conv_bn::stem_sm80
