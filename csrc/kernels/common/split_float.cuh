// float32 in two terms, for tensor cores: v * s = high + low / 2^11, both float16, with a power of two s that puts the
// largest magnitude of a group of values into [2^14, 2^15). high * high plus low * high plus high * low keeps 22 bits
// of significand, like three TF32 products at twice their speed. That holds for magnitudes down to 2^-27 of the
// largest; whoever splits looks at the magnitudes first, and computes what does not split in plain float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vec.cuh"

namespace fused_conv_bn {

constexpr float kLowScale = 2048.0f;  // of the low term
constexpr int kMaxSpan = 27;          // binary exponents between the largest and the smallest magnitude
// Largest magnitudes that can be scaled without a thought of over- and underflow: 2^-45 to 2^45.
constexpr uint32_t kLeastExponent = 127 - 45;
constexpr uint32_t kMostExponent = 127 + 45;

// The largest and the smallest magnitude other than 0 of some values.
struct Magnitudes {
  uint32_t most = 0;             // as bits
  uint32_t least = 0xffffffffu;  // as bits, less 1, so that 0 counts as the largest of all

  __device__ __forceinline__ void add(float v) {
    const uint32_t bits = __float_as_uint(v) & 0x7fffffffu;
    most = max(most, bits);
    least = min(least, bits - 1);
  }
  __device__ __forceinline__ void merge(uint32_t other_most, uint32_t other_least) {
    most = max(most, other_most);
    least = min(least, other_least);
  }
  __device__ __forceinline__ bool in_range() const {
    const uint32_t exponent = most >> 23;
    return most == 0 || (exponent >= kLeastExponent && exponent <= kMostExponent);
  }
  // Whether scale() and inverse() exist.
  __device__ __forceinline__ bool has_scale() const {
    const uint32_t exponent = most >> 23;
    return most == 0 || (exponent >= 15 && exponent < 255);
  }
  // Of inverse(), without its bias.
  __device__ __forceinline__ int inverse_exponent() const {
    return most == 0 ? 0 : static_cast<int>(most >> 23) - 14 - 127;
  }
  // Binary exponents between the largest and the smallest.
  __device__ __forceinline__ int span() const {
    return static_cast<int>(most >> 23) - static_cast<int>((least + 1) >> 23);
  }
  // Whether splitting keeps float32's accuracy.
  __device__ __forceinline__ bool can_split() const { return in_range() && span() <= kMaxSpan; }
  // Puts `most` into [2^14, 2^15), and back.
  __device__ __forceinline__ float scale() const {
    return most == 0 ? 1.0f : __uint_as_float((268 - (most >> 23)) << 23);
  }
  __device__ __forceinline__ float inverse() const {
    return most == 0 ? 1.0f : __uint_as_float(((most >> 23) - 14) << 23);
  }
};

// Of kLanes neighbouring lanes, a power of two.
template <int kLanes>
__device__ __forceinline__ Magnitudes merge_lanes(Magnitudes m) {
#pragma unroll
  for (int other = 1; other < kLanes; other *= 2) {
    m.merge(__shfl_xor_sync(0xffffffffu, m.most, other), __shfl_xor_sync(0xffffffffu, m.least, other));
  }
  return m;
}

// Of kWarps warps, by way of shared memory, where each has a word pair. own: this warp's; all: the first one's. sync():
// their threads meet.
template <int kWarps, typename Sync>
__device__ __forceinline__ Magnitudes merge_warps(Magnitudes m, uint2& own, const uint2* all, Sync&& sync) {
  const int lane = threadIdx.x % 32;
  m.most = __reduce_max_sync(0xffffffffu, m.most);
  m.least = __reduce_min_sync(0xffffffffu, m.least);
  if (lane == 0) {
    own = make_uint2(m.most, m.least);
  }
  sync();
  const uint2 other = all[lane % kWarps];
  m.most = __reduce_max_sync(0xffffffffu, other.x);
  m.least = __reduce_min_sync(0xffffffffu, other.y);
  return m;
}

// Two values, scaled and split.
__device__ __forceinline__ void split(float a, float b, float scale, uint32_t& high, uint32_t& low) {
  a *= scale;
  b *= scale;
  high = pack_pair(float16(), a, b);
  const float2 rounded = unpack_pair(float16(), high);
  low = pack_pair(float16(), (a - rounded.x) * kLowScale, (b - rounded.y) * kLowScale);
}

// The same of more, which are given as bits.
template <int kCount>
__device__ __forceinline__ void split(const uint32_t (&values)[kCount], float scale, uint32_t (&high)[kCount / 2],
                                      uint32_t (&low)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    split(__uint_as_float(values[2 * i]), __uint_as_float(values[2 * i + 1]), scale, high[i], low[i]);
  }
}

// Whether a scale times the inverse of the scale of some input is still far from float32's limits, or is what PyTorch
// would have it be at any scale: 0, Inf or NaN.
__device__ __forceinline__ bool is_moderate(float scale) {
  const uint32_t exponent = __float_as_uint(scale) >> 23 & 0xff;
  return (exponent >= 127 - 60 && exponent <= 127 + 60) || (__float_as_uint(scale) & 0x7fffffff) == 0 ||
         exponent == 255;
}

}  // namespace fused_conv_bn
