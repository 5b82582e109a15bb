// What the depthwise kernels share: their parameters, and the walk down the rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/conv/problem.h"
#include "kernels/elementwise/memory_format.h"
#include "kernels/ptx/launch.cuh"
#include "plan.h"

namespace fused_conv_bn {

template <typename T>
struct DepthwiseParams {
  const T* x;
  const T* w;
  const T* residual;  // nullptr: none
  T* y;
  AffineSource<T> affine;
  int64_t w_stride_k, w_stride_r, w_stride_s;
  bool dense_filters;  // one behind the other, and aligned for vectors
  int C, H, W, P, Q;
  int pad_h, pad_w;
  Activation activation;
  bool residual_last;
  acc_t<T> negative_slope;
  int tile_cols, in_cols;
  int stage_bytes;
  FastDiv col_threads;
  // contiguous
  int rows, tile_rows;
  int planes, all_planes;
  uint32_t tiles;
  FastDiv row_threads;
  FastDiv tiles_p;
  FastDiv all_channels;
  // channels_last; range i has range_rows rows of all images, one more if i < longer_ranges
  int channels;
  uint32_t range_rows, longer_ranges;
  uint32_t all_rows;
  // Of y, one or the other: means, an element for each image and channel, where each range has whole images; or sums of each
  // block's part of an image, (N, parts, C), which another kernel adds up.
  T* means;
  float* sums;
  uint32_t parts, tiles_q;
  FastDiv rows_of_range, rows_of_longer_range;
  int sums_offset;   // in shared memory, of the threads' sums; 0: neither
  bool next_begins;  // whether blocks of the next kernel may come before these end
  FastDiv lanes;
  FastDiv chunks;
  FastDiv image_rows;
};

// The filter of channel c, as the thread's channel k.
template <typename T, int R, int V>
__device__ __forceinline__ void load_filter(const DepthwiseParams<T>& p, int c, acc_t<T> (&w)[R][R][V], int k) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int s = 0; s < R; ++s) {
      w[r][s][k] = to_acc(p.w[c * p.w_stride_k + r * p.w_stride_r + s * p.w_stride_s]);
    }
  }
}

// ---- the walk down the rows ----------------------------------------------------------------------------------------

// A step takes kStride rows of inputs. Output t needs those of steps t to t + kDepthwiseSteps - 1, the last of them in
// part: input row i of step t is under row i + j * kStride of the filter for output t - j. So each input is read and
// converted once, while kDepthwiseSteps outputs are being summed: sums[k] is finished k + 1 steps on.
template <int R, int kStride>
constexpr int kDepthwiseSteps = (R - 1) / kStride + 1;

// to = from + in * a row of the filter, for kCols columns of V channels; kFresh: from is 0.
template <int kStride, bool kFresh, int R, int kCols, int kIn, int V, typename Acc>
__device__ __forceinline__ void add_row(const Acc (&in)[kIn][V], const Acc (&w)[R][V], const Acc (&from)[kCols][V],
                                        Acc (&to)[kCols][V]) {
#pragma unroll
  for (int s = 0; s < R; ++s) {
#pragma unroll
    for (int q = 0; q < kCols; ++q) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Acc x = in[q * kStride + s][k];
        to[q][k] = s > 0 ? fma(x, w[s][k], to[q][k]) : kFresh ? x * w[s][k] : fma(x, w[s][k], from[q][k]);
      }
    }
  }
}

// One step. load(i, in): input row i of the step; finish(sum): a row of outputs. The last step only finishes one, which
// takes its first row. The sums move on by one as they grow, in an order that needs no copies.
template <int R, int kStride, int kCols, int V, typename Acc, typename Load, typename Finish>
__device__ __forceinline__ void step_down(const Acc (&w)[R][R][V],
                                          Acc (&sums)[kDepthwiseSteps<R, kStride> - 1][kCols][V], Load load,
                                          Finish finish, bool last) {
  static_assert((R - 1) % kStride == 0, "the first row of a step finishes an output");
  constexpr int kSteps = kDepthwiseSteps<R, kStride>;
  Acc in[(kCols - 1) * kStride + R][V];
  load(0, in);
  add_row<kStride, false>(in, w[R - 1], sums[0], sums[0]);
  finish(sums[0]);
#pragma unroll
  for (int j = kSteps - 2; j >= 1; --j) {
    add_row<kStride, false>(in, w[j * kStride], sums[kSteps - 1 - j], sums[kSteps - 2 - j]);
  }
  add_row<kStride, true>(in, w[0], sums[kSteps - 2], sums[kSteps - 2]);
#pragma unroll
  for (int i = 1; i < kStride; ++i) {
    if (last) {
      break;
    }
    load(i, in);
#pragma unroll
    for (int j = (R - 1 - i) / kStride; j >= 0; --j) {
      add_row<kStride, false>(in, w[i + j * kStride], sums[kSteps - 2 - j], sums[kSteps - 2 - j]);
    }
  }
}

}  // namespace fused_conv_bn
