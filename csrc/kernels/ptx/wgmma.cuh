// Matrix products of a warpgroup (wgmma), and its registers: compute capability 9.0a. Elsewhere they compile to nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/scalar.h"

namespace fused_conv_bn {

// ---- registers of a warpgroup ----------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void release_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- products --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void product_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void product_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void product_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// An operand in shared memory without swizzling, k along a row: blocks of 8 rows by 16 bytes, 128 bytes each. Blocks of
// neighbouring rows follow each other; `start` has the first block's address and the distance to the other half of k.
__device__ __forceinline__ uint64_t operand(uint32_t start) { return static_cast<uint64_t>(128 >> 4) << 32 | start; }
__host__ __device__ constexpr uint32_t operand_start(uint32_t address, uint32_t other_half) {
  return (address >> 4) | (other_half >> 4) << 16;
}

// An operand in shared memory as a box of a tensor comes there, swizzled over its whole row of 128, 64 or 32 bytes, k along a
// row. Eight rows are a pattern, which starts at a multiple of its size; the k of the next product is 32 bytes further on.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t row_bytes) {
  const uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return mode << 62 | static_cast<uint64_t>(row_bytes * 8 >> 4) << 32 | uint64_t{1} << 16 | address >> 4;
}

#define FCB_SUMS_8(i)                                                                                           \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FCB_SUMS_16(i) FCB_SUMS_8(i), FCB_SUMS_8(i + 8)
#define FCB_SUMS_32(i) FCB_SUMS_16(i), FCB_SUMS_16(i + 16)
#define FCB_SUMS_64(i) FCB_SUMS_32(i), FCB_SUMS_32(i + 32)
#define FCB_SUMS_128(i) FCB_SUMS_64(i), FCB_SUMS_64(i + 64)
#define FCB_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FCB_REGISTERS_32 \
  FCB_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FCB_REGISTERS_64                                                                         \
  FCB_REGISTERS_32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FCB_REGISTERS_128                                                                            \
  FCB_REGISTERS_64                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82"  \
  ", %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100"      \
  ", %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116" \
  ", %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FCB_PRODUCT_OF(kind, more, n, registers, operands, ...)                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n kind " {" registers "}, " operands ", 1, 1" more ";" \
               : __VA_ARGS__                                                                               \
               : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))
#define FCB_PRODUCT(...)                                        \
  if constexpr (std::is_same_v<MmaType, float>) {               \
    FCB_PRODUCT_OF("k8.f32.tf32.tf32", "", __VA_ARGS__);        \
  } else if constexpr (std::is_same_v<MmaType, bfloat16>) {     \
    FCB_PRODUCT_OF("k16.f32.bf16.bf16", ", 0, 0", __VA_ARGS__); \
  } else {                                                      \
    FCB_PRODUCT_OF("k16.f32.f16.f16", ", 0, 0", __VA_ARGS__);   \
  }

// sums = a * b, or kAdd: sums += a * b. 64 rows of a, 128 rows of b; 32 bytes of k. MmaType: float16, bfloat16, or float, of which
// TF32's bits count.
template <typename MmaType, bool kAdd>
__device__ __forceinline__ void product_m64n128(float (&sums)[64], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(128, FCB_REGISTERS_64, "%64, %65, %66", FCB_SUMS_64(0))
#endif
}

// The same of 256 rows of b.
template <typename MmaType, bool kAdd>
__device__ __forceinline__ void product_m64n256(float (&sums)[128], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(256, FCB_REGISTERS_128, "%128, %129, %130", FCB_SUMS_128(0))
#endif
}

// The same of 64 rows of b.
template <typename MmaType, bool kAdd>
__device__ __forceinline__ void product_m64n64(float (&sums)[32], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(64, FCB_REGISTERS_32, "%32, %33, %34", FCB_SUMS_32(0))
#endif
}

// The same of 32 rows of b.
template <typename MmaType, bool kAdd>
__device__ __forceinline__ void product_m64n32(float (&sums)[16], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(32, FCB_REGISTERS_16, "%16, %17, %18", FCB_SUMS_16(0))
#endif
}

// The same of 64 rows of b, or 32, into half of the sums: the first (kPart = 0) or the second.
template <typename MmaType, int kPart, bool kAdd>
__device__ __forceinline__ void product_into_part(float (&sums)[64], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(64, FCB_REGISTERS_32, "%32, %33, %34", FCB_SUMS_32(kPart * 32))
#endif
}
template <typename MmaType, int kPart, bool kAdd>
__device__ __forceinline__ void product_into_part(float (&sums)[32], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FCB_PRODUCT(32, FCB_REGISTERS_16, "%16, %17, %18", FCB_SUMS_16(kPart * 16))
#endif
}

#undef FCB_PRODUCT
#undef FCB_PRODUCT_OF
#undef FCB_SUMS_8
#undef FCB_SUMS_16
#undef FCB_SUMS_32
#undef FCB_SUMS_64
#undef FCB_SUMS_128
#undef FCB_REGISTERS_16
#undef FCB_REGISTERS_32
#undef FCB_REGISTERS_64
#undef FCB_REGISTERS_128

}  // namespace fused_conv_bn
