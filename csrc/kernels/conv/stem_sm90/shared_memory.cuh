// A block's shared memory: the header that it begins with, and where everything else is (tile.h has the layout).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

struct Header {
  // mbarriers. full: a stage has units; empty: consumers are done with it.
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t raw_full[kRawStages];
  uint64_t weights_ready;
  uint64_t order[kMaxConsumers];  // OrderBarrier
  // float32: whether the tile does not split, and the inverse of its scale. Else a byte for each producer warp: whether it has
  // met Inf or NaN.
  uint2 stages[kMaxStages];
  uint2 magnitudes[4][4 * kProducerWarpgroups];  // of producer warps
  uint32_t all_exact;                            // the weights, or their affines, do not split: nothing does
  uint32_t centered;                             // some of the centers are not 0
  int w_span;                                    // the widest span of an output channel's weights
  int least_unscale, most_unscale;               // exponents among scaled_unscales[]
  // Four channels are read at a time.
  alignas(16) float scales[kBlockChannels];
  float shifts[kBlockChannels];
  float centers[kBlockChannels];
  float w_scales[kBlockChannels];         // float32: of the weights
  float unscales[kBlockChannels];         // their inverses
  float scaled_unscales[kBlockChannels];  // times the affine's scale
};
static_assert(sizeof(Header) <= kHeaderBytes);

extern __shared__ __align__(128) unsigned char shared_bytes[];

// By 32-bit addresses (kernels/ptx/shared.cuh), but for the header.
template <typename C>
struct SharedMemory {
  const Params<typename C::T>& p;

  static __device__ __forceinline__ uint32_t base() { return shared_address(shared_bytes); }
  static __device__ __forceinline__ Header& header() { return *reinterpret_cast<Header*>(shared_bytes); }

  static __device__ __forceinline__ uint32_t full(int stage) { return shared_address(&header().full[stage]); }
  static __device__ __forceinline__ uint32_t empty(int stage) { return shared_address(&header().empty[stage]); }
  static __device__ __forceinline__ uint32_t raw_full(int stage) { return shared_address(&header().raw_full[stage]); }
  static __device__ __forceinline__ uint32_t weights_ready() { return shared_address(&header().weights_ready); }
  static __device__ __forceinline__ uint32_t order(int consumer) { return shared_address(&header().order[consumer]); }

  static __device__ __forceinline__ uint32_t weights() { return base() + kHeaderBytes; }
  __device__ __forceinline__ uint32_t input(int stage) const {
    return base() + p.tile.at_input + stage * C::kSplits * p.tile.x_split;
  }
  __device__ __forceinline__ uint32_t raw_rows(int stage) const {
    return base() + p.tile.at_raw + stage * p.tile.raw_stage;
  }
  __device__ __forceinline__ uint32_t unit_table() const { return base() + p.tile.at_unit_table; }
  __device__ __forceinline__ uint32_t output_offsets() const { return base() + p.tile.at_output_offsets; }
  // Contiguous: a consumer's output buffer, channel by channel.
  __device__ __forceinline__ uint32_t output(int consumer) const {
    return base() + p.tile.at_output + consumer * (kBlockChannels * C::kBytes) * p.tile.out_pitch;
  }
  // channels_last: that of a consumer's warp, pixel by pixel.
  __device__ __forceinline__ uint32_t output_pixels(int consumer, int warp) const {
    return base() + p.tile.at_output + (consumer * 4 + warp) * p.tile.out_pixels;
  }

  // By all threads of the block; they have to meet before one uses a barrier.
  __device__ __forceinline__ void set_up() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < p.tile.stages; ++stage) {
        barrier_init(full(stage), C::kGroupThreads / 32);
        barrier_init(empty(stage), p.tile.consumers_share ? 4 * C::kConsumers : 4);
      }
      for (int stage = 0; stage < kRawStages; ++stage) {
        barrier_init(raw_full(stage), p.raw_in_bulk ? 1 : C::kGroupThreads);
      }
      barrier_init(weights_ready(), 1);
      for (int consumer = 0; consumer < C::kConsumers; ++consumer) {
        barrier_init(order(consumer), 4);
      }
      header().all_exact = 0;
      header().centered = 0;
      header().w_span = 0;
      header().least_unscale = 1 << 20;
      header().most_unscale = -(1 << 20);
    }
  }
};

// What several threads may do at once.
__device__ __forceinline__ void set_flag(uint32_t& flag) { atomicOr(&flag, 1u); }

}  // namespace fused_conv_bn::stem_sm90
