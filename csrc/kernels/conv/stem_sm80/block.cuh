// A block as its threads see it: what it is compiled for, who does what, and where things lie in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/vec.cuh"
#include "kernels/conv/tile.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm80 {

// What shared memory begins with. The offsets of the quads follow.
template <int kChannels>
struct Header {
  uint2 zeros;
  uint32_t all_exact;  // the weights, or their affines, do not split: nothing does
  uint32_t unused;
  float scales[kChannels];
  float shifts[kChannels];
  float unscales[kChannels];  // scale, and the inverse of the weights' scale
  float w_scales[kChannels];
  uint2 warps[kBlockThreads / 32];
  // Per pixel of the tile: from the start of the input window to the pixel's first input.
  int window_offsets[kTilePixels];
  // Per pixel of the tile. channels_last: its offset in the image, row and column. Else: its offset in the staging
  // buffer and, where rows are not whole, its row's in the image, in bytes.
  int2 output_offsets[kTilePixels];
};

extern __shared__ __align__(128) unsigned char shared_memory[];

// A kernel at compile time. T: the tensors' type. kM_: output channels, in sixteens. kLast_: channels_last.
// kAlternating_: a block is two groups of threads with a tile each, which multiply alternately. kBounds_: the
// activation is a bound.
template <typename T, int kM_, bool kLast_, bool kAlternating_, bool kBounds_>
struct Kind {
  using Element = T;
  using Factor = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr int kM = kM_;
  static constexpr bool kLast = kLast_, kAlternating = kAlternating_, kBounds = kBounds_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kTerms = kFloat ? 2 : 1;
  static constexpr int kChannels = 16 * kM;
  static constexpr int kThreadGroups = thread_groups(kAlternating);
  static constexpr int kThreads = kBlockThreads / kThreadGroups;  // of a thread group
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPixels = kTilePixels / kWarps;  // of a warp
  static constexpr int kN = kPixels / 8;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  // Whether the next tile's input is read before this one is multiplied. The others have no registers left for it.
  static constexpr bool kAhead = kLast && !kFloat && kM == 4;
  using Accumulator = float[kM][kN][4];  // in fragments of 16 channels by 8 pixels
  // A thread's own part of it.
  static constexpr int kOwnChannels = 2 * kM;
  static constexpr int kOwnPixels = 2 * kN;
  // kLast: so many of its channels lie side by side.
  static constexpr int kChunk = kOwnChannels < kVec ? kOwnChannels : kVec;
};

// A block, as one of its threads sees it: its channels, its threads' roles, its shared memory and its tiles.
template <typename K>
struct Block {
  using T = typename K::Element;
  using Accumulator = typename K::Accumulator;

  const Params<T>& p;
  const int first_channel;

  static __device__ __forceinline__ int thread_group() { return K::kAlternating ? threadIdx.x / K::kThreads : 0; }
  // Within the thread group.
  static __device__ __forceinline__ int thread() { return K::kAlternating ? threadIdx.x % K::kThreads : threadIdx.x; }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // PTX's names for the row, and the two columns, that a thread has in a fragment.
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  // The threads of a group meet.
  static __device__ __forceinline__ void sync() {
    if constexpr (K::kAlternating) {
      named_barrier_sync(1 + thread_group(), K::kThreads);
    } else {
      __syncthreads();
    }
  }

  // kAlternating: one thread group multiplies at a time. Every warp has pixels, so that all of them wait and let others
  // go on.
  static __device__ __forceinline__ void wait_to_multiply(bool is_first) {
    if (thread_group() == 1 || !is_first) {
      named_barrier_sync(3 + thread_group(), kBlockThreads);
    }
  }
  // The other thread group, if it has a tile that comes after this one.
  __device__ __forceinline__ void let_other_multiply(uint32_t index) const {
    if ((thread_group() == 0 ? index : index - 2 + K::kThreadGroups * gridDim.x) + 1 < p.tiles) {
      named_barrier_arrive(4 - thread_group(), kBlockThreads);
    }
  }

  // Shared memory: a header, the table of quads' offsets in the input window (-1: none), the packed weights, the
  // window. Later the staging buffer lies where the window did. kAlternating: each thread group has a window, and
  // copies of the next one's rows behind it.
  static __device__ __forceinline__ Header<K::kChannels>& header() {
    return *reinterpret_cast<Header<K::kChannels>*>(shared_memory);
  }
  static __device__ __forceinline__ uint32_t zeros() { return shared_address(shared_memory); }
  static __device__ __forceinline__ uint32_t quad_offsets() { return zeros() + sizeof(Header<K::kChannels>); }
  __device__ __forceinline__ uint32_t weights() const { return zeros() + header_bytes(p.tile.k_steps, K::kChannels); }
  __device__ __forceinline__ uint32_t window() const {
    return weights() + K::kTerms * w_term() + thread_group() * p.tile.group_bytes;
  }
  __device__ __forceinline__ int w_term() const { return p.tile.k_steps * K::kM * 512; }
  __device__ __forceinline__ uint32_t copies() const { return window() + p.tile.copies; }

  // Where a thread's own channels and pixels are in the product, and which they are.
  static __device__ __forceinline__ float& at(Accumulator& acc, int channel, int pixel) {
    return acc[channel / 2][pixel / 2][channel % 2 * 2 + pixel % 2];
  }
  static __device__ __forceinline__ auto own(Accumulator& acc) {
    return [&acc](int channel, int pixel) -> float& { return at(acc, channel, pixel); };
  }
  static __device__ __forceinline__ int own_channel(int i, int g) {
    return K::kLast ? i / K::kChunk * (8 * K::kChunk) + g * K::kChunk + i % K::kChunk : i / 2 * 16 + g + i % 2 * 8;
  }
  static __device__ __forceinline__ int own_pixel(int j, int t) {
    return warp() * K::kPixels + 8 * (j / 2) + 2 * t + j % 2;
  }

  __device__ __forceinline__ TileGrid tiles() const { return {p.tile.p, p.tile.q, p.tiles_q, p.tiles_p}; }
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    return output_offset<K::kLast>(tile, p.c, first_channel);
  }

  // Until what write_vectors() started has left the staging buffer. Others know after a barrier.
  __device__ __forceinline__ void wait_for_stores() const {
    if constexpr (!K::kLast) {
      copy_bulk_wait_read();
    }
  }
};

// f(i, j, e) for every element of the accumulators.
template <typename K, typename F>
__device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
  for (int i = 0; i < K::kM; ++i) {
#pragma unroll
    for (int j = 0; j < K::kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(i, j, e);
      }
    }
  }
}

}  // namespace fused_conv_bn::stem_sm80
