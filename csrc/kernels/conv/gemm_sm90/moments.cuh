// Moments of the block's filters, for BatchNorm in training mode: of the convolution's values as they are stored.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "params.cuh"

namespace fused_conv_bn::gemm_sm90 {

// Values in shared memory: two of 16 bits, one or two of 32.
template <typename T, int kCount>
__device__ __forceinline__ void load_values(uint32_t address, float (&values)[kCount]) {
  if constexpr (kCount == 2) {
    const float2 pair = unpack_pair(T(), load_shared_words<PairWords<T>>(address));
    values[0] = pair.x;
    values[1] = pair.y;
  } else {
    static_assert(kCount == 1 && sizeof(T) == 4);
    values[0] = __uint_as_float(load_shared_1(address));
  }
}

// What a thread of a consumer gathers over all of its tiles: of one filter or two, in every so many pixels. Sums of the
// distances from a pivot, the mean of a few of the first values: in float32 over a tile, then in float64.
template <typename T, int kTile>
struct ConsumerMoments {
  static constexpr int kPixels = kTiles[kTile].pixels, kFilters = kTiles[kTile].filters;
  static constexpr int kOwn = std::max(4 / static_cast<int>(sizeof(T)), kFilters / 128);  // a thread's filters
  static constexpr int kAcross = kFilters / kOwn;                                         // threads that share a pixel
  static constexpr int kEvery = 128 / kAcross;  // and those that share a filter
  static constexpr int kAtATime = 8;            // pixels
  static constexpr int kChains = 2;             // of sums, that do not wait for each other
  static_assert(kAcross * kEvery == 128);
  static_assert(kEvery * kFilters * sizeof(Moments) <= kTiles[kTile].out_bytes(sizeof(T)));

  int count = 0;
  float pivots[kOwn] = {};
  double sums[kOwn] = {};
  double squares[kOwn] = {};

  static __device__ __forceinline__ int first_filter() { return static_cast<int>(threadIdx.x) % kAcross * kOwn; }
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) % 128 / kAcross; }

  // pixels: of the tile, of which exists(row) says which count. at(row, filter): where a pixel's value is, in shared memory.
  template <typename F, typename Exists>
  __device__ __forceinline__ void add(int pixels, F&& at, Exists&& exists) {
    const int rows = (min(pixels, kPixels) - first_row() + kEvery - 1) / kEvery;
    if (rows <= 0) {
      return;
    }
    const auto load = [&](int i, float (&values)[kOwn]) {
      load_values<T>(at(first_row() + i * kEvery, first_filter()), values);
      return exists(first_row() + i * kEvery);
    };
    if (count == 0) {
      set_pivots(rows, load);
    }
    // Sums of few at first: fewer roundings, and shorter chains.
    float sum[kOwn][kChains] = {}, square[kOwn][kChains] = {};
    int i = 0;
#pragma unroll 1
    for (; i + kAtATime <= rows; i += kAtATime) {
      float values[kAtATime][kOwn];
      bool is_there[kAtATime];
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        is_there[j] = load(i + j, values[j]);
        count += is_there[j];
      }
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) {
          float few = is_there[chain] ? values[chain][own] - pivots[own] : 0, few_squares = few * few;
#pragma unroll
          for (int j = chain + kChains; j < kAtATime; j += kChains) {
            const float distance = is_there[j] ? values[j][own] - pivots[own] : 0;
            few += distance;
            few_squares = fmaf(distance, distance, few_squares);
          }
          sum[own][chain] += few;
          square[own][chain] += few_squares;
        }
      }
    }
#pragma unroll 1
    for (; i < rows; ++i) {
      float values[kOwn];
      const bool is_there = load(i, values);
      count += is_there;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const float distance = is_there ? values[own] - pivots[own] : 0;
        sum[own][0] += distance;
        square[own][0] = fmaf(distance, distance, square[own][0]);
      }
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      sums[own] += sum[own][0] + sum[own][1];
      squares[own] += square[own][0] + square[own][1];
    }
  }

  // The means of a few of a tile's pixels, as values of T: distances from these are mostly exact.
  template <typename F>
  __device__ __forceinline__ void set_pivots(int rows, F&& load) {
    const int step = max(rows / kAtATime, 1);
    float few = 0;
#pragma unroll 1
    for (int i = 0, start = 0; few < kAtATime && start < step;) {
      float values[kOwn];
      if (load(i, values)) {
        few += 1;
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          pivots[own] += values[own] * (1.0f / kAtATime);
        }
      }
      i += step;
      i = i < rows ? i : ++start;
    }
    const float factor = kAtATime / max(few, 1.0f);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      pivots[own] = to_acc(from_acc<T>(pivots[own] * factor));
    }
  }

  // scratch: memory that nobody else uses, of a tile's results. sync(): waits for all threads of the consumer.
  template <typename F>
  __device__ __forceinline__ void write(const Block<T, kTile>& block, int consumer, uint32_t scratch, F&& sync) const {
    auto* const all = reinterpret_cast<Moments*>(shared_bytes + (scratch - block.base));
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      all[first_row() * kFilters + first_filter() + own] = from_sums(count, pivots[own], sums[own], squares[own]);
    }
    sync();
    const Params<T>& p = block.p;
#pragma unroll 1
    for (int filter = static_cast<int>(threadIdx.x) % 128; filter < kFilters; filter += 128) {
      const int k = block.first_filter() + filter;
      Moments m = all[filter];
#pragma unroll 1
      for (int other = 1; other < kEvery; ++other) {
        m = merge(m, all[other * kFilters + filter]);
      }
      if (k < p.filters) {
        p.moments[static_cast<int64_t>(block.first * kConsumers + consumer) * p.filters + k] = m;
      }
    }
  }
};

// Of a warp's 16 pixels from `pixel` on, not all of which need exist. A thread has two of them, eight apart, and two filters from k
// on, which exist or not; values: pixel by pixel. record: the number of these moments.
template <typename T>
__device__ __forceinline__ void write_warp_moments(const Params<T>& p, int64_t record, int pixel, int k, bool exists,
                                                   const float (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pixels = min(p.pixels - pixel, kWarpPixels);
  const float share = 1 / static_cast<float>(max(pixels, 1));
  const auto sum_of_lanes = [](float value) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, other);
    }
    return value;
  };
#pragma unroll 1
  for (int own = 0; own < 2; ++own) {
    const float first = to_acc(from_acc<T>(own == 0 ? values[0] : values[1]));
    const float second = to_acc(from_acc<T>(own == 0 ? values[2] : values[3]));
    const bool has_first = lane / 4 < pixels, has_second = lane / 4 + 8 < pixels;
    const float mean = sum_of_lanes((has_first ? first * share : 0) + (has_second ? second * share : 0));
    const float pivot = to_acc(from_acc<T>(mean));
    const float a = has_first ? first - pivot : 0, b = has_second ? second - pivot : 0;
    const float sum = sum_of_lanes(a + b), square = sum_of_lanes(fmaf(a, a, b * b));
    if (lane < 4 && exists) {
      p.moments[record * p.filters + k + own] = from_sums(pixels, pivot, sum, square);
    }
  }
}

}  // namespace fused_conv_bn::gemm_sm90
