// From a problem and its tile to the kernel's parameters, and its launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernel.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/elementwise/memory_format.h"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "plan.h"

namespace fused_conv_bn {
namespace stem_sm90 {

// Whether consumers compute the activation one after another. Measured on an H200 with problem 73 and four stems in both layouts,
// times in order over times without. 16 bits: 0.77 to 1.0, but up to 1.13 for short activations of contiguous outputs. float32:
// SiLU 0.8 to 0.97 where the product is short, and 1.04 to 1.1 where it is long (two consumers are enough to keep the units busy
// with both then); short ones 0.98 to 1.14.
inline bool orders_activation(Activation activation, const TileLayout& tile, bool channels_last) {
  constexpr int kLongProduct = 8;
  if (tile.splits == 1 && channels_last) {
    return !is_bound(activation);
  }
  return !is_short(activation) && (tile.splits == 1 || tile.k_steps < kLongProduct);
}

// The units of the filter in the order of the k steps: their offsets, and what weights they hold.
template <typename T>
void set_steps(const Conv2d& c, const TileLayout& tile, Params<T>& p) {
  std::vector<FilterUnit> units;
  for (int i = 0; i < tile.units; ++i) {
    units.push_back(filter_unit(c, tile, i));
  }
  // So that the second unit of a step never lies before the first.
  std::stable_sort(units.begin(), units.end(),
                   [](const FilterUnit& a, const FilterUnit& b) { return a.offset < b.offset; });
  for (int step = 0; step < tile.k_steps; ++step) {
    const FilterUnit& a = units[2 * step];
    const bool single = 2 * step + 1 == tile.units;
    const FilterUnit& b = single ? a : units[2 * step + 1];  // an odd last one is there twice, once with weights of 0
    p.steps[step] = operand_start(a.offset * 16, (b.offset - a.offset) * 16);
    p.units[2 * step] = a.r << 16 | a.s << 8 | a.c_block;
    p.units[2 * step + 1] = single ? kNoUnit : b.r << 16 | b.s << 8 | b.c_block;
  }
}

// What the operands' layout and alignment allow.
template <typename T>
void set_accesses(const Conv2d& c, const ConvOperands& operands, const TileLayout& tile, Params<T>& p) {
  constexpr int64_t kBytes = sizeof(T);
  p.row_vectors = FastDiv(static_cast<uint32_t>(ceil_div(tile.q * kBytes, kVecBytes)));
  p.x_row_bytes = static_cast<int>(row_bytes(c));
  p.x_col_bytes = p.x_row_bytes / p.W;
  p.x_separate = c.channels_last ? 1 : p.C;
  p.unit_row_bytes = tile.raw_stage == 0 ? p.x_row_bytes : tile.raw_pitch;
  p.unit_channel = c.channels_last ? static_cast<int>(kBytes) : tile.raw_rows * tile.raw_pitch;
  p.raw_in_bulk = p.x_row_bytes % 16 == 0;
  p.raw_vectors = c.channels_last && c.C % 8 == 0;
  p.w_vectors = operands.w_stride_c == 1 && c.C % 8 == 0;
  p.y_vectors = c.channels_last && c.K * kBytes % kVecBytes == 0 && is_aligned(p.y);
  p.out_pairs = tile.q % 2 == 0 && tile.x_cols % 2 == 0 && c.Q % 2 == 0 && is_aligned(p.y, 2 * kBytes);
  p.runs_aligned = c.P * c.Q * kBytes % kVecBytes == 0 && tile.p * c.Q * kBytes % kVecBytes == 0 && is_aligned(p.y);
  p.rows_aligned = c.Q * kBytes % kVecBytes == 0 && is_aligned(p.y);
  p.y_in_bulk = c.channels_last ? tile.out_pixels > 0 && is_aligned(p.y) : tile.q == c.Q;
  p.streams = c.N * c.K * c.P * c.Q * kBytes > kL2Bytes;
}

template <typename T>
Params<T> make_params(const ConvCall& call, const TileLayout& tile, Moments* moments) {
  const auto& [c, operands, gpu, epilogue] = call;
  Params<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.affine = AffineSource<T>(operands.affine);
  p.late_affine = operands.late_affine;
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.moments = moments;
  p.w_stride_c = static_cast<int>(operands.w_stride_c);
  p.w_stride_r = static_cast<int>(operands.w_stride_r);
  p.w_stride_s = static_cast<int>(operands.w_stride_s);
  static_cast<Extents&>(p) = narrow(c);
  p.x_stride_c = c.channels_last ? 1 : p.H * p.W;
  p.x_stride_h = c.channels_last ? p.W * p.C : p.W;
  p.x_stride_w = c.channels_last ? p.C : 1;
  p.tile = tile;
  p.x_units = static_cast<int>(tile.x_units);
  p.x_cols = FastDiv(tile.x_cols);
  p.x_rows = FastDiv(tile.x_rows);
  p.c_blocks = FastDiv(tile.c_blocks);
  p.raw_rows = FastDiv(tile.raw_rows);
  p.phases_w = FastDiv(tile.phases_w);
  p.tiles_q = FastDiv(tile.tiles_q);
  p.tiles_p = FastDiv(tile.tiles_p);
  p.tile_p = FastDiv(tile.p);
  p.tiles = static_cast<uint32_t>(c.N * tile.tiles_p * tile.tiles_q);
  set_accesses(c, operands, tile, p);
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.orders_activation = orders_activation(epilogue.activation, tile, c.channels_last);
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  set_steps(c, tile, p);
  return p;
}

// The tile was made for the problem. moments: nullptr, or where they go instead of an output.
template <typename T>
cudaError_t launch(const ConvCall& call, const TileLayout& tile, Moments* moments, cudaStream_t stream) {
  const Conv2d& c = call.problem;
  const Activation activation = call.epilogue.activation;
  constexpr int kFewChannels = sizeof(T) == 2 ? kBlockChannels / 2 : kBlockChannels;
  const auto kernel_of = [&](auto bounds) {
    return !c.channels_last      ? stem_sm90_kernel<T, Output::contiguous, kBlockChannels, bounds()>
           : c.K <= kFewChannels ? stem_sm90_kernel<T, Output::channels_last, kFewChannels, bounds()>
                                 : stem_sm90_kernel<T, Output::channels_last, kBlockChannels, bounds()>;
  };
  const auto kernel = moments != nullptr     ? stem_sm90_kernel<T, Output::moments, kBlockChannels, true>
                      : is_bound(activation) ? kernel_of(std::true_type{})
                                             : kernel_of(std::false_type{});
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  tile.shared_memory);
  if (status != cudaSuccess) {
    return status;
  }
  const dim3 grid(static_cast<unsigned>(blocks(c, tile, call.gpu)),
                  static_cast<unsigned>(ceil_div(c.K, kBlockChannels)));
  return launch_kernel(kernel, grid, block_threads(tile.splits), tile.shared_memory, true, stream,
                       make_params<T>(call, tile, moments));
}

}  // namespace stem_sm90

template <typename T>
cudaError_t StemSm90::launch(const ConvCall& call, cudaStream_t stream) const {
  return stem_sm90::launch<T>(call, tile, nullptr, stream);
}

template <typename T>
cudaError_t StemSm90::launch_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const {
  return stem_sm90::launch<T>(call, moments_tile, moments, stream);
}

}  // namespace fused_conv_bn
