// Depthwise convolution of contiguous tensors.
//
// A tile is full rows of a plane, or whole planes, so it is one contiguous piece of x and gives one of y. Both are
// copied 16 bytes at a time, through shared memory, however odd the width: a block copies the next tile in (cp.async)
// while it computes one. A thread has one channel of seven columns, and walks down some rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common.cuh"
#include "kernels/ptx/cp_async.cuh"

namespace fused_conv_bn {

// A tile of contiguous outputs, and the rows of inputs that it needs and that exist. Whole planes if there are many.
struct DepthwiseRows {
  int plane, planes;
  int p0, p1;
  int h0, h1;
};

template <int R, int kStride, typename T>
__device__ __forceinline__ DepthwiseRows rows_of(const DepthwiseParams<T>& p, uint32_t tile) {
  DepthwiseRows at;
  at.plane = static_cast<int>(div_mod(p.tiles_p, tile)) * p.planes;
  at.planes = min(p.planes, p.all_planes - at.plane);
  at.p0 = static_cast<int>(tile) * p.tile_rows;
  at.p1 = min(p.P, at.p0 + p.tile_rows);
  if (p.planes > 1) {
    at.h0 = 0;
    at.h1 = p.H;
  } else {
    at.h0 = min(p.H, max(0, at.p0 * kStride - p.pad_h));
    at.h1 = max(at.h0, min(p.H, (at.p1 - 1) * kStride - p.pad_h + R));
  }
  return at;
}

// How many elements a tensor's address lies behind a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ int phase_of(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kVecBytes / sizeof(T));
}

// The first element of the tile's rows, and how many elements they have.
template <typename T>
__device__ __forceinline__ const T* input_span(const DepthwiseParams<T>& p, const DepthwiseRows& at, int& count) {
  count = ((at.planes - 1) * p.H + at.h1 - at.h0) * p.W;
  return p.x + (static_cast<int64_t>(at.plane) * p.H + at.h0) * p.W;
}

// Starts the copy of a tile's inputs, which keep their phase.
template <int R, int kStride, typename T>
__device__ __forceinline__ void copy_rows(const DepthwiseParams<T>& p, uint32_t tile, T* stage) {
  constexpr int V = Vec<T>::kSize;
  int count;
  const T* from = input_span(p, rows_of<R, kStride>(p, tile), count);
  const int phase = phase_of(from);
  from -= phase;
  count += phase;
#pragma unroll 1
  for (int e = threadIdx.x * V; e < count; e += blockDim.x * V) {
    if (e >= phase && e + V <= count) {
      copy_async(stage + e, from + e);
    } else {
#pragma unroll 1
      for (int k = max(e, phase); k < min(e + V, count); ++k) {
        stage[k] = from[k];
      }
    }
  }
}

// CUDA 12's compiler tries for 128 registers with 5x5 filters, and spills; with 2 blocks named, which is as many, it
// does not.
template <int R>
constexpr int kDepthwisePlaneBlocks = __CUDACC_VER_MAJOR__ < 13 && R == 5 ? 2 : 0;  // 0: unnamed

// One long body: cut into functions, kernels took up to 1.04 times as long (960 channels of 7x7: 7.4 and 7.7 us).
//
// kBounds: the activation is a bound.
template <typename T, int R, int kStride, bool kBounds>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwisePlaneBlocks<R>)
    conv_depthwise_planes_kernel(const DepthwiseParams<T> p) {
#if __CUDA_ARCH__ >= 800  // select_plan() leaves older GPUs to PyTorch
  wait_for_previous();
  using Acc = acc_t<T>;
  constexpr int kCols = kDepthwiseCols;
  constexpr int kSteps = kDepthwiseSteps<R, kStride>;
  constexpr int kIn = (kCols - 1) * kStride + R;
  static_assert(kIn * sizeof(T) <= kDepthwiseZeroBytes);
  extern __shared__ uint4 shared[];
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(shared);
  T* const zeros = reinterpret_cast<T*>(bytes);
  const auto stage = [&](int i) { return reinterpret_cast<T*>(bytes + kDepthwiseZeroBytes + i * p.stage_bytes); };
  T* const result = stage(2);
  if (threadIdx.x < kIn) {
    zeros[threadIdx.x] = from_acc<T>(0);
  }

  const uint32_t step = gridDim.x;
#pragma unroll 1
  for (uint32_t next = blockIdx.x, i = 0; next < p.tiles + step; next += step, i ^= 1) {
    if (next < p.tiles) {
      copy_rows<R, kStride>(p, next, stage(i));
    }
    copy_async_commit();
    if (next == blockIdx.x) {
      continue;
    }
    copy_async_wait_all_but<1>();
    __syncthreads();

    const DepthwiseRows at = rows_of<R, kStride>(p, next - step);
    const int64_t out_at = (static_cast<int64_t>(at.plane) * p.P + at.p0) * p.Q;
    const int out_phase = phase_of(p.y + out_at);
    const uint32_t units = at.planes * p.row_threads.divisor * p.col_threads.divisor;
#pragma unroll 1
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
      uint32_t col_thread = unit;
      uint32_t group = div_mod(p.col_threads, col_thread);
      const int plane = static_cast<int>(div_mod(p.row_threads, group));
      const int first_row = at.p0 + static_cast<int>(group) * p.rows;
      const int rows = min(p.rows, at.p1 - first_row);
      if (rows <= 0) {
        continue;
      }
      const int first_col = static_cast<int>(col_thread) * kCols;
      const int cols = p.Q - first_col;
      const uint32_t image_plane = static_cast<uint32_t>(at.plane + plane);
      const int c = static_cast<int>(image_plane - p.all_channels.div(image_plane) * p.all_channels.divisor);
      Acc w[R][R][1];
      load_filter(p, c, w, 0);
      const Affine<Acc> affine = p.affine.pair(c);

      const int w0 = first_col * kStride - p.pad_w;
      uint32_t exists = 0;  // bit i: column w0 + i
#pragma unroll
      for (int col = 0; col < kIn; ++col) {
        exists |= (static_cast<unsigned>(w0 + col) < static_cast<unsigned>(p.W) ? 1u : 0u) << col;
      }
      int count;
      const int in_phase = phase_of(input_span(p, at, count));
      int h = first_row * kStride - p.pad_h;
      const T* in_at = stage(i ^ 1) + (in_phase + (plane * p.H - at.h0 + h) * p.W + w0);
      int e = (plane * p.P + first_row - at.p0) * p.Q + first_col;
      Acc sums[kSteps - 1][kCols][1];  // its first values are not used
#pragma unroll
      for (int k = 0; k < (kSteps - 1) * kCols; ++k) {
        sums[k / kCols][k % kCols][0] = 0;
      }
#pragma unroll 1
      for (int t = 0; t < rows + kSteps - 1; ++t) {
        step_down<R, kStride, kCols, 1>(
            w, sums,
            [&](int, Acc(&in)[kIn][1]) {
              const T* from = h >= at.h0 && h < at.h1 ? in_at : zeros;
#pragma unroll
              for (int col = 0; col < kIn; ++col) {
                in[col][0] = exists >> col & 1 ? to_acc(from[col]) : Acc(0);
              }
              ++h;
              in_at += p.W;
            },
            [&](const Acc(&sum)[kCols][1]) {
              if (t < kSteps - 1) {
                return;
              }
              Acc z[kCols];
#pragma unroll
              for (int q = 0; q < kCols; ++q) {
                z[q] = apply_affine(sum[q][0], affine);
              }
              const auto add_residual = [&] {
#pragma unroll
                for (int q = 0; q < kCols; ++q) {
                  if (q < cols) {
                    z[q] += to_acc(p.residual[out_at + e + q]);
                  }
                }
              };
              if (p.residual != nullptr && !p.residual_last) {
                add_residual();
              }
              activate_all<T, kBounds>(p.activation, p.negative_slope, z);
              if (p.residual != nullptr && p.residual_last) [[unlikely]] {
                add_residual();
              }
#pragma unroll
              for (int q = 0; q < kCols; ++q) {
                if (q < cols) {
                  result[out_phase + e + q] = from_acc<T>(z[q]);
                }
              }
              e += p.Q;
            },
            t == rows + kSteps - 2);
      }
    }
    __syncthreads();

    constexpr int V = Vec<T>::kSize;
    T* const to = p.y + out_at - out_phase;
    const int end = out_phase + ((at.planes - 1) * p.P + at.p1 - at.p0) * p.Q;
#pragma unroll 1
    for (int e = threadIdx.x * V; e < end; e += blockDim.x * V) {
      if (e >= out_phase && e + V <= end) {
        store_words(to + e, *reinterpret_cast<const uint4*>(result + e));
      } else {
#pragma unroll 1
        for (int k = max(e, out_phase); k < min(e + V, end); ++k) {
          to[k] = result[k];
        }
      }
    }
  }
#endif
}

}  // namespace fused_conv_bn
