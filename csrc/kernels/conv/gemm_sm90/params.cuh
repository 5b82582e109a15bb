// What the kernel of gemm_sm90 is launched with, and how a block's shared memory lies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tensor_map.cuh"
#include "kernels/ptx/tma.cuh"
#include "plan.h"

namespace fused_conv_bn::gemm_sm90 {

template <typename T>
struct Params {
  CUtensorMap x;         // boxes of a tile's pixels, a step's channels
  CUtensorMap w;         // of a tile's filters
  CUtensorMap y;         // of a tile's pixels, a row of shared memory's filters; the residual's alike
  CUtensorMap residual;  // if there is one
  AffineSource<T> affine;
  const T* residual_data;
  T* y_data;
  Moments* moments;  // [partials][filters] of the results (plan.h); nullptr: they are not asked for
  int pixels;        // with the padding between them where tiles have halos
  int filters;
  int R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FastDiv image_pixels, columns;  // of the output, counted like its pixels
  FastDiv filter_tiles;
  int pixel_tiles;
  Layout layout;
  int stage_rounds, stage_rest;    // a tile's steps in stages: whole rounds of the ring, and what is left
  int filter_rounds, filter_rest;  // the same where filters have a ring of their own
  int H, W;                        // with halos: of the output
  int tap_row, tap_columns;        // with halos: pixels from a row of taps to the next, and of such a row
  bool flat;                       // x is a matrix of pixels by channels: a tap, a pixel
  bool has_residual;
  bool residual_last;
  Activation activation;
  float negative_slope;
  const T* gates;  // [images][channels] of flat pixels, in 16 bits; nullptr: none
  int channels;
  bool has_groups;
  int group_channels;
  FastDiv group_filters;
};

struct Header {
  uint64_t full[kMostStages];       // a stage has come
  uint64_t empty[kMostStages];      // its consumer is done with it
  uint64_t filters[kMostResident];  // those of a step have come, for good or to a stage of their own
  uint64_t spare[kMostStages];      // their consumer is done with them
  uint64_t residual[kConsumers];    // a consumer's has come
  uint64_t turn[kConsumers];        // a consumer's turn to wait for stages: nobody waits for one that is a round ahead
  alignas(16) float scales[kMostFilters];
  float shifts[kMostFilters];
};
static_assert(sizeof(Header) <= kHeaderBytes);

extern __shared__ __align__(1024) unsigned char shared_bytes[];

// The same in all threads of a warp: what follows from it is worked out once, in uniform registers, which descriptors of products
// and addresses of barriers are read from. (A step took 140 ns with these in each thread's registers.)
template <typename I>
__device__ __forceinline__ I as_uniform(I value) {
  return __shfl_sync(0xffffffffu, value, 0);
}
__device__ __forceinline__ int warpgroup_index() { return as_uniform(static_cast<int>(threadIdx.x) / 128); }

template <typename T, int kTile>
struct Block {
  static constexpr TileShape kShape = kTiles[kTile];

  const Params<T>& p;
  Header& header;
  uint32_t base;    // of shared memory, with its header
  int filter_tile;  // for good
  int first, step;  // tiles of pixels: every so many

  // index: of the block, or of its cluster.
  __device__ __forceinline__ Block(const Params<T>& params, uint32_t index)
      : p(params), header(*reinterpret_cast<Header*>(shared_bytes)), base(as_uniform(shared_address(shared_bytes))) {
    first = static_cast<int>(div_mod(p.filter_tiles, index));
    filter_tile = static_cast<int>(index);
    step = p.layout.blocks_of_filters;
  }

  // By all threads.
  __device__ __forceinline__ void set_up() const {
    if (threadIdx.x == 0) {
      prefetch_map(p.x);
      prefetch_map(p.w);
      if (p.layout.splits == 1 && !p.layout.halo) {
        prefetch_map(p.y);
      }
      for (int stage = 0; stage < p.layout.stages; ++stage) {
        barrier_init(full(stage), 1);
        barrier_init(empty(stage), kShape.together ? 4 * kConsumers : 4);
      }
      for (int i = 0; i < (p.layout.resident ? p.layout.steps : p.layout.filter_stages); ++i) {
        barrier_init(filters(i), 1);
      }
      for (int i = 0; i < p.layout.filter_stages; ++i) {
        barrier_init(spare(i), 4);
      }
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        barrier_init(residual(consumer), 1);
        barrier_init(turn(consumer), 4);
      }
      fence_async();
    }
    __syncthreads();
  }

  // Scale and shift of the block's filters, by all consumers.
  __device__ __forceinline__ void set_affines() const {
    const int filter = static_cast<int>(threadIdx.x) - 128;
    if (filter < kShape.filters) {
      const int k = first_filter() + filter;
      const Affine<float> affine = k < p.filters ? p.affine.pair(k) : Affine<float>{0, 0, 0};
      header.scales[filter] = affine.scale;
      header.shifts[filter] = affine.shift;
    }
    named_barrier_sync(1 + kConsumers, 128 * kConsumers);
  }

  __device__ __forceinline__ int tiles() const { return (p.pixel_tiles - first + step - 1) / step; }
  __device__ __forceinline__ int first_pixel(int tile) const { return (first + tile * step) * kShape.block_pixels(); }
  __device__ __forceinline__ int first_filter() const { return filter_tile * kShape.filters; }

  __device__ __forceinline__ int group_of(int filter) const {
    return static_cast<int>(p.group_filters.div(static_cast<uint32_t>(filter)));
  }
  // Of those that the block's filters multiply.
  __device__ __forceinline__ int first_channel() const { return group_of(first_filter()) * p.group_channels; }

  __device__ __forceinline__ uint32_t pixels_of(int stage) const {
    return base + kHeaderBytes + stage * p.layout.stage_bytes;
  }
  __device__ __forceinline__ uint32_t filters_of(int stage, int step_of_filter) const {
    return p.layout.resident ? filters_at(step_of_filter) : pixels_of(stage) + p.layout.pixel_bytes;
  }
  // Those that lie apart.
  __device__ __forceinline__ uint32_t filters_at(int place) const {
    return base + p.layout.at_resident + place * p.layout.filter_bytes;
  }
  __device__ __forceinline__ uint32_t output(int consumer, int buffer) const {
    return base + p.layout.at_output + (consumer * p.layout.buffers + buffer) * kShape.out_bytes(sizeof(T));
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return shared_address(&header.full[stage]); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return shared_address(&header.empty[stage]); }
  __device__ __forceinline__ uint32_t filters(int step_of_filter) const {
    return shared_address(&header.filters[step_of_filter]);
  }
  __device__ __forceinline__ uint32_t spare(int stage) const { return shared_address(&header.spare[stage]); }
  __device__ __forceinline__ uint32_t residual(int consumer) const {
    return shared_address(&header.residual[consumer]);
  }
  __device__ __forceinline__ uint32_t turn(int consumer) const { return shared_address(&header.turn[consumer]); }
};

// Goes round the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // rounds, rest: by how many.
  __device__ __forceinline__ void skip(int rounds, int rest, int stages) {
    stage += rest;
    parity ^= rounds & 1;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

}  // namespace fused_conv_bn::gemm_sm90
