// What a block does once: tables of offsets, affines, and the weights as the products read them.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "kernels/common/split_float.cuh"

namespace fused_conv_bn::stem_sm80 {

constexpr int kSparePlaces = 12;      // of the table of offsets
constexpr int kOutside = 0x7fff0000;  // as a row, below every other

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
  for (int q = threadIdx.x; q < p.tile.k_steps * 4 + kSparePlaces; q += kFewChannelsThreads) {
    // Past the last quad weights are 0. What is split is finite, so that any value will do: the last quad's, which costs
    // no access of its own.
    const int known = min(q, quads - 1);
    const int tap = known / p.tile.quads_per_tap;
    const int r = tap / p.S;
    const int s = tap - r * p.S;
    const int offset = (r * p.dilation_h * p.tile.x_cols + s * p.dilation_w) * p.tile.x_pitch +
                       (known - tap * p.tile.quads_per_tap) * 8;
    store_shared(b.offsets() + q * 4, static_cast<uint32_t>(K::kFloat || q < quads ? offset : -1));
  }
  for (int pixel = threadIdx.x; pixel < kFewChannelsPixels; pixel += kFewChannelsThreads) {
    const int row = p.tile_q.div(pixel);
    const int col = pixel - row * p.tile.q;
    const bool inside = row < p.tile.p;
    b.header().operands[pixel] = inside ? (row * p.stride_h * p.tile.x_cols + col * p.stride_w) * p.tile.x_pitch : 0;
    if constexpr (K::kLast) {
      b.header().places[pixel] = make_int2((row * p.Q + col) * p.K * K::kBytes, inside ? row << 16 | col : kOutside);
    } else {
      const int place = inside ? row * p.tile.stage_row + col : p.tile.stage_end + pixel - p.tile.p * p.tile.q;
      b.header().places[pixel] = make_int2(place * K::kBytes, p.tile.q == p.Q ? 0 : row * p.Q * K::kBytes);
    }
  }
}

// The magnitudes of an output channel's weights, by neighbouring threads.
template <typename K>
__device__ __forceinline__ void fold_affines(const Block<K>& b) {
  const auto& p = b.p;
  constexpr int kSharers = kFewChannelsThreads / K::kChannels;
  const int channel = threadIdx.x / kSharers;
  const int k = b.first_channel + channel;
  const Affine<float> affine = k < p.K ? p.affine.pair(k) : Affine<float>{0, 0, 0};
  const float scale = affine.scale;
  bool exact = false;
  float w_scale = 1.0f, unscaled = scale;
  if constexpr (K::kFloat) {
    Magnitudes m;
#pragma unroll 8
    for (int e = threadIdx.x % kSharers; e < p.C * p.R * p.S && k < p.K; e += kSharers) {
      const int c = e / (p.R * p.S);
      const int tap = e - c * (p.R * p.S);
      const int r = tap / p.S;
      m.add(weight(b, k, c, r, tap - r * p.S));
    }
#pragma unroll
    for (int other = 1; other < kSharers; other *= 2) {
      m.merge(__shfl_xor_sync(0xffffffffu, m.most, other), __shfl_xor_sync(0xffffffffu, m.least, other));
    }
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
  for (int e = threadIdx.x; e < p.tile.k_steps * K::kM * 32; e += kFewChannelsThreads) {
    const int e_lane = e % 32;
    const int m = e / 32 % K::kM;
    const int quad = e / (32 * K::kM) * 4 + e_lane % 4;
    const int tap = quad / p.tile.quads_per_tap;
    const int c0 = (quad - tap * p.tile.quads_per_tap) * kQuad;
    const int r = tap / p.S;
    const int s = tap - r * p.S;
    uint32_t high[4], low[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = b.own_channel(2 * m + half, e_lane / 4);
      float v[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        // Read from where there is something, so that no read waits for another.
        const bool inside = quad < quads && c0 + i < p.C && b.first_channel + row < p.K;
        const float value = weight(b, inside ? b.first_channel + row : 0, inside ? c0 + i : 0, inside ? r : 0,
                                   inside ? s : 0);
        v[i] = inside ? value : 0.0f;
      }
      if constexpr (K::kFloat) {
        split(v[0], v[1], b.header().w_scales[row], high[half], low[half]);
        split(v[2], v[3], b.header().w_scales[row], high[half + 2], low[half + 2]);
      } else {
        high[half] = pack_pair(T(), v[0], v[1]);
        high[half + 2] = pack_pair(T(), v[2], v[3]);
      }
    }
    store_shared(b.weights() + e * 16, make_uint4(high[0], high[1], high[2], high[3]));
    if constexpr (K::kFloat) {
      if (p.split) {
        store_shared(b.weights() + b.w_plane() + e * 16, make_uint4(low[0], low[1], low[2], low[3]));
      }
    }
  }
}

template <typename K>
__device__ __forceinline__ void set_up(const Block<K>& b) {
  const int quads = b.p.R * b.p.S * b.p.tile.quads_per_tap;
  make_tables(b, quads);
  fold_affines(b);
  pack_weights(b, quads);
}

}  // namespace fused_conv_bn::stem_sm80
