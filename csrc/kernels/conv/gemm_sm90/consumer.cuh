// A warpgroup that multiplies every second of the block's tiles, and finishes them while the other one multiplies; or its part of
// every tile.
#pragma once

#include "gates.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/conv/epilogue/residual.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/tma.cuh"
#include "moments.cuh"
#include "products.cuh"

namespace fused_conv_bn::gemm_sm90 {

// kGated: pixels are multiplied by gates first.
template <typename T, int kTile, bool kGated = false>
struct Consumer {
  using B = Block<T, kTile>;
  static constexpr int kPixels = B::kShape.pixels, kFilters = B::kShape.filters;
  static constexpr bool kTogether = B::kShape.together;
  static constexpr int kEvery = kTogether ? 1 : kConsumers;  // of the block's tiles
  static constexpr int kM = Products<T, kTile>::kM;
  static constexpr int kBytes = sizeof(T);
  static constexpr int kRowBytes = kFilters * kBytes < 128 ? kFilters * kBytes : 128;  // of a box of the output
  static constexpr int kRow = kRowBytes / kBytes;                                      // filters

  const B& block;
  const int consumer;
  const Params<T>& p = block.p;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  Ring ring{};
  uint32_t output = 0;  // the buffer of this tile's results
  Products<T, kTile> products;
  ConsumerMoments<T, kTile> moments;

  __device__ __forceinline__ void sync() const { named_barrier_sync(1 + consumer, 128); }

  // ---- products ----

  // pixel: the first one; next: another consumer's tile follows.
  template <int kStepBytes>
  __device__ __forceinline__ void multiply_tile(int pixel, bool first_tile, bool next) {
    const Layout& l = p.layout;
    products.clear();
    Gates<T, kPixels, kStepBytes> gates{p};
    const auto fetch_gates = [&](int step) { gates.fetch(pixel, block.first_channel() + step * l.depth); };
    if constexpr (kGated) {
      fetch_gates(0);
    }
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < l.steps; ++step) {
      if (l.resident && first_tile) {
        barrier_wait(block.filters(step), 0);
      }
      barrier_wait(block.full(ring.stage), ring.parity);
      if (next && step + 1 == l.steps) {
        __syncwarp();
        arrive_as_warp(block.turn(1 - consumer));
      }
      const uint32_t pixels = block.pixels_of(ring.stage) + (kTogether ? consumer * (kPixels * kStepBytes) : 0);
      if constexpr (kGated) {
        gates.apply(pixels);
        sync();
      }
      products.template start<kStepBytes>(pixels, block.filters_of(ring.stage, step));
      if constexpr (kGated) {
        fetch_gates(
            min(step + 1, l.steps - 1));  // the last ones again: a branch takes registers that a tile does not have
      }
      if (step > 0) {
        product_wait<1>();
        arrive_as_warp(block.empty(previous));
      }
      previous = ring.stage;
      ring.advance(l.stages);
    }
    products.finish();
    arrive_as_warp(block.empty(previous));
  }

  // ---- results ----

  // Where 16 bytes of a pixel are in shared memory, swizzled over the row of a box. A row starts at a multiple of its size. beside:
  // 1 for those behind a chunk of an even number.
  __device__ __forceinline__ uint32_t place_of_chunk(int row, int chunk, int beside = 0) const {
    constexpr int kChunks = kRowBytes / 16;
    return ((output + row * kRowBytes + (swizzle(row) ^ beside) * 16) ^ (chunk % kChunks * 16)) +
           chunk / kChunks * (kPixels * kRowBytes);
  }
  static __device__ __forceinline__ int swizzle(int row) { return kRowBytes == 128 ? row & 7 : row >> 1 & 3; }
  __device__ __forceinline__ uint32_t place_of_filter(int row, int filter) const {
    constexpr int kOfChunk = 16 / kBytes;
    return place_of_chunk(row, filter / kOfChunk) + filter % kOfChunk * kBytes;
  }
  // Where the thread's two filters of the eight from 8 * j on are of one of its pixels. Swizzles are the same every eight rows: the
  // places are few sums, and constants.
  __device__ __forceinline__ uint32_t place(int m, int half, int j) const {
    const int row = thread / 32 * 16 + thread % 32 / 4, byte = thread % 4 * (2 * kBytes);
    return place_of_chunk(row, j * (kBytes / 2), byte / 16) + byte % 16 + (m * 64 + half * 8) * kRowBytes;
  }

  __device__ __forceinline__ void add_residual(int m) {
#pragma unroll
    for (int j = 0; j < kFilters / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 r = unpack_pair(T(), load_shared_words<PairWords<T>>(place(m, half, j)));
        products.sums[m][4 * j + 2 * half] += r.x;
        products.sums[m][4 * j + 2 * half + 1] += r.y;
      }
    }
  }

  __device__ __forceinline__ void finish(int m) {
#pragma unroll
    for (int j = 0; j < kFilters / 8; ++j) {
      const int filter = 8 * j + thread % 4 * 2;
      const auto scale = *reinterpret_cast<const float2*>(&block.header.scales[filter]);
      const auto shift = *reinterpret_cast<const float2*>(&block.header.shifts[filter]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& a = products.sums[m][4 * j + 2 * half];
        float& b = products.sums[m][4 * j + 2 * half + 1];
        a = apply_affine(a, Affine<float>{0, scale.x, shift.x});
        b = apply_affine(b, Affine<float>{0, scale.y, shift.y});
      }
    }
    finish_sums(
        p.has_residual, p.residual_last, [&] { add_residual(m); },
        [&] { activate_all<T, false>(p.activation, p.negative_slope, products.sums[m]); });
#pragma unroll
    for (int j = 0; j < kFilters / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_shared(place(m, half, j),
                     pack_pair(T(), products.sums[m][4 * j + 2 * half], products.sums[m][4 * j + 2 * half + 1]));
      }
    }
  }

  // Boxes of the consumer's output.
  template <typename F>
  __device__ __forceinline__ void for_boxes(F&& f) const {
#pragma unroll
    for (int box = 0; box < kFilters / kRow; ++box) {
      const int filter = block.first_filter() + box * kRow;
      if (filter < p.filters) {
        f(filter, output + box * (kPixels * kRowBytes));
      }
    }
  }

  __device__ __forceinline__ void fetch_residual(int pixel) const {
    const int boxes = min((p.filters - block.first_filter() + kRow - 1) / kRow, kFilters / kRow);
    barrier_arrive_expect(block.residual(consumer), boxes * (kPixels * kRowBytes));
    for_boxes([&](int filter, uint32_t at) { fetch_box(at, p.residual, filter, pixel, block.residual(consumer)); });
  }

  __device__ __forceinline__ void run() {
    const Layout& l = p.layout;
    const int tiles = block.tiles();
    if (!kTogether && consumer > 0) {
      ring.skip(p.stage_rounds, p.stage_rest, l.stages);
    }
#pragma unroll 1
    for (int tile = kTogether ? 0 : consumer, round = 0; tile < tiles; tile += kEvery, ++round) {
      const int pixel = block.first_pixel(tile) + (kTogether ? consumer * kPixels : 0);
      output = block.output(consumer, l.buffers == 2 ? round & 1 : 0);
      if (thread == 0) {  // the buffer is free
        if (l.buffers == 2) {
          copy_bulk_wait_read<1>();
        } else {
          copy_bulk_wait_read();
        }
        if (p.has_residual) {
          fetch_residual(pixel);
        }
      }
      __syncwarp();
      if (!kTogether && tile > 0) {
        barrier_wait(block.turn(consumer), (tile - 1) / kConsumers & 1);
      }
      Products<T, kTile>::with_row_bytes(l.depth, [&]<int kStepBytes>() {
        multiply_tile<kStepBytes>(pixel, round == 0, !kTogether && tile + 1 < tiles);
      });
      if (!kTogether) {
        ring.skip(p.stage_rounds, p.stage_rest, l.stages);
      }
      if (p.has_residual) {
        barrier_wait(block.residual(consumer), round & 1);
      } else {
        sync();  // as thread 0 knows that the buffer is free
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        finish(m);
      }
      fence_async();
      sync();
      if (thread == 0) {
        for_boxes([&](int filter, uint32_t at) { store_box(p.y, filter, pixel, at); });
        copy_bulk_commit();
      }
      if (p.moments != nullptr) {  // there is no residual, which would come into the buffer too soon
        moments.add(
            p.pixels - pixel, [&](int row, int filter) { return place_of_filter(row, filter); },
            [](int) { return true; });
      }
    }
    if (thread == 0) {
      copy_bulk_wait();
    }
    if (p.moments != nullptr) {
      sync();
      moments.write(block, consumer, block.output(consumer, 0), [&] { sync(); });
    }
  }
};

}  // namespace fused_conv_bn::gemm_sm90
