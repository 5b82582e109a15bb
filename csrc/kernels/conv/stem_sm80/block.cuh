// A block's threads, shared memory and tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/vec.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm80 {

struct Tile {
  int image, p0, q0;
};

// What shared memory begins with. The offsets of the quads follow.
template <int kChannels>
struct FewChannelsHeader {
  uint2 zeros;
  uint32_t all_exact;  // the weights, or their affines, do not split: nothing does
  uint32_t unused;
  float scales[kChannels];
  float shifts[kChannels];
  float unscales[kChannels];  // scale, and the inverse of the weights' scale
  float w_scales[kChannels];
  uint2 warps[kFewChannelsThreads / 32];
  // Per pixel of the tile: from the patch's start to its first input pixel.
  int operands[kFewChannelsPixels];
  // Per pixel of the tile. channels_last: its offset in the image, row and column. Else: its offset in the stage and, where
  // rows are not whole, its row's in the image, in bytes.
  int2 places[kFewChannelsPixels];
};

extern __shared__ __align__(128) unsigned char shared_memory[];

// A kernel at compile time. T: the tensors' type. kM_: output channels, in sixteens. kLast_: channels_last. kPaired_: a block is
// two groups of threads with a tile each, which multiply by turns. kBounds_: the activation is a bound.
template <typename T, int kM_, bool kLast_, bool kPaired_, bool kBounds_>
struct Kind {
  using Element = T;
  using Half = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr int kM = kM_;
  static constexpr bool kLast = kLast_, kPaired = kPaired_, kBounds = kBounds_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kPlanes = kFloat ? 2 : 1;
  static constexpr int kChannels = 16 * kM;
  static constexpr int kGroups = few_channels_groups(kPaired);
  static constexpr int kThreads = kFewChannelsThreads / kGroups;  // of a group
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPixels = kFewChannelsPixels / kWarps;  // of a warp
  static constexpr int kN = kPixels / 8;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  // Whether the next tile's input is read before this one is multiplied. The others have no registers left for it.
  static constexpr bool kAhead = kLast && !kFloat && kM == 4;
  using Product = float[kM][kN][4];  // in fragments of 16 channels by 8 pixels
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
  using Product = typename K::Product;

  const FewChannelsParams<T>& p;
  const int first_channel;
  static __device__ __forceinline__ int group() { return K::kPaired ? threadIdx.x / K::kThreads : 0; }
  // Within the group.
  static __device__ __forceinline__ int thread() { return K::kPaired ? threadIdx.x % K::kThreads : threadIdx.x; }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // The row and the column group that a thread has in a fragment.
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  // A group's threads meet.
  static __device__ __forceinline__ void sync() {
    if constexpr (K::kPaired) {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + group()), "n"(K::kThreads) : "memory");
    } else {
      __syncthreads();
    }
  }

  // kPaired: groups multiply by turns. Every warp has pixels, so that all give and wait.
  static __device__ __forceinline__ void wait_for_turn(bool is_first) {
    if (group() == 1 || !is_first) {
      asm volatile("bar.sync %0, %1;" ::"r"(3 + group()), "n"(kFewChannelsThreads) : "memory");
    }
  }
  // To the other group, if it has a tile that comes after this one.
  __device__ __forceinline__ void give_turn(uint32_t index) const {
    if ((group() == 0 ? index : index - 2 + K::kGroups * gridDim.x) + 1 < p.tiles) {
      asm volatile("bar.arrive %0, %1;" ::"r"(4 - group()), "n"(kFewChannelsThreads) : "memory");
    }
  }

  // Shared memory: a header, the table of quads' offsets in the patch (-1: none), the packed weights, the patch. The stage
  // takes the patch's place. kPaired: for each group a patch, and copies of the next one's input behind it.
  static __device__ __forceinline__ FewChannelsHeader<K::kChannels>& header() {
    return *reinterpret_cast<FewChannelsHeader<K::kChannels>*>(shared_memory);
  }
  static __device__ __forceinline__ uint32_t zeros() { return shared_address(shared_memory); }
  static __device__ __forceinline__ uint32_t offsets() { return zeros() + sizeof(FewChannelsHeader<K::kChannels>); }
  __device__ __forceinline__ uint32_t weights() const {
    return zeros() + few_channels_header(p.tile.k_steps, K::kChannels);
  }
  __device__ __forceinline__ uint32_t patch() const {
    return weights() + K::kPlanes * w_plane() + group() * p.tile.group_bytes;
  }
  __device__ __forceinline__ int w_plane() const { return p.tile.k_steps * K::kM * 512; }
  __device__ __forceinline__ uint32_t copies() const { return patch() + p.tile.copies; }

  // Where a thread's own channels and pixels are in the product, and which they are.
  static __device__ __forceinline__ float& at(Product& acc, int channel, int pixel) {
    return acc[channel / 2][pixel / 2][channel % 2 * 2 + pixel % 2];
  }
  static __device__ __forceinline__ int own_channel(int i, int g) {
    return K::kLast ? i / K::kChunk * (8 * K::kChunk) + g * K::kChunk + i % K::kChunk : i / 2 * 16 + g + i % 2 * 8;
  }
  static __device__ __forceinline__ int own_pixel(int j, int t) {
    return warp() * K::kPixels + 8 * (j / 2) + 2 * t + j % 2;
  }

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
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    const int64_t start = static_cast<int64_t>(tile.image) * p.K * p.P * p.Q;
    const int pixel = tile.p0 * p.Q + tile.q0;
    return K::kLast ? start + pixel * p.K + first_channel : start + first_channel * (p.P * p.Q) + pixel;
  }

  __device__ __forceinline__ const T* image(const Tile& tile) const {
    return p.x + static_cast<int64_t>(tile.image) * (p.C * p.H * p.W);
  }

  // Until what write_vectors() started has left the stage. Others know after a barrier.
  __device__ __forceinline__ void wait_for_stores() const {
    if constexpr (!K::kLast) {
      copy_bulk_wait_read();
    }
  }
};

// f(i, j, e) for every element of a Product.
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
