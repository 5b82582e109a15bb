// From a problem and its layout to the kernel's parameters, and its launch.
#pragma once

#include <type_traits>
#include <utility>

#include "kernel.cuh"

namespace fused_conv_bn {
namespace gemm_sm90 {

template <typename T>
constexpr CUtensorMapDataType kType = std::is_same_v<T, float>      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                      : std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
// Of what is multiplied: float32 is rounded to TF32 on its way, where products would cut it off.
template <typename T>
constexpr CUtensorMapDataType kFactorType = std::is_same_v<T, float> ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : kType<T>;

// Boxes whose rows have so many bytes are swizzled over them.
inline CUtensorMapSwizzle swizzle(int row_bytes) {
  return row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : CU_TENSOR_MAP_SWIZZLE_32B;
}

// Rows of `columns` values that follow each other.
template <typename T>
cudaError_t encode_matrix(CUtensorMap& map, CUtensorMapDataType type, const void* data, int64_t columns, int64_t rows,
                          int box_columns, int box_rows) {
  const TensorLayout<2> matrix{data,
                               type,
                               {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                               {static_cast<cuuint64_t>(columns) * sizeof(T)}};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  return encode_tiled(map, matrix, box, swizzle(box_columns * static_cast<int>(sizeof(T))));
}

template <typename T>
cudaError_t encode_pixels(CUtensorMap& map, const void* x, const Conv2d& c, const Layout& l, bool flat) {
  const TileShape& t = kTiles[l.tile];
  if (flat) {
    return encode_matrix<T>(map, kFactorType<T>, x, c.C, c.N * c.P * c.Q, l.depth, t.block_pixels());
  }
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t pixel = size(c.C) * sizeof(T);
  const TensorLayout<4> images{x,
                               kFactorType<T>,
                               {size(c.C), size(c.W), size(c.H), size(c.N)},
                               {pixel, size(c.W) * pixel, size(c.H * c.W) * pixel}};
  const auto corner = [](int64_t pad, int64_t taps, int64_t dilation) {
    return static_cast<int>(pad - (taps == 1 ? 0 : dilation * (taps - 1)));
  };
  const int lower[] = {static_cast<int>(-c.pad_w), static_cast<int>(-c.pad_h)};
  // With halos the padding is between rows and images, once.
  const int upper[] = {l.halo ? 0 : corner(c.pad_w, c.S, c.dilation_w),
                       l.halo ? 0 : corner(c.pad_h, c.R, c.dilation_h)};
  const int64_t pixels = l.halo ? halo_rows(c, t) : t.block_pixels();
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(c.stride_w), static_cast<cuuint32_t>(c.stride_h), 1};
  return encode_im2col(map, images, lower, upper, static_cast<cuuint32_t>(l.depth), static_cast<cuuint32_t>(pixels),
                       steps, swizzle(l.depth * static_cast<int>(sizeof(T))));
}

template <typename T>
cudaError_t encode_filters(CUtensorMap& map, const void* w, const Conv2d& c, const Layout& l) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t channels = size(c.C / c.groups), tap = channels * sizeof(T);
  const TensorLayout<3> filters{
      w, kFactorType<T>, {channels, size(c.R * c.S), size(c.K)}, {tap, size(c.R * c.S) * tap}};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(l.depth), 1, static_cast<cuuint32_t>(l.of_group)};
  return encode_tiled(map, filters, box, swizzle(l.depth * static_cast<int>(sizeof(T))));
}

template <typename T>
cudaError_t set_maps(const ConvCall& call, const Layout& l, Params<T>& p) {
  const auto& [c, operands, gpu, epilogue] = call;
  const TileShape& t = kTiles[l.tile];
  const int row = std::min(t.filters, 128 / static_cast<int>(sizeof(T)));
  cudaError_t status = encode_pixels<T>(p.x, operands.x, c, l, p.flat);
  if (status == cudaSuccess) {
    status = encode_filters<T>(p.w, operands.w, c, l);
  }
  const bool by_boxes = l.splits == 1 && !l.halo;
  if (status == cudaSuccess && by_boxes) {
    status = encode_matrix<T>(p.y, kType<T>, operands.y, c.K, c.N * c.P * c.Q, row, t.pixels);
  }
  if (status == cudaSuccess && by_boxes && p.has_residual) {
    status = encode_matrix<T>(p.residual, kType<T>, operands.residual, c.K, c.N * c.P * c.Q, row, t.pixels);
  }
  return status;
}

// moments: nullptr, or where those of the results go, which then have no residual.
template <typename T>
cudaError_t launch(const ConvCall& call, const Layout& l, Moments* moments, cudaStream_t stream) {
  const auto& [c, operands, gpu, epilogue] = call;
  if ((moments != nullptr && operands.residual != nullptr) || (operands.gates != nullptr && !takes_gates(c))) {
    return cudaErrorInvalidValue;
  }
  const TileShape& t = kTiles[l.tile];
  Params<T> p{};
  p.affine = AffineSource<T>(operands.affine);
  p.residual_data = static_cast<const T*>(operands.residual);
  p.y_data = static_cast<T*>(operands.y);
  p.gates = static_cast<const T*>(operands.gates);
  p.moments = moments;
  const Padded padded(c);
  p.pixels = static_cast<int>(count_pixels(c, l));
  p.channels = static_cast<int>(c.C);
  p.filters = static_cast<int>(c.K);
  p.has_groups = c.groups > 1;
  p.group_channels = static_cast<int>(c.C / c.groups);
  p.group_filters = FastDiv(static_cast<uint32_t>(c.K / c.groups));
  p.R = static_cast<int>(c.R);
  p.S = static_cast<int>(c.S);
  p.stride_h = static_cast<int>(c.stride_h);
  p.stride_w = static_cast<int>(c.stride_w);
  p.pad_h = static_cast<int>(c.pad_h);
  p.pad_w = static_cast<int>(c.pad_w);
  p.dilation_h = c.R == 1 ? 1 : static_cast<int>(c.dilation_h);
  p.dilation_w = c.S == 1 ? 1 : static_cast<int>(c.dilation_w);
  p.image_pixels = FastDiv(static_cast<uint32_t>(l.halo ? padded.image : c.P * c.Q));
  p.columns = FastDiv(static_cast<uint32_t>(l.halo ? padded.pitch : c.Q));
  p.H = static_cast<int>(c.P);
  p.W = static_cast<int>(c.Q);
  p.tap_row = static_cast<int>(padded.pitch) * p.dilation_h;
  p.tap_columns = p.dilation_w * p.S;
  const int64_t filter_tiles = ceil_div(c.K, t.filters);
  p.filter_tiles = FastDiv(static_cast<uint32_t>(filter_tiles));
  p.pixel_tiles = static_cast<int>(ceil_div(p.pixels, t.block_pixels()));
  p.layout = l;
  const int fetches = l.halo ? l.slices : l.steps;
  p.stage_rounds = fetches / l.stages;
  p.stage_rest = fetches % l.stages;
  p.filter_rounds = l.filter_stages == 0 ? 0 : l.steps / l.filter_stages;
  p.filter_rest = l.filter_stages == 0 ? 0 : l.steps % l.filter_stages;
  p.flat = is_flat(c);
  p.has_residual = operands.residual != nullptr;
  p.residual_last = epilogue.residual_last;
  p.activation = epilogue.activation;
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  cudaError_t status = set_maps(call, l, p);
  const auto start = [&](auto kernel) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_memory);
    if (status == cudaSuccess) {
      const auto blocks = static_cast<unsigned>(filter_tiles * l.blocks_of_filters * l.splits);
      status = launch_cluster(kernel, dim3(blocks), static_cast<unsigned>(l.splits), kThreads, l.shared_memory, true,
                              stream, p);
    }
  };
  const auto start_tile = [&]<int kTile>() {
    if (p.gates != nullptr) {
      if constexpr (sizeof(T) == 2) {
        if (l.splits == 1) {
          start(gemm_sm90_kernel<T, kTile, true>);
        } else if constexpr (kTiles[kTile].is_shared) {
          start(gemm_sm90_split_kernel<T, kTile, true>);
        }
      }
    } else if (l.halo) {
      if constexpr (kTiles[kTile].has_halo_of(sizeof(T))) {
        start(gemm_sm90_halo_kernel<T, kTile>);
      }
    } else if (l.splits == 1) {
      if constexpr (sizeof(T) == 2 || !kTiles[kTile].is_wide) {
        start(gemm_sm90_kernel<T, kTile, false>);
      }
    } else if constexpr (kTiles[kTile].is_shared) {
      start(gemm_sm90_split_kernel<T, kTile, false>);
    }
  };
  if (status == cudaSuccess) {
    [&]<int... tiles>(std::integer_sequence<int, tiles...>) {
      ((tiles == l.tile && (start_tile.template operator()<tiles>(), true)) || ...);
    }(std::make_integer_sequence<int, kTileCount>());
  }
  return status;
}

}  // namespace gemm_sm90

template <typename T>
cudaError_t GemmSm90::launch(const ConvCall& call, cudaStream_t stream) const {
  return launch_with_moments<T>(call, nullptr, stream);
}

template <typename T>
cudaError_t GemmSm90::launch_with_moments(const ConvCall& call, Moments* moments, cudaStream_t stream) const {
  return gemm_sm90::launch<T>(call, layout, moments, stream);
}

}  // namespace fused_conv_bn
