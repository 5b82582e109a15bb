// The largest elements of windows, as F.max_pool2d finds them: NaN is larger than any number.
//
// A thread takes 16 bytes of channels, or one element where they have no vectors, and up to kTileRows outputs below each other:
// rows that two of those share are read once. Outside of the image a window repeats its last row or column inside, which
// changes no maximum: there is no branch before a load, and all of them are on their way together.
#pragma once

#include <limits>

#include "kernels/common/vec.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace fused_conv_bn {

// Where tiles are fewer than fill the multiprocessors, each thread has one output.
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
  PoolTiles tiles;
  PoolNumbers of;
  uint32_t channels;
  int64_t input_row, input_image, output_row, output_image;  // in elements

  MaxPoolParams(const T* input_, T* output_, const PoolProblem& problem)
      : input(input_),
        output(output_),
        tiles(),
        of(problem),
        channels(static_cast<uint32_t>(problem.channels)),
        input_row(problem.columns.input * problem.channels),
        input_image(problem.rows.input * input_row),
        output_row(problem.columns.output * problem.channels),
        output_image(problem.rows.output * output_row) {}

  void skip_images(int64_t images) {
    input += images * input_image;
    output += images * output_image;
  }
};

// A thread's outputs.
struct MaxPoolTile {
  int64_t input;   // where the image's first pixel is
  int64_t output;  // where the tile's first output is
  int row;
  int column;
};

template <int kElements, int kTileRows, typename T>
__device__ __forceinline__ MaxPoolTile max_pool_tile(const MaxPoolParams<T>& p, uint32_t thread) {
  const PoolTile found = pool_tile(p.tiles, thread);
  const uint32_t channel = found.lane * kElements;
  MaxPoolTile tile;
  tile.row = found.row * kTileRows;
  tile.column = found.column;
  tile.input = found.image * p.input_image + channel;
  tile.output = found.image * p.output_image + tile.row * p.output_row +
                static_cast<uint32_t>(found.column) * p.channels + channel;
  return tile;
}

// Square windows without dilation. Of a tile each row of the input is read once, whatever windows it is in.
template <typename Max, int kKernel, int kStride, int kTileRows, typename T = typename Max::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_square_kernel(const MaxPoolParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  const MaxPoolTile tile = max_pool_tile<Max::kElements, kTileRows>(p, thread);
  uint32_t columns[kKernel];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    const int column = tile.column * kStride - p.of.padding[1] + s;
    columns[s] = static_cast<uint32_t>(min(max(column, 0), p.of.input[1] - 1)) * p.channels;
  }
  wait_for_previous();
  Max best[kTileRows];
#pragma unroll
  for (int r = 0; r < (kTileRows - 1) * kStride + kKernel; ++r) {
    const int row = min(max(tile.row * kStride - p.of.padding[0] + r, 0), p.of.input[0] - 1);
    const T* const data = p.input + tile.input + row * p.input_row;
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
    if (tile.row + i < p.of.output[0]) {
      best[i].store(p.output + tile.output + i * p.output_row);
    }
  }
}

// Any window.
template <typename Max, typename T = typename Max::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_any_kernel(const MaxPoolParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  const MaxPoolTile tile = max_pool_tile<Max::kElements, 1>(p, thread);
  const PoolSpan rows(p.of, 0, tile.row), columns(p.of, 1, tile.column);
  wait_for_previous();
  Max best = Max::lowest();
  for (int row = rows.first; row < rows.end; row += p.of.dilation[0]) {
    const T* const data = p.input + tile.input + row * p.input_row;
#pragma unroll 4
    for (int column = columns.first; column < columns.end; column += p.of.dilation[1]) {
      best.add(Max::load(data + static_cast<uint32_t>(column) * p.channels));
    }
  }
  best.store(p.output + tile.output);
}

template <typename Max, typename T>
cudaError_t launch_max_pool_with(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                                 cudaStream_t stream) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t threads = problem.images * rows.output * columns.output * (problem.channels / Max::kElements);
  const bool is_large = threads / Max::kTileRows >= kPoolFullThreads * multiprocessors;
  // tile_rows: of a thread of this kernel.
  const auto launch = [&](void (*kernel)(MaxPoolParams<T>), int tile_rows) {
    return launch_pool_tiles(kernel, MaxPoolParams<T>(input, output, problem), problem.images,
                             (rows.output + tile_rows - 1) / tile_rows, columns.output,
                             problem.channels / Max::kElements, multiprocessors, stream);
  };
  const auto square = [&](auto kernel, auto stride) {
    constexpr int kKernel = kernel(), kStride = stride(), kTileRows = Max::kTileRows;
    return is_large ? launch(max_pool_square_kernel<Max, kKernel, kStride, kTileRows>, kTileRows)
                    : launch(max_pool_square_kernel<Max, kKernel, kStride, 1>, 1);
  };
  if (is_square(problem, 3, 2)) {
    return square(std::integral_constant<int, 3>(), std::integral_constant<int, 2>());
  }
  if (is_square(problem, 2, 2)) {
    return square(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
  }
  if (is_square(problem, 3, 1)) {
    return square(std::integral_constant<int, 3>(), std::integral_constant<int, 1>());
  }
  return launch(max_pool_any_kernel<Max>, 1);
}

template <typename T>
cudaError_t launch_max_pool(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                            cudaStream_t stream) {
  const bool by_vector = problem.channels % Vec<T>::kSize == 0 && is_aligned(input) && is_aligned(output);
  return by_vector ? launch_max_pool_with<VectorMax<T>>(input, output, problem, multiprocessors, stream)
                   : launch_max_pool_with<ElementMax<T>>(input, output, problem, multiprocessors, stream);
}

}  // namespace fused_conv_bn
