// A cluster of blocks that shares the steps of one tile. Each has a run of them, its consumers every second one of those. Then
// all put their sums where the stages were, and each block finishes some of the tile's filters: it adds up all parts, in
// the same order every time.
#pragma once

#include "gates.cuh"
#include "kernels/conv/epilogue/residual.cuh"
#include "kernels/ptx/cluster.cuh"
#include "moments.cuh"
#include "producer.cuh"
#include "products.cuh"

namespace fused_conv_bn::gemm_sm90 {

// kGated: pixels are multiplied by gates first.
template <typename T, int kTile, bool kGated>
struct Split {
  using B = Block<T, kTile>;
  static constexpr int kM = Products<T, kTile>::kM;
  static constexpr int kColumns = B::kShape.filters / 8;  // groups of filters, of which a thread has two each
  static constexpr int kPartBytes = kM * kColumns * 128 * 16;

  const B& block;
  const int rank;
  const Params<T>& p = block.p;
  const int first_step = p.layout.steps * rank / p.layout.splits;
  const int steps = p.layout.steps * (rank + 1) / p.layout.splits - first_step;
  const int thread = static_cast<int>(threadIdx.x) % 128;

  // A thread's four sums of a group of filters: two of a pixel, two of the pixel eight rows on.
  __device__ __forceinline__ uint32_t place(int consumer, int m, int column) const {
    return block.base + kHeaderBytes + consumer * kPartBytes + ((m * kColumns + column) * 128 + thread) * 16;
  }

  template <bool kFilters, bool kGrouped>
  __device__ __forceinline__ void produce(int fetcher) const {
    Producer<T, kTile, kFilters, kGrouped> producer{block, {block, fetcher}};
    producer.fetch(block.first_pixel(0), producer.step_at(first_step), steps);
  }

  template <int kStepBytes>
  __device__ __forceinline__ void multiply(int consumer, Products<T, kTile>& products) const {
    products.clear();
    Gates<T, B::kShape.pixels, kStepBytes> gates{p};
    const auto fetch_gates = [&](int round) {
      const int step = first_step + consumer + round * kConsumers;
      gates.fetch(block.first_pixel(0), block.first_channel() + step * p.layout.depth);
    };
    if constexpr (kGated) {
      fetch_gates(0);
    }
    Ring ring{};
    ring.stage = consumer;
    const int rounds = (steps - consumer + kConsumers - 1) / kConsumers;  // one at least
    int previous = 0;
#pragma unroll 1
    for (int i = 0; i < rounds; ++i) {
      barrier_wait(block.full(ring.stage), ring.parity);
      if constexpr (kGated) {
        gates.apply(block.pixels_of(ring.stage));
        named_barrier_sync(1 + consumer, 128);
      }
      products.template start<kStepBytes>(block.pixels_of(ring.stage), block.filters_of(ring.stage, 0));
      if constexpr (kGated) {
        fetch_gates(min(i + 1, rounds - 1));
      }
      if (i > 0) {
        product_wait<1>();
        arrive_as_warp(block.empty(previous));
      }
      previous = ring.stage;
      ring.skip(0, kConsumers, p.layout.stages);
    }
    products.finish();
  }

  // By all consumers, who may not write before all of them have multiplied.
  __device__ __forceinline__ void consume(int consumer) const {
    Products<T, kTile> products;
    Products<T, kTile>::with_row_bytes(p.layout.depth,
                                       [&]<int kStepBytes>() { multiply<kStepBytes>(consumer, products); });
    named_barrier_sync(1 + kConsumers, 128 * kConsumers);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const float* const s = products.sums[m] + 4 * column;
        store_shared(place(consumer, m, column),
                     uint4{__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])});
      }
    }
  }

  __device__ __forceinline__ void finish(int m, int column) const {
    const int filter = column * 8 + thread % 4 * 2, k = block.first_filter() + filter;
    const int pixel = block.first_pixel(0) + m * 64 + thread / 32 * 16 + thread % 32 / 4;
    float v[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int from = 0; from < p.layout.splits; ++from) {
#pragma unroll
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const float4 part = load_cluster_4(place(consumer, m, column), from);
        v[0] += part.x;
        v[1] += part.y;
        v[2] += part.z;
        v[3] += part.w;
      }
    }
    const bool exists = k < p.filters;  // a whole number of vectors: both filters do, or none
    float residual[4] = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = static_cast<int64_t>(pixel + 8 * half) * p.filters + k;
      if (p.has_residual && exists && pixel + 8 * half < p.pixels) {
        const float2 r = unpack_pair(T(), *reinterpret_cast<const PairWords<T>*>(p.residual_data + at));
        residual[2 * half] = r.x;
        residual[2 * half + 1] = r.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = apply_affine(v[i],
                          Affine<float>{0, block.header.scales[filter + i % 2], block.header.shifts[filter + i % 2]});
    }
    finish_sums(
        p.has_residual, p.residual_last,
        [&] {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            v[i] += residual[i];
          }
        },
        [&] { activate_all<T, false>(p.activation, p.negative_slope, v); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (exists && pixel + 8 * half < p.pixels) {
        const int64_t at = static_cast<int64_t>(pixel + 8 * half) * p.filters + k;
        *reinterpret_cast<PairWords<T>*>(p.y_data + at) = pack_pair(T(), v[2 * half], v[2 * half + 1]);
      }
    }
    if (p.moments != nullptr) {
      const int first = pixel - thread % 32 / 4;  // of the warp's
      write_warp_moments(p, first / kWarpPixels, first, k, exists, v);
    }
  }

  __device__ __forceinline__ void run() const {
    const int warpgroup = warpgroup_index();
    // Of the two waits the first is for all sums, the second for others that still read from this block. Producers have code of their
    // own to the end: they may have few registers.
    if (warpgroup == 0) {
      if constexpr (kGated) {
        release_registers<kProducerRegisters<1>>();
      }
      as_producer(block, [&](auto filters, auto grouped, int fetcher) { produce<filters(), grouped()>(fetcher); });
      __syncwarp();
      cluster_sync();
      cluster_sync();
    } else {
      if constexpr (kGated) {
        acquire_registers<kConsumerRegisters<1>>();
      }
      block.set_affines();
      consume(warpgroup - 1);
      cluster_sync();
      const int columns = kColumns / p.layout.splits;
#pragma unroll 1
      for (int i = warpgroup - 1; i < kM * columns; i += kConsumers) {
        finish(i / columns, rank * columns + i % columns);
      }
      cluster_sync();
    }
  }
};

}  // namespace fused_conv_bn::gemm_sm90
