// Bulk copies between global and shared memory (cp.async.bulk), from compute capability 9.0 on; elsewhere they compile to
// nothing. Bytes and addresses: multiples of 16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_conv_bn {

// `bytes` from global to shared memory, counted by a barrier there.
__device__ __forceinline__ void fetch_bulk(uint32_t to_shared, const void* from, uint32_t bytes, uint32_t barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to_shared),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FCB_BULK(...) asm volatile(__VA_ARGS__ : "memory")
#else
#define FCB_BULK(...)
#endif

// Starts one from shared to global memory.
__device__ __forceinline__ void copy_bulk(void* to, uint32_t from_shared, uint32_t bytes) {
  FCB_BULK("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from_shared), "r"(bytes));
}
// The same of data that L2 need not keep, or like any other: once().
struct L2Policy {
  uint64_t bits = 0;
  static __device__ __forceinline__ L2Policy once(bool is) {
    L2Policy policy;
    if (is) {
      FCB_BULK("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits) :);
    } else {
      FCB_BULK("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits) :);
    }
    return policy;
  }
};
__device__ __forceinline__ void copy_bulk(void* to, uint32_t from_shared, uint32_t bytes, L2Policy policy) {
  FCB_BULK("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to), "r"(from_shared),
           "r"(bytes), "l"(policy.bits));
}
// Ends a group of those that this thread started.
__device__ __forceinline__ void copy_bulk_commit() { FCB_BULK("cp.async.bulk.commit_group;" ::); }
// Waits until this thread's have read their source, but for the latest kLeft groups.
template <int kLeft = 0>
__device__ __forceinline__ void copy_bulk_wait_read() {
  FCB_BULK("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft));
}
// Waits until they are done.
__device__ __forceinline__ void copy_bulk_wait() { FCB_BULK("cp.async.bulk.wait_group 0;" ::); }
// What this thread wrote to shared memory becomes visible to bulk copies and wgmma.
__device__ __forceinline__ void fence_async() { FCB_BULK("fence.proxy.async.shared::cta;" ::); }

#undef FCB_BULK

}  // namespace fused_conv_bn
