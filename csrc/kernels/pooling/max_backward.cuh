// The gradient of max pooling's input: of each element the sum of those of the windows whose maximum it is, which their positions
// tell (max_train.cuh). A pixel asks the windows that it is in: nothing is added up by atomics, and the order is the same in
// every run. The sums are in acc_t<T>.
#pragma once

#include "kernels/common/vec.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace fused_conv_bn {

// Gradients of 16 bytes of channels of a window, and the positions of their maxima.
template <typename T>
struct VectorGradient {
  using Element = T;
  static constexpr int kElements = Vec<T>::kSize;
  uint32_t value[4];
  uint32_t position[kElements == 8 ? 2 : 1];

  // If the condition holds, else zeros.
  __device__ __forceinline__ static VectorGradient load_if(bool condition, const T* at, const uint8_t* position) {
    VectorGradient result;
    load_words_if(condition, at, result.value);
    if constexpr (kElements == 2) {
      result.position[0] = load_half_if(condition, position);
    } else {
      load_words_if(condition, position, result.position);
    }
    return result;
  }
  __device__ __forceinline__ void numbers(acc_t<T> (&out)[kElements]) const {
    unpack(Vec<T>{{value[0], value[1], value[2], value[3]}}, out);
  }
  __device__ __forceinline__ static void store(const acc_t<T> (&sums)[kElements], T* at) {
    Vec<T> result;
    pack(sums, result);
    store_words(at, result.words);
  }
};

// Of one channel.
template <typename T>
struct ElementGradient {
  using Element = T;
  static constexpr int kElements = 1;
  acc_t<T> value;
  uint32_t position[1];

  __device__ __forceinline__ static ElementGradient load_if(bool condition, const T* at, const uint8_t* position) {
    ElementGradient result{0, {0}};
    if (condition) {
      result = {to_acc(*at), {*position}};
    }
    return result;
  }
  __device__ __forceinline__ void numbers(acc_t<T> (&out)[1]) const { out[0] = value; }
  __device__ __forceinline__ static void store(const acc_t<T> (&sums)[1], T* at) { *at = from_acc<T>(sums[0]); }
};

// What of it belongs to the element at this position of the window.
template <typename Gradient, typename Acc>
__device__ __forceinline__ void add_at(const Gradient& gradient, const Acc (&numbers)[Gradient::kElements],
                                       uint32_t position, Acc (&sums)[Gradient::kElements]) {
  const uint32_t spread = position * 0x01010101u;
#pragma unroll
  for (int k = 0; k < Gradient::kElements; ++k) {
    if (((gradient.position[k / 4] ^ spread) & (0xffu << (8 * (k % 4)))) == 0) {
      sums[k] += numbers[k];
    }
  }
}

template <typename T>
struct MaxPoolBackwardParams {
  const T* gradient;  // of the launch's first image
  const uint8_t* position;
  T* result;
  PoolTiles tiles;
  PoolNumbers of;
  uint32_t channels;
  FastDiv dilation[2];
  int64_t input_row, input_image, output_row, output_image;  // in elements

  MaxPoolBackwardParams(const T* gradient_, const uint8_t* position_, T* result_, const PoolProblem& problem)
      : gradient(gradient_),
        position(position_),
        result(result_),
        tiles(),
        of(problem),
        channels(static_cast<uint32_t>(problem.channels)),
        dilation{FastDiv(static_cast<uint32_t>(problem.rows.dilation)),
                 FastDiv(static_cast<uint32_t>(problem.columns.dilation))},
        input_row(problem.columns.input * problem.channels),
        input_image(problem.rows.input * input_row),
        output_row(problem.columns.output * problem.channels),
        output_image(problem.rows.output * output_row) {}

  void skip_images(int64_t images) {
    gradient += images * output_image;
    position += images * output_image;
    result += images * input_image;
  }
};

// Square windows without dilation. A thread has kStride x kStride pixels, from where a window begins: of these each window is
// read once.
template <typename Gradient, int kKernel, int kStride, typename T = typename Gradient::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_backward_square_kernel(const MaxPoolBackwardParams<T> p) {
  constexpr int kWindows = (kKernel - 1) / kStride + 1;  // in each dimension that a tile is in
  constexpr int kElements = Gradient::kElements;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  const PoolTile tile = pool_tile(p.tiles, thread);
  const uint32_t channel = tile.lane * kElements;
  // The last window that the tile is in: it begins with it.
  const int window_row = tile.row + p.of.padding[0] / kStride, window_column = tile.column + p.of.padding[1] / kStride;
  const int64_t image = tile.image * p.output_image + channel;
  wait_for_previous();
  Gradient found[kWindows][kWindows];
#pragma unroll
  for (int i = 0; i < kWindows; ++i) {
#pragma unroll
    for (int j = 0; j < kWindows; ++j) {
      const int row = window_row - i, column = window_column - j;
      const bool exists = row >= 0 && row < p.of.output[0] && column >= 0 && column < p.of.output[1];
      const int64_t at = image + row * p.output_row + column * static_cast<int64_t>(p.channels);
      found[i][j] = Gradient::load_if(exists, p.gradient + at, p.position + at);
    }
  }
  acc_t<T> sums[kStride][kStride][kElements] = {};
#pragma unroll
  for (int i = kWindows - 1; i >= 0; --i) {
#pragma unroll
    for (int j = kWindows - 1; j >= 0; --j) {
      acc_t<T> numbers[kElements];
      found[i][j].numbers(numbers);
#pragma unroll
      for (int r = 0; r < kStride && i * kStride + r < kKernel; ++r) {
#pragma unroll
        for (int s = 0; s < kStride && j * kStride + s < kKernel; ++s) {
          add_at(found[i][j], numbers, (i * kStride + r) * kKernel + j * kStride + s, sums[r][s]);
        }
      }
    }
  }
  const int first_row = window_row * kStride - p.of.padding[0],
            first_column = window_column * kStride - p.of.padding[1];
#pragma unroll
  for (int r = 0; r < kStride; ++r) {
#pragma unroll
    for (int s = 0; s < kStride; ++s) {
      const int row = first_row + r, column = first_column + s;
      if (row >= 0 && row < p.of.input[0] && column >= 0 && column < p.of.input[1]) {
        Gradient::store(sums[r][s], p.result + tile.image * p.input_image + row * p.input_row +
                                        static_cast<uint32_t>(column) * p.channels + channel);
      }
    }
  }
}

// The windows, in one dimension, that an element of the input may be in: of some dilation leaves it out.
struct PoolReach {
  int element;  // counted from where the first window begins
  int first;
  int last;

  __device__ __forceinline__ PoolReach(const PoolNumbers& of, int d, int at) : element(at + of.padding[d]) {
    const int before = element -
                       (of.kernel[d] - 1) * of.dilation[d];  // where the first of them begins, at the earliest
    first = before > 0 ? (before - 1) / of.stride[d] + 1 : 0;
    last = min(element / of.stride[d], of.output[d] - 1);
  }
};

// Any window. A thread has one pixel.
template <typename Gradient, typename T = typename Gradient::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_backward_any_kernel(const MaxPoolBackwardParams<T> p) {
  constexpr int kElements = Gradient::kElements;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  const PoolTile tile = pool_tile(p.tiles, thread);
  const uint32_t channel = tile.lane * kElements;
  const PoolReach rows(p.of, 0, tile.row), columns(p.of, 1, tile.column);
  const int64_t image = tile.image * p.output_image + channel;
  wait_for_previous();
  acc_t<T> sums[kElements] = {};
  for (int row = rows.first; row <= rows.last; ++row) {
    uint32_t row_rest = static_cast<uint32_t>(rows.element - row * p.of.stride[0]);
    const uint32_t of_row = div_mod(p.dilation[0], row_rest) * static_cast<uint32_t>(p.of.kernel[1]);
#pragma unroll 2
    for (int column = columns.first; column <= columns.last; ++column) {
      uint32_t rest = static_cast<uint32_t>(columns.element - column * p.of.stride[1]);
      const uint32_t position = of_row + div_mod(p.dilation[1], rest);
      const int64_t at = image + row * p.output_row + static_cast<uint32_t>(column) * p.channels;
      const Gradient found = Gradient::load_if((row_rest | rest) == 0, p.gradient + at, p.position + at);
      acc_t<T> numbers[kElements];
      found.numbers(numbers);
      add_at(found, numbers, position, sums);
    }
  }
  Gradient::store(sums, p.result + tile.image * p.input_image + tile.row * p.input_row +
                            static_cast<uint32_t>(tile.column) * p.channels + channel);
}

template <typename Gradient, typename T>
cudaError_t launch_max_pool_backward_with(const T* gradient, const uint8_t* position, T* result,
                                          const PoolProblem& problem, int multiprocessors, cudaStream_t stream) {
  // stride: rows and columns of a tile. The first one has the first pixel in it.
  const auto launch = [&](void (*kernel)(MaxPoolBackwardParams<T>), int64_t stride) {
    const auto tiles = [&](const PoolWindow& w) { return (w.padding + w.input - 1) / stride - w.padding / stride + 1; };
    return launch_pool_tiles(kernel, MaxPoolBackwardParams<T>(gradient, position, result, problem), problem.images,
                             tiles(problem.rows), tiles(problem.columns), problem.channels / Gradient::kElements,
                             multiprocessors, stream);
  };
  if constexpr (sizeof(T) < 8) {  // float64 is for checks
    if (is_square(problem, 3, 2)) {
      return launch(max_pool_backward_square_kernel<Gradient, 3, 2>, 2);
    }
    if (is_square(problem, 2, 2)) {
      return launch(max_pool_backward_square_kernel<Gradient, 2, 2>, 2);
    }
  }
  return launch(max_pool_backward_any_kernel<Gradient>, 1);
}

template <typename T>
cudaError_t launch_max_pool_backward(const T* gradient, const uint8_t* position, T* result, const PoolProblem& problem,
                                     int multiprocessors, cudaStream_t stream) {
  const bool by_vector = problem.channels % Vec<T>::kSize == 0 && is_aligned(gradient) && is_aligned(result) &&
                         is_aligned(position, Vec<T>::kSize);
  return by_vector ? launch_max_pool_backward_with<VectorGradient<T>>(gradient, position, result, problem,
                                                                      multiprocessors, stream)
                   : launch_max_pool_backward_with<ElementGradient<T>>(gradient, position, result, problem,
                                                                       multiprocessors, stream);
}

}  // namespace fused_conv_bn
