// A convolution as the product of a matrix of pixels by one of filters, each row of which has the terms of one result.
//
// A block has a tile of pixels by filters. Stages of its terms, 64 at a time, come to shared memory while the one before is
// multiplied (cp.async): of each pixel those values that its filter falls on, by their taps and channels, zeros where that is
// outside of the image; and of each filter its weights. Sums stay in registers. In the end they go through shared memory, so that
// each thread finishes eight filters of a pixel: affine, residual, activation, and 16 bytes to the output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/conv/epilogue/residual.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/shared.cuh"
#include "plan.h"

namespace fused_conv_bn::gemm_sm80 {

template <typename T>
struct Params {
  const T* x;
  const T* w;  // filter by filter, row by row, tap by tap, the channels of a group
  const T* residual;
  T* y;
  AffineSource<T> affine;
  Extents c;
  int pixels;
  int group_channels, group_filters, terms;
  FastDiv image_pixels, columns;      // of the output
  FastDiv filter_tiles, group_tiles;  // of a group, and of all pixels in a group
  bool y_vectors;                     // a pixel's filters can be written eight at a time
  Activation activation;
  bool residual_last;
  float negative_slope;
};

// Where the terms of a stage are that a thread copies: a tap, and a channel.
struct Term {
  int r, s, channel;

  // `terms` on. A filter's taps are wrapped once at most where it has as many channels.
  __device__ __forceinline__ void advance(int terms, int channels, int columns) {
    channel += terms;
    while (channel >= channels) {
      channel -= channels;
      if (++s == columns) {
        s = 0;
        ++r;
      }
    }
  }
};

// The chunk of a row in shared memory: those of eight rows that a warp reads at once lie in different banks.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kDepth * 2 + ((chunk ^ (row & 7)) * 16));
}

template <typename T, int kTile>
struct Block {
  static constexpr TileShape kShape = kTiles[kTile];
  static constexpr int kThreads = kShape.threads();
  static constexpr int kRowThreads = kDepth / kChunk;  // that copy a row's terms
  static constexpr int kRowStep = kThreads / kRowThreads;
  static constexpr int kPixelRows = kShape.pixels / kRowStep;    // of a thread
  static constexpr int kFilterRows = kShape.filters / kRowStep;  // of a thread
  static constexpr int kWarpPixels = kShape.pixels / kShape.warps_m;
  static constexpr int kWarpFilters = kShape.filters / kShape.warps_n;
  static constexpr int kM = kWarpPixels / 16, kN = kWarpFilters / 8;
  static_assert(kShape.pixels % kRowStep == 0 && kShape.filters % kRowStep == 0 && kN % 2 == 0);

  const Params<T>& p;
  const uint32_t shared;  // the stages
  int first_pixel, first_filter, group;

  // ---- copies ----

  // A row of pixels as a thread copies it: the first input pixel of its filter, and its place in memory.
  uint32_t offset[kPixelRows];  // modulo 2^32: outside of the image it may be anything
  int origin[kPixelRows];       // row and column of the input, 16 bits each
  int filter_offset[kFilterRows];
  Term term;
  int next_term;  // of the filter, that this thread copies next

  static constexpr int kNoOrigin = -0x4000;  // outside of every image, whatever the tap

  __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / kRowThreads; }
  __device__ __forceinline__ int chunk() const { return static_cast<int>(threadIdx.x) % kRowThreads; }

  __device__ __forceinline__ void begin() {
    const Extents& c = p.c;
    next_term = chunk() * kChunk;
    term = {0, 0, 0};
    term.advance(next_term, p.group_channels, c.S);
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int pixel = first_pixel + row() + i * kRowStep;
      offset[i] = 0;
      origin[i] = kNoOrigin << 16;
      if (pixel < p.pixels) {
        uint32_t rest = pixel;
        const auto image = static_cast<int>(div_mod(p.image_pixels, rest));
        const auto out_row = static_cast<int>(div_mod(p.columns, rest));
        const int h = out_row * c.stride_h - c.pad_h, w = static_cast<int>(rest) * c.stride_w - c.pad_w;
        const auto at = static_cast<uint32_t>(image * c.H + h) * static_cast<uint32_t>(c.W) + static_cast<uint32_t>(w);
        offset[i] = at * static_cast<uint32_t>(c.C) + static_cast<uint32_t>(group * p.group_channels);
        origin[i] = h << 16 | (w & 0xffff);
      }
    }
#pragma unroll
    for (int i = 0; i < kFilterRows; ++i) {
      const int filter = first_filter + row() + i * kRowStep;
      filter_offset[i] = filter < p.group_filters ? (group * p.group_filters + filter) * p.terms : -1;
    }
  }

  __device__ __forceinline__ void copy_stage(int stage) {
    const Extents& c = p.c;
    const uint32_t pixels = shared + stage * kShape.stage_bytes();
    const uint32_t filters = pixels + kShape.pixels * kDepth * 2;
    const bool exists = next_term < p.terms;
    const int down = term.r * c.dilation_h, right = term.s * c.dilation_w;
    const auto tap = static_cast<uint32_t>(down * c.W + right) * static_cast<uint32_t>(c.C) +
                     static_cast<uint32_t>(term.channel);
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int h = (origin[i] >> 16) + down, w = static_cast<int16_t>(origin[i]) + right;
      const bool inside = exists && static_cast<unsigned>(h) < static_cast<unsigned>(c.H) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(c.W);
      const T* from = inside ? p.x + (offset[i] + tap) : p.x;
      copy_async(pixels + chunk_offset(row() + i * kRowStep, chunk()), from, inside);
    }
#pragma unroll
    for (int i = 0; i < kFilterRows; ++i) {
      const bool inside = exists && filter_offset[i] >= 0;
      const T* from = inside ? p.w + (filter_offset[i] + next_term) : p.w;
      copy_async(filters + chunk_offset(row() + i * kRowStep, chunk()), from, inside);
    }
    next_term += kDepth;
    term.advance(kDepth, p.group_channels, c.S);
  }

  // ---- products ----

  float sums[kM][kN][4];

  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int warp_pixel() const {
    return static_cast<int>(threadIdx.x) / 32 / kShape.warps_n * kWarpPixels;
  }
  __device__ __forceinline__ int warp_filter() const {
    return static_cast<int>(threadIdx.x) / 32 % kShape.warps_n * kWarpFilters;
  }

  // 16 terms of a stage, from the chunk `2 * step` on.
  __device__ __forceinline__ void multiply(int stage, int step) {
    const uint32_t pixels = shared + stage * kShape.stage_bytes();
    const uint32_t filters = pixels + kShape.pixels * kDepth * 2;
    uint4 a[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int row = warp_pixel() + i * 16 + lane() % 16;
      a[i] = load_matrices(pixels + chunk_offset(row, 2 * step + lane() / 16));
    }
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      const int row = warp_filter() + j * 8 + lane() % 8 + lane() / 16 * 8;
      const uint4 b = load_matrices(filters + chunk_offset(row, 2 * step + lane() / 8 % 2));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16<T>(sums[i][j], a[i], uint2{b.x, b.y});
        mma_m16n8k16<T>(sums[i][j + 1], a[i], uint2{b.z, b.w});
      }
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kStages = kShape.stages;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[i][j][e] = 0;
        }
      }
    }
    const int stages = (p.terms + kDepth - 1) / kDepth;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < stages) {
        copy_stage(s);
      }
      copy_async_commit();
    }
    int stage = 0, filled = kStages - 1;  // the one to multiply, and the one to fill
    for (int s = 0; s < stages; ++s) {
      copy_async_wait_all_but<kStages - 2>();
      __syncthreads();
      if (s + kStages - 1 < stages) {
        copy_stage(filled);
      }
      copy_async_commit();
      const int steps = min(kDepth / 16, (p.terms - s * kDepth + 15) / 16);
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        if (step < steps) {
          multiply(stage, step);
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
      filled = filled + 1 == kStages ? 0 : filled + 1;
    }
    copy_async_wait_all_but<0>();
    __syncthreads();
  }

  // ---- results ----

  static constexpr int kSumPitch = kShape.filters + kPaddedSums;

  __device__ __forceinline__ void stage_sums(float* staged) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float* to = staged + (warp_pixel() + i * 16 + lane() / 4) * kSumPitch + warp_filter() + j * 8 + lane() % 4 * 2;
        *reinterpret_cast<float2*>(to) = {sums[i][j][0], sums[i][j][1]};
        *reinterpret_cast<float2*>(to + 8 * kSumPitch) = {sums[i][j][2], sums[i][j][3]};
      }
    }
  }

  // Eight filters of a pixel, at `at` of the output: as many of them as `count` says exist.
  __device__ __forceinline__ void finish(const float* staged, const float* scales, const float* shifts, int64_t at,
                                         int count) const {
    const bool whole = p.y_vectors && count >= kChunk;
    float v[kChunk], residual[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; k += 4) {
      const float4 sum = *reinterpret_cast<const float4*>(staged + k);
      const float4 scale = *reinterpret_cast<const float4*>(scales + k);
      const float4 shift = *reinterpret_cast<const float4*>(shifts + k);
      v[k] = apply_affine(sum.x, Affine<float>{0, scale.x, shift.x});
      v[k + 1] = apply_affine(sum.y, Affine<float>{0, scale.y, shift.y});
      v[k + 2] = apply_affine(sum.z, Affine<float>{0, scale.z, shift.z});
      v[k + 3] = apply_affine(sum.w, Affine<float>{0, scale.w, shift.w});
    }
    if (p.residual != nullptr) {
      unpack(load_vec(p.residual + at, 0, count, whole, whole), residual);
    }
    finish_sums(
        p.residual != nullptr, p.residual_last,
        [&] {
#pragma unroll
          for (int k = 0; k < kChunk; ++k) {
            v[k] += residual[k];
          }
        },
        [&] { activate_all<T, false>(p.activation, p.negative_slope, v); });
    Vec<T> packed;
    pack(v, packed);
    store_vec(p.y + at, 0, count, whole, packed);
  }

  __device__ __forceinline__ void write(const float* staged, const float* scales, const float* shifts) const {
    constexpr int kVectors = kShape.filters / kChunk;  // of a pixel
    const int filters = p.group_filters - first_filter;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kShape.pixels * kVectors; i += kThreads) {
      const int pixel = i / kVectors, filter = i % kVectors * kChunk;
      if (first_pixel + pixel < p.pixels && filter < filters) {
        const int64_t at = static_cast<int64_t>(first_pixel + pixel) * p.c.K + group * p.group_filters + first_filter +
                           filter;
        finish(staged + pixel * kSumPitch + filter, scales + filter, shifts + filter, at,
               min(filters - filter, kChunk));
      }
    }
  }
};

template <typename T, int kTile>
__global__ void __launch_bounds__(kTiles[kTile].threads()) gemm_sm80_kernel(const Params<T> p) {
#if __CUDA_ARCH__ >= 800
  using B = Block<T, kTile>;
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int kStaged = B::kShape.shared_memory() - B::kShape.filters * 8;
  auto* const sums = reinterpret_cast<float*>(memory);
  auto* const scales = reinterpret_cast<float*>(memory + kStaged);
  float* const shifts = scales + B::kShape.filters;
  // Blocks of the same pixels run together: what they read is in L2 then.
  uint32_t tile = blockIdx.x;
  const auto group = static_cast<int>(div_mod(p.group_tiles, tile));
  const auto pixel_tile = static_cast<int>(div_mod(p.filter_tiles, tile));
  B block{.p = p,
          .shared = shared_address(memory),
          .first_pixel = pixel_tile * B::kShape.pixels,
          .first_filter = static_cast<int>(tile) * B::kShape.filters,
          .group = group};
  block.begin();
  wait_for_previous();
  if (const int filter = static_cast<int>(threadIdx.x); filter < B::kShape.filters) {
    const bool exists = block.first_filter + filter < p.group_filters;
    const Affine<float> affine = exists ? p.affine.pair(group * p.group_filters + block.first_filter + filter)
                                        : Affine<float>{0, 0, 0};
    scales[filter] = affine.scale;
    shifts[filter] = affine.shift;
  }
  block.run();
  let_next_begin();
  block.stage_sums(sums);
  __syncthreads();
  block.write(sums, scales, shifts);
#endif
}

template <typename T>
cudaError_t launch(const ConvCall& call, int tile, cudaStream_t stream) {
  const auto& [c, operands, gpu, epilogue] = call;
  const TileShape& shape = kTiles[tile];
  Params<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.affine = AffineSource<T>(operands.affine);
  p.c = narrow(c);
  p.c.dilation_h = c.R == 1 ? 1 : p.c.dilation_h;  // where a filter has one row, its dilation may be anything
  p.c.dilation_w = c.S == 1 ? 1 : p.c.dilation_w;
  p.pixels = static_cast<int>(c.N * c.P * c.Q);
  p.group_channels = static_cast<int>(c.C / c.groups);
  p.group_filters = static_cast<int>(c.K / c.groups);
  p.terms = static_cast<int>(c.C / c.groups * c.R * c.S);
  p.image_pixels = FastDiv(static_cast<uint32_t>(c.P * c.Q));
  p.columns = FastDiv(static_cast<uint32_t>(c.Q));
  const int64_t filter_tiles = ceil_div(p.group_filters, shape.filters);
  const int64_t group_tiles = ceil_div(p.pixels, shape.pixels) * filter_tiles;
  p.filter_tiles = FastDiv(static_cast<uint32_t>(filter_tiles));
  p.group_tiles = FastDiv(static_cast<uint32_t>(group_tiles));
  p.y_vectors = p.group_filters % kChunk == 0 && is_aligned(p.y) && is_aligned(p.residual);
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  const auto start = [&](auto kernel) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    shape.shared_memory());
    return status != cudaSuccess
               ? status
               : launch_kernel(kernel, dim3(static_cast<unsigned>(group_tiles * c.groups)),
                               static_cast<unsigned>(shape.threads()), shape.shared_memory(), true, stream, p);
  };
  switch (tile) {
    case 0:
      return start(gemm_sm80_kernel<T, 0>);
    case 1:
      return start(gemm_sm80_kernel<T, 1>);
    case 2:
      return start(gemm_sm80_kernel<T, 2>);
    default:
      return start(gemm_sm80_kernel<T, 3>);
  }
}

}  // namespace fused_conv_bn::gemm_sm80

namespace fused_conv_bn {

template <typename T>
cudaError_t GemmSm80::launch(const ConvCall& call, cudaStream_t stream) const {
  if constexpr (sizeof(T) == 2) {
    return call.problem.N == 0 ? cudaSuccess : gemm_sm80::launch<T>(call, tile, stream);
  } else {
    return cudaErrorInvalidValue;  // supports() has none of these
  }
}

}  // namespace fused_conv_bn
