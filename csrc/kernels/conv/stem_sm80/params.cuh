// What a kernel is launched with.
#pragma once

#include <cstdint>

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "plan.h"

namespace fused_conv_bn::stem_sm80 {

template <typename T>
struct FewChannelsParams {
  const T* x;
  const T* w;
  AffineSource<T> affine;
  const T* residual;
  T* y;
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  int C, H, W, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FewChannelsTile tile;
  FastDiv x_cols, pixel_groups, tile_q, tile_p, tiles_q, tiles_p;
  FastDiv channel_vectors, row_vectors;  // kPaired: copies of 16 bytes that a channel and a row take
  uint32_t tiles;
  int run_shift;      // contiguous: 2^run_shift lanes share a run of the output
  bool split;         // float32: in two halves, three products; else one
  bool x_vectors;     // channels_last: a pixel's quads can be read as a whole
  bool whole_groups;  // no group of input channels goes past the last one
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool stage_pairs;   // contiguous: two neighbouring results can be staged with one store
  bool run_vectors;   // contiguous: rows are whole, and a tile's runs are vectors, long enough for a warp each
  Activation activation;
  bool residual_last;
  float negative_slope;
};

}  // namespace fused_conv_bn::stem_sm80
