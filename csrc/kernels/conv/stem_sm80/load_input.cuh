// A tile's input patch, from global to shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "kernels/common/split_float.cuh"

namespace fused_conv_bn::stem_sm80 {

// The patch goes by groups of 4 or 8 channels of a pixel; thread i has groups i, i + 256, ...
template <typename K, int G>
struct Group {
  uint32_t words[G * K::kBytes / 4];
};
template <typename K, int G>
__device__ __forceinline__ int groups(const Block<K>& b) {
  const auto& p = b.p;
  return p.tile.x_rows * p.tile.x_cols * (p.tile.quads_per_tap * kQuad / G);
}
template <typename K, int G>
__device__ __forceinline__ void split_index(const Block<K>& b, int index, int& pixel, int& channel) {
  const auto& p = b.p;
  pixel = p.pixel_groups.div(index);
  channel = (index - pixel * p.pixel_groups.divisor) * G;
}

// A patch's pixel in the image, and whether the image has it.
template <typename K>
__device__ __forceinline__ bool find_pixel(const Block<K>& b, int pixel, const Tile& tile, int& h, int& w) {
  const auto& p = b.p;
  const int row = p.x_cols.div(pixel);
  h = tile.p0 * p.stride_h - p.pad_h + row;
  w = tile.q0 * p.stride_w - p.pad_w + pixel - row * p.tile.x_cols;
  return static_cast<unsigned>(h) < static_cast<unsigned>(p.H) && static_cast<unsigned>(w) < static_cast<unsigned>(p.W);
}

// Past the image, and past the patch, zeros.
template <typename K, int G>
__device__ __forceinline__ void read_group(const Block<K>& b, Group<K, G>& group, int index, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  int pixel, c0;
  split_index<K, G>(b, index, pixel, c0);
  int h, w;
  const bool inside = find_pixel(b, pixel, tile, h, w) && index < groups<K, G>(b);
  const T* const x = b.image(tile);
  constexpr int kWords = G * K::kBytes / 4;
  if (K::kLast && p.x_vectors) {
    const T* const source = x + (h * p.W + w) * p.C + c0;
    if constexpr (kWords == 2) {
      const uint2 two = inside ? __ldg(reinterpret_cast<const uint2*>(source)) : make_uint2(0, 0);
      group.words[0] = two.x, group.words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = inside ? __ldg(reinterpret_cast<const uint4*>(source) + i / 4) : make_uint4(0, 0, 0, 0);
        group.words[i] = four.x, group.words[i + 1] = four.y;
        group.words[i + 2] = four.z, group.words[i + 3] = four.w;
      }
    }
  } else {
    using Bits = std::conditional_t<K::kFloat, uint32_t, uint16_t>;
    const int channel_stride = K::kLast ? 1 : p.H * p.W;
    const Bits* source = reinterpret_cast<const Bits*>(x) +
                         (K::kLast ? (h * p.W + w) * p.C + c0 : (c0 * p.H + h) * p.W + w);
    uint32_t v[G];
    if (p.whole_groups) {
#pragma unroll
      for (int i = 0; i < G; ++i) {
        v[i] = inside ? __ldg(source) : 0;
        source += channel_stride;
      }
    } else {
      const int channels = inside ? p.C - c0 : 0;
#pragma unroll
      for (int i = 0; i < G; ++i) {
        v[i] = i < channels ? __ldg(source) : 0;
        source += channel_stride;
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      group.words[i] = K::kFloat ? v[i] : v[i * 2] | v[i * 2 + 1] << 16;
    }
  }
}

template <typename K, int G>
__device__ __forceinline__ void store_exactly(const Block<K>& b, const Group<K, G>& group, int index) {
  const auto& p = b.p;
  int pixel, c0;
  split_index<K, G>(b, index, pixel, c0);
  const uint32_t target = b.patch() + 2 * (pixel * p.tile.x_pitch + c0 * 2);
#pragma unroll
  for (int i = 0; i < G; i += 4) {
    store_shared(target + i * 4,
                 make_uint4(group.words[i], group.words[i + 1], group.words[i + 2], group.words[i + 3]));
  }
}

template <typename K, int G>
__device__ __forceinline__ void store_group(const Block<K>& b, const Group<K, G>& group, int index, float scale) {
  const auto& p = b.p;
  int pixel, c0;
  split_index<K, G>(b, index, pixel, c0);
  const uint32_t target = b.patch() + pixel * p.tile.x_pitch + c0 * 2;
  uint32_t high[G / 2], low[G / 2];
#pragma unroll
  for (int i = 0; i < G / 2; ++i) {
    if constexpr (K::kFloat) {
      split(__uint_as_float(group.words[2 * i]), __uint_as_float(group.words[2 * i + 1]), scale, high[i], low[i]);
    } else {
      high[i] = group.words[i];
    }
  }
  const auto store = [&](uint32_t address, const uint32_t (&v)[G / 2]) {
    if constexpr (G == 8) {
      store_shared(address, make_uint4(v[0], v[1], v[2], v[3]));
    } else {
      store_shared(address, make_uint2(v[0], v[1]));
    }
  };
  store(target, high);
  if constexpr (K::kFloat) {
    if (p.split) {
      store(target + p.tile.x_plane, low);
    }
  }
}

// The first groups are kept in registers; others are read when they are stored (in float32 before that as well, for
// their magnitudes: the second time they come from the first-level cache).
template <typename K>
constexpr int kKeptWords = K::kFloat ? 16 : 8;
template <typename K, int G>
constexpr int kKept = kKeptWords<K> / (G * K::kBytes / 4);
template <typename K>
using Ahead = uint32_t[kKeptWords<K>];

// Calls f(integral_constant<G>): groups of 8 where the channels allow it.
template <typename K, typename F>
__device__ __forceinline__ void by_group(const Block<K>& b, F&& f) {
  const auto& p = b.p;
  if (p.tile.quads_per_tap % 2 == 0) {
    f(std::integral_constant<int, 8>{});
  } else {
    f(std::integral_constant<int, 4>{});
  }
}

template <typename K>
__device__ __forceinline__ void read_ahead(const Block<K>& b, uint32_t (&ahead)[kKeptWords<K>], const Tile& tile) {
  by_group(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    constexpr int kWords = G * K::kBytes / 4;
#pragma unroll
    for (int i = 0; i < kKept<K, G>; ++i) {
      Group<K, G> group{};
      if (i * K::kThreads < groups<K, G>(b)) {
        read_group(b, group, b.thread() + i * K::kThreads, tile);
      }
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        ahead[i * kWords + k] = group.words[k];
      }
    }
  });
}

// The magnitudes of all threads; when it returns, the patch may be written. Returns the scale.
template <typename K>
__device__ __forceinline__ float meet(const Block<K>& b, Magnitudes m, bool& exact, float& inverse) {
  m.most = __reduce_max_sync(0xffffffffu, m.most);
  m.least = __reduce_min_sync(0xffffffffu, m.least);
  if (b.lane() == 0) {
    b.header().warps[threadIdx.x / 32] = make_uint2(m.most, m.least);
  }
  b.wait_for_stores();
  b.sync();
  const uint2 other = b.header().warps[b.group() * K::kWarps + b.lane() % K::kWarps];
  m.most = __reduce_max_sync(0xffffffffu, other.x);
  m.least = __reduce_min_sync(0xffffffffu, other.y);
  inverse = m.inverse();
  exact = b.header().all_exact != 0 || !m.can_split();
  return m.scale();
}

template <typename K>
__device__ __forceinline__ void load_patch(const Block<K>& b, const uint32_t (&ahead)[kKeptWords<K>], const Tile& tile,
                                           bool& exact, float& inverse) {
  by_group(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    constexpr int kWords = G * K::kBytes / 4;
    const auto kept = [&](int i) {
      Group<K, G> group;
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        group.words[k] = ahead[i * kWords + k];
      }
      return group;
    };
    float scale = 1.0f;
    if constexpr (K::kFloat) {
      Magnitudes m;
      const auto add = [&](const Group<K, G>& group) {
#pragma unroll
        for (int i = 0; i < G; ++i) {
          m.add(__uint_as_float(group.words[i]));
        }
      };
#pragma unroll
      for (int i = 0; i < kKept<K, G>; ++i) {
        if (i * K::kThreads < groups<K, G>(b)) {
          add(kept(i));
        }
      }
      for (int i = b.thread() + kKept<K, G> * K::kThreads; i < groups<K, G>(b); i += K::kThreads) {
        Group<K, G> group;
        read_group(b, group, i, tile);
        add(group);
      }
      scale = meet(b, m, exact, inverse);
    } else {
      b.wait_for_stores();
      b.sync();
    }
    if constexpr (K::kFloat) {
      if (exact) {
#pragma unroll 1
        for (int i = b.thread(); i < groups<K, G>(b); i += K::kThreads) {
          Group<K, G> group;
          read_group(b, group, i, tile);
          store_exactly(b, group, i);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kKept<K, G>; ++i) {
      if (b.thread() + i * K::kThreads < groups<K, G>(b)) {
        store_group(b, kept(i), b.thread() + i * K::kThreads, scale);
      }
    }
#pragma unroll 2
    for (int i = b.thread() + kKept<K, G> * K::kThreads; i < groups<K, G>(b); i += K::kThreads) {
      Group<K, G> group;
      read_group(b, group, i, tile);
      store_group(b, group, i, scale);
    }
  });
}

}  // namespace fused_conv_bn::stem_sm80
