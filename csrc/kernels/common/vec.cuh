// The one 16-byte vector type: loads and stores that may be partial or misaligned, and the way to and from arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "epilogue.h"
#include "scalar.h"

namespace fused_conv_bn {

constexpr int kVecBytes = 16;

// float4, 8 halves or 2 doubles. Kept as words: a struct of __half members is copied member by member, and the compiler
// then splits the 16-byte access.
template <typename T>
struct Vec {
  static constexpr int kSize = kVecBytes / static_cast<int>(sizeof(T));
  uint4 words;
};

// Whether vectors may be read or written there.
inline bool is_aligned(const void* address, int64_t bytes = kVecBytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// 16-byte accesses in so many words: left to itself, the compiler may merge one with the element-wise path beside it.
__device__ __forceinline__ uint4 load_words(const void* address) {
  uint4 w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(address));
  return w;
}
__device__ __forceinline__ void store_words(void* address, const uint4& w) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}

// The same for 4 and 8 bytes, or 16.
__device__ __forceinline__ void load_words(const void* address, uint32_t (&w)[1]) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(address));
}
__device__ __forceinline__ void load_words(const void* address, uint32_t (&w)[2]) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(address));
}
__device__ __forceinline__ void load_words(const void* address, uint32_t (&w)[4]) {
  const uint4 words = load_words(address);
  w[0] = words.x, w[1] = words.y, w[2] = words.z, w[3] = words.w;
}
__device__ __forceinline__ void store_words(void* address, const uint32_t (&w)[1]) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(w[0]) : "memory");
}
__device__ __forceinline__ void store_words(void* address, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1]) : "memory");
}
__device__ __forceinline__ void store_words(void* address, const uint32_t (&w)[4]) {
  store_words(address, uint4{w[0], w[1], w[2], w[3]});
}

// If the condition holds, else zeros. As a branch it would wait for the load.
__device__ __forceinline__ uint32_t load_half_if(bool condition, const void* address) {
  uint32_t w;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.global.u16 %0, [%1];\n}"
               : "=&r"(w)
               : "l"(address), "r"(static_cast<int>(condition)));
  return w;
}
__device__ __forceinline__ void load_words_if(bool condition, const void* address, uint32_t (&w)[1]) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.global.u32 %0, [%1];\n}"
               : "=&r"(w[0])
               : "l"(address), "r"(static_cast<int>(condition)));
}
__device__ __forceinline__ void load_words_if(bool condition, const void* address, uint32_t (&w)[2]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\n@p ld.global.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(w[0]), "=&r"(w[1])
      : "l"(address), "r"(static_cast<int>(condition)));
}
__device__ __forceinline__ void load_words_if(bool condition, const void* address, uint32_t (&w)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(w[0]), "=&r"(w[1]), "=&r"(w[2]), "=&r"(w[3])
      : "l"(address), "r"(static_cast<int>(condition)));
}

// Elements [e, e + kSize) of data; `whole`: all of them exist, else only those in [0, n) do, and the others read as 0;
// `aligned`: data + e is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* data, int e, int n, bool whole, bool aligned) {
  if (whole && aligned) {
    return {load_words(data + e)};
  }
  constexpr int kWords = sizeof(T) / 4;  // of one element; 0: two elements share a word
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) {
    if (e + k >= 0 && e + k < n) {
      if constexpr (kWords == 0) {
        const uint32_t bits = *reinterpret_cast<const uint16_t*>(data + e + k);
        words[k / 2] |= bits << (16 * (k % 2));
      } else {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          words[k * kWords + w] = reinterpret_cast<const uint32_t*>(data + e + k)[w];
        }
      }
    }
  }
  return {{words[0], words[1], words[2], words[3]}};
}

// data + e is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void store_vec(T* data, int e, int n, bool whole, const Vec<T>& value) {
  if (whole) {
    store_words(data + e, value.words);
    return;
  }
  constexpr int kWords = sizeof(T) / 4;
  const uint32_t words[4] = {value.words.x, value.words.y, value.words.z, value.words.w};
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) {
    if (e + k >= 0 && e + k < n) {
      if constexpr (kWords == 0) {
        *reinterpret_cast<uint16_t*>(data + e + k) = static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)));
      } else {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          reinterpret_cast<uint32_t*>(data + e + k)[w] = words[k * kWords + w];
        }
      }
    }
  }
}

// ---- words to acc_t<T> and back, 16-bit elements in pairs --------------------------------------------------------------

__device__ __forceinline__ void unpack(const Vec<float>& v, float (&out)[4]) {
  out[0] = __uint_as_float(v.words.x);
  out[1] = __uint_as_float(v.words.y);
  out[2] = __uint_as_float(v.words.z);
  out[3] = __uint_as_float(v.words.w);
}
__device__ __forceinline__ void unpack(const Vec<double>& v, double (&out)[2]) {
  out[0] = __hiloint2double(static_cast<int>(v.words.y), static_cast<int>(v.words.x));
  out[1] = __hiloint2double(static_cast<int>(v.words.w), static_cast<int>(v.words.z));
}
// The words of two elements.
template <typename T>
using PairWords = std::conditional_t<sizeof(T) == 2, uint32_t, uint2>;

__device__ __forceinline__ float2 unpack_pair(float, uint2 words) {
  return {__uint_as_float(words.x), __uint_as_float(words.y)};
}
__device__ __forceinline__ float2 unpack_pair(float16, uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack_pair(bfloat16, uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <typename T>
__device__ __forceinline__ void unpack(const Vec<T>& v, float (&out)[8]) {
  const uint32_t words[4] = {v.words.x, v.words.y, v.words.z, v.words.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = unpack_pair(T(), words[w]);
    out[2 * w] = pair.x;
    out[2 * w + 1] = pair.y;
  }
}

__device__ __forceinline__ void pack(const float (&in)[4], Vec<float>& v) {
  v.words = {__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3])};
}
__device__ __forceinline__ void pack(const double (&in)[2], Vec<double>& v) {
  v.words = {static_cast<uint32_t>(__double2loint(in[0])), static_cast<uint32_t>(__double2hiint(in[0])),
             static_cast<uint32_t>(__double2loint(in[1])), static_cast<uint32_t>(__double2hiint(in[1]))};
}
__device__ __forceinline__ uint2 pack_pair(float, float low, float high) {
  return {__float_as_uint(low), __float_as_uint(high)};
}
__device__ __forceinline__ uint32_t pack_pair(float16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// The same with ReLU, which rounding does on the way. Compute capability 8.0 on.
__device__ __forceinline__ uint32_t pack_pair_relu(float16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_pair_relu(bfloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// The same with the bound that an activation is. Rounding keeps the order of numbers, and these bounds as they are.
template <Activation A, typename T>
__device__ __forceinline__ uint32_t pack_pair_bounded(T, float low, float high) {
  if constexpr (A == Activation::none) {
    return pack_pair(T(), low, high);
  }
  uint32_t pair = pack_pair_relu(T(), low, high);
  if constexpr (A == Activation::relu6) {
    if constexpr (std::is_same_v<T, float16>) {
      asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x46004600u));
    } else {
      asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x40c040c0u));
    }
  }
  return pair;
}
template <typename T>
__device__ __forceinline__ void pack(const float (&in)[8], Vec<T>& v) {
  v.words = {pack_pair(T(), in[0], in[1]), pack_pair(T(), in[2], in[3]), pack_pair(T(), in[4], in[5]),
             pack_pair(T(), in[6], in[7])};
}

}  // namespace fused_conv_bn
