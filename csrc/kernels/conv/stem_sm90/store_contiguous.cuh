// Results of a tile on their way to a contiguous output: through the consumer's output buffer, which has each channel's run as it
// lies in memory. A warp has 16 channels to itself, so that it waits for nobody else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "fragment.cuh"
#include "kernels/common/activation.h"
#include "kernels/common/vec.cuh"
#include "kernels/conv/epilogue/staging.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

template <typename C>
struct ContiguousStore {
  static constexpr int kBytes = C::kBytes;

  const Block<C>& block;
  const int consumer;
  const Params<typename C::T>& p = block.p;

  // The bytes by which a channel's run is shifted in its buffer, so that it starts there where it does in memory, modulo
  // kRunAlignment: bulk copies need that modulo 16, and are faster like this.
  __device__ __forceinline__ uint32_t lead(int channel, int64_t offset) const {
    const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.y + offset));
    return block.tiles().has_whole_rows(p) ? (address - channel * p.tile.out_pitch * kBytes) % kRunAlignment : 0;
  }

  // Where a thread's own channels begin in the buffer.
  __device__ __forceinline__ uint2 targets(const Tile& tile) const {
    const Fragment<C> fragment{p.tile};
    uint32_t targets[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      targets[i] = block.shared.output(consumer) + fragment.own_channel(i) * p.tile.out_pitch * kBytes +
                   lead(fragment.own_channel(i), block.y_offset(tile) + fragment.own_channel(i) * (p.P * p.Q));
    }
    return make_uint2(targets[0], targets[1]);
  }

  // A chunk into the buffer. own: targets() of the tile.
  template <bool kPairs, Activation kBound>
  __device__ __forceinline__ void put(const typename C::Accumulators& acc, uint2 own, int first_position) const {
    const uint32_t targets[2] = {own.x, own.y};
    const uint32_t table = block.shared.output_offsets() + (first_position + Fragment<C>::own_position()) * 2;
    // All of them first: a store would wait for its own.
    uint32_t offsets[C::kOwnPositions / 2];
#pragma unroll
    for (int j = 0; j < C::kOwnPositions / 2; ++j) {
      offsets[j] = kPairs ? load_shared_half(table + j * 16) : load_shared_1(table + j * 16);
    }
#pragma unroll
    for (int j = 0; j < C::kOwnPositions; j += 2) {
      const uint32_t offset = kPairs ? offsets[j / 2] : offsets[j / 2] & 0xffff;
      const uint32_t next = kPairs ? 0 : offsets[j / 2] >> 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        stage_two<typename C::T, kPairs, kBound>(targets[i] + offset, targets[i] + next, Fragment<C>::at(acc, i, j),
                                                 Fragment<C>::at(acc, i, j + 1));
      }
    }
  }

  // Where rows are whole, a channel's part of a tile is one run. Starts a bulk copy of the vectors of 16 bytes in each of the
  // warp's runs, and writes what lies before the first and behind the last one: planes may start anywhere. For problem 73 in
  // 16 bits every other plane starts in the middle of a vector: 162 us with vectors that threads wrote, 100 like this. A lane
  // has one end of a channel's run.
  __device__ __forceinline__ void start_copies(const Tile& tile) const {
    const int channel = warp() * 16 + lane() % 16;
    if (block.first_channel + channel >= p.K) {
      return;
    }
    const int64_t own = block.y_offset(tile) + channel * (p.P * p.Q);
    auto* const target = reinterpret_cast<unsigned char*>(p.y + own);
    const uint32_t source = block.shared.output(consumer) + channel * p.tile.out_pitch * kBytes + lead(channel, own);
    const int bytes = block.tiles().rows(tile, p) * p.Q * kBytes;
    if (p.runs_aligned) {
      if (lane() < 16) {
        copy_bulk(target, source, bytes, L2Policy::once(p.streams));
      }
      return;
    }
    const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(target));
    int head = -address & (kVecBytes - 1), tail = (address + bytes) & (kVecBytes - 1);
    if (head + tail > bytes) {  // in the middle of one vector
      head = bytes, tail = 0;
    }
    const int middle = bytes - head - tail;
    const bool first_end = lane() < 16;
    if (first_end && middle > 0) {
      copy_bulk(target + head, source + head, middle, L2Policy::once(p.streams));
    }
    const int begin = first_end ? 0 : bytes - tail;
    copy_end(target + begin, source + begin, first_end ? head : tail);
  }

  // Less than a vector, in the largest pieces that its address allows.
  static __device__ __forceinline__ void copy_end(unsigned char* target, uint32_t source, int bytes) {
    while (bytes > 0) {
      const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(target));
      int piece = kBytes;
      if (bytes >= 8 && address % 8 == 0) {
        *reinterpret_cast<uint2*>(target) = load_shared_2(source);
        piece = 8;
      } else if (kBytes == 4 || (bytes >= 4 && address % 4 == 0)) {
        *reinterpret_cast<uint32_t*>(target) = load_shared_1(source);
        piece = 4;
      } else {
        *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(load_shared_half(source));
      }
      target += piece, source += piece, bytes -= piece;
    }
  }

  // Writes the warp's channels of a tile whose rows are not whole, vector by vector of all rows.
  __device__ __forceinline__ void write_rows(const Tile& tile) const {
    const int channels = min(16, p.K - block.first_channel - warp() * 16);
    const uint32_t pitch = p.tile.out_pitch * kBytes;
    const uint32_t source = block.shared.output(consumer) + warp() * 16 * pitch;
    const int64_t offset = block.y_offset(tile) + warp() * 16 * (p.P * p.Q);
    __syncwarp();
    const int rows = channels * p.tile.p;
    const int length = block.tiles().cols(tile, p) * kBytes;
    const int vectors = static_cast<int>(p.row_vectors.divisor);
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int first = lane(); first < rows * vectors; first += 32 * kBatch) {
      uint4 words[kBatch];
      unsigned char* targets[kBatch];
      int left[kBatch];  // bytes of the row, from the vector on
      uint32_t sources[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int index = first + i * 32;
        const int row_of_all = p.row_vectors.div(index);
        const int channel = p.tile_p.div(row_of_all);
        const int row = row_of_all - channel * p.tile.p;
        const int at = (index - row_of_all * vectors) * kVecBytes;
        targets[i] = reinterpret_cast<unsigned char*>(p.y + offset + (channel * (p.P * p.Q) + row * p.Q)) + at;
        sources[i] = source + channel * pitch + row * p.tile.out_row * kBytes + at;
        left[i] = row_of_all < rows && row < block.tiles().rows(tile, p) ? length - at : 0;
        words[i] = left[i] > 0 ? load_shared_4(sources[i]) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (left[i] >= kVecBytes && p.rows_aligned) {
          store_words(targets[i], words[i]);
        } else {
          // One at a time: unrolled, the loop takes 4% more instructions of the kernel.
#pragma unroll 1
          for (int e = 0; e < min(left[i], kVecBytes); e += kBytes) {
            write_elements<kBytes>(targets[i] + e, sources[i] + e, 0, kBytes);
          }
        }
      }
    }
    __syncwarp();
  }
};

}  // namespace fused_conv_bn::stem_sm90
