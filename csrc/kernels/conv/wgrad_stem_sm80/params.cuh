// What the kernels are told, and where things are in a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/activation.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/conv/tile.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "plan.h"

namespace fused_conv_bn::wgrad_stem_sm80 {

// Extents are the problem's.
template <typename T>
struct Params : Extents {
  const T* x;
  const T* dy;
  const T* result;   // of the activation; nullptr: there is none, or no derivative to take
  double* partials;  // [blocks][roles][sums of a role]
  Layout tile;
  uint32_t tiles;
  FastDiv tiles_q, tiles_p, tile_q;
  FastDiv phase_cols, raw_rows;  // raw_rows: of a channel's window
  FastDiv raw_pieces;            // of a row, by input_copy_bytes
  int copy_bytes;                // of dy, at once: 16, 8, 4 or an element
  int input_copy_bytes;          // of x
  Activation activation;         // relu, sigmoid or tanh
};

// T: of the tensors. kRows: what the patch is multiplied with.
template <typename T_, bool kChannelsLast_, Rows kRows_>
struct Config {
  using T = T_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr Rows kRows = kRows_;
  static constexpr bool kFloat32 = std::is_same_v<T, float>;
  using Factor = std::conditional_t<kFloat32, float16, T>;
  static constexpr int kTerms = kFloat32 ? 2 : 1;
  static constexpr int kBytes = sizeof(T);
  static constexpr int kChunkPitch = chunk_pitch(kBytes, kChannelsLast);
  static constexpr int kChunkTensor = (kChannelsLast ? kChunk : kWarpRows) * kChunkPitch;
};

// Named barriers; 0 is __syncthreads()'s.
enum BarrierId { kAllBarrier = 1, kProducersBarrier = 2, kConsumersBarrier = 3 };

// Shared memory behind the header: windows of units, a window's rows as they lie in memory, and each consumer's stages of dy.
template <typename C>
struct Block {
  const Params<typename C::T>& p;

  __device__ __forceinline__ Header& header() const {
    extern __shared__ __align__(128) unsigned char wgrad_shared[];
    return *reinterpret_cast<Header*>(wgrad_shared);
  }
  __device__ __forceinline__ uint32_t shared() const { return shared_address(&header()); }
  __device__ __forceinline__ uint32_t window(uint32_t number) const {
    return shared() + kHeaderBytes + number % kWindows * C::kTerms * p.tile.x_term;
  }
  __device__ __forceinline__ uint32_t raw() const {
    return shared() + kHeaderBytes + kWindows * C::kTerms * p.tile.x_term;
  }
  // Of a consumer.
  __device__ __forceinline__ uint32_t chunk_stage(int stage) const {
    return raw() + p.tile.raw_bytes + (consumer() * kChunkStages + stage) * p.tile.chunk_bytes;
  }
  __device__ __forceinline__ uint32_t* most(uint32_t number) const { return header().most[number % kWindows]; }

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ int consumer() const { return warp() - p.tile.producers; }

  // Once a tile: producers have made its window, and consumers have read the one before, which is the next one's place.
  __device__ __forceinline__ void hand_over() const {
    named_barrier_sync(kAllBarrier, 32 * (p.tile.producers + p.tile.consumers()));
  }
  __device__ __forceinline__ void sync_producers() const {
    named_barrier_sync(kProducersBarrier, 32 * p.tile.producers);
  }
  __device__ __forceinline__ void sync_consumers() const {
    named_barrier_sync(kConsumersBarrier, 32 * p.tile.consumers());
  }

  __device__ __forceinline__ TileGridOf<const FastDiv&> tiles() const {
    return {p.tile.p, p.tile.q, p.tiles_q, p.tiles_p};
  }
  // The block's tiles have numbers.
  __device__ __forceinline__ uint32_t tile_index(uint32_t number) const { return blockIdx.x + number * gridDim.x; }
  __device__ __forceinline__ bool exists(uint32_t number) const { return tile_index(number) < p.tiles; }
};

// Copies so many bytes, or writes zeros; the source's address is one that exists.
template <int kCopy, typename T>
__device__ __forceinline__ void copy_piece(uint32_t target, const T* source, bool exists) {
  if constexpr (kCopy == 16) {
    copy_async(target, source, exists);
  } else if constexpr (kCopy >= 4) {
    copy_async_small<kCopy>(target, source, exists);
  } else {
    store_shared(target, exists ? __ldg(reinterpret_cast<const uint16_t*>(source)) : uint16_t{0});
  }
}

// Puts the largest magnitude of a channel or a row into [2^14, 2^15); numbers that far from 1 stay in float32's range.
__device__ __forceinline__ int scale_exponent(uint32_t most) {
  const int exponent = static_cast<int>(most >> 23);
  return exponent == 0 ? 0 : exponent == 255 ? 0 : min(127 + 14 - exponent, 100);
}
__device__ __forceinline__ float exp2_of(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// Two scaled values as a high and a low term. Both have the same scale, so that their products go into the same sums: what the
// low term loses below 2^-24 is 2^-39 of the largest value.
__device__ __forceinline__ void split_two(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_pair(float16(), a, b);
  const float2 rounded = unpack_pair(float16(), high);
  low = pack_pair(float16(), a - rounded.x, b - rounded.y);
}

}  // namespace fused_conv_bn::wgrad_stem_sm80
