// A convolution as the product of a matrix of pixels by one of filters, each row of which has the terms of one result.
//
// A block has a tile of filters for good, and takes one tile of pixels after another. A few threads fetch what is multiplied,
// as boxes of tensors (ptx/tensor_map.cuh): of a tap's pixels as the tensor map for im2col finds them, and of its filters.
// Two warpgroups have every second tile each: while one multiplies, the other adds the affine, the residual and the activation,
// and sends its results to shared memory and from there as boxes to the output. Larger tiles they have together, half each.
// Where there are few tiles, a cluster of blocks has one, and shares its terms.
//
//     plan.h        the domain, tiles, and what they are chosen by
//     params.cuh    what a block knows: parameters, shared memory, the ring of stages
//     producer.cuh  from tensors to stages
//     gates.cuh     from pixels to pixels times the gates of their images
//     products.cuh  from a stage to sums
//     consumer.cuh  from stages to results
//     moments.cuh   from results to their moments, for BatchNorm in training mode
//     split.cuh     the same in a cluster
//     halo.cuh      the same with pixels that are fetched once for all taps
//     launch.cuh    from a problem to parameters
#pragma once

#include "halo.cuh"
#include "kernels/ptx/launch.cuh"
#include "producer.cuh"
#include "split.cuh"

namespace fused_conv_bn::gemm_sm90 {

// produce(filters, grouped, fetcher): by threads that fetch (producer.cuh); consume(consumer): by a warpgroup.
template <int kBlocks, typename T, int kTile, typename Produce, typename Consume>
__device__ __forceinline__ void run_block(const Block<T, kTile>& block, Produce&& produce, Consume&& consume) {
  const int warpgroup = warpgroup_index();
  block.set_up();
  wait_for_previous();
  let_next_begin();
  if (warpgroup == 0) {
    release_registers<kProducerRegisters<kBlocks>>();
    as_producer(block, produce);
  } else {
    acquire_registers<kConsumerRegisters<kBlocks>>();
    block.set_affines();
    consume(warpgroup - 1);
  }
}

// kGated: a kernel of its own, so that others have no step more.
template <typename T, int kTile, bool kGated>
__global__ void __launch_bounds__(kThreads, kTiles[kTile].blocks)
    gemm_sm90_kernel(const __grid_constant__ Params<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Block<T, kTile> block(p, blockIdx.x);
  run_block<kTiles[kTile].blocks>(
      block,
      [&](auto filters, auto grouped, int fetcher) {
        Producer<T, kTile, filters(), grouped()>{block, {block, fetcher}}.run();
      },
      [&](int consumer) { Consumer<T, kTile, kGated>{block, consumer}.run(); });
#endif
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_halo_kernel(const __grid_constant__ Params<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Block<T, kTile> block(p, blockIdx.x);
  run_block<1>(
      block,
      [&](auto filters, auto grouped, int fetcher) {
        HaloProducer<T, kTile, filters(), grouped()>{block, {block, fetcher}}.run();
      },
      [&](int consumer) { HaloConsumer<T, kTile>(block, consumer).run(); });
#endif
}

template <typename T, int kTile, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_split_kernel(const __grid_constant__ Params<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int rank = static_cast<int>(cluster_rank());
  const Block<T, kTile> block(p, blockIdx.x / p.layout.splits);
  block.set_up();
  wait_for_previous();
  let_next_begin();
  Split<T, kTile, kGated>{block, rank}.run();
#endif
}

}  // namespace fused_conv_bn::gemm_sm90
