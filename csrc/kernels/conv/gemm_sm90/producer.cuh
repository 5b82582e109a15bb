// The threads that fetch what consumers multiply, one the pixels and one the filters: step by step, tile by tile, as stages become
// empty. Filters of several groups are as many boxes, which three threads have in turns.
#pragma once

#include <type_traits>

#include "params.cuh"

namespace fused_conv_bn::gemm_sm90 {

// A multiprocessor's registers for the threads of so many blocks: producers take few of them.
template <int kBlocks>
constexpr int kConsumerRegisters = kBlocks == 1 ? 232 : 104;
template <int kBlocks>
constexpr int kProducerRegisters = kBlocks == 1 ? 40 : 32;

// By a thread of each warp of a warpgroup. f(filters, grouped, fetcher): of the one that fetches pixels with false_type, of those with
// filters with true_type and their number. Without groups there is one of these, and its code is its own: a step takes 0.1 us longer
// where it could be another, or a box of several.
template <typename T, int kTile, typename F>
__device__ __forceinline__ void as_producer(const Block<T, kTile>& block, F&& f) {
  const std::false_type no{};
  const std::true_type yes{};
  if (!block.p.has_groups) {
    if (threadIdx.x == 0) {
      f(no, no, 0);
    } else if (threadIdx.x == 32) {
      f(yes, no, 0);
    }
  } else if (threadIdx.x == 0) {
    f(no, yes, 0);
  } else if (threadIdx.x % 32 == 0) {
    const int fetcher = static_cast<int>(threadIdx.x) / 32 - 1;
    if (fetcher * block.p.layout.of_group < kTiles[kTile].filters) {
      f(yes, yes, fetcher);
    }
  }
}

// A fetcher's channels and filters of a tile.
template <typename T, int kTile, bool kGrouped>
struct Fetcher {
  const Block<T, kTile>& block;
  const int number;

  // Of the first step's pixels.
  __device__ __forceinline__ int first_channel() const { return kGrouped ? block.first_channel() : 0; }

  // What it has of a step's filters, group by group. channel: the step's first one, counted from the block's.
  __device__ __forceinline__ void fetch_filters(uint32_t at, int channel, int tap, uint32_t barrier) const {
    const Params<T>& p = block.p;
    if constexpr (!kGrouped) {
      fetch_box(at, p.w, channel, tap, block.first_filter(), barrier);
    } else {
      const int row_bytes = p.layout.depth * static_cast<int>(sizeof(T)), every = kFilterFetchers * p.layout.of_group;
#pragma unroll 1
      for (int i = number * p.layout.of_group; i < kTiles[kTile].filters; i += every) {
        const int filter = block.first_filter() + i;
        const int of_group = block.first_channel() + channel - block.group_of(filter) * p.group_channels;
        fetch_box(at + i * row_bytes, p.w, of_group, tap, filter, barrier);
      }
    }
  }
};

// kFilters: which of them.
template <typename T, int kTile, bool kFilters, bool kGrouped>
struct Producer {
  const Block<T, kTile>& block;
  const Fetcher<T, kTile, kGrouped> fetcher;
  const Params<T>& p = block.p;
  Ring ring{};

  // A step of the filter: a tap, and some of its channels.
  struct Step {
    int index, r, s, slice;

    __device__ __forceinline__ void advance(const Params<T>& p) {
      ++index;
      if (++slice == p.layout.slices) {
        slice = 0;
        if (++s == p.S) {
          s = 0;
          ++r;
        }
      }
    }
  };

  __device__ __forceinline__ Step step_at(int index) const {
    const int tap = index / p.layout.slices;
    return {index, tap / p.S, tap % p.S, index % p.layout.slices};
  }

  // `steps` of a tile.
  __device__ __forceinline__ void fetch(int pixel, Step step, int steps) {
    const Layout& l = p.layout;
    int image = 0, row = 0, column = 0;  // of the window's first tap
    if (!kFilters && !p.flat) {
      auto rest = static_cast<uint32_t>(pixel);
      image = static_cast<int>(div_mod(p.image_pixels, rest));
      row = static_cast<int>(div_mod(p.columns, rest)) * p.stride_h - p.pad_h;
      column = static_cast<int>(rest) * p.stride_w - p.pad_w;
    }
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const uint32_t full = block.full(ring.stage);
      const int channel = step.slice * l.depth;
      if (!kFilters || !l.resident) {
        barrier_wait(block.empty(ring.stage), ring.parity ^ 1);
      }
      if constexpr (kFilters) {
        const uint32_t barrier = l.resident ? block.filters(step.index) : full;
        if (l.resident && fetcher.number == 0) {
          barrier_arrive_expect(barrier, l.filter_bytes);
        }
        fetcher.fetch_filters(block.filters_of(ring.stage, step.index), channel, step.r * p.S + step.s, barrier);
      } else {
        barrier_arrive_expect(full, l.stage_bytes);  // those of its filters too, if these do not lie apart
        if (p.flat) {
          fetch_box(block.pixels_of(ring.stage), p.x, fetcher.first_channel() + channel, pixel, full);
        } else {
          fetch_pixels(block.pixels_of(ring.stage), p.x, fetcher.first_channel() + channel, column, row, image,
                       static_cast<uint16_t>(step.s * p.dilation_w), static_cast<uint16_t>(step.r * p.dilation_h),
                       full);
        }
      }
      ring.advance(l.stages);
      step.advance(p);
    }
  }

  __device__ __forceinline__ void run() {
    const int tiles = kFilters && p.layout.resident ? 1 : block.tiles();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      fetch(block.first_pixel(tile), step_at(0), p.layout.steps);
    }
  }
};

}  // namespace fused_conv_bn::gemm_sm90
