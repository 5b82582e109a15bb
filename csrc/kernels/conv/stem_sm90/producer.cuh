// Producers: warpgroups that fill stages with units of the input, tile after tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "input_window.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"
#include "pipeline.cuh"
#include "raw_rows.cuh"
#include "units.cuh"

namespace fused_conv_bn::stem_sm90 {

template <typename C>
struct Producer {
  const Block<C>& block;
  const Params<typename C::T>& p = block.p;
  const SharedMemory<C>& shared = block.shared;

  __device__ __forceinline__ void run() const {
    UnitTable<C>{block}.set_up();
    if constexpr (C::kProducerGroups > 1) {
      block.sync_producers();
    }
    block.wait_unless_late();
    if constexpr (C::kFloat32) {
      build_units();
    } else {
      if (p.tile.raw_stage == 0) {
        copy_units();
      } else {
        build_units();
      }
    }
  }

 private:
  __device__ __forceinline__ void build_units() const {
    switch (p.tile.slots_log2) {
      case 0:
        return build_units_of<1>();
      case 1:
        return build_units_of<2>();
      case 2:
        return build_units_of<4>();
      default:
        return build_units_of<8>();
    }
  }

  // Until a stage is free. All but the first have raw weights in them at first.
  __device__ __forceinline__ void wait_for_stage(const PipelineState& state) const {
    if (state.parity == 0 && state.stage > 0) {
      barrier_wait(shared.weights_ready(), 0);
    }
    barrier_wait(shared.empty(state.stage), state.parity ^ 1);
  }

  // Units of this warp are there, and what is said of them.
  __device__ __forceinline__ void arrive(int stage) const {
    fence_async();
    __syncwarp();
    if (lane() == 0) {
      barrier_arrive(shared.full(stage));
    }
  }

  // From raw rows, whose copies run ahead by as many tiles as there are raw stages.
  template <int kSlots>
  __device__ __forceinline__ void build_units_of() const {
    constexpr int kGroups = C::kProducerGroups;
    const UnitBuilder<C, kSlots> builder{block};
    for (int i = block.group(); i < kRawStages; i += kGroups) {
      start_raw_rows(block, blockIdx.x + i * gridDim.x, i);
    }
    // float32 needs the values twice. Where they are few enough they stay in registers.
    const bool kept = C::kFloat32 && p.tile.rounds == 1;
    PipelineState to{block.group(), 0}, from{block.group(), 0};
    for (uint32_t index = blockIdx.x + block.group() * gridDim.x; index < p.tiles; index += kGroups * gridDim.x) {
      const TileInput window = tile_input(block, index);
      const uint32_t next = index + kRawStages * gridDim.x;
      typename UnitBuilder<C, kSlots>::Values v;
      barrier_wait(shared.raw_full(from.stage), from.parity);
      if constexpr (C::kFloat32) {
        const Scaling scaling = builder.measure(window, shared.raw_rows(from.stage), v, kept,
                                                kGroups == 1 ? from.stage : static_cast<int>(from.parity));
        wait_for_stage(to);
        if (block.group_thread() == 0) {
          shared.header().stages[to.stage] = make_uint2(scaling.exact, __float_as_uint(scaling.inverse));
        }
        builder.build(window, shared.raw_rows(from.stage), v, kept, to.stage, scaling.scale);
      } else {
        wait_for_stage(to);
        report_infinity(block, to.stage, builder.build(window, shared.raw_rows(from.stage), v, false, to.stage, 1.0f));
      }
      arrive(to.stage);
      if (!kept) {
        block.sync_group();  // nobody reads the raw rows any more
      }
      start_raw_rows(block, next, from.stage);
      to.advance(kGroups, p.tile.stages);
      from.advance(kGroups, kRawStages);
    }
  }

  // float16 and bfloat16 whose image consists of units: each is copied from there. The copies of the next tile are under way
  // while this one is looked at.
  __device__ __forceinline__ void copy_units() const {
    const UnitTable<C> table{block};
    PipelineState state{0, 0}, next{0, 0};
    const auto start = [&](uint32_t index) {
      if (index < p.tiles) {
        wait_for_stage(next);
        const TileInput window = tile_input(block, index);
        const unsigned char* const start = window.image + static_cast<int64_t>(window.h0) * p.x_row_bytes +
                                           window.w0 * p.x_col_bytes;
#pragma unroll 2
        for (int i = threadIdx.x; i < p.x_units; i += C::kProducerThreads) {
          const UnitSource unit = table.source(i, window);
          const bool inside = unit.channels > 0 && exists(unit.w, window.end);
          const auto* const from = inside ? start + unit.offset : window.image;
          copy_async(shared.input(next.stage) + i * 16, from, inside);
        }
        next.advance(1, p.tile.stages);
      }
      copy_async_commit();
    };
    start(blockIdx.x);
    for (uint32_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      start(index + gridDim.x);
      copy_async_wait_all_but<1>();
      uint32_t most = 0;
      for (int i = threadIdx.x; i < p.x_units; i += C::kProducerThreads) {
        most = most_of(most, load_shared_4(shared.input(state.stage) + i * 16));
      }
      report_infinity(block, state.stage, most);
      arrive(state.stage);
      state.advance(1, p.tile.stages);
    }
  }
};

}  // namespace fused_conv_bn::stem_sm90
