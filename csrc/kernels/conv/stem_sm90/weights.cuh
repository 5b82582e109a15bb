// Weights on their way to shared memory, once for a block, by the consumers.
//
// They come as they lie, pass by pass, to where the units of the second stage will be: gathered from global memory, with a
// distance between any two, those of a stem took 7 us. From there they go into units as operands of wgmma want them. float32
// is scaled channel by channel and split in two.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"
#include "epilogue.cuh"
#include "fragment.cuh"
#include "kernels/common/split_float.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "params.cuh"

namespace fused_conv_bn::stem_sm90 {

template <typename C>
struct Weights {
  static constexpr int kBytes = C::kBytes;
  static constexpr int kChannels = C::kChannels;
  static constexpr int kLineBytes = 128;  // of L2

  const Block<C>& block;
  const Params<typename C::T>& p = block.p;
  Header& header = block.shared.header();

  // Before it is known whether they are there: L2 sees who writes to them yet.
  __device__ __forceinline__ void prefetch() const {
    const int bytes = min(kChannels, p.K - block.first_channel) * block.terms() * kBytes;
    const auto* const source = reinterpret_cast<const unsigned char*>(p.w) +
                               static_cast<int64_t>(block.first_channel) * block.terms() * kBytes;
    for (int i = block.consumer_thread() * kLineBytes; i < bytes; i += C::kConsumerThreads * kLineBytes) {
      prefetch_l2(source + i);
    }
    if (!C::kMoments && threadIdx.x == C::kProducerThreads && !p.late_affine) {
      const int first = block.first_channel * (p.affine.wide ? static_cast<int>(sizeof(float)) : kBytes);
      for (const void* values : {p.affine.mean, p.affine.var, p.affine.weight, p.affine.bias, p.affine.conv_bias}) {
        if (values != nullptr) {
          prefetch_l2(static_cast<const unsigned char*>(values) + first);
        }
      }
    }
  }

  // Weights and affines, while producers begin to load. A pass has some output channels; one is mostly enough.
  __device__ __forceinline__ void set_up(const ChannelAffines<C>& affines) const {
#pragma unroll 1
    for (int pass = 0; pass < p.tile.w_passes; ++pass) {
      const int first = pass * p.tile.w_channels;
      const int channels = min(min(p.tile.w_channels, kChannels - first), p.K - block.first_channel - first);
      block.sync_consumers();  // the ones before are done with
      start_copies(first, channels);
      copy_async_commit();
      if (pass == 0 && !p.late_affine) {
        affines.fold();  // while the copies are under way
      }
      copy_async_wait_all_but<0>();
      block.sync_consumers();
      if constexpr (C::kFloat32) {
        measure(first, channels);
        block.sync_consumers();
      }
      build(first);
    }
    if (p.late_affine) {
      wait_for_previous();
      affines.fold();
    }
    block.sync_consumers();
    affines.finish();
    fence_async();
  }

  __device__ __forceinline__ uint32_t raw() const { return block.shared.input(1); }

  __device__ __forceinline__ void start_copies(int first, int channels) const {
    const int bytes = max(channels, 0) * block.terms() * kBytes;
    const int whole = bytes & -kVecBytes;
    const auto* const source = reinterpret_cast<const unsigned char*>(p.w) +
                               static_cast<int64_t>(block.first_channel + first) * block.terms() * kBytes;
    const int thread = block.consumer_thread();
    for (int i = thread * kVecBytes; i < whole; i += C::kConsumerThreads * kVecBytes) {
      copy_async(raw() + i, source + i, true);
    }
    // The last values one by one: 16 bytes would reach past the end of the tensor.
    if (const int i = whole + thread * kBytes; i < bytes) {
      if constexpr (C::kFloat32) {
        copy_async_1(raw() + i, source + i);
      } else {
        store_shared(raw() + i, *reinterpret_cast<const uint16_t*>(source + i));
      }
    }
  }

  // float32: the magnitudes of an output channel's weights, by neighbouring threads.
  __device__ __forceinline__ void measure(int first, int channels) const {
    constexpr int kSharers = C::kConsumerThreads / kChannels;
    const int thread = block.consumer_thread();
    const int channel = thread / kSharers - first;
    const bool measured = channel >= 0 && channel < p.tile.w_channels;
    Magnitudes m;
    const int end = measured && channel < channels ? block.terms() : 0;
    const uint32_t start = raw() + channel * block.terms() * kBytes;
#pragma unroll 4
    for (int i = thread % kSharers; i < end; i += kSharers) {
      m.add(__uint_as_float(load_shared_1(start + i * kBytes)));
    }
    m = merge_lanes<kSharers>(m);
    if (measured && thread % kSharers == 0) {
      header.w_scales[first + channel] = m.scale();
      header.unscales[first + channel] = m.inverse();
      if (!m.has_scale() || m.span() > kMaxSpan) {
        set_flag(header.all_exact);
      }
      atomicMax(&header.w_span, m.span());
    }
  }

  // A unit of the filter, and a row of its weights. A warp has four units of eight rows: a load for many channels is slow,
  // and so is a store for one.
  struct WeightRow {
    int unit, row;
  };
  static __device__ __forceinline__ WeightRow weight_row(int index) {
    constexpr int kEights = kChannels / 8;
    return {index / (32 * kEights) * 4 + index / 8 % 4, index / 32 % kEights * 8 + index % 8};
  }

  // Of each step, the first unit of all channels, then the second; float32: of each, the high splits, then the low ones.
  __device__ __forceinline__ void build(int first) const {
    const int rows = (p.tile.k_steps + 1) / 2 * 4 * kChannels;
    const Fragment<C> fragment{p.tile};
    const int last_slot = (1 << p.tile.slots_log2) - 1;
#pragma unroll 2
    for (int index = block.consumer_thread(); index < rows; index += C::kConsumerThreads) {
      const WeightRow w = weight_row(index);
      const int channel = fragment.row_channel(w.row) - first;
      if (w.unit >= p.tile.k_steps * 2 || channel < 0 || channel >= p.tile.w_channels) {
        continue;
      }
      const uint32_t unit = p.units[w.unit];
      const int r = static_cast<int>(unit >> 16);
      const int s = static_cast<int>(unit >> 8 & 255);
      const int c = static_cast<int>(unit & 255) * 8;
      const int present = unit != kNoUnit && block.first_channel + first + channel < p.K ? p.C - c : 0;
      const uint32_t start = raw() + (channel * block.terms() + c * p.w_stride_c + r * p.w_stride_r) * kBytes;
      uint32_t v[8];
      if (C::kFloat32 && p.w_vectors) {
        const uint32_t address = start + s * p.w_stride_s * kBytes;
        const uint4 a = present > 0 ? load_shared_4(address) : make_uint4(0, 0, 0, 0);
        const uint4 b = present > 0 ? load_shared_4(address + 16) : make_uint4(0, 0, 0, 0);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int slot = i & last_slot;
          const int tap = s + (i >> p.tile.slots_log2);
          v[i] = load_shared_if_less<kBytes>(start + (slot * p.w_stride_c + tap * p.w_stride_s) * kBytes, slot,
                                             tap < p.S ? present : 0);
        }
      }
      const uint32_t target = block.shared.weights() + (w.unit * C::kWeightRows + w.row) * 16;
      if constexpr (C::kFloat32) {
        uint32_t high[4], low[4];
        split(v, header.w_scales[first + channel], high, low);
        store_shared(target, make_uint4(high[0], high[1], high[2], high[3]));
        store_shared(target + kChannels * 16, make_uint4(low[0], low[1], low[2], low[3]));
      } else {
        store_shared(target, make_uint4(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410),
                                        __byte_perm(v[4], v[5], 0x5410), __byte_perm(v[6], v[7], 0x5410)));
      }
    }
  }
};

}  // namespace fused_conv_bn::stem_sm90
