// Copies between global and shared memory that a thread starts and waits for later. Compute capability 7.5 has none: there
// those of 16 bytes happen at once.
#pragma once

#include <cstdint>

#include "kernels/common/vec.cuh"

namespace fused_conv_bn {

// Both addresses are multiples of 16 bytes. Where the source does not exist, it is not read and zeros are written; its
// address is to be that of 16 bytes that do exist, for what looks at accesses may take it for one. The data does not go
// through L1.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from, bool exists = true) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
#else
  *static_cast<uint4*>(to_shared) = exists ? load_words(from) : uint4{0, 0, 0, 0};
#endif
}

// The same by the shared memory's 32-bit address. Compute capability 8.0 on.
__device__ __forceinline__ void copy_async(uint32_t to_shared, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
// 4 bytes that exist.
__device__ __forceinline__ void copy_async_1(uint32_t to_shared, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_shared), "l"(from) : "memory");
}
// 4 or 8 bytes, zeros where the source does not exist.
template <int kBytes>
__device__ __forceinline__ void copy_async_small(uint32_t to_shared, const void* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to_shared), "l"(from), "n"(kBytes),
               "r"(exists ? kBytes : 0)
               : "memory");
}

// The line that holds this address is to come to L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Ends a group of the copies that this thread started.
__device__ __forceinline__ void copy_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the latest kGroups. Others see the data after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait_all_but() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace fused_conv_bn
