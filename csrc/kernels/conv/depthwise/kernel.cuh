// Depthwise convolution: y = activation(conv(x, w) * scale + shift + residual), where each channel has its own filter.
//
// There is no product of matrices here, so the goal is to move x and y once while the products, conversions and
// addresses of 9 or 25 taps an output hide behind that. Two kernels, one for each layout, work alike:
//   - Inputs go through shared memory, several rows ahead of their use (cp.async).
//   - Threads walk down rows of outputs. Each row of inputs is read from shared memory once for all rows of the filter.
//   - The weights stay in registers. Padding is zeros.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "channels_last.cuh"
#include "contiguous.cuh"
#include "kernels/common/fast_div.h"
#include "kernels/pooling/launch.cuh"

namespace fused_conv_bn {

template <typename T>
DepthwiseParams<T> make_depthwise_params(const Conv2d& c, const ConvOperands& operands, const Epilogue& epilogue,
                                         const DepthwisePlan& plan) {
  DepthwiseParams<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.affine = AffineSource<T>(operands.affine);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
  p.dense_filters = p.w_stride_s == 1 && p.w_stride_r == c.S && p.w_stride_k == c.R * c.S && is_aligned(p.w);
  const Extents e = narrow(c);
  p.C = e.C, p.H = e.H, p.W = e.W, p.P = e.P, p.Q = e.Q;
  p.pad_h = e.pad_h, p.pad_w = e.pad_w;
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<acc_t<T>>(epilogue.negative_slope);
  p.tile_cols = plan.tile_cols;
  p.in_cols = plan.in_cols;
  p.stage_bytes = plan.stage_bytes;
  p.col_threads = FastDiv(static_cast<uint32_t>(plan.col_threads));
  if (c.channels_last) {
    p.channels = plan.channels;
    p.lanes = FastDiv(static_cast<uint32_t>(plan.lanes));
    p.chunks = FastDiv(static_cast<uint32_t>(plan.chunks));
    p.image_rows = FastDiv(static_cast<uint32_t>(c.P));
    p.tiles_q = static_cast<uint32_t>(plan.tiles_q);
    p.all_rows = static_cast<uint32_t>(c.N * c.P);
  } else {
    p.rows = plan.rows;
    p.tile_rows = plan.tile_rows;
    p.planes = plan.planes;
    p.all_planes = static_cast<int>(c.N * c.C);
    p.tiles = static_cast<uint32_t>(plan.tiles);
    p.row_threads = FastDiv(static_cast<uint32_t>(plan.row_threads));
    p.tiles_p = FastDiv(static_cast<uint32_t>(plan.tiles_p));
    p.all_channels = FastDiv(static_cast<uint32_t>(c.C));
  }
  return p;
}

// Calls f(kernel) with the kernel of this layout, filter, stride and kind of activation.
template <typename T, typename F>
cudaError_t dispatch_depthwise(const Conv2d& c, bool bounds, F&& f) {
  const auto with = [&](auto r, auto stride) {
    constexpr int R = decltype(r)::value;
    constexpr int kStride = decltype(stride)::value;
    if (c.channels_last) {
      return f(bounds ? conv_depthwise_lanes_kernel<T, R, kStride, true>
                      : conv_depthwise_lanes_kernel<T, R, kStride, false>);
    }
    return f(bounds ? conv_depthwise_planes_kernel<T, R, kStride, true>
                    : conv_depthwise_planes_kernel<T, R, kStride, false>);
  };
  const auto with_stride = [&](auto r) {
    return c.stride_h == 1 ? with(r, std::integral_constant<int, 1>{}) : with(r, std::integral_constant<int, 2>{});
  };
  switch (c.R) {
    case 3:
      return with_stride(std::integral_constant<int, 3>{});
    case 5:
      return with_stride(std::integral_constant<int, 5>{});
  }
  return cudaErrorInvalidValue;
}

// The rows of all images, cut into ranges for the blocks below one another, which have whole images where they put out means.
// Returns the shared memory of a block.
template <typename T>
int cut_into_ranges(const Conv2d& c, const DepthwisePlan& plan, const GpuTraits& gpu, int64_t most_blocks,
                    DepthwiseParams<T>& p, dim3& grid) {
  const int64_t columns = int64_t{plan.tiles_q} * plan.chunks;
  int64_t rows = c.N * c.P, ranges = depthwise_ranges(c, plan, most_blocks);
  if (p.means != nullptr) {
    const int64_t images = depthwise_images(c, plan, most_blocks);
    ranges = ceil_div(c.N, images);
    rows = ranges * images * c.P;
  }
  p.range_rows = static_cast<uint32_t>(rows / ranges);
  p.longer_ranges = static_cast<uint32_t>(rows % ranges);
  grid = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(ranges));
  // The next kernel's blocks come where there is room. So that those of a next one like this do not crowd on some of
  // the multiprocessors, none has room for more than its share: 384 channels of 14x14 took 10.5 us without this, 7.3
  // with it, 7.7 where none come. Blocks of many rows gain nothing, and lose up to 1%.
  constexpr uint32_t kMostRows = 16;
  const int64_t share = ceil_div(columns * ranges, gpu.multiprocessors);
  if (launches_dependents() && share > 1 && p.range_rows <= kMostRows) {
    p.next_begins = true;
    return std::max(plan.shared_bytes, depthwise_bytes_of_share(share));
  }
  return plan.shared_bytes;
}

template <typename T>
cudaError_t Depthwise::launch(const ConvCall& call, cudaStream_t stream) const {
  const auto& [c, operands, gpu, epilogue] = call;
  if (c.N == 0) {
    return cudaSuccess;
  }
  const bool puts_out = operands.means != nullptr && whole_images.has_value();
  DepthwisePlan cut = puts_out ? *whole_images : plan;
  if (operands.means != nullptr && !puts_out) {
    cut.shared_bytes += depthwise_sums_bytes(cut);
  }
  DepthwiseParams<T> p = make_depthwise_params<T>(c, operands, epilogue, cut);
  p.means = puts_out ? static_cast<T*>(operands.means) : nullptr;
  p.sums = operands.sums;
  p.sums_offset = operands.means != nullptr ? cut.shared_bytes - depthwise_sums_bytes(cut) : 0;
  // The kernels of bounds do not add up.
  return dispatch_depthwise<T>(c, is_bound(epilogue.activation) && operands.means == nullptr, [&](auto kernel) {
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              kDepthwiseMaxSharedBytes);
    if (status != cudaSuccess) {
      return status;
    }
    int resident = 0;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, cut.threads, cut.shared_bytes);
    if (status != cudaSuccess) {
      return status;
    }
    const int64_t most = std::max<int64_t>(int64_t{resident} * gpu.multiprocessors, 1);
    dim3 grid;
    int shared_bytes = cut.shared_bytes;
    if (c.channels_last) {
      shared_bytes = cut_into_ranges(c, cut, gpu, most, p, grid);
    } else {  // the tiles are shared out evenly to no more blocks than run at a time
      grid = dim3(static_cast<unsigned>(ceil_div(cut.tiles, ceil_div(cut.tiles, most))));
    }
    if (p.sums != nullptr) {
      p.parts = static_cast<uint32_t>(cut.tiles_q * depthwise_parts(c, grid.y));
      p.rows_of_range = FastDiv(p.range_rows);
      p.rows_of_longer_range = FastDiv(p.range_rows + 1);
    }
    status = launch_kernel(kernel, grid, static_cast<unsigned>(cut.threads), shared_bytes, true, stream, p);
    if constexpr (depthwise_sums(sizeof(T))) {
      if (status == cudaSuccess && p.sums != nullptr) {
        status = launch_mean_of_sums(p.sums, static_cast<T*>(operands.means), c.N, p.parts, c.C, c.P * c.Q,
                                     gpu.multiprocessors, stream);
      }
    }
    return status;
  });
}

}  // namespace fused_conv_bn
