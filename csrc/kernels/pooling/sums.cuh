// What the kernels of means have in common: blocks, and how their threads add up vectors of pixels.
#pragma once

#include "kernels/common/vec.cuh"

namespace fused_conv_bn {

constexpr int kMeanThreads = 256;
constexpr int kMeanWarps = kMeanThreads / 32;
constexpr int kMeanLoads = 8;  // of a thread, that are on their way together
// With so many named (64 registers a thread) the compiler starts all loads before it adds up any.
constexpr int kMeanBlocksOfMultiprocessor = 4;
constexpr unsigned kMostMeanBlocks = 8;  // of a cluster, which any GPU that has clusters takes

constexpr int64_t kMostMeanGrid = int64_t{1} << 30;

extern __shared__ __align__(16) unsigned char mean_shared[];

// 16 bytes of elements, or one. A load that stands under no condition is on its way together with others.
template <typename T, int kElements>
struct MeanVector {
  Vec<T> value;

  __device__ __forceinline__ void load(const T* at) { value = {load_words(at)}; }
  __device__ __forceinline__ void get(acc_t<T> (&x)[kElements]) const { unpack(value, x); }
  __device__ __forceinline__ void add_to(acc_t<T> (&sums)[kElements], bool counts) const {
    acc_t<T> x[kElements];
    get(x);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      sums[k] = counts ? sums[k] + x[k] : sums[k];
    }
  }
};
template <typename T>
struct MeanVector<T, 1> {
  acc_t<T> value;

  __device__ __forceinline__ void load(const T* at) { value = to_acc(*at); }
  __device__ __forceinline__ void get(acc_t<T> (&x)[1]) const { x[0] = value; }
  __device__ __forceinline__ void add_to(acc_t<T> (&sums)[1], bool counts) const {
    sums[0] = counts ? sums[0] + value : sums[0];
  }
};

// Adds up vectors at `data` and every `step` behind it, `count` of them, each `pitch` elements long. What is behind the last one
// is the last one again, and not counted.
template <int kLoads, typename T, int kElements>
__device__ __forceinline__ void add_vectors(const T* data, uint32_t step, uint32_t pitch, int64_t count,
                                            acc_t<T> (&sums)[kElements]) {
  for (; count > 0; count -= kLoads * int64_t{step}) {
    const auto last = static_cast<uint32_t>(min(count, kLoads * int64_t{step}) - 1);
    MeanVector<T, kElements> found[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      found[i].load(data + static_cast<uint64_t>(min(i * step, last)) * pitch);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      found[i].add_to(sums, i * step <= last);
    }
    data += kLoads * static_cast<uint64_t>(step) * pitch;
  }
}

}  // namespace fused_conv_bn
