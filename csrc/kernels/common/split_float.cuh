// float32 in two halves, for tensor cores: v * s = high + low / 2^11, both float16, with a power of two s that puts the
// largest magnitude of a group of values into [2^14, 2^15). high * high plus low * high plus high * low keeps 22 bits of
// significand, like three TF32 products at twice their speed. That holds for magnitudes down to 2^-27 of the largest;
// whoever splits looks at the magnitudes first, and computes what does not split in plain float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "vec.cuh"

namespace fused_conv_bn {

constexpr float kLowScale = 2048.0f;  // of the low half
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

// Two values, scaled and split.
__device__ __forceinline__ void split(float a, float b, float scale, uint32_t& high, uint32_t& low) {
  a *= scale;
  b *= scale;
  high = pack_pair(float16(), a, b);
  const float2 rounded = unpack_pair(float16(), high);
  low = pack_pair(float16(), (a - rounded.x) * kLowScale, (b - rounded.y) * kLowScale);
}

// Whether a scale times the inverse of a patch's scale is still far from float32's limits, or is what PyTorch would have
// it be at any scale: 0, Inf or NaN.
__device__ __forceinline__ bool is_moderate(float scale) {
  const uint32_t exponent = __float_as_uint(scale) >> 23 & 0xff;
  return (exponent >= 127 - 60 && exponent <= 127 + 60) || (__float_as_uint(scale) & 0x7fffffff) == 0 ||
         exponent == 255;
}

}  // namespace fused_conv_bn
