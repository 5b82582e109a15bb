// The gradients of the elementwise pass on the GPU: dz and the residual's, in one pass over what they are made of (backward.h).
//
// Three kernels, as those of scale_shift.cuh, by how channels lie in memory. Results are new memory, and begin on a 16-byte
// boundary; operands that do not are read element by element.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backward_derivative.cuh"
#include "backward_launch.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/elementwise/scale_shift.cuh"
#include "kernels/ptx/launch.cuh"

namespace fused_conv_bn {

constexpr int kApplyBlocks =
    3;  // a multiprocessor's at least, of kernels whose threads keep the affines of many channels

template <typename T>
struct ApplyParams {
  const T* dy;
  const T* z;
  const T* other;
  T* dz;
  T* dresidual;
  int numel;
  bool dy_aligned;
  bool z_aligned;
  bool other_aligned;
  uint32_t vectors;
  ChannelMap channels;
  AffineSource<T> source;  // in evaluation
  BackwardBuffer buffer;   // in training
  Derivative<T> derivative;

  // As ScaleShiftParams has them.
  FastDiv row;
  FastDiv lanes;
  FastDiv chunks;
  uint32_t pixel_vectors;
  uint32_t pixels;

  __device__ __forceinline__ BackwardAffine<acc_t<T>> at(uint32_t c) const {
    if (buffer.data != nullptr) {
      return buffer.at<T>(c);
    }
    return {source.at(c), 0, 0};
  }
};

// One vector of the tensor: where it is, and what is read from it.
template <typename T>
struct ApplyItem {
  int element;
  bool whole;
  Vec<T> dy, z, other;
};

template <bool kOther, typename T>
__device__ __forceinline__ ApplyItem<T> load_apply_item(const ApplyParams<T>& p, uint32_t vector) {
  constexpr int V = Vec<T>::kSize;
  ApplyItem<T> item{};
  item.element = static_cast<int>(vector * V);
  item.whole = item.element + V <= p.numel;
  item.dy = load_vec(p.dy, item.element, p.numel, item.whole, p.dy_aligned);
  if (p.z != nullptr) {
    item.z = load_vec(p.z, item.element, p.numel, item.whole, p.z_aligned);
  }
  if constexpr (kOther) {
    item.other = load_vec(p.other, item.element, p.numel, item.whole, p.other_aligned);
  }
  return item;
}

// affine_of(k): that of the vector's element k.
template <bool kOther, bool kBounds, typename T, typename AffineOf>
__device__ __forceinline__ void finish_apply_item(const ApplyParams<T>& p, ApplyItem<T>& item, AffineOf affine_of) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  Acc dv[V], d[V], other[V] = {};
  unpack(item.dy, dv);
  unpack(item.z, d);
  if constexpr (kOther) {
    unpack(item.other, other);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    d[k] -= affine_of(k).affine.center;
  }
  with_derivative<T, kOther, kBounds>(p.derivative, [&](const auto& dv_of) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      dv[k] = dv_of(dv[k], d[k], other[k], affine_of(k).affine);
    }
  });
  if (p.dresidual != nullptr) {
    pack(dv, item.dy);
    store_vec(p.dresidual, item.element, p.numel, item.whole, item.dy);
  }
  if (p.dz == nullptr) {
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    dv[k] *= affine_of(k).affine.scale;
  }
  if (p.buffer.data != nullptr) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      dv[k] += d[k] * affine_of(k).slope + affine_of(k).offset;
    }
  }
  pack(dv, item.dy);
  store_vec(p.dz, item.element, p.numel, item.whole, item.dy);
}

template <typename T, bool kOther, bool kBounds>
__global__ void __launch_bounds__(kThreads, 4) backward_apply_planes_kernel(const ApplyParams<T> p) {
  using Acc = acc_t<T>;
  constexpr uint32_t V = Vec<T>::kSize;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= p.vectors) {
    return;
  }
  wait_for_previous();
  ApplyItem<T> item = load_apply_item<kOther>(p, vector);
  uint32_t remaining;
  const uint32_t c = p.channels.channel(vector * V, remaining);
  const BackwardAffine<Acc> first = p.at(c);
  BackwardAffine<Acc> second = first;
  if (remaining < V) {
    second = p.at(p.channels.wrap(c + 1));
  }
  finish_apply_item<kOther, kBounds>(p, item, [&](uint32_t k) -> BackwardAffine<Acc> {
    const auto of = [&](Acc a, Acc b) { return k < remaining ? a : b; };
    return {{of(first.affine.center, second.affine.center), of(first.affine.scale, second.affine.scale),
             of(first.affine.shift, second.affine.shift)},
            of(first.slope, second.slope),
            of(first.offset, second.offset)};
  });
}

template <typename T, bool kOther, bool kBounds, int kRows>
__global__ void __launch_bounds__(kThreads, kApplyBlocks) backward_apply_columns_kernel(const ApplyParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  constexpr int kPerLoad = Vec<Acc>::kSize;
  constexpr int kArrays = BackwardBuffer::kArrays;
  __shared__ alignas(kVecBytes) Acc numbers[kArrays][kColumnChannels<T>];
  const uint32_t group = p.chunks.div(blockIdx.x);
  const uint32_t first_lane = (blockIdx.x - group * p.chunks.divisor) * p.lanes.divisor;
  const uint32_t pixel = p.lanes.div(threadIdx.x);
  const uint32_t lane = threadIdx.x - pixel * p.lanes.divisor;
  const bool active = pixel < p.pixels && first_lane + lane < p.pixel_vectors;
  wait_for_previous();
  const uint32_t stride = p.pixels * p.pixel_vectors;
  const uint32_t vector = group * kRows * stride + pixel * p.pixel_vectors + first_lane + lane;
  ApplyItem<T> items[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (active && vector + i * stride < p.vectors) {
      items[i] = load_apply_item<kOther>(p, vector + i * stride);
    }
  }
  const uint32_t c = first_lane * V + threadIdx.x;
  if (threadIdx.x < p.lanes.divisor * V && c < p.channels.channels.divisor) {
    const BackwardAffine<Acc> b = p.at(c);
    const Acc values[kArrays] = {b.affine.center, b.affine.scale, b.affine.shift, b.slope, b.offset};
#pragma unroll
    for (int i = 0; i < kArrays; ++i) {
      numbers[i][threadIdx.x] = values[i];
    }
  }
  __syncthreads();
  if (!active) {
    return;
  }
  Acc values[kArrays][V];
#pragma unroll
  for (int i = 0; i < kArrays; ++i) {
#pragma unroll
    for (int k = 0; k < V; k += kPerLoad) {
      Acc loaded[kPerLoad];
      unpack(Vec<Acc>{*reinterpret_cast<const uint4*>(numbers[i] + lane * V + k)}, loaded);
#pragma unroll
      for (int n = 0; n < kPerLoad; ++n) {
        values[i][k + n] = i == 0 && !kCentered<T> ? Acc(0) : loaded[n];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * stride < p.vectors) {
      finish_apply_item<kOther, kBounds>(p, items[i], [&](int k) -> BackwardAffine<Acc> {
        return {{values[0][k], values[1][k], values[2][k]}, values[3][k], values[4][k]};
      });
    }
  }
}

template <typename T, bool kOther, bool kBounds, int kRows>
__global__ void __launch_bounds__(kThreads, kApplyBlocks) backward_apply_periodic_kernel(const ApplyParams<T> p) {
  constexpr int V = Vec<T>::kSize;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t group = p.row.div(thread);
  const uint32_t column = thread - group * p.row.divisor;
  const uint32_t vector = group * kRows * p.row.divisor + column;
  ApplyItem<T> items[kRows];
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * p.row.divisor < p.vectors) {
      items[i] = load_apply_item<kOther>(p, vector + i * p.row.divisor);
    }
  }
  BackwardAffine<acc_t<T>> affine[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    uint32_t remaining;
    affine[k] = p.at(p.channels.channel(column * V + k, remaining));
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (vector + i * p.row.divisor < p.vectors) {
      finish_apply_item<kOther, kBounds>(p, items[i], [&](int k) { return affine[k]; });
    }
  }
}

template <bool kOther, bool kBounds, typename T>
cudaError_t launch_backward_apply_with(const BackwardTensors<T>& t, const Shape& shape, const AffineTensors& affine,
                                       const BackwardBuffer& buffer, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int V = Vec<T>::kSize;
  const auto at = [](auto* data, int64_t begin) { return data == nullptr ? nullptr : data + begin; };
  int64_t count = 0;
  for (int64_t begin = 0; begin < shape.numel; begin += count) {
    ApplyParams<T> p{};
    p.source = AffineSource<T>(affine);
    p.buffer = buffer;
    p.derivative = {epilogue.activation, t.from_result, static_cast<acc_t<T>>(epilogue.negative_slope)};
    p.dy = t.dy + begin;
    p.z = at(t.z, begin);
    p.other = at(t.other, begin);
    p.dz = at(t.dz, begin);
    p.dresidual = at(t.dresidual, begin);
    p.dy_aligned = is_aligned(p.dy);
    p.z_aligned = is_aligned(p.z);
    p.other_aligned = is_aligned(p.other);
    count = std::min(shape.numel - begin, kMaxLaunchElements);
    p.channels = make_channel_map(shape, begin, 0, count);
    p.numel = static_cast<int>(count);
    p.vectors = static_cast<uint32_t>((count + V - 1) / V);
    constexpr int kRows = sizeof(T) == 2 ? 2 : 1;
    const auto launch = [&](const auto kernel, uint32_t threads) {
      return launch_kernel(kernel, (threads + kThreads - 1) / kThreads, kThreads, 0, true, stream, p);
    };
    cudaError_t status;
    if (shape.inner >= V) {
      status = launch(backward_apply_planes_kernel<T, kOther, kBounds>, p.vectors);
    } else if (shape.inner == 1 && shape.channels % V == 0 && p.channels.first_channel == 0) {
      const uint32_t threads = set_columns(p, shape.channels, p.vectors, kRows);
      status = launch(backward_apply_columns_kernel<T, kOther, kBounds, kRows>, threads);
    } else {
      constexpr int kPeriodicRows = sizeof(T) == 8 ? 1 : 2;
      const uint32_t threads = set_periodic(p, shape, kPeriodicRows);
      status = launch(backward_apply_periodic_kernel<T, kOther, kBounds, kPeriodicRows>, threads);
    }
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_backward_apply(const BackwardTensors<T>& t, const Shape& shape, const AffineTensors& affine,
                                  const BackwardBuffer& buffer, const Epilogue& epilogue, cudaStream_t stream) {
  const auto with = [&](auto other, auto bounds) {
    return launch_backward_apply_with<other(), bounds()>(t, shape, affine, buffer, epilogue, stream);
  };
  const auto with_other = [&](auto other) {
    return is_bound(epilogue.activation) ? with(other, std::true_type{}) : with(other, std::false_type{});
  };
  return t.other != nullptr ? with_other(std::true_type{}) : with_other(std::false_type{});
}

}  // namespace fused_conv_bn
