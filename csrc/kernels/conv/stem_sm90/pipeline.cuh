// How producers and consumers keep step: the state of a ring of stages, and the order of the consumers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "kernels/ptx/mbarrier.cuh"

namespace fused_conv_bn::stem_sm90 {

// Goes round the stages, or the raw stages.
struct PipelineState {
  int stage;
  uint32_t parity;

  __device__ __forceinline__ void advance(int by, int stages) {
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

// Lets consumers do something one after another, round by round: each waits for the consumer before, and the first one for the
// last in the round before. The first ones may have one round more than the others, which are left out then: nobody gets
// ahead by more than a round. Each consumer has an mbarrier, whose phases are its rounds.
template <typename C>
struct OrderBarrier {
  const Block<C>& block;
  const int consumer;
  const int tiles;  // of the block
  int rounds = 0;   // of this consumer, that are over

  __device__ __forceinline__ int rounds_of(int other) const {
    const TileLayout& tile = block.p.tile;
    return tile.consumers_share ? (tiles * tile.chunks + C::kConsumers - 1 - other) / C::kConsumers
                                : (tiles + C::kConsumers - 1 - other) / C::kConsumers * tile.chunks;
  }

  __device__ __forceinline__ void wait() const {
    int other = consumer - 1, round = rounds;
    if (consumer == 0) {
      round = rounds - 1;
      other = C::kConsumers - 1;
      while (other > 0 && round >= rounds_of(other)) {
        --other;
      }
    }
    if (round >= 0 && other != consumer) {
      barrier_wait(block.shared.order(other), round & 1);
    }
  }

  __device__ __forceinline__ void arrive() {
    const bool next_waits = consumer + 1 < C::kConsumers && rounds < rounds_of(consumer + 1);
    if (next_waits || (consumer > 0 && rounds + 1 < rounds_of(0))) {
      __syncwarp();
      if (lane() == 0) {
        barrier_arrive(block.shared.order(consumer));
      }
    }
    ++rounds;
  }
};

}  // namespace fused_conv_bn::stem_sm90
