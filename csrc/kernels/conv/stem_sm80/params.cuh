// What a kernel is launched with.
#pragma once

#include <cstdint>

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/conv/tile.cuh"
#include "plan.h"

namespace fused_conv_bn::stem_sm80 {

template <typename T>
struct Params {
  const T* x;
  const T* w;
  AffineSource<T> affine;
  const T* residual;
  T* y;
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  Extents c;
  TileLayout tile;
  FastDiv x_cols, pixel_slices, tile_q, tile_p, tiles_q, tiles_p;
  FastDiv channel_vectors, row_vectors;  // kAlternating: copies of 16 bytes that a channel and a row take
  uint32_t tiles;
  int run_shift;      // contiguous: 2^run_shift lanes share a run of the output
  bool split;         // float32: in two terms, three products; else one
  bool x_vectors;     // channels_last: a pixel's quads can be read as a whole
  bool whole_slices;  // no slice of input channels goes past the last one
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool stage_pairs;   // contiguous: two neighbouring results can be staged with one store
  bool run_vectors;   // contiguous: rows are whole, and a tile's runs are vectors, long enough for a warp each
  Activation activation;
  bool residual_last;
  float negative_slope;
};

}  // namespace fused_conv_bn::stem_sm80
