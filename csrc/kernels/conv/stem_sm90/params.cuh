// What the kernel of stem_sm90 is launched with, and what its template arguments fix.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/batch_norm/fold.h"
#include "kernels/batch_norm/moments.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "tile.h"

namespace fused_conv_bn::stem_sm90 {

constexpr uint32_t kNoUnit = 0xffffffffu;
constexpr uint32_t kNoTile = 0xffffffffu;

// What a kernel puts out: results in one of the two layouts, or moments of each channel and no results.
enum class Output { contiguous, channels_last, moments };

template <typename T>
struct Params : Extents {
  const T* x;
  const T* w;
  AffineSource<T> affine;  // of moments: unused
  bool late_affine;        // the kernel before makes its tensors: center, scale and shift
  const T* residual;
  T* y;
  Moments* moments;                        // [blocks][consumers][K]
  int w_stride_c, w_stride_r, w_stride_s;  // output channels follow each other
  int x_stride_c, x_stride_h, x_stride_w;
  TileLayout tile;
  int x_units;
  int x_row_bytes, x_col_bytes;      // of the input: of a row, from column to column
  int x_separate;                    // channels of the input that lie apart from each other
  int unit_row_bytes, unit_channel;  // where units are read: bytes from row to row, from channel to channel
  FastDiv x_cols, x_rows, c_blocks, phases_w, raw_rows, tiles_q, tiles_p, tile_p, row_vectors;
  uint32_t tiles;
  bool raw_in_bulk;   // raw rows come by bulk copies
  bool raw_vectors;   // float32: a unit's eight channels lie side by side in the raw rows
  bool w_vectors;     // float32: and in the weights
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool out_pairs;     // contiguous: two neighbouring results can be put into the output buffer with one store
  bool runs_aligned;  // contiguous, whole rows: each channel's part of a tile starts and ends at multiples of 16 bytes
  bool rows_aligned;  // contiguous, rows that are not whole: each starts at a multiple of 16 bytes
  // The output buffer is written by bulk copies. contiguous: rows are whole; channels_last: there is a buffer.
  bool y_in_bulk;
  bool streams;  // the output is larger than L2
  Activation activation;
  bool residual_last;
  bool orders_activation;  // the activation takes long: consumers compute it one after another
  float negative_slope;
  uint32_t steps[kMaxUnits / 2];  // operand_start() of each step, from the tile's first unit on
  uint32_t units[kMaxUnits];      // r, s and c_block of each step's two units; kNoUnit
};

// kBlockChannels_: output channels of a block. 32 is for channels_last in 16 bits.
// kBounds_: the activation is none or a bound, which comes with the rounding in 16 bits.
template <typename T_, Output kOutput_, int kBlockChannels_, bool kBounds_>
struct Config {
  using T = T_;
  static constexpr Output kOutput = kOutput_;
  static constexpr int kChannels = kBlockChannels_;
  static constexpr bool kBounds = kBounds_;

  static constexpr bool kContiguous = kOutput == Output::contiguous;
  static constexpr bool kChannelsLast = kOutput == Output::channels_last;
  static constexpr bool kMoments = kOutput == Output::moments;
  static constexpr bool kFloat32 = std::is_same_v<T, float>;
  using MmaType = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr int kSplits = kFloat32 ? 2 : 1;
  static constexpr int kWeightRows = kSplits * kChannels;  // for each unit
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr int kVec = Vec<T>::kSize;

  static constexpr int kProducerThreads = 128 * kProducerWarpgroups;
  static constexpr int kProducerGroups = producer_groups(kSplits, kChannelsLast);
  static constexpr int kGroupThreads = kProducerThreads / kProducerGroups;
  static constexpr int kUnitsInRegisters = units_in_registers(kSplits, !kMoments, kChannelsLast);
  static constexpr int kConsumers = consumers(kSplits);
  static constexpr int kConsumerThreads = 128 * kConsumers;
  // Whether consumers start their products one after another: 168 -> 164 us for problem 73. Without it they do the same at the
  // same time. Elsewhere it gained nothing, or lost 2%.
  static constexpr bool kOrdersProducts = kFloat32 && kChannelsLast;

  // A consumer thread's accumulators of a chunk.
  static constexpr int kAccumulators = kChannels * kChunk / 128;
  static constexpr int kOwnChannels = kChannelsLast ? kChannels / 4 : 2;
  static constexpr int kOwnPositions = kAccumulators / kOwnChannels;
  using Accumulators = float[kAccumulators];
};

}  // namespace fused_conv_bn::stem_sm90
