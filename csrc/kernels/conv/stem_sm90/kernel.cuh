// Convolutions of few input channels as an implicit GEMM on the tensor cores of compute capability 9.0a (wgmma), with the
// epilogue in the same kernel.
//
// A block owns 64 output channels for good and takes one tile of output pixels after another. Raw rows of the tiles to come
// are on their way to shared memory, by bulk copies where they begin at multiples of 16 bytes. Two producer warpgroups make
// units of them (tile.h), of which wgmma reads any two at a time: im2col is a table of offsets. The others, two or three
// consumers, have every second or third of the tiles, or of the chunks of each: while one multiplies, another writes.
//
// For a contiguous output the rows of the product are channels. A warp has 16 of them to itself, puts them into shared
// memory as they lie in the output, and starts copies of whole rows behind its next product. For a channels_last output
// the rows are pixels, and channels are dealt to the columns so that a thread ends up with 16 bytes of a pixel's. In 16 bits
// it writes them, and where there are at most 32 channels, no more are computed; float32 goes through shared memory too.
//
// For BatchNorm in training mode there are two passes: one that keeps the moments of each channel and writes nothing else
// (unless sums over the input take its place, statistics/from_input_sm90), and one with the affine that comes of them.
//
// float32 is split in two (split_float.cuh). A tile that does not split, or has Inf or NaN (which must not meet the zeros of
// half-filled units), is computed in plain float32 FMAs.
//
//     tile.h                 the tile and the layout of shared memory
//     plan.h                 the domain, the choice of a tile, and when the kernel is faster
//     params.cuh             what the kernel is launched with
//     shared_memory.cuh, block.cuh, fragment.cuh, pipeline.cuh
//                            what producers and consumers agree on
//     input_window.cuh, raw_rows.cuh, units.cuh, producer.cuh
//                            from the input to stages of units
//     weights.cuh, output_offsets.cuh, products.cuh, exact.cuh, consumer.cuh
//                            from stages to products
//     epilogue.cuh, moments.cuh, store_contiguous.cuh, store_channels_last.cuh
//                            from products to results
//     launch.cuh             from a problem to parameters
#pragma once

#include <cuda_runtime.h>

#include "block.cuh"
#include "consumer.cuh"
#include "epilogue.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "output_offsets.cuh"
#include "params.cuh"
#include "producer.cuh"
#include "weights.cuh"

namespace fused_conv_bn::stem_sm90 {

template <typename C>
__device__ __forceinline__ void run_block(const Params<typename C::T>& params) {
  const Block<C> block(params);
  block.shared.set_up();
  __syncthreads();
  const int warpgroup = block.warp_of_block / 4;
  if (warpgroup < kProducerWarpgroups) {
    release_registers<C::kFloat32 ? (C::kMoments ? 88 : 80) : 56>();
    Producer<C>{block}.run();
  } else {
    acquire_registers<C::kFloat32 ? (C::kMoments ? 168 : 176) : 120>();
    const Weights<C> weights{block};
    weights.prefetch();
    set_up_output_offsets(block);
    block.wait_unless_late();
    weights.set_up(ChannelAffines<C>{block});
    if constexpr (!C::kMoments) {  // else small blocks come next, and would crowd where there is room first
      let_next_begin();
    }
    block.sync_consumers();
    if (threadIdx.x == C::kProducerThreads) {
      barrier_arrive(block.shared.weights_ready());
    }
    Consumer<C>{block, warpgroup - kProducerWarpgroups}.run();
  }
}

template <typename T, Output kOutput, int kChannels, bool kBounds>
__global__ void __launch_bounds__(block_threads(Config<T, kOutput, kChannels, kBounds>::kSplits), 1)
    stem_sm90_kernel(const __grid_constant__ Params<T> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_block<Config<T, kOutput, kChannels, kBounds>>(params);
#endif
}

}  // namespace fused_conv_bn::stem_sm90
