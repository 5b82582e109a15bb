// The element types that tensors are made of, and the type that each is computed in.
//
// float16 and bfloat16 are CUDA's own types in device code. The CPU library has two-byte structs with the same layout
// and branch-free conversions, which compilers turn into vector instructions (they do not do that with _Float16).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FCB_HD __host__ __device__ __forceinline__
#else
#define FCB_HD inline __attribute__((always_inline))
#endif

namespace fused_conv_bn {

#if defined(__CUDACC__)

using float16 = __half;
using bfloat16 = __nv_bfloat16;

FCB_HD float to_acc(float16 value) { return __half2float(value); }
FCB_HD float to_acc(bfloat16 value) { return __bfloat162float(value); }

#else

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline __attribute__((always_inline)) float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

FCB_HD float to_acc(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The exponent bias differs by 112; the product also normalises half's subnormals.
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t inf_or_nan = (value.bits & 0x7fffu) >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(scaled | inf_or_nan | sign);
}
FCB_HD float to_acc(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

#endif

FCB_HD float to_acc(float value) { return value; }
FCB_HD double to_acc(double value) { return value; }

// acc_t<T>: float for everything up to 32 bits, double for double.
template <typename T>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccType<T>::type;

// The same types at run time, for code in which they matter little.
enum class Element { float16, bfloat16, float32, float64 };

// f(T) for each.
#define FCB_FORALL_ELEMENTS(f) f(float16) f(bfloat16) f(float) f(double)

template <typename T>
constexpr Element kElement = Element::float32;
template <>
inline constexpr Element kElement<float16> = Element::float16;
template <>
inline constexpr Element kElement<bfloat16> = Element::bfloat16;
template <>
inline constexpr Element kElement<double> = Element::float64;

// from_acc<T>: round to nearest even, as PyTorch's casts do.
template <typename T>
FCB_HD T from_acc(acc_t<T> value);

template <>
FCB_HD float from_acc<float>(float value) {
  return value;
}
template <>
FCB_HD double from_acc<double>(double value) {
  return value;
}

#if defined(__CUDACC__)

template <>
FCB_HD float16 from_acc<float16>(float value) {
  return __float2half_rn(value);
}
template <>
FCB_HD bfloat16 from_acc<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

#else

template <>
FCB_HD float16 from_acc<float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round at bit 13. A carry out of the largest finite half lands on
  // infinity by itself.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa so that the FPU does the rounding.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}
template <>
FCB_HD bfloat16 from_acc<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

#endif

}  // namespace fused_conv_bn
