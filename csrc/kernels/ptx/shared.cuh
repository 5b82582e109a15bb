// Shared memory by its 32-bit addresses. Through generic pointers the compiler works the address out anew at every turn.
#pragma once

#include <cstdint>

namespace fused_conv_bn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t load_shared_half(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_1(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_shared_2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared_4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
template <typename Words>
__device__ __forceinline__ Words load_shared_words(uint32_t address) {
  if constexpr (sizeof(Words) == 4) {
    return load_shared_1(address);
  } else {
    return load_shared_2(address);
  }
}
// 4 or 2 bytes if a < b, else 0.
template <int kBytes>
__device__ __forceinline__ uint32_t load_shared_if_less(uint32_t address, int a, int b) {
  uint32_t v;
  if constexpr (kBytes == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\nmov.u32 %0, 0;\n@p ld.shared.u32 %0, [%1];\n}"
                 : "=&r"(v)
                 : "r"(address), "r"(a), "r"(b)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\nmov.u32 %0, 0;\n@p ld.shared.u16 %0, [%1];\n}"
                 : "=&r"(v)
                 : "r"(address), "r"(a), "r"(b)
                 : "memory");
  }
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace fused_conv_bn
