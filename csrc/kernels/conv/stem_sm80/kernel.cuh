// Convolutions of few input channels as an implicit GEMM on tensor cores, with the epilogue in the same kernel.
//
// A block owns 32 or 64 output channels for good, and takes one tile of up to 256 output pixels after another: it puts
// the input that it needs, its window, into shared memory as [pixel][channel] in 16 bits, multiplies, applies the
// epilogue and writes. A warp has 32 pixels and all channels of the block. For a channels_last output, channels are
// dealt to the rows of the product so that a thread ends up with 16 bytes of a pixel's, which it writes. For a
// contiguous output, results go through shared memory, to be written as whole rows of the image. Two blocks share a
// multiprocessor, so that one moves memory while the other multiplies. Contiguous float32 goes further where it can: a
// block has two groups of threads, each with a tile of its own and copies of its next one's input on the way, which
// multiply alternately. Left alone, both would multiply at the same time, and tensor cores idle while both move memory.
//
// The GEMM's depth is cut into quads: four input channels of one filter tap. A tap is an offset in the window, so
// im2col is a table of offsets, one a quad. mma.sync.m16n8k16 wants four values of its k from each thread; in which
// order the 16 values of k come is free as long as both operands agree, so that a thread's four are one quad: 8 bytes
// of one pixel.
//
// float32 is split into a high and a low term (split_float.cuh). The sum low * high + high * low is formed first,
// scaled by 2^-11, then high * high goes on top. A window that does not split is computed in plain float32 FMAs from
// unscaled values instead; so are all windows if the weights are like that.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "epilogue.cuh"
#include "exact.cuh"
#include "kernels/ptx/launch.cuh"
#include "load_input.cuh"
#include "load_rows.cuh"
#include "products.cuh"
#include "store_channels_last.cuh"
#include "store_contiguous.cuh"
#include "weights.cuh"

namespace fused_conv_bn::stem_sm80 {

template <typename K>
__device__ __forceinline__ void run(const Block<K>& b) {
  const auto& p = b.p;
  const uint32_t first = blockIdx.x * K::kThreadGroups + b.thread_group();
  const uint32_t step = gridDim.x * K::kThreadGroups;
  if constexpr (K::kAlternating) {
    if (first < p.tiles) {
      start_copies(b, b.tiles().locate(first));
    }
  }
  set_up(b);
  if constexpr (K::kAlternating) {
    __syncthreads();  // the thread groups do not meet again
  }
  uint32_t ahead[kKeptWords<K>];
  if constexpr (K::kAhead) {
    read_ahead(b, ahead, b.tiles().locate(first));
  }
  // Little is kept in registers from one step to the next: what is a few instructions away is made anew.
  for (uint32_t index = first; index < p.tiles; index += step) {
    bool exact = false;
    float inverse = 1.0f;
    if constexpr (K::kAlternating) {
      load_copies(b, exact, inverse);
    } else {
      const Tile tile = b.tiles().locate(index);
      if constexpr (!K::kAhead) {
        read_ahead(b, ahead, tile);
      }
      load_window(b, ahead, tile, exact, inverse);
    }
    b.sync();
    if constexpr (K::kAlternating) {
      if (index + step < p.tiles) {
        start_copies(b, b.tiles().locate(index + step));
      }
      b.wait_to_multiply(index == first);
      if (exact) {
        b.let_other_multiply(index);
      }
    }
    if constexpr (K::kAhead) {
      // The next tile's input is on its way while this one is multiplied.
      if (index + step < p.tiles) {
        read_ahead(b, ahead, b.tiles().locate(index + step));
      }
    }
    inverse = exact ? 0.0f : inverse;  // one register for both
    const bool has_pixels = b.warp() * K::kPixels < b.tiles().p * b.tiles().q;
    typename K::Accumulator acc;
    if (has_pixels) {
      if (K::kFloat && inverse == 0) {
        multiply_exactly(b, acc);
      } else if constexpr (K::kAlternating) {
        multiply_ahead(b, acc);
        b.let_other_multiply(index);
      } else {
        multiply(b, acc);
      }
      apply_affines(b, acc, inverse == 0, inverse);
      finish(b, acc, b.tiles().locate(index));
    }
    const Tile tile = b.tiles().locate(index);
    if constexpr (K::kLast) {
      if (has_pixels) {
        write_pixels(b, acc, tile);
      }
    } else {
      b.sync();
      if (has_pixels) {
        if (writes_vectors(b)) {
          stage_planes<true, true, true>(b, acc, tile);
        } else if (!p.stage_pairs) {
          stage_planes<false, false>(b, acc, tile);
        } else if (b.tiles().has_whole_rows(p.c)) {
          stage_planes<true, true>(b, acc, tile);
        } else {
          stage_planes<true, false>(b, acc, tile);
        }
      }
      fence_async();
      b.sync();
      if (writes_vectors(b)) {
        write_vectors(b, tile);
      } else if (b.tiles().has_whole_rows(p.c)) {
        write_whole_planes(b, tile);
      } else {
        write_rows(b, tile);
      }
    }
  }
  b.wait_for_stores();
}

template <typename T, int kM, bool kLast, bool kAlternating, bool kBounds>
__global__ void __launch_bounds__(kBlockThreads, resident_blocks(kAlternating))
    stem_sm80_kernel(const __grid_constant__ Params<T> params) {
#if __CUDA_ARCH__ >= 800  // select_plan() leaves older GPUs to PyTorch
  if constexpr (!kAlternating || can_alternate(__CUDA_ARCH__ / 10)) {
    using K = Kind<T, kM, kLast, kAlternating, kBounds>;
    wait_for_previous();
    run(Block<K>{params, static_cast<int>(blockIdx.y * K::kChannels)});
  }
#endif
}

}  // namespace fused_conv_bn::stem_sm80
