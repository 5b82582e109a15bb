// Images of one pixel by filters of one tap: dot products of rows, each of which has its channels one behind the other.
//
// There is so little to do that what takes time is waiting. Lanes of a warp share the channels of a tile of results, as many lanes
// as a row has loads, up to 32. Each lane has its loads of all rows of the tile on their way together, then multiplies. In the end
// lanes exchange halves of their sums until each has one, which it finishes: affine, residual, activation. Nothing goes through
// shared memory, and no thread waits for another warp.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/conv/epilogue/residual.cuh"
#include "kernels/ptx/launch.cuh"
#include "plan.h"

namespace fused_conv_bn::pointwise {

template <typename T>
struct Params {
  const T* x;
  const T* w;
  const T* residual;  // nullptr: none
  T* y;
  int64_t w_stride_k, w_stride_c;
  AffineSource<T> affine;
  int N, C, K;
  int loads;  // of a row
  int log_lanes;
  uint32_t tiles;
  FastDiv filter_tiles;
  Activation activation;
  bool residual_last;
  float negative_slope;
};

// What a load brings, of 2 to 16 bytes: zeros where there is nothing.
template <typename T, int kBytes>
struct Piece {
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  uint32_t words[kBytes < 4 ? 1 : kBytes / 4];

  __device__ __forceinline__ void load(bool exists, const T* at) {
    if constexpr (kBytes == 2) {
      words[0] = load_half_if(exists, at);
    } else {
      load_words_if(exists, at, words);
    }
  }
  __device__ __forceinline__ void unpack(float (&values)[kElements]) const {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        values[e] = __uint_as_float(words[e]);
      }
    } else if constexpr (kElements == 1) {
      values[0] = unpack_pair(T(), words[0]).x;
    } else {
#pragma unroll
      for (int e = 0; e < kElements; e += 2) {
        const float2 pair = unpack_pair(T(), words[e / 2]);
        values[e] = pair.x;
        values[e + 1] = pair.y;
      }
    }
  }
};

// The sums of a warp's lanes that share a row: half of the sums go to the other half of the lanes, until a lane has one, the
// first of `sums`. Lanes that are left then have the same one.
template <int kSums>
__device__ __forceinline__ void exchange_sums(float (&sums)[kSums], int lane, int lanes) {
  constexpr uint32_t kAll = 0xffffffffu;
  int mask = lanes / 2;
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = upper ? sums[i] : sums[i + half];
      sums[i] = (upper ? sums[i + half] : sums[i]) + __shfl_xor_sync(kAll, other, mask);
    }
    mask /= 2;
  }
#pragma unroll 1
  for (; mask > 0; mask /= 2) {
    sums[0] += __shfl_xor_sync(kAll, sums[0], mask);
  }
}

// kBytes: of a load.
template <typename T, int kBytes, int kTile>
__global__ void __launch_bounds__(kMostThreads) pointwise_kernel(const Params<T> p) {
  constexpr TileShape kShape = kTiles[kTile];
  constexpr int kImages = kShape.images, kFilters = kShape.filters, kSums = kShape.results();
  constexpr int kChains = kSums < 4 ? 4 : 1;  // of products that wait for one another
  using P = Piece<T, kBytes>;

  const int lanes = 1 << p.log_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const uint32_t tile = blockIdx.x * (blockDim.x >> p.log_lanes) + (threadIdx.x >> p.log_lanes);
  uint32_t filter_tile = min(tile, p.tiles - 1);  // a lane without a tile helps with the last one, and writes nothing
  const int first_image = static_cast<int>(div_mod(p.filter_tiles, filter_tile)) * kImages;
  const int first_filter = static_cast<int>(filter_tile) * kFilters;

  // The result that is this lane's in the end; among several lanes of one, the first writes it.
  const int own = lane * kSums >> p.log_lanes;
  const int image = first_image + own / kFilters, filter = first_filter + own % kFilters;
  const bool writes = tile < p.tiles && lane * kSums == own << p.log_lanes && image < p.N && filter < p.K;
  const int at = image * p.K + filter;

  // The lane's first load of each row. Rows that do not exist are the last one, for results that nobody writes.
  const T *x[kImages], *w[kFilters];
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    x[i] = p.x + (min(first_image + i, p.N - 1) * p.C + lane * P::kElements);
  }
  const auto w_step = [&] {  // from load to load
    if constexpr (P::kElements == 1) {
      return p.w_stride_c;
    } else {
      return P::kElements;
    }
  }();
#pragma unroll
  for (int j = 0; j < kFilters; ++j) {
    w[j] = p.w + (min(first_filter + j, p.K - 1) * p.w_stride_k + lane * w_step);
  }

  wait_for_previous();
  let_next_begin();
  const bool has_residual = p.residual != nullptr;
  typename AffineSource<T>::Values channel{};
  T residual = from_acc<T>(0);
  float sums[kChains][kSums] = {};
#pragma unroll 1
  for (int first = 0; first < p.loads; first += kShape.depth * lanes) {
    P a[kShape.depth][kImages], b[kShape.depth][kFilters];
#pragma unroll
    for (int d = 0; d < kShape.depth; ++d) {
      const bool exists = first + d * lanes + lane < p.loads;
#pragma unroll
      for (int j = 0; j < kFilters; ++j) {
        b[d][j].load(exists, w[j]);
        w[j] += lanes * w_step;
      }
#pragma unroll
      for (int i = 0; i < kImages; ++i) {
        a[d][i].load(exists, x[i]);
        x[i] += lanes * P::kElements;
      }
    }
    if (first == 0) {  // behind the rows: conversions in here wait for their values
      if (has_residual && writes) {
        residual = p.residual[at];
      }
      channel = p.affine.values(static_cast<uint32_t>(min(filter, p.K - 1)));
    }
#pragma unroll
    for (int d = 0; d < kShape.depth; ++d) {
      if (first + d * lanes >= p.loads) {  // for all lanes
        break;
      }
      float values[kFilters][P::kElements];
#pragma unroll
      for (int j = 0; j < kFilters; ++j) {
        b[d][j].unpack(values[j]);
      }
#pragma unroll
      for (int i = 0; i < kImages; ++i) {
        float v[P::kElements];
        a[d][i].unpack(v);
#pragma unroll
        for (int j = 0; j < kFilters; ++j) {
#pragma unroll
          for (int e = 0; e < P::kElements; ++e) {
            float& sum = sums[(d * P::kElements + e) % kChains][i * kFilters + j];
            sum = fmaf(v[e], values[j][e], sum);
          }
        }
      }
    }
  }
#pragma unroll
  for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[0][i] += sums[chain][i];
    }
  }
  exchange_sums(sums[0], lane, lanes);

  const Affine<float> affine = kCentered<T> ? p.affine.centered_of(channel) : p.affine.pair_of(channel);
  float z[] = {apply_affine(sums[0][0], affine)};
  finish_sums(
      has_residual, p.residual_last, [&] { z[0] += to_acc(residual); },
      [&] { activate_all<T, false>(p.activation, p.negative_slope, z); });
  if (writes) {
    p.y[at] = from_acc<T>(z[0]);
  }
}

// Bytes of a load that rows allow where they lie.
template <typename T>
int aligned_load_bytes(const Conv2d& c, const ConvOperands& o) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  if (c.C > 1 && o.w_stride_c != 1) {
    return kElement;
  }
  int bytes = load_bytes(c);
  while (bytes > kElement &&
         !(is_aligned(o.x, bytes) && is_aligned(o.w, bytes) && (c.K == 1 || o.w_stride_k * kElement % bytes == 0))) {
    bytes /= 2;
  }
  return bytes;
}

template <typename T>
cudaError_t launch(const ConvCall& call, int tile, cudaStream_t stream) {
  const auto& [c, operands, gpu, epilogue] = call;
  const TileShape& shape = kTiles[tile];
  const int bytes = aligned_load_bytes<T>(c, operands);
  Params<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_c = operands.w_stride_c;
  p.affine = AffineSource<T>(operands.affine);
  p.N = static_cast<int>(c.N), p.C = static_cast<int>(c.C), p.K = static_cast<int>(c.K);
  p.loads = p.C * static_cast<int>(sizeof(T)) / bytes;
  p.log_lanes = log_lanes(shape, p.loads);
  p.tiles = static_cast<uint32_t>(count_tiles(c, shape));
  p.filter_tiles = FastDiv(static_cast<uint32_t>(ceil_div(c.K, shape.filters)));
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  // Blocks of few warps as long as there are not enough for all multiprocessors.
  const int64_t warps = count_warps(c, shape, p.loads);
  const auto block_warps = std::clamp<int64_t>(warps / gpu.multiprocessors, 1, kMostThreads / 32);
  const auto blocks = static_cast<unsigned>(ceil_div(warps, block_warps));
  const auto start = [&](auto kernel) {
    return launch_kernel(kernel, dim3(blocks), static_cast<unsigned>(32 * block_warps), 0, true, stream, p);
  };
  const auto start_tile = [&]<int kBytes>(std::integral_constant<int, kBytes>) {
    return tile == 0 ? start(pointwise_kernel<T, kBytes, 0>) : start(pointwise_kernel<T, kBytes, 1>);
  };
  switch (bytes) {
    case 16:
      return start_tile(std::integral_constant<int, 16>());
    case 8:
      return start_tile(std::integral_constant<int, 8>());
    case 4:
      return start_tile(std::integral_constant<int, 4>());
    default:
      if constexpr (sizeof(T) == 2) {
        return start_tile(std::integral_constant<int, 2>());
      }
      return cudaErrorInvalidValue;
  }
}

}  // namespace fused_conv_bn::pointwise

namespace fused_conv_bn {

template <typename T>
cudaError_t Pointwise::launch(const ConvCall& call, cudaStream_t stream) const {
  return call.problem.N == 0 ? cudaSuccess : pointwise::launch<T>(call, tile, stream);
}

}  // namespace fused_conv_bn
