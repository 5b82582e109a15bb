// out = epilogue(affine of its channel of the concatenated inputs): a concatenation that is never written. What PyTorch takes for
// it, in channels_last, is several times what its memory takes.
#pragma once

#include "scale_shift_any.cuh"

namespace fused_conv_bn {

template <typename T>
struct CatParams : ScaleShiftParams<T> {  // its input is not used
  Parts<T> parts;
};

// The elements of a vector from two planes, the second from element `from_first` on.
template <typename T>
__device__ __forceinline__ Vec<T> load_from_planes(const T* first, const T* second, uint32_t from_first,
                                                   uint32_t count) {
  constexpr uint32_t V = Vec<T>::kSize;
  alignas(kVecBytes) T elements[V];
#pragma unroll
  for (uint32_t k = 0; k < V; ++k) {
    elements[k] = k < count ? (k < from_first ? first[k] : second[k - from_first]) : T{};
  }
  return {*reinterpret_cast<const uint4*>(elements)};
}

// Planes of at least a vector, in launches that begin with an image and on a 16-byte boundary.
template <typename T, bool kBounds>
__global__ void __launch_bounds__(kThreads) cat_planes_kernel(const CatParams<T> p) {
  constexpr uint32_t V = Vec<T>::kSize;
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= p.vectors) {
    return;
  }
  const uint32_t inner = p.channels.inner.divisor;
  uint32_t remaining;
  const uint32_t plane = p.channels.plane(vector * V, remaining);
  const uint32_t row = p.channels.channels.div(plane);
  const uint32_t c = plane - row * p.channels.channels.divisor;
  const T* data = p.parts.plane(row, c, inner) + (inner - remaining);
  Item<T> item;
  item.element = static_cast<int>(vector * V);
  item.whole = item.element + static_cast<int>(V) <= p.numel;
  wait_for_previous();
  const bool is_last = c + 1 == p.channels.channels.divisor;
  const uint32_t next = is_last ? 0 : c + 1;
  if (remaining >= V && item.whole && reinterpret_cast<uintptr_t>(data) % kVecBytes == 0) {
    item.x = {load_words(data)};
  } else {
    const T* second = remaining < V ? p.parts.plane(row + is_last, next, inner) : data;
    item.x = load_from_planes(data, second, remaining, static_cast<uint32_t>(p.numel) - vector * V);
  }
  const Affine<acc_t<T>> affine = p.source.at(c);
  Affine<acc_t<T>> behind = affine;
  if (remaining < V) {
    behind = p.source.at(next);
  }
  finish_item<false, kBounds>(p, item, [&](uint32_t k) -> Affine<acc_t<T>> {
    return {k < remaining ? affine.center : behind.center, k < remaining ? affine.scale : behind.scale,
            k < remaining ? affine.shift : behind.shift};
  });
}

// Channels innermost, and each part a multiple of the vector's size on a 16-byte boundary.
template <typename T, bool kBounds, int kRows>
__global__ void __launch_bounds__(kThreads, kColumnBlocks) cat_columns_kernel(const CatParams<T> p) {
  constexpr int V = Vec<T>::kSize;
  scale_shift_columns<false, kBounds, true, kRows>(p, [&](uint32_t c) {
    const int part = p.parts.find(c);
    const T* first = p.parts.data[part] + (c - p.parts.first[part]);
    const uint32_t pitch = p.parts.channels(part);
    return [=](uint32_t vector, uint32_t pixel) {
      Item<T> item;
      item.element = static_cast<int>(vector * V);
      item.whole = true;
      item.x = {load_words(first + pixel * pitch)};
      return item;
    };
  });
}

// Parts of which the rows from `row` on are taken.
template <typename T>
Parts<T> rows_from(Parts<T> parts, int64_t row, int64_t inner) {
  for (int i = 0; i < parts.count; ++i) {
    parts.data[i] += row * parts.channels(i) * inner;
  }
  return parts;
}

template <bool kBounds, typename T>
cudaError_t launch_cat_with(const Parts<T>& parts, T* output, const Shape& shape, const AffineSource<T>& source,
                            const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int V = Vec<T>::kSize;
  const int64_t period = shape.channels * shape.inner;
  bool by_vector = shape.inner == 1;
  for (int i = 0; i < parts.count; ++i) {
    by_vector = by_vector && parts.channels(i) % V == 0 && misalignment(parts.data[i]) == 0;
  }
  // Whole rows in each launch, and a multiple of V of them, so that it begins where vectors do.
  const int64_t rows = kMaxLaunchElements / period / V * V;
  if (misalignment(output) != 0 || rows == 0 || !(by_vector || shape.inner >= V)) {
    return launch_any(parts, static_cast<const T*>(nullptr), output, shape, 0, source, epilogue, stream);
  }
  int64_t count = 0;
  for (int64_t begin = 0; begin < shape.numel; begin += count) {
    count = std::min(shape.numel - begin, rows * period);
    auto p = make_params<CatParams>(static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), output, shape,
                                    begin, count, source, epilogue);
    p.parts = rows_from(parts, begin / period, shape.inner);
    cudaError_t status;
    if (by_vector) {
      const uint32_t threads = set_columns(p, shape.channels, p.vectors, kColumnRows<T>);
      status = launch_threads(cat_columns_kernel<T, kBounds, kColumnRows<T>>, threads, 1, stream, p);
    } else {
      status = launch_threads(cat_planes_kernel<T, kBounds>, p.vectors, 1, stream, p);
    }
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_cat(const Parts<T>& parts, T* output, const Shape& shape, const AffineTensors& affine,
                       const Epilogue& epilogue, cudaStream_t stream) {
  const AffineSource<T> source(affine);
  if constexpr (std::is_same_v<T, double>) {  // correct, and not worth code of its own
    return launch_any(parts, static_cast<const T*>(nullptr), output, shape, 0, source, epilogue, stream);
  } else {
    return is_bound(epilogue.activation) ? launch_cat_with<true>(parts, output, shape, source, epilogue, stream)
                                         : launch_cat_with<false>(parts, output, shape, source, epilogue, stream);
  }
}

}  // namespace fused_conv_bn
