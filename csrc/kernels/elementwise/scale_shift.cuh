// The elementwise kernels: out = epilogue(input, affine of its channel, residual), one pass, 16 bytes at a time.
//
// A thread's unit is one 16-byte vector of the output, counted from the 16-byte boundary at or before its first element.
// So the first and the last vector may be partial, and need no kernel of their own. Inputs that are out of step with the
// output are read element by element; the stores stay 16 bytes wide.
//
// The affine of a channel is folded on the way (AffineSource). The activation, and where the residual is added, are chosen at
// run time: a branch for a whole vector.
// Three kernels, by how channels lie in memory:
//   planes    planes of at least a vector: a vector touches at most two channels. One vector a thread, in linear order.
//   columns   channels innermost (channels_last, or (N, C)), a multiple of the vector's size: a block takes up to 512
//             bytes of many pixels, and folds each of their channels once.
//   periodic  what is left (channels_last with odd channel counts, planes of a few elements): every element of a vector may
//             have a channel of its own, but the channels repeat every channels * inner elements, and a thread uses its
//             affines for vectors a multiple of that apart.
// In each, a thread's loads of the tensor come first: what the affines take is hidden behind them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/launch.cuh"
#include "launch.cuh"
#include "memory_format.h"

namespace fused_conv_bn {

constexpr int kThreads = 256;

template <typename T>
struct ScaleShiftParams {
  const T* input;
  const T* residual;  // nullptr: none
  T* output;
  int numel;
  int lead;  // elements between the 16-byte boundary and the output's first element
  bool input_aligned;
  bool residual_aligned;
  uint32_t vectors;
  ChannelMap channels;  // its element 0 is the boundary's
  AffineSource<T> source;
  Activation activation;
  bool residual_last;
  acc_t<T> negative_slope;

  // Of the periodic kernel: vectors in a row, which is some periods of the channels.
  FastDiv row;
  // Of the columns kernel: how many vectors of a pixel a block takes, how many such chunks make up the pixel, and how many
  // pixels a block takes at a time. Row blockIdx.y of the grid takes image_vectors of all vectors, and affines of its own.
  FastDiv lanes;
  FastDiv chunks;
  uint32_t pixel_vectors;
  uint32_t pixels;
  uint32_t image_vectors;
};

// One vector of the tensor: where it is, and what is read from it.
template <typename T>
struct Item {
  int element;
  bool whole;
  Vec<T> x;
  Vec<T> residual;
};

template <bool kResidual, typename T>
__device__ __forceinline__ Item<T> load_item(const ScaleShiftParams<T>& p, uint32_t vector) {
  constexpr int V = Vec<T>::kSize;
  Item<T> item;
  item.element = static_cast<int>(vector * V) - p.lead;
  item.whole = item.element >= 0 && item.element + V <= p.numel;
  item.x = load_vec(p.input, item.element, p.numel, item.whole, p.input_aligned);
  if constexpr (kResidual) {
    item.residual = load_vec(p.residual, item.element, p.numel, item.whole, p.residual_aligned);
  }
  return item;
}

// affine_of(k): the affine of the vector's element k.
template <bool kResidual, bool kBounds, typename T, typename AffineOf>
__device__ __forceinline__ void finish_item(const ScaleShiftParams<T>& p, Item<T>& item, AffineOf affine_of) {
  constexpr int V = Vec<T>::kSize;
  acc_t<T> x[V];
  acc_t<T> residual[kResidual ? V : 1];
  unpack(item.x, x);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    x[k] = apply_affine(x[k], affine_of(k));
  }
  const auto add_residual = [&] {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      x[k] += residual[k];
    }
  };
  if constexpr (kResidual) {
    unpack(item.residual, residual);
    if (!p.residual_last) {
      add_residual();
    }
  }
  activate_all<T, kBounds>(p.activation, p.negative_slope, x);
  if constexpr (kResidual) {
    if (p.residual_last) {
      add_residual();
    }
  }
  pack(x, item.x);
  store_vec(p.output, item.element, p.numel, item.whole, item.x);
}

template <typename T, bool kResidual, bool kBounds, bool kFolds>
__global__ void __launch_bounds__(kThreads) scale_shift_planes_kernel(const ScaleShiftParams<T> p) {
  constexpr uint32_t V = Vec<T>::kSize;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= p.vectors) {
    return;
  }
  wait_for_previous();
  Item<T> item = load_item<kResidual>(p, vector);
  uint32_t remaining;
  const uint32_t c = p.channels.channel(vector * V, remaining);
  const Affine<acc_t<T>> first = p.source.template at<kFolds>(c);
  Affine<acc_t<T>> second = first;
  if (remaining < V) {
    second = p.source.template at<kFolds>(p.channels.wrap(c + 1));
  }
  finish_item<kResidual, kBounds>(p, item, [&](uint32_t k) -> Affine<acc_t<T>> {
    return {k < remaining ? first.center : second.center, k < remaining ? first.scale : second.scale,
            k < remaining ? first.shift : second.shift};
  });
}

// Channels that a block of the columns kernel takes at most: a warp's worth of vectors.
template <typename T>
constexpr int kColumnChannels = 32 * Vec<T>::kSize;

// CUDA 12's compiler tries for 48 registers here, and spills; with 4 blocks named (64 registers) it does not.
constexpr int kColumnBlocks = __CUDACC_VER_MAJOR__ < 13 ? 4 : 0;  // 0: unnamed

// loader_of(c): what loads an item of the channels from c on, by its vector and its pixel.
template <bool kResidual, bool kBounds, bool kFolds, int kRows, typename T, typename LoaderOf>
__device__ __forceinline__ void scale_shift_columns(const ScaleShiftParams<T>& p, const LoaderOf& loader_of) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  constexpr int kPerLoad = Vec<Acc>::kSize;
  __shared__ alignas(kVecBytes) Acc centers[kCentered<T> ? kColumnChannels<T> : kPerLoad];
  __shared__ alignas(kVecBytes) Acc scales[kColumnChannels<T>];
  __shared__ alignas(kVecBytes) Acc shifts[kColumnChannels<T>];
  const uint32_t group = p.chunks.div(blockIdx.x);
  const uint32_t first_lane = (blockIdx.x - group * p.chunks.divisor) * p.lanes.divisor;
  const uint32_t pixel = p.lanes.div(threadIdx.x);
  const uint32_t lane = threadIdx.x - pixel * p.lanes.divisor;
  const bool active = pixel < p.pixels && first_lane + lane < p.pixel_vectors;
  wait_for_previous();
  const uint32_t stride = p.pixels * p.pixel_vectors;
  const uint32_t first_vector = blockIdx.y * p.image_vectors;
  const uint32_t end = min(first_vector + p.image_vectors, p.vectors);
  const uint32_t first_pixel = group * kRows * p.pixels + pixel;
  const uint32_t vector = first_vector + first_pixel * p.pixel_vectors + first_lane + lane;
  Item<T> items[kRows];
  if (active && vector < end) {
    const auto load = loader_of((first_lane + lane) * V);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (vector + i * stride < end) {
        items[i] = load(vector + i * stride, first_pixel + i * p.pixels);
      }
    }
  }
  const uint32_t channels = p.channels.channels.divisor;
  const uint32_t c = first_lane * V + threadIdx.x;
  if (threadIdx.x < p.lanes.divisor * V && c < channels) {
    const Affine<Acc> affine = p.source.template at<kFolds>(blockIdx.y * channels + c);
    if constexpr (kCentered<T>) {
      centers[threadIdx.x] = affine.center;
    }
    scales[threadIdx.x] = affine.scale;
    shifts[threadIdx.x] = affine.shift;
  }
  __syncthreads();
  if (!active) {
    return;
  }
  Affine<Acc> affine[V];
#pragma unroll
  for (int k = 0; k < V; k += kPerLoad) {
    Acc center[kPerLoad] = {}, scale[kPerLoad], shift[kPerLoad];
    if constexpr (kCentered<T>) {
      unpack(Vec<Acc>{*reinterpret_cast<const uint4*>(centers + lane * V + k)}, center);
    }
    unpack(Vec<Acc>{*reinterpret_cast<const uint4*>(scales + lane * V + k)}, scale);
    unpack(Vec<Acc>{*reinterpret_cast<const uint4*>(shifts + lane * V + k)}, shift);
#pragma unroll
    for (int i = 0; i < kPerLoad; ++i) {
      affine[k + i] = {center[i], scale[i], shift[i]};
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * stride < end) {
      finish_item<kResidual, kBounds>(p, items[i], [&](int k) { return affine[k]; });
    }
  }
}

template <typename T, bool kResidual, bool kBounds, bool kFolds, int kRows>
__global__ void __launch_bounds__(kThreads, kColumnBlocks) scale_shift_columns_kernel(const ScaleShiftParams<T> p) {
  scale_shift_columns<kResidual, kBounds, kFolds, kRows>(
      p, [&](uint32_t) { return [&](uint32_t vector, uint32_t) { return load_item<kResidual>(p, vector); }; });
}

// With the 4 blocks named (64 registers a thread) the compiler does not try for more, and spills nothing.
template <typename T, bool kResidual, bool kBounds, bool kFolds, int kRows>
__global__ void __launch_bounds__(kThreads, 4) scale_shift_periodic_kernel(const ScaleShiftParams<T> p) {
  constexpr int V = Vec<T>::kSize;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  // Consecutive threads take consecutive vectors of kRows rows, the next ones those of the rows behind them.
  const uint32_t group = p.row.div(thread);
  const uint32_t column = thread - group * p.row.divisor;
  const uint32_t vector = group * kRows * p.row.divisor + column;
  Item<T> items[kRows];
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * p.row.divisor < p.vectors) {
      items[i] = load_item<kResidual>(p, vector + i * p.row.divisor);
    }
  }
  Affine<acc_t<T>> affine[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    uint32_t remaining;
    affine[k] = p.source.template at<kFolds>(p.channels.channel(column * V + k, remaining));
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * p.row.divisor < p.vectors) {
      finish_item<kResidual, kBounds>(p, items[i], [&](int k) { return affine[k]; });
    }
  }
}

// Set what the kernels' own fields say, and return the number of threads to launch (for so many vectors).
template <template <typename> class Params, typename T>
uint32_t set_columns(Params<T>& p, int64_t channels, uint32_t vectors, int rows) {
  constexpr int64_t V = Vec<T>::kSize;
  const int64_t chunks = (channels + kColumnChannels<T> - 1) / kColumnChannels<T>;
  const int64_t pixel_vectors = channels / V;
  const int64_t lanes = (pixel_vectors + chunks - 1) / chunks;
  p.lanes = FastDiv(static_cast<uint32_t>(lanes));
  p.chunks = FastDiv(static_cast<uint32_t>(chunks));
  p.pixel_vectors = static_cast<uint32_t>(pixel_vectors);
  p.pixels = static_cast<uint32_t>(kThreads / lanes);
  const int64_t group_vectors = int64_t{p.pixels} * pixel_vectors * rows;
  return static_cast<uint32_t>((vectors + group_vectors - 1) / group_vectors * chunks * kThreads);
}

template <template <typename> class Params, typename T>
uint32_t set_periodic(Params<T>& p, const Shape& shape, int rows) {
  const int64_t period = shape.channels * shape.inner;
  const int64_t period_vectors = period / std::gcd(period, int64_t{Vec<T>::kSize});
  const int64_t row = std::min<int64_t>(p.vectors, period_vectors * std::max<int64_t>(1, kThreads / period_vectors));
  p.row = FastDiv(static_cast<uint32_t>(row));
  return static_cast<uint32_t>((p.vectors + row * rows - 1) / (row * rows) * row);
}

// Measured on an H200: more than this many vectors a thread cost bandwidth, fewer leave the affines' cost visible.
template <typename T>
constexpr int kColumnRows = sizeof(T) == 2 ? 2 : 1;

inline int64_t misalignment(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVecBytes; }

// A launch over the elements from `begin` on, at most `count` of them, which is set to how many they are. residual: nullptr for
// none.
template <template <typename> class Params = ScaleShiftParams, typename T>
Params<T> make_params(const T* input, const T* residual, T* output, const Shape& shape, int64_t begin, int64_t& count,
                      const AffineSource<T>& source, const Epilogue& epilogue) {
  constexpr int V = Vec<T>::kSize;
  Params<T> p{};
  p.source = source;
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<acc_t<T>>(epilogue.negative_slope);
  p.input = input == nullptr ? nullptr : input + begin;
  p.residual = residual == nullptr ? nullptr : residual + begin;
  p.output = output + begin;
  p.lead = static_cast<int>(misalignment(p.output) / sizeof(T));
  p.input_aligned = misalignment(p.input) == misalignment(p.output);
  p.residual_aligned = misalignment(p.residual) == misalignment(p.output);
  p.channels = make_channel_map(shape, begin, p.lead, count);
  p.numel = static_cast<int>(count);
  p.vectors = static_cast<uint32_t>((p.lead + count + V - 1) / V);
  p.image_vectors = p.vectors;
  return p;
}

template <typename Params>
cudaError_t launch_threads(void (*kernel)(Params), uint32_t threads, uint32_t images, cudaStream_t stream,
                           const std::remove_const_t<Params>& p) {
  return launch_kernel(kernel, dim3((threads + kThreads - 1) / kThreads, images), kThreads, 0, true, stream, p);
}

template <bool kResidual, bool kBounds, bool kFolds, typename T>
cudaError_t launch_scale_shift_with(const T* input, const T* residual, T* output, const Shape& shape,
                                    const AffineSource<T>& source, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int V = Vec<T>::kSize, kRows = kColumnRows<T>;
  int64_t count = 0;
  for (int64_t begin = 0; begin < shape.numel; begin += count) {
    count = std::min(shape.numel - begin, kMaxLaunchElements);
    auto p = make_params(input, residual, output, shape, begin, count, source, epilogue);
    cudaError_t status;
    if (shape.inner >= V) {
      status = launch_threads(scale_shift_planes_kernel<T, kResidual, kBounds, kFolds>, p.vectors, 1, stream, p);
    } else if (shape.inner == 1 && shape.channels % V == 0 && p.channels.first_channel == 0) {
      const uint32_t threads = set_columns(p, shape.channels, p.vectors, kRows);
      status = launch_threads(scale_shift_columns_kernel<T, kResidual, kBounds, kFolds, kRows>, threads, 1, stream, p);
    } else {
      const uint32_t threads = set_periodic(p, shape, 2);
      status = launch_threads(scale_shift_periodic_kernel<T, kResidual, kBounds, kFolds, 2>, threads, 1, stream, p);
    }
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_scale_shift(const T* input, const T* residual, T* output, const Shape& shape,
                               const AffineTensors& affine, const Epilogue& epilogue, cudaStream_t stream) {
  const auto launch = [&](auto has_residual, auto bounds, auto folds) {
    return launch_scale_shift_with<has_residual(), bounds(), folds()>(input, residual, output, shape,
                                                                      AffineSource<T>(affine), epilogue, stream);
  };
  const auto with = [&](auto has_residual, auto bounds) {
    return affine.is_pair() ? launch(has_residual, bounds, std::false_type{})
                            : launch(has_residual, bounds, std::true_type{});
  };
  const auto with_residual = [&](auto has_residual) {
    return is_bound(epilogue.activation) ? with(has_residual, std::true_type{}) : with(has_residual, std::false_type{});
  };
  return residual != nullptr ? with_residual(std::true_type{}) : with_residual(std::false_type{});
}

}  // namespace fused_conv_bn
