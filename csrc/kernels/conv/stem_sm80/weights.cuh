// What a block does once: tables of offsets, affines, and the weights as the products read them.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "kernels/common/split_float.cuh"

namespace fused_conv_bn::stem_sm80 {

constexpr int kSpareOffsets = 12;  // of the table of offsets

template <typename K>
__device__ __forceinline__ float weight(const Block<K>& b, int k, int c, int r, int s) {
  const auto& p = b.p;
  return to_acc(p.w[k * p.w_stride_k + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s]);
}

template <typename K>
__device__ __forceinline__ void make_tables(const Block<K>& b, int quads) {
  const auto& p = b.p;
  if (threadIdx.x == 0) {
    b.header().zeros = make_uint2(0, 0);
    b.header().all_exact = 0;
  }
  for (int q = threadIdx.x; q < p.tile.k_steps * 4 + kSpareOffsets; q += kBlockThreads) {
    // Past the last quad weights are 0. What is split is finite, so that any value will do: the last quad's, which
    // costs no access of its own.
    const int known = min(q, quads - 1);
    const int tap = known / p.tile.quads_per_tap;
    const int r = tap / p.c.S;
    const int s = tap - r * p.c.S;
    const int offset = (r * p.c.dilation_h * p.tile.x_cols + s * p.c.dilation_w) * p.tile.x_pitch +
                       (known - tap * p.tile.quads_per_tap) * 8;
    store_shared(b.quad_offsets() + q * 4, static_cast<uint32_t>(K::kFloat || q < quads ? offset : -1));
  }
  for (int pixel = threadIdx.x; pixel < kTilePixels; pixel += kBlockThreads) {
    const auto [row, col] = locate_pixel(pixel, p.tile_q);
    const bool inside = row < b.tiles().p;
    b.header().window_offsets[pixel] = inside
                                           ? (row * p.c.stride_h * p.tile.x_cols + col * p.c.stride_w) * p.tile.x_pitch
                                           : 0;
    if constexpr (K::kLast) {
      b.header().output_offsets[pixel] = make_int2((row * p.c.Q + col) * p.c.K * K::kBytes,
                                                   inside ? pack_pixel({row, col}) : kOutsideTile);
    } else {
      const int offset = inside ? row * p.tile.staging_row + col
                                : p.tile.staging_end + pixel - b.tiles().p * b.tiles().q;
      b.header().output_offsets[pixel] = make_int2(offset * K::kBytes,
                                                   b.tiles().has_whole_rows(p.c) ? 0 : row * p.c.Q * K::kBytes);
    }
  }
}

// Affines, and in float32 the magnitudes of an output channel's weights, by neighbouring threads.
template <typename K>
__device__ __forceinline__ void fold_affines(const Block<K>& b) {
  const auto& p = b.p;
  constexpr int kSharers = kBlockThreads / K::kChannels;
  const int channel = threadIdx.x / kSharers;
  const int k = b.first_channel + channel;
  const Affine<float> affine = k < p.c.K ? p.affine.pair(k) : Affine<float>{0, 0, 0};
  const float scale = affine.scale;
  bool exact = false;
  float w_scale = 1.0f, unscaled = scale;
  if constexpr (K::kFloat) {
    Magnitudes m;
#pragma unroll 8
    for (int e = threadIdx.x % kSharers; e < p.c.C * p.c.R * p.c.S && k < p.c.K; e += kSharers) {
      const int c = e / (p.c.R * p.c.S);
      const int tap = e - c * (p.c.R * p.c.S);
      const int r = tap / p.c.S;
      m.add(weight(b, k, c, r, tap - r * p.c.S));
    }
    m = merge_lanes<kSharers>(m);
    w_scale = m.scale();
    unscaled = scale * m.inverse();
    exact = !m.can_split() || !is_moderate(unscaled);
  }
  if (threadIdx.x % kSharers == 0) {
    if constexpr (K::kFloat) {
      b.header().w_scales[channel] = w_scale;
      b.header().unscales[channel] = unscaled;
    }
    b.header().scales[channel] = scale;
    b.header().shifts[channel] = affine.shift;
  }
  if (__syncthreads_or(exact) && threadIdx.x == 0) {
    b.header().all_exact = 1;
  }
}

// Packed as the instruction wants it: of each k step and each 16 channels, 16 bytes a lane.
template <typename K>
__device__ __forceinline__ void pack_weights(const Block<K>& b, int quads) {
  using T = typename K::Element;
  const auto& p = b.p;
#pragma unroll 2
  for (int e = threadIdx.x; e < p.tile.k_steps * K::kM * 32; e += kBlockThreads) {
    const int e_lane = e % 32;
    const int m = e / 32 % K::kM;
    const int quad = e / (32 * K::kM) * 4 + e_lane % 4;
    const int tap = quad / p.tile.quads_per_tap;
    const int c0 = (quad - tap * p.tile.quads_per_tap) * kQuad;
    const int r = tap / p.c.S;
    const int s = tap - r * p.c.S;
    uint32_t high[4], low[4];
#pragma unroll
    for (int i_row = 0; i_row < 2; ++i_row) {
      const int row = b.own_channel(2 * m + i_row, e_lane / 4);
      float v[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        // Read from where there is something, so that no read waits for another.
        const bool inside = quad < quads && c0 + i < p.c.C && b.first_channel + row < p.c.K;
        const float value = weight(b, inside ? b.first_channel + row : 0, inside ? c0 + i : 0, inside ? r : 0,
                                   inside ? s : 0);
        v[i] = inside ? value : 0.0f;
      }
      if constexpr (K::kFloat) {
        split(v[0], v[1], b.header().w_scales[row], high[i_row], low[i_row]);
        split(v[2], v[3], b.header().w_scales[row], high[i_row + 2], low[i_row + 2]);
      } else {
        high[i_row] = pack_pair(T(), v[0], v[1]);
        high[i_row + 2] = pack_pair(T(), v[2], v[3]);
      }
    }
    store_shared(b.weights() + e * 16, make_uint4(high[0], high[1], high[2], high[3]));
    if constexpr (K::kFloat) {
      if (p.split) {
        store_shared(b.weights() + b.w_term() + e * 16, make_uint4(low[0], low[1], low[2], low[3]));
      }
    }
  }
}

template <typename K>
__device__ __forceinline__ void set_up(const Block<K>& b) {
  const int quads = b.p.c.R * b.p.c.S * b.p.tile.quads_per_tap;
  make_tables(b, quads);
  fold_affines(b);
  pack_weights(b, quads);
}

}  // namespace fused_conv_bn::stem_sm80
