// A block's view of the problem: which threads are producers and consumers, its output channels, and its output tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/conv/tile.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "params.cuh"
#include "shared_memory.cuh"

namespace fused_conv_bn::stem_sm90 {

// Named barriers.
constexpr int kAllProducersBarrier = 1;
constexpr int kConsumersBarrier = 2;
constexpr int kProducerGroupBarrier = 3;  // of the first group; others follow

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x % 128 / 32; }  // of its warpgroup

template <typename C>
struct Block {
  using T = typename C::T;

  const Params<T>& p;
  const int first_channel, warp_of_block;
  const SharedMemory<C> shared;

  __device__ __forceinline__ explicit Block(const Params<T>& params)
      : p(params),
        first_channel(blockIdx.y * C::kChannels),
        // The compiler shall see that a warp agrees: it keeps addresses in uniform registers then.
        warp_of_block(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        shared{params} {}

  // ---- threads ----

  static __device__ __forceinline__ uint32_t consumer_thread() { return threadIdx.x - C::kProducerThreads; }
  static __device__ __forceinline__ void sync_consumers() {
    named_barrier_sync(kConsumersBarrier, C::kConsumerThreads);
  }
  static __device__ __forceinline__ void sync_producers() {
    named_barrier_sync(kAllProducersBarrier, C::kProducerThreads);
  }
  __device__ __forceinline__ int group() const {  // of producers
    return C::kProducerGroups == 1 ? 0 : warp_of_block / (C::kGroupThreads / 32);
  }
  static __device__ __forceinline__ int group_thread() {
    return C::kProducerGroups == 1 ? threadIdx.x : threadIdx.x % C::kGroupThreads;
  }
  __device__ __forceinline__ int group_warp() const {
    return C::kProducerGroups == 1 ? warp_of_block : warp_of_block % (C::kGroupThreads / 32);
  }
  __device__ __forceinline__ void sync_group() const {
    named_barrier_sync(kProducerGroupBarrier + group(), C::kGroupThreads);
  }

  // Where the affines are late, the kernel before makes these and nothing else; otherwise it may make anything.
  __device__ __forceinline__ void wait_unless_late() const {
    if (!p.late_affine) {
      wait_for_previous();
    }
  }

  // ---- output tiles ----

  __device__ __forceinline__ TileGridRef tiles() const { return {p.tile.p, p.tile.q, p.tiles_q, p.tiles_p}; }
  __device__ __forceinline__ bool is_whole(const Tile& tile) const {
    return tiles().rows(tile, p) == p.tile.p && tiles().cols(tile, p) == p.tile.q;
  }
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    return output_offset<C::kChannelsLast>(tile, p, first_channel);
  }

  __device__ __forceinline__ int terms() const { return p.C * p.R * p.S; }  // of an output channel
};

}  // namespace fused_conv_bn::stem_sm90
