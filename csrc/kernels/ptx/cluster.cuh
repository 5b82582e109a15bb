// Blocks of a cluster: they meet, and read each other's shared memory. From compute capability 9.0 on; elsewhere the rank
// is 0, and the rest compiles to nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_conv_bn {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FCB_CLUSTER(...) asm volatile(__VA_ARGS__)
#else
#define FCB_CLUSTER(...)
#endif

// Of the block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
  FCB_CLUSTER("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all its blocks arrive, whole warps at a time, and then wait: what they did before is there behind the wait.
__device__ __forceinline__ void cluster_arrive() {
  FCB_CLUSTER("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
// Of blocks that have read: what they write is behind no such wait.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  FCB_CLUSTER("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() { FCB_CLUSTER("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// From the shared memory of the block of this rank, by the address that the same bytes have in the own block. That block
// may not end before.
__device__ __forceinline__ float4 load_cluster_4(uint32_t shared_address, int rank) {
  float4 v{};
  [[maybe_unused]] uint32_t address;
  FCB_CLUSTER("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address), "r"(rank));
  FCB_CLUSTER("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z),
              "=f"(v.w) : "r"(address) : "memory");
  return v;
}

#undef FCB_CLUSTER

}  // namespace fused_conv_bn
