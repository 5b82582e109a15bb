// max.cuh's maxima, and of each its position in its window: of several equal ones the first, and of NaN the last, row by row, as
// eager's loop keeps them. A thread has one output. An element that stands in for one outside of the image has its own position.
#pragma once

#include "max.cuh"

namespace fused_conv_bn {

// Full words of what eager's loop replaces: where `found` is larger, or NaN.
__device__ __forceinline__ uint32_t replaced_words(float, uint32_t kept, uint32_t found) {
  const float a = __uint_as_float(kept), b = __uint_as_float(found);
  return b > a || b != b ? 0xffffffffu : 0u;
}
template <typename T>
__device__ __forceinline__ uint32_t replaced_words(T, uint32_t kept, uint32_t found) {
#if defined(__CUDA_ARCH__)
  constexpr bool kComparesPairs = __CUDA_ARCH__ >= 900 || (__CUDA_ARCH__ >= 750 && std::is_same_v<T, float16>);
#else
  constexpr bool kComparesPairs = false;
#endif
  if constexpr (kComparesPairs) {
    uint32_t larger, nan;
    if constexpr (std::is_same_v<T, float16>) {
      asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(found), "r"(kept));
      asm("set.nan.u32.f16x2 %0, %1, %2;" : "=r"(nan) : "r"(found), "r"(found));
    } else {
      asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(found), "r"(kept));
      asm("set.nan.u32.bf16x2 %0, %1, %2;" : "=r"(nan) : "r"(found), "r"(found));
    }
    return larger | nan;
  } else {
    const float2 a = unpack_pair(T(), kept), b = unpack_pair(T(), found);
    return (b.x > a.x || b.x != b.x ? 0xffffu : 0u) | (b.y > a.y || b.y != b.y ? 0xffff0000u : 0u);
  }
}

// Of 16 bytes of channels.
template <typename T>
struct VectorArgmax {
  using Element = T;
  static constexpr int kElements = Vec<T>::kSize;
  static constexpr bool kIsPairs = sizeof(T) == 2;
  static constexpr int kPlaces = sizeof(T) == 8 ? 2 : 4;  // words; of 16-bit elements each has two
  uint32_t value[4];
  uint32_t place[kPlaces];

  // A position as a word has it.
  __device__ __forceinline__ static uint32_t spread(int position) {
    return static_cast<uint32_t>(position) * (kIsPairs ? 0x10001u : 1u);
  }
  __device__ __forceinline__ static VectorArgmax load(const T* at) {
    VectorArgmax result;
    load_words(at, result.value);
    return result;
  }
  __device__ __forceinline__ static VectorArgmax lowest() {
    const Vec<T> lowest = VectorMax<T>::lowest().value;
    return {{lowest.words.x, lowest.words.y, lowest.words.z, lowest.words.w}, {}};
  }
  __device__ __forceinline__ void set_place(uint32_t spread_position) {
#pragma unroll
    for (int w = 0; w < kPlaces; ++w) {
      place[w] = spread_position;
    }
  }
  __device__ __forceinline__ void add(const VectorArgmax& found, uint32_t spread_position) {
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const double a = number(k), b = found.number(k);
        if (b > a || b != b) {
          value[2 * k] = found.value[2 * k];
          value[2 * k + 1] = found.value[2 * k + 1];
          place[k] = spread_position;
        }
      }
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t mask = replaced_words(T(), value[w], found.value[w]);
        value[w] = (found.value[w] & mask) | (value[w] & ~mask);
        place[w] = (spread_position & mask) | (place[w] & ~mask);
      }
    }
  }
  __device__ __forceinline__ void store(T* at, uint8_t* position) const {
    store_words(at, value);
    if constexpr (kIsPairs) {
      const uint32_t words[2] = {__byte_perm(place[0], place[1], 0x6420), __byte_perm(place[2], place[3], 0x6420)};
      store_words(position, words);
    } else if constexpr (sizeof(T) == 4) {
      const uint32_t words[1] = {place[0] | place[1] << 8 | place[2] << 16 | place[3] << 24};
      store_words(position, words);
    } else {
      *reinterpret_cast<uint16_t*>(position) = static_cast<uint16_t>(place[0] | place[1] << 8);
    }
  }

 private:
  __device__ __forceinline__ double number(int k) const {
    return __hiloint2double(static_cast<int>(value[2 * k + 1]), static_cast<int>(value[2 * k]));
  }
};

// Of one channel.
template <typename T>
struct ElementArgmax {
  using Element = T;
  static constexpr int kElements = 1;
  acc_t<T> value;
  uint32_t place;

  __device__ __forceinline__ static uint32_t spread(int position) { return static_cast<uint32_t>(position); }
  __device__ __forceinline__ static ElementArgmax load(const T* at) { return {to_acc(*at), 0}; }
  __device__ __forceinline__ static ElementArgmax lowest() { return {ElementMax<T>::lowest().value, 0}; }
  __device__ __forceinline__ void set_place(uint32_t position) { place = position; }
  __device__ __forceinline__ void add(const ElementArgmax& found, uint32_t position) {
    if (found.value > value || found.value != found.value) {
      value = found.value;
      place = position;
    }
  }
  __device__ __forceinline__ void store(T* at, uint8_t* position) const {
    *at = from_acc<T>(value);
    *position = static_cast<uint8_t>(place);
  }
};

template <typename T>
struct MaxPoolTrainParams : MaxPoolParams<T> {
  uint8_t* position;  // as the output

  MaxPoolTrainParams(const T* input_, T* output_, uint8_t* position_, const PoolProblem& problem)
      : MaxPoolParams<T>(input_, output_, problem), position(position_) {}

  void skip_images(int64_t images) {
    MaxPoolParams<T>::skip_images(images);
    position += images * this->output_image;
  }
};

// Square windows without dilation.
template <typename Max, int kKernel, int kStride, typename T = typename Max::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_train_square_kernel(const MaxPoolTrainParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  const MaxPoolTile tile = max_pool_tile<Max::kElements, 1>(p, thread);
  const int first_row = tile.row * kStride - p.of.padding[0], first_column = tile.column * kStride - p.of.padding[1];
  int64_t rows[kKernel];
  uint32_t columns[kKernel], of_row[kKernel], of_column[kKernel];  // the latter: of the position
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
    const int row = min(max(first_row + r, 0), p.of.input[0] - 1);
    rows[r] = row * p.input_row;
    of_row[r] = Max::spread((row - first_row) * kKernel);
    const int column = min(max(first_column + r, 0), p.of.input[1] - 1);
    columns[r] = static_cast<uint32_t>(column) * p.channels;
    of_column[r] = Max::spread(column - first_column);
  }
  wait_for_previous();
  Max found[kKernel][kKernel];
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      found[r][s] = Max::load(p.input + tile.input + rows[r] + columns[s]);
    }
  }
  Max best = found[0][0];
  best.set_place(of_row[0] + of_column[0]);
#pragma unroll
  for (int i = 1; i < kKernel * kKernel; ++i) {
    const int r = i / kKernel, s = i % kKernel;
    best.add(found[r][s], of_row[r] + of_column[s]);
  }
  best.store(p.output + tile.output, p.position + tile.output);
}

// Any window.
template <typename Max, typename T = typename Max::Element>
__global__ void __launch_bounds__(kPoolThreads) max_pool_train_any_kernel(const MaxPoolTrainParams<T> p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= p.tiles.threads) {
    return;
  }
  constexpr int kAtOnce = sizeof(T) == 8 ? 2
                                         : 4;  // more of the former would not fit into the registers that others take
  const MaxPoolTile tile = max_pool_tile<Max::kElements, 1>(p, thread);
  const PoolSpan rows(p.of, 0, tile.row), columns(p.of, 1, tile.column);
  wait_for_previous();
  Max best = Max::lowest();
  int of_row = rows.skipped * p.of.kernel[1] + columns.skipped;
  best.set_place(Max::spread(of_row));
  for (int row = rows.first; row < rows.end; row += p.of.dilation[0]) {
    const T* const data = p.input + tile.input + row * p.input_row;
    int position = of_row;
#pragma unroll kAtOnce
    for (int column = columns.first; column < columns.end; column += p.of.dilation[1]) {
      best.add(Max::load(data + static_cast<uint32_t>(column) * p.channels), Max::spread(position));
      ++position;
    }
    of_row += p.of.kernel[1];
  }
  best.store(p.output + tile.output, p.position + tile.output);
}

template <typename Max, typename T>
cudaError_t launch_max_pool_train_with(const T* input, T* output, uint8_t* position, const PoolProblem& problem,
                                       int multiprocessors, cudaStream_t stream) {
  const auto launch = [&](void (*kernel)(MaxPoolTrainParams<T>)) {
    return launch_pool_tiles(kernel, MaxPoolTrainParams<T>(input, output, position, problem), problem.images,
                             problem.rows.output, problem.columns.output, problem.channels / Max::kElements,
                             multiprocessors, stream);
  };
  if constexpr (sizeof(T) < 8) {  // float64 is for checks
    if (is_square(problem, 3, 2)) {
      return launch(max_pool_train_square_kernel<Max, 3, 2>);
    }
    if (is_square(problem, 2, 2)) {
      return launch(max_pool_train_square_kernel<Max, 2, 2>);
    }
  }
  return launch(max_pool_train_any_kernel<Max>);
}

template <typename T>
cudaError_t launch_max_pool_train(const T* input, T* output, uint8_t* position, const PoolProblem& problem,
                                  int multiprocessors, cudaStream_t stream) {
  const bool by_vector = problem.channels % Vec<T>::kSize == 0 && is_aligned(input) && is_aligned(output) &&
                         is_aligned(position, Vec<T>::kSize);
  return by_vector
             ? launch_max_pool_train_with<VectorArgmax<T>>(input, output, position, problem, multiprocessors, stream)
             : launch_max_pool_train_with<ElementArgmax<T>>(input, output, position, problem, multiprocessors, stream);
}

}  // namespace fused_conv_bn
