// Pixels times the gates of their images, an element for each channel, where they lie in shared memory, before they are multiplied.
#pragma once

#include "kernels/common/vec.cuh"
#include "params.cuh"

namespace fused_conv_bn::gemm_sm90 {

// 16 bytes of pixels times as many of gates, rounded as `gate` rounds its results.
template <typename T>
__device__ __forceinline__ uint4 times_gates(const uint4& pixels, const uint4& gates) {
  float x[8], g[8];
  unpack(Vec<T>{pixels}, x);
  unpack(Vec<T>{gates}, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] *= g[i];
  }
  Vec<T> product;
  pack(x, product);
  return product.words;
}

// The pixels that a consumer multiplies, by its 128 threads: of a thread always the same channels of a step.
template <typename T, int kPixels>
struct Gates {
  const Params<T>& p;
  const int thread = static_cast<int>(threadIdx.x) % 128;

  // Of a box of rows of kRowBytes, from `first_pixel` on, and its channels from `first_channel` on. What does not exist is zeros.
  template <int kRowBytes>
  __device__ __forceinline__ void apply(uint32_t pixels, int first_pixel, int first_channel) const {
    constexpr int kChunks = kRowBytes / 16, kRows = 128 / kChunks;  // of all threads at a time
    const int chunk = thread % kChunks, row = thread / kChunks;
    const int channel = first_channel + chunk * (16 / static_cast<int>(sizeof(T)));
    // The swizzle is the same every eight rows.
    const int swizzled = chunk ^ (kRowBytes == 128 ? row & 7 : kRowBytes == 64 ? row >> 1 & 3 : row >> 2 & 1);
    const uint32_t at = pixels + row * kRowBytes + swizzled * 16;
    if (channel < p.channels) {
      uint32_t of = ~0u;  // the image that `gates` are of
      uint4 gates{};
#pragma unroll 2
      for (int i = 0; i < kPixels / kRows; ++i) {
        const int pixel = min(first_pixel + row + i * kRows, p.pixels - 1);
        const uint32_t image = p.image_pixels.div(static_cast<uint32_t>(pixel));
        if (image != of) {
          of = image;
          gates = load_words(p.gates + static_cast<int64_t>(image) * p.channels + channel);
        }
        store_shared(at + i * (kRows * kRowBytes), times_gates<T>(load_shared_4(at + i * (kRows * kRowBytes)), gates));
      }
    }
    fence_async();  // products read it by another proxy
  }
};

}  // namespace fused_conv_bn::gemm_sm90
