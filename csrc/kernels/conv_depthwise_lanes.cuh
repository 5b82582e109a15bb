// Depthwise convolution of channels_last tensors.
//
// A block has some channels of tile_cols columns, and goes down a range of rows. A ring of steps in shared memory holds
// the inputs: one step is computed while the next ones arrive (cp.async). A thread has two channels, its lane, of
// seven columns. The weights stay in registers. Padding is zeros: that of columns lies in the ring
// from the start, that of rows is copied as such.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_depthwise_common.cuh"
#include "copy_async.cuh"

namespace fused_conv_bn {

// conv_depthwise.h's number, which device code can only have as a constant.
template <int kStride>
constexpr int kDepthwiseStages = depthwise_stages(kStride);

// A lane's channels, in shared or global memory.
template <typename T>
__device__ __forceinline__ void load_lane(const T* address, float (&out)[2]) {
  const float2 two = unpack_pair(T(), *reinterpret_cast<const uint32_t*>(address));
  out[0] = two.x, out[1] = two.y;
}
__device__ __forceinline__ void load_lane(const float* address, float (&out)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(address);
  out[0] = two.x, out[1] = two.y;
}

template <typename T>
__device__ __forceinline__ void store_lane(T* address, const float* in) {
  *reinterpret_cast<uint32_t*>(address) = pack_pair(T(), in[0], in[1]);
}
__device__ __forceinline__ void store_lane(float* address, const float* in) {
  *reinterpret_cast<float2*>(address) = {in[0], in[1]};
}

// gridDim.x: the chunks of channels, so that the blocks which share lines of x run together, of all tiles across the
// image. gridDim.y: the ranges of rows.
template <typename T, int R, int kStride>
__global__ void __launch_bounds__(depthwise_lane_threads(R), depthwise_lane_blocks(R))
    conv_depthwise_lanes_kernel(const DepthwiseParams<T> p) {
#if __CUDA_ARCH__ >= 800  // select_config() leaves older GPUs to PyTorch
  constexpr int V = kDepthwiseLaneChannels;
  constexpr int kCols = kDepthwiseCols;
  constexpr int kIn = (kCols - 1) * kStride + R;
  constexpr int kSteps = kDepthwiseSteps<R, kStride>;
  constexpr int kStages = kDepthwiseStages<kStride>;
  constexpr int kPiece = Vec<T>::kSize;
  extern __shared__ uint4 shared[];
  unsigned char* const ring = reinterpret_cast<unsigned char*>(shared);
  const int ring_bytes = kStages * p.stage_bytes;
#pragma unroll 1
  for (int at = threadIdx.x * 16; at < ring_bytes; at += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(ring + at) = uint4{0, 0, 0, 0};
  }
  uint32_t chunk = blockIdx.x;
  const int q0 = static_cast<int>(div_mod(p.chunks, chunk)) * p.tile_cols;
  const int first_channel = static_cast<int>(chunk) * p.channels;
  uint32_t lane = threadIdx.x;
  const int col_thread = static_cast<int>(div_mod(p.lanes, lane));
  const int c0 = first_channel + static_cast<int>(lane) * V;
  const bool works = col_thread < static_cast<int>(p.col_threads.divisor);
  // Columns that the thread has to compute.
  const int cols = works && c0 < p.C ? min(p.tile_cols, p.Q - q0) - col_thread * kCols : 0;
  uint32_t row = blockIdx.y * p.range_rows + min(blockIdx.y, p.longer_ranges);
  const uint32_t end = row + p.range_rows + (blockIdx.y < p.longer_ranges ? 1 : 0);

  // What the thread copies of a row: 16 bytes of channels of the pixels pixel, pixel + pixel_step, ... that exist.
  const int pixel_bytes = p.channels * static_cast<int>(sizeof(T));
  const int row_bytes = p.in_cols * pixel_bytes;
  const int pieces = p.channels / kPiece;
  const int pixel_step = static_cast<int>(p.col_threads.divisor) * kPiece / V;
  const int w0 = q0 * kStride - p.pad_w;
  int pixel = static_cast<int>(threadIdx.x) / pieces;
  const int piece = (static_cast<int>(threadIdx.x) - pixel * pieces) * kPiece;
  const int pixel_end = works && first_channel + piece < p.C ? min(p.in_cols, p.W - w0) : 0;
  while (pixel < -w0) {
    pixel += pixel_step;
  }
  const int64_t from_offset = static_cast<int64_t>(w0 + pixel) * p.C + first_channel + piece;
  const int to_offset = pixel * pixel_bytes + piece * static_cast<int>(sizeof(T));

  acc_t<T> w[R][R][V];
  Affine<acc_t<T>> affine[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int c = min(c0 + k, p.C - 1);
    affine[k] = {0, p.scale[c], p.shift[c]};
    load_filter(p, c, w, k);
  }
  acc_t<T> sums[kSteps - 1][kCols][V];  // its first values are not used
#pragma unroll
  for (int i = 0; i < (kSteps - 1) * kCols * V; ++i) {
    sums[i / (kCols * V)][i / V % kCols][i % V] = 0;
  }
  T* out = p.y + ((static_cast<int64_t>(row) * p.Q + q0 + col_thread * kCols) * p.C + c0);
  const int in_offset = (col_thread * kCols * kStride * p.channels + static_cast<int>(lane) * V) *
                        static_cast<int>(sizeof(T));
  unsigned char* stage = ring;  // the one to copy to, then the one to compute

  // The rows of one image at a time.
#pragma unroll 1
  while (row < end) {
    const uint32_t n = p.image_rows.div(row);
    const int p0 = static_cast<int>(row - n * p.image_rows.divisor);
    const int rows = min(static_cast<int>(end - row), p.P - p0);
    row += rows;
    int h = p0 * kStride - p.pad_h;
    const T* from_row = p.x + (static_cast<int64_t>(n) * p.H + h) * p.W * p.C + from_offset;
    __syncthreads();
    // Step t is computed, and step t + kStages - 1 begins to arrive.
#pragma unroll 1
    for (int t = 1 - kStages; t < rows + kSteps - 1; ++t) {
      if (t >= 0) {
        copy_async_wait_all_but<kStages - 2>();
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kStride; ++i) {
        if (t + kStages - 1 < rows + kSteps - 1 - (i > 0 ? 1 : 0)) {
          const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(p.H);
          const T* from = from_row;
          unsigned char* to = stage + i * row_bytes + to_offset;
#pragma unroll 1
          for (int at = pixel; at < pixel_end; at += pixel_step) {
            copy_async(to, from, exists);
            from += pixel_step * p.C;
            to += pixel_step * pixel_bytes;
          }
        }
        ++h;
        from_row += p.W * p.C;
      }
      copy_async_commit();
      stage += p.stage_bytes;
      if (stage == ring + ring_bytes) {
        stage = ring;
      }
      if (t < 0 || cols <= 0) {
        continue;
      }
      step_down<R, kStride, kCols, V>(
          w, sums,
          [&](int i, acc_t<T>(&in)[kIn][V]) {
            const unsigned char* from = stage + i * row_bytes + in_offset;
#pragma unroll
            for (int col = 0; col < kIn; ++col) {
              load_lane(reinterpret_cast<const T*>(from), in[col]);
              from += pixel_bytes;
            }
          },
          [&](const acc_t<T>(&sum)[kCols][V]) {
            if (t < kSteps - 1) {
              return;
            }
            acc_t<T> z[kCols * V];
#pragma unroll
            for (int k = 0; k < kCols * V; ++k) {
              z[k] = epilogue<Activation::none>(sum[k / V][k % V], affine[k % V]);
            }
            if (p.residual != nullptr) {
              const T* from = p.residual + (out - p.y);
#pragma unroll
              for (int q = 0; q < kCols; ++q) {
                if (q < cols) {
                  acc_t<T> residual[V];
                  load_lane(from + q * p.C, residual);
#pragma unroll
                  for (int k = 0; k < V; ++k) {
                    z[q * V + k] += residual[k];  // as epilogue() does
                  }
                }
              }
            }
            activate<V>(p.activation, z);
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              if (q < cols) {
                store_lane(out + q * p.C, z + q * V);
              }
            }
            out += p.Q * p.C;
          });
    }
  }
#endif
}

}  // namespace fused_conv_bn
