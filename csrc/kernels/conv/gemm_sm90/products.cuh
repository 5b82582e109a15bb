// A warpgroup's sums of products, and how it multiplies a stage.
#pragma once

#include "kernels/ptx/wgmma.cuh"
#include "params.cuh"

namespace fused_conv_bn::gemm_sm90 {

// Of 64 pixels by twice as many filters as a thread has sums.
template <typename T, int kCount>
__device__ __forceinline__ void multiply(float (&sums)[kCount], uint64_t a, uint64_t b) {
  if constexpr (kCount == 128) {
    product_m64n256<T, true>(sums, a, b);
  } else if constexpr (kCount == 64) {
    product_m64n128<T, true>(sums, a, b);
  } else if constexpr (kCount == 32) {
    product_m64n64<T, true>(sums, a, b);
  } else {
    product_m64n32<T, true>(sums, a, b);
  }
}

template <typename T, int kTile>
struct Products {
  static constexpr int kM = kTiles[kTile].pixels / 64;      // of 64 pixels each
  static constexpr int kCount = kTiles[kTile].filters / 2;  // a thread's sums in each
  float sums[kM][kCount];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums[m][i] = 0;
      }
    }
  }

  // Starts the products of a stage. kRowBytes: of its channels.
  template <int kRowBytes>
  __device__ __forceinline__ void start(uint32_t pixels_at, uint32_t filters_at) {
    const uint64_t pixels = swizzled_operand(pixels_at, kRowBytes), filters = swizzled_operand(filters_at, kRowBytes);
    product_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(sums[m], pixels + (m * 64 * kRowBytes >> 4) + 2 * k, filters + 2 * k);
      }
    }
    product_commit();
  }

  // Waits for all of them.
  __device__ __forceinline__ void finish() {
    product_wait<0>();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(sums[m][i])::"memory");  // the compiler shall not move a sum before it is there
      }
    }
  }

  // f<kRowBytes>(): once, for the depth of this launch.
  template <typename F>
  static __device__ __forceinline__ void with_row_bytes(int depth, F&& f) {
    switch (depth * static_cast<int>(sizeof(T))) {
      case 128:
        return f.template operator()<128>();
      case 64:
        return f.template operator()<64>();
      default:
        return f.template operator()<32>();
    }
  }
};

// Arrives at a barrier that each of a warpgroup's four warps arrives at.
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
  if (threadIdx.x % 32 == 0) {
    barrier_arrive(barrier);
  }
}

}  // namespace fused_conv_bn::gemm_sm90
