// The product of weights and pixels on tensor cores.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "kernels/common/split_float.cuh"
#include "kernels/ptx/mma.cuh"

namespace fused_conv_bn::stem_sm80 {

template <typename K>
__device__ __forceinline__ uint4 load_weight(const Block<K>& b, int step, int term, int i) {
  return load_shared_4(b.weights() + term * b.w_term() + (step * K::kM + i) * 512 + b.lane() * 16);
}
template <typename K>
__device__ __forceinline__ void load_weights(const Block<K>& b, uint4 (&w)[K::kM], int step, int term) {
#pragma unroll
  for (int i = 0; i < K::kM; ++i) {
    w[i] = load_weight(b, step, term, i);
  }
}

// The pixels' share in a k step. Past the last quad, zeros: 0 times what a window may hold need not be 0.
template <typename K>
__device__ __forceinline__ void load_pixels(const Block<K>& b, uint2 (&v)[K::kN], const uint32_t (&base)[K::kN],
                                            int offset, int term) {
  const auto& p = b.p;
#pragma unroll
  for (int j = 0; j < K::kN; ++j) {
    const uint32_t address = base[j] + term * p.tile.x_term + offset;
    v[j] = load_shared_2(K::kFloat || offset >= 0 ? address : b.zeros());
  }
}

template <typename K>
__device__ __forceinline__ void multiply_step(const Block<K>&, typename K::Accumulator& acc, const uint4 (&w)[K::kM],
                                              const uint2 (&v)[K::kN]) {
#pragma unroll
  for (int i = 0; i < K::kM; ++i) {
#pragma unroll
    for (int j = 0; j < K::kN; ++j) {
      mma_m16n8k16<typename K::Factor>(acc[i][j], w[i], v[j]);
    }
  }
}

template <typename K>
__device__ __forceinline__ int quad_offset(const Block<K>& b, int step) {
  return static_cast<int>(load_shared_1(b.quad_offsets() + step * 16 + b.t() * 4));
}

// Where the first tap of a thread's pixels is in the window.
template <typename K>
__device__ __forceinline__ void begin(const Block<K>& b, typename K::Accumulator& acc, uint32_t (&base)[K::kN]) {
#pragma unroll
  for (int j = 0; j < K::kN; ++j) {
    base[j] = b.window() + b.header().window_offsets[b.warp() * K::kPixels + 8 * j + b.g()];
  }
  for_each<K>([&](int i, int j, int e) { acc[i][j][e] = 0; });
}

// A step's pixels are on their way while the one before it multiplies. The table of offsets goes on for two steps more.
template <typename K>
__device__ __forceinline__ void multiply(const Block<K>& b, typename K::Accumulator& acc) {
  const auto& p = b.p;
  uint32_t base[K::kN];
  begin(b, acc, base);
  if constexpr (K::kFloat) {
    if (p.split) {
      int offset = quad_offset(b, 0);
#pragma unroll 1
      for (int step = 0; step < p.tile.k_steps; ++step) {
        uint4 w[K::kM];
        uint2 v[K::kN];
        load_weights(b, w, step, 1);
        load_pixels(b, v, base, offset, 0);
        multiply_step(b, acc, w, v);
        load_weights(b, w, step, 0);
        load_pixels(b, v, base, offset, 1);
        offset = quad_offset(b, step + 1);
        multiply_step(b, acc, w, v);
      }
      for_each<K>([&](int i, int j, int e) { acc[i][j][e] *= 1 / kLowScale; });
    }
  }
  uint2 v[K::kN];
  load_pixels(b, v, base, quad_offset(b, 0), 0);
  int offset = quad_offset(b, 1);
#pragma unroll 1
  for (int step = 0; step < p.tile.k_steps; step += 2) {
    uint4 w[K::kM];
    uint2 following[K::kN];
    load_weights(b, w, step, 0);
    load_pixels(b, following, base, offset, 0);
    offset = quad_offset(b, step + 2);
    multiply_step(b, acc, w, v);
    if (step + 1 < p.tile.k_steps) {
      load_weights(b, w, step + 1, 0);
      load_pixels(b, v, base, offset, 0);
      offset = quad_offset(b, step + 3);
      multiply_step(b, acc, w, following);
    }
  }
}

// A step, and the loading of another one's weights.
template <typename K>
__device__ __forceinline__ void multiply_step(const Block<K>& b, typename K::Accumulator& acc, uint4 (&w)[K::kM],
                                              const uint2 (&v)[K::kN], int step, int term) {
  const auto& p = b.p;
  step = min(step, p.tile.k_steps - 1);
#pragma unroll
  for (int i = 0; i < K::kM; ++i) {
#pragma unroll
    for (int j = 0; j < K::kN; ++j) {
      mma_m16n8k16<typename K::Factor>(acc[i][j], w[i], v[j]);
    }
    w[i] = load_weight(b, step, term, i);
  }
}

// kAlternating, which has registers for weights on their way as well. Behind the last step that is the last one's
// again.
template <typename K>
__device__ __forceinline__ void multiply_ahead(const Block<K>& b, typename K::Accumulator& acc) {
  const auto& p = b.p;
  uint32_t base[K::kN];
  begin(b, acc, base);
  uint4 w[K::kM];
  uint2 v[K::kN], next[K::kN];
  int offset = quad_offset(b, 0);
  if (p.split) {
    load_weights(b, w, 0, 1);
    load_pixels(b, v, base, offset, 0);
#pragma unroll 1
    for (int step = 0; step < p.tile.k_steps; ++step) {
      load_pixels(b, next, base, offset, 1);
      offset = quad_offset(b, step + 1);
      multiply_step(b, acc, w, v, step, 0);
      load_pixels(b, v, base, offset, 0);
      multiply_step(b, acc, w, next, step + 1, 1);
    }
  }
  load_weights(b, w, 0, 0);
  load_pixels(b, v, base, quad_offset(b, 0), 0);
  offset = quad_offset(b, 1);
  for_each<K>([&](int i, int j, int e) { acc[i][j][e] *= 1 / kLowScale; });
#pragma unroll 1
  for (int step = 0; step < p.tile.k_steps; step += 2) {
    load_pixels(b, next, base, offset, 0);
    offset = quad_offset(b, step + 2);
    multiply_step(b, acc, w, v, step + 1, 0);
    if (step + 1 < p.tile.k_steps) {
      load_pixels(b, v, base, offset, 0);
      offset = quad_offset(b, step + 3);
      multiply_step(b, acc, w, next, step + 2, 0);
    }
  }
}

}  // namespace fused_conv_bn::stem_sm80
