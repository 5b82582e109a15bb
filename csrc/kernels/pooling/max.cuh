// The largest elements of windows, as F.max_pool2d finds them: NaN is larger than any number.
//
// A thread takes 16 bytes of channels, or one element where they have no vectors, and up to kTileRows outputs below each other:
// rows that two of those share are read once. Consecutive threads have consecutive channels, then consecutive columns, so that
// what columns share comes from the nearest cache. Outside of the image a window repeats its last row or column inside, which
// changes no maximum: there is no branch before a load, and all of them are on their way together.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/launch.cuh"
#include "launch.cuh"

namespace fused_conv_bn {

// Of a block. Few threads are in small ones, which all multiprocessors get their share of.
constexpr int kMaxPoolThreads = 256, kMaxPoolFewThreads = 64;
// Of a multiprocessor. Where tiles are fewer, each thread has one output.
constexpr int64_t kMaxPoolFullThreads = 2048;
constexpr int kTileRowsOfVectors = 2, kTileRowsOfElements = 4;

// The element that eager's loop keeps.
template <typename Acc>
__device__ __forceinline__ Acc larger(Acc kept, Acc found) {
  return found > kept || found != found ? found : kept;
}
__device__ __forceinline__ uint32_t larger_words(float, uint32_t kept, uint32_t found) {
  return __float_as_uint(larger(__uint_as_float(kept), __uint_as_float(found)));
}
template <typename T>
__device__ __forceinline__ uint32_t larger_words(T, uint32_t kept, uint32_t found) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t result;
  if constexpr (std::is_same_v<T, float16>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(kept), "r"(found));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(kept), "r"(found));
  }
  return result;
#else
  const float2 a = unpack_pair(T(), kept), b = unpack_pair(T(), found);
  return pack_pair(T(), larger(a.x, b.x), larger(a.y, b.y));
#endif
}

// Maxima of 16 bytes of channels.
template <typename T>
struct VectorMax {
  using Element = T;
  static constexpr int kElements = Vec<T>::kSize;
  static constexpr int kTileRows = kTileRowsOfVectors;
  Vec<T> value;

  __device__ __forceinline__ static VectorMax load(const T* at) { return {{load_words(at)}}; }
  __device__ __forceinline__ static VectorMax lowest() {
    acc_t<T> all[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      all[k] = -std::numeric_limits<acc_t<T>>::infinity();
    }
    VectorMax result;
    pack(all, result.value);
    return result;
  }
  __device__ __forceinline__ void add(const VectorMax& other) {
    if constexpr (std::is_same_v<T, double>) {
      double a[2], b[2];
      unpack(value, a);
      unpack(other.value, b);
      pack({larger(a[0], b[0]), larger(a[1], b[1])}, value);
    } else {
      uint4& a = value.words;
      const uint4& b = other.value.words;
      a = {larger_words(T(), a.x, b.x), larger_words(T(), a.y, b.y), larger_words(T(), a.z, b.z),
           larger_words(T(), a.w, b.w)};
    }
  }
  __device__ __forceinline__ void store(T* at) const { store_words(at, value.words); }
};

// The maximum of one channel.
template <typename T>
struct ElementMax {
  using Element = T;
  static constexpr int kElements = 1;
  static constexpr int kTileRows = kTileRowsOfElements;
  acc_t<T> value;

  __device__ __forceinline__ static ElementMax load(const T* at) { return {to_acc(*at)}; }
  __device__ __forceinline__ static ElementMax lowest() { return {-std::numeric_limits<acc_t<T>>::infinity()}; }
  __device__ __forceinline__ void add(const ElementMax& other) { value = larger(value, other.value); }
  __device__ __forceinline__ void store(T* at) const { *at = from_acc<T>(value); }
};

template <typename T>
struct MaxPoolParams {
  const T* input;  // of the launch's first image
  T* output;
  uint32_t threads;
  int first_tile;  // of the rows
  FastDiv lanes;   // threads of a pixel
  FastDiv columns;
  FastDiv tiles;
  uint32_t channels;
  int64_t input_row, input_image, output_row, output_image;  // in elements
  int input_rows, input_columns, output_rows;
  // Of rows and columns.
  int kernel[2];
  int stride[2];
  int padding[2];
  int dilation[2];
};

// A thread's outputs.
template <typename T>
struct MaxPoolTile {
  const T* input;  // the image's first pixel
  T* output;       // the tile's first output
  int row;
  int column;
};

template <int kElements, int kTileRows, typename T>
__device__ __forceinline__ MaxPoolTile<T> max_pool_tile(const MaxPoolParams<T>& p, uint32_t thread) {
  uint32_t rest = thread;
  uint32_t pixel = div_mod(p.lanes, rest);
  const uint32_t channel = rest * kElements;
  uint32_t row = div_mod(p.columns, pixel);
  const uint32_t image = div_mod(p.tiles, row);
  MaxPoolTile<T> tile;
  tile.row = (p.first_tile + static_cast<int>(row)) * kTileRows;
  tile.column = static_cast<int>(pixel);
  tile.input = p.input + image * p.input_image + channel;
  tile.output = p.output + image * p.output_image + tile.row * p.output_row + pixel * p.channels + channel;
  return tile;
}

// Square windows without dilation. Of a tile each row of the input is read once, whatever windows it is in.
template <typename Max, int kKernel, int kStride, int kTileRows, typename T = typename Max::Element>
__global__ void __launch_bounds__(kMaxPoolThreads) max_pool_square_kernel(const MaxPoolParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.threads) {
    return;
  }
  const MaxPoolTile<T> tile = max_pool_tile<Max::kElements, kTileRows>(p, thread);
  uint32_t columns[kKernel];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    const int column = tile.column * kStride - p.padding[1] + s;
    columns[s] = static_cast<uint32_t>(min(max(column, 0), p.input_columns - 1)) * p.channels;
  }
  wait_for_previous();
  Max best[kTileRows];
#pragma unroll
  for (int r = 0; r < (kTileRows - 1) * kStride + kKernel; ++r) {
    const int row = min(max(tile.row * kStride - p.padding[0] + r, 0), p.input_rows - 1);
    const T* const data = tile.input + row * p.input_row;
    Max found[kKernel];
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      found[s] = Max::load(data + columns[s]);
    }
#pragma unroll
    for (int s = 1; s < kKernel; ++s) {
      found[0].add(found[s]);
    }
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      if (r == i * kStride) {
        best[i] = found[0];
      } else if (r > i * kStride && r < i * kStride + kKernel) {
        best[i].add(found[0]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (tile.row + i < p.output_rows) {
      best[i].store(tile.output + i * p.output_row);
    }
  }
}

// Any window.
template <typename Max, typename T = typename Max::Element>
__global__ void __launch_bounds__(kMaxPoolThreads) max_pool_any_kernel(const MaxPoolParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.threads) {
    return;
  }
  const MaxPoolTile<T> tile = max_pool_tile<Max::kElements, 1>(p, thread);
  const int extent[] = {p.input_rows, p.input_columns}, at[] = {tile.row, tile.column};
  int first[2], end[2];
#pragma unroll
  for (int d = 0; d < 2; ++d) {
    first[d] = at[d] * p.stride[d] - p.padding[d];
    end[d] = min(first[d] + (p.kernel[d] - 1) * p.dilation[d] + 1, extent[d]);
    if (first[d] < 0) {
      first[d] += (p.dilation[d] - 1 - first[d]) / p.dilation[d] * p.dilation[d];
    }
  }
  wait_for_previous();
  Max best = Max::lowest();
  for (int row = first[0]; row < end[0]; row += p.dilation[0]) {
    const T* const data = tile.input + row * p.input_row;
#pragma unroll 4
    for (int column = first[1]; column < end[1]; column += p.dilation[1]) {
      best.add(Max::load(data + static_cast<uint32_t>(column) * p.channels));
    }
  }
  best.store(tile.output);
}

// tile_rows: of a thread of this kernel.
template <typename Max, typename T>
cudaError_t launch_max_pool_tiles(void (*kernel)(MaxPoolParams<T>), int tile_rows, const T* input, T* output,
                                  const PoolProblem& problem, int multiprocessors, cudaStream_t stream) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  MaxPoolParams<T> p{};
  p.lanes = FastDiv(static_cast<uint32_t>(problem.channels / Max::kElements));
  p.columns = FastDiv(static_cast<uint32_t>(columns.output));
  p.channels = static_cast<uint32_t>(problem.channels);
  p.input_row = columns.input * problem.channels;
  p.input_image = rows.input * p.input_row;
  p.output_row = columns.output * problem.channels;
  p.output_image = rows.output * p.output_row;
  p.input_rows = static_cast<int>(rows.input);
  p.input_columns = static_cast<int>(columns.input);
  p.output_rows = static_cast<int>(rows.output);
  for (int d = 0; d < 2; ++d) {
    const PoolWindow& window = d == 0 ? rows : columns;
    p.kernel[d] = static_cast<int>(window.kernel);
    p.stride[d] = static_cast<int>(window.stride);
    p.padding[d] = static_cast<int>(window.padding);
    p.dilation[d] = static_cast<int>(window.dilation);
  }
  // So many images in a launch, or so many tiles of one.
  const int64_t row_threads = p.columns.divisor * int64_t{p.lanes.divisor};
  const int64_t tiles = (rows.output + tile_rows - 1) / tile_rows;
  const int64_t tiles_step = std::clamp<int64_t>(kMostPooled / row_threads, 1, tiles);
  const int64_t images_step = tiles_step < tiles ? 1 : std::max<int64_t>(1, kMostPooled / (tiles * row_threads));
  for (int64_t image = 0; image < problem.images; image += images_step) {
    const int64_t images = std::min(images_step, problem.images - image);
    for (int64_t tile = 0; tile < tiles; tile += tiles_step) {
      const int64_t count = std::min(tiles_step, tiles - tile);
      p.input = input + image * p.input_image;
      p.output = output + image * p.output_image;
      p.first_tile = static_cast<int>(tile);
      p.tiles = FastDiv(static_cast<uint32_t>(count));
      p.threads = static_cast<uint32_t>(images * count * row_threads);
      const unsigned size = p.threads < kMaxPoolFullThreads * multiprocessors ? kMaxPoolFewThreads : kMaxPoolThreads;
      const cudaError_t status = launch_kernel(kernel, dim3((p.threads + size - 1) / size), size, 0, true, stream, p);
      if (status != cudaSuccess) {
        return status;
      }
    }
  }
  return cudaSuccess;
}

template <typename Max, typename T>
cudaError_t launch_max_pool_with(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                                 cudaStream_t stream) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t threads = problem.images * rows.output * columns.output * (problem.channels / Max::kElements);
  const bool is_large = threads / Max::kTileRows >= kMaxPoolFullThreads * multiprocessors;
  const auto square = [&](auto kernel, auto stride) {
    constexpr int kKernel = kernel(), kStride = stride(), kTileRows = Max::kTileRows;
    return is_large ? launch_max_pool_tiles<Max>(max_pool_square_kernel<Max, kKernel, kStride, kTileRows>, kTileRows,
                                                 input, output, problem, multiprocessors, stream)
                    : launch_max_pool_tiles<Max>(max_pool_square_kernel<Max, kKernel, kStride, 1>, 1, input, output,
                                                 problem, multiprocessors, stream);
  };
  const auto all = [&](int64_t kernel, int64_t stride) {
    return rows.kernel == kernel && columns.kernel == kernel && rows.stride == stride && columns.stride == stride &&
           rows.dilation == 1 && columns.dilation == 1;
  };
  if (all(3, 2)) {
    return square(std::integral_constant<int, 3>(), std::integral_constant<int, 2>());
  }
  if (all(2, 2)) {
    return square(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
  }
  if (all(3, 1)) {
    return square(std::integral_constant<int, 3>(), std::integral_constant<int, 1>());
  }
  return launch_max_pool_tiles<Max>(max_pool_any_kernel<Max>, 1, input, output, problem, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_max_pool(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                            cudaStream_t stream) {
  const bool by_vector = problem.channels % Vec<T>::kSize == 0 && is_aligned(input) && is_aligned(output);
  return by_vector ? launch_max_pool_with<VectorMax<T>>(input, output, problem, multiprocessors, stream)
                   : launch_max_pool_with<ElementMax<T>>(input, output, problem, multiprocessors, stream);
}

}  // namespace fused_conv_bn
