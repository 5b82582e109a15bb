// Pixels times the gates of their images, an element for each channel, where they lie in shared memory, before they are multiplied.
#pragma once

#include "kernels/common/vec.cuh"
#include "params.cuh"

namespace fused_conv_bn::gemm_sm90 {

// Two elements times two, each rounded to nearest once: as `gate` rounds its results, whose products in float32 are exact but for
// those of bfloat16 below 2^-149.
__device__ __forceinline__ uint32_t times_pair(float16, uint32_t x, uint32_t gates) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(gates));
  return product;
}
__device__ __forceinline__ uint32_t times_pair(bfloat16, uint32_t x, uint32_t gates) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(gates));
  return product;
}

// The gates of the pixels that a consumer multiplies in a step, by its 128 threads: a thread has the same channels of several pixels.
// Gates are fetched while the step before is multiplied.
template <typename T, int kPixels, int kRowBytes>
struct Gates {
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kRows = 128 / kChunks;  // of all threads at a time
  static constexpr int kOfThread = kPixels / kRows;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));

  const Params<T>& p;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int chunk = thread % kChunks, row = thread / kChunks;
  uint32_t gates[kOfThread][4];

  // first_pixel: of the tile. Behind the last channel there are zeros to multiply, and zeros to do so. 32 bits are enough (plan.h):
  // with 64 a tile of 128 pixels has a register too few.
  __device__ __forceinline__ void fetch(int first_pixel, int first_channel) {
    const int channel = first_channel + chunk * kElements;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int pixel = min(first_pixel + row + i * kRows, p.pixels - 1);
      const uint32_t image = p.image_pixels.div(static_cast<uint32_t>(pixel));
      load_words_if(channel < p.channels,
                    p.gates + (image * static_cast<uint32_t>(p.channels) + static_cast<uint32_t>(channel)), gates[i]);
    }
  }

  // pixels: a box of rows of kRowBytes.
  __device__ __forceinline__ void apply(uint32_t pixels) const {
    // The swizzle is the same every eight rows.
    const int swizzled = chunk ^ (kRowBytes == 128 ? row & 7 : kRowBytes == 64 ? row >> 1 & 3 : row >> 2 & 1);
    const uint32_t at = pixels + row * kRowBytes + swizzled * 16;
    constexpr int kAtOnce = kOfThread < 2 ? kOfThread : 2;
#pragma unroll
    for (int from = 0; from < kOfThread; from += kAtOnce) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        x[i] = load_shared_4(at + (from + i) * (kRows * kRowBytes));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t (&g)[4] = gates[from + i];
        store_shared(at + (from + i) * (kRows * kRowBytes),
                     uint4{times_pair(T(), x[i].x, g[0]), times_pair(T(), x[i].y, g[1]), times_pair(T(), x[i].z, g[2]),
                           times_pair(T(), x[i].w, g[3])});
      }
    }
    fence_async();  // products read it by another proxy
  }
};

}  // namespace fused_conv_bn::gemm_sm90
