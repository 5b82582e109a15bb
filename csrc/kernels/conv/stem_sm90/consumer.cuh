// Consumers: warpgroups that multiply a tile's units with the weights, apply the epilogue and write, chunk by chunk.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "epilogue.cuh"
#include "exact.cuh"
#include "kernels/common/activation.h"
#include "kernels/conv/epilogue/residual.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "moments.cuh"
#include "output_offsets.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "products.cuh"
#include "store_channels_last.cuh"
#include "store_contiguous.cuh"

namespace fused_conv_bn::stem_sm90 {

template <typename C>
struct Consumer {
  using Accumulators = typename C::Accumulators;

  // A tile of units, and where its results go.
  struct InputTile {
    uint32_t index;
    bool exact;
    float inverse;  // float32: of its scale
    bool whole;     // moments: it has full size
    uint2 targets;  // contiguous
    Pixels pixels;  // channels_last
  };

  const Block<C>& block;
  const int consumer;
  const Params<typename C::T>& p = block.p;
  const SharedMemory<C>& shared = block.shared;
  const ChannelAffines<C> affines{block};
  const ContiguousStore<C> contiguous{block, consumer};
  const ChannelsLastStore<C> channels_last{block, consumer};
  ChannelMoments<C> moments{block};
  OrderBarrier<C> order{block, consumer, static_cast<int>((p.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x)};
  uint32_t buffered = kNoTile;  // contiguous: a tile in the output buffer that has to be copied

  __device__ __forceinline__ void run() {
    const bool share = p.tile.consumers_share;
    const int chunk_step = share ? C::kConsumers : 1, tile_step = share ? 1 : C::kConsumers;
    int first_chunk = share ? consumer : 0;
    PipelineState state{share ? 0 : consumer, 0};
    for (uint32_t index = blockIdx.x + state.stage * gridDim.x; index < p.tiles; index += tile_step * gridDim.x) {
      const int stage = state.stage;
      barrier_wait(shared.full(stage), state.parity);
      state.advance(tile_step, p.tile.stages);
      const InputTile tile = input_tile(index, stage);
#pragma unroll 1
      for (int chunk = first_chunk; chunk < p.tile.chunks; chunk += chunk_step) {
        Accumulators acc;
        multiply_in_order(acc, stage, chunk);
        if (chunk + chunk_step >= p.tile.chunks) {
          __syncwarp();
          if (lane() == 0) {
            barrier_arrive(shared.empty(stage));
          }
        }
        if (tile.exact) [[unlikely]] {
          multiply_exactly(block, acc, block.tiles().locate(index), chunk * kChunk);
        }
        if constexpr (C::kMoments) {
          gather_moments(acc, tile, chunk);
        } else {
          finish(acc, tile, chunk);
        }
      }
      if constexpr (C::kContiguous) {
        store_tile(index);
      }
      if (share) {
        // Chunks are dealt round all tiles.
        first_chunk = (first_chunk + C::kConsumers - p.tile.chunks % C::kConsumers) % C::kConsumers;
      }
    }
    copy_buffered();
    if constexpr (C::kMoments) {
      moments.write(consumer);
    } else if (p.y_in_bulk) {
      copy_bulk_wait();
    }
  }

 private:
  __device__ __forceinline__ InputTile input_tile(uint32_t index, int stage) const {
    const uint2 info = shared.header().stages[stage];
    InputTile tile{};
    tile.index = index;
    tile.exact = C::kFloat32 ? info.x != 0 : (info.x | info.y) != 0;
    tile.inverse = C::kFloat32 && !tile.exact ? __uint_as_float(info.y) : 1.0f;
    if constexpr (C::kMoments) {
      tile.whole = block.is_whole(block.tiles().locate(index));
    } else if constexpr (C::kContiguous) {
      tile.targets = contiguous.targets(block.tiles().locate(index));
    } else {
      tile.pixels = channels_last.pixels(block.tiles().locate(index));
    }
    return tile;
  }

  // The copies of the tile before start while the tensor cores are busy.
  __device__ __forceinline__ void multiply_in_order(Accumulators& acc, int stage, int chunk) {
    const bool ordered = C::kOrdersProducts && !p.orders_activation;
    if (ordered) {
      order.wait();
    }
    multiply(block, acc, shared.input(stage) + chunk * (kChunk * 16), [&] {
      if (ordered) {
        order.arrive();
      }
      copy_buffered();
    });
  }

  __device__ __forceinline__ void gather_moments(const Accumulators& acc, const InputTile& tile, int chunk) {
    const uint32_t inside = tile.whole ? load_shared_1(shared.output_offsets() + (chunk * 4 + fragment_col()) * 4)
                                       : inside_mask(block, chunk * kChunk + fragment_col() * 2,
                                                     block.tiles().locate(tile.index));
    moments.add(acc, inside, tile.exact, tile.inverse);
  }

  // From products to results, and on their way out.
  __device__ __forceinline__ void finish(Accumulators& acc, const InputTile& tile, int chunk) {
    affines.apply(acc, tile.exact, tile.inverse);
    const bool residual_last = p.residual != nullptr && p.residual_last;
    finish_sums(
        p.residual != nullptr, residual_last,
        [&] { add_residual(block, acc, block.tiles().locate(tile.index), chunk * kChunk); },
        [&] { apply_activation(acc, residual_last); });
    if (p.y_in_bulk && (C::kChannelsLast || chunk == 0)) {
      copy_bulk_wait_read();  // of what this warp had buffered before
      __syncwarp();
    }
    // In 16 bits bounds come with the rounding, at little or no cost.
    if constexpr (C::kBounds && !C::kFloat32) {
      dispatch_bound(residual_last ? Activation::none : p.activation,
                     [&](auto bound) { store<bound()>(acc, tile, chunk); });
    } else {
      store<Activation::none>(acc, tile, chunk);
    }
  }

  // All but the bounds that come with the rounding.
  __device__ __forceinline__ void apply_activation(Accumulators& acc, bool residual_last) {
    using T = typename C::T;
    if constexpr (!C::kBounds) {
      // While one consumer does this, the other waits for input, multiplies and writes. In step, both would wait for the
      // special-function units, and leave them idle afterwards.
      if (p.orders_activation) {
        order.wait();
      }
      activate_all<T, false>(p.activation, p.negative_slope, acc, [&] {
        if (p.orders_activation) {
          order.arrive();
        }
      });
    } else if (C::kFloat32 || residual_last) {
      activate_all<T, true>(p.activation, p.negative_slope, acc);
    }
  }

  // Results of a chunk: to the output, or to the output buffer.
  template <Activation kBound>
  __device__ __forceinline__ void store(const Accumulators& acc, const InputTile& tile, int chunk) const {
    if constexpr (C::kChannelsLast) {
      if constexpr (C::kFloat32) {
        if (p.y_in_bulk) {
          channels_last.put(acc);
          fence_async();
          __syncwarp();
          channels_last.start_copies(tile.pixels, chunk * kChunk);
          copy_bulk_commit();
          return;
        }
      }
      if (p.y_vectors) {
        channels_last.template write<true, kBound>(acc, tile.pixels, chunk * kChunk);
      } else {
        channels_last.template write<false, kBound>(acc, tile.pixels, chunk * kChunk);
      }
    } else if (p.out_pairs) {
      contiguous.template put<true, kBound>(acc, tile.targets, chunk * kChunk);
    } else {
      contiguous.template put<false, kBound>(acc, tile.targets, chunk * kChunk);
    }
  }

  // Contiguous: a tile is in the output buffer. Bulk copies of it start behind the next product.
  __device__ __forceinline__ void store_tile(uint32_t index) {
    if (p.y_in_bulk) {
      fence_async();
      __syncwarp();
      buffered = index;
    } else {
      contiguous.write_rows(block.tiles().locate(index));
    }
  }
  __device__ __forceinline__ void copy_buffered() {
    if constexpr (C::kContiguous) {
      if (buffered != kNoTile) {
        contiguous.start_copies(block.tiles().locate(buffered));
        copy_bulk_commit();
        buffered = kNoTile;
      }
    }
  }
};

}  // namespace fused_conv_bn::stem_sm90
