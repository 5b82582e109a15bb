// A tile's input window, from global to shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "kernels/common/split_float.cuh"

namespace fused_conv_bn::stem_sm80 {

// The window goes by slices of 4 or 8 channels of a pixel; thread i has slices i, i + 256, ...
template <typename K, int G>
struct Slice {
  uint32_t words[G * K::kBytes / 4];
};
template <typename K, int G>
__device__ __forceinline__ int slices(const Block<K>& b) {
  const auto& p = b.p;
  return p.tile.x_rows * p.tile.x_cols * (p.tile.quads_per_tap * kQuad / G);
}
template <typename K, int G>
__device__ __forceinline__ void locate_slice(const Block<K>& b, int index, int& pixel, int& channel) {
  const auto& p = b.p;
  pixel = p.pixel_slices.div(index);
  channel = (index - pixel * p.pixel_slices.divisor) * G;
}

// A pixel of the window in the image, and whether the image has it.
template <typename K>
__device__ __forceinline__ bool find_pixel(const Block<K>& b, int pixel, const Tile& tile, int& h, int& w) {
  const auto& p = b.p;
  const int row = p.x_cols.div(pixel);
  const InputWindow window = input_window(tile, p.c);
  h = window.h0 + row;
  w = window.w0 + pixel - row * p.tile.x_cols;
  return exists(h, p.c.H) && exists(w, p.c.W);
}

// Past the image, and past the window, zeros.
template <typename K, int G>
__device__ __forceinline__ void read_slice(const Block<K>& b, Slice<K, G>& slice, int index, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  int pixel, c0;
  locate_slice<K, G>(b, index, pixel, c0);
  int h, w;
  const bool inside = find_pixel(b, pixel, tile, h, w) && index < slices<K, G>(b);
  const T* const x = input_image(p.x, tile, p.c);
  constexpr int kWords = G * K::kBytes / 4;
  if (K::kLast && p.x_vectors) {
    const T* const source = x + (h * p.c.W + w) * p.c.C + c0;
    if constexpr (kWords == 2) {
      const uint2 two = inside ? __ldg(reinterpret_cast<const uint2*>(source)) : make_uint2(0, 0);
      slice.words[0] = two.x, slice.words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = inside ? __ldg(reinterpret_cast<const uint4*>(source) + i / 4) : make_uint4(0, 0, 0, 0);
        slice.words[i] = four.x, slice.words[i + 1] = four.y;
        slice.words[i + 2] = four.z, slice.words[i + 3] = four.w;
      }
    }
  } else {
    using Bits = std::conditional_t<K::kFloat, uint32_t, uint16_t>;
    const int channel_stride = K::kLast ? 1 : p.c.H * p.c.W;
    const Bits* source = reinterpret_cast<const Bits*>(x) +
                         (K::kLast ? (h * p.c.W + w) * p.c.C + c0 : (c0 * p.c.H + h) * p.c.W + w);
    uint32_t v[G];
    if (p.whole_slices) {
#pragma unroll
      for (int i = 0; i < G; ++i) {
        v[i] = inside ? __ldg(source) : 0;
        source += channel_stride;
      }
    } else {
      const int channels = inside ? p.c.C - c0 : 0;
#pragma unroll
      for (int i = 0; i < G; ++i) {
        v[i] = i < channels ? __ldg(source) : 0;
        source += channel_stride;
      }
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      slice.words[i] = K::kFloat ? v[i] : v[i * 2] | v[i * 2 + 1] << 16;
    }
  }
}

template <typename K, int G>
__device__ __forceinline__ void store_slice_exactly(const Block<K>& b, const Slice<K, G>& slice, int index) {
  const auto& p = b.p;
  int pixel, c0;
  locate_slice<K, G>(b, index, pixel, c0);
  const uint32_t target = b.window() + 2 * (pixel * p.tile.x_pitch + c0 * 2);
#pragma unroll
  for (int i = 0; i < G; i += 4) {
    store_shared(target + i * 4,
                 make_uint4(slice.words[i], slice.words[i + 1], slice.words[i + 2], slice.words[i + 3]));
  }
}

template <typename K, int G>
__device__ __forceinline__ void store_slice(const Block<K>& b, const Slice<K, G>& slice, int index, float scale) {
  const auto& p = b.p;
  int pixel, c0;
  locate_slice<K, G>(b, index, pixel, c0);
  const uint32_t target = b.window() + pixel * p.tile.x_pitch + c0 * 2;
  uint32_t high[G / 2], low[G / 2];
  if constexpr (K::kFloat) {
    split(slice.words, scale, high, low);
  } else {
#pragma unroll
    for (int i = 0; i < G / 2; ++i) {
      high[i] = slice.words[i];
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
      store(target + p.tile.x_term, low);
    }
  }
}

// The first slices are kept in registers; others are read when they are stored (in float32 before that as well, for
// their magnitudes: the second time they come from the first-level cache).
template <typename K>
constexpr int kKeptWords = K::kFloat ? 16 : 8;
template <typename K, int G>
constexpr int kKept = kKeptWords<K> / (G * K::kBytes / 4);
template <typename K>
using Ahead = uint32_t[kKeptWords<K>];

// Calls f(integral_constant<G>): slices of 8 where the channels allow it.
template <typename K, typename F>
__device__ __forceinline__ void by_slice(const Block<K>& b, F&& f) {
  const auto& p = b.p;
  if (p.tile.quads_per_tap % 2 == 0) {
    f(std::integral_constant<int, 8>{});
  } else {
    f(std::integral_constant<int, 4>{});
  }
}

template <typename K>
__device__ __forceinline__ void read_ahead(const Block<K>& b, uint32_t (&ahead)[kKeptWords<K>], const Tile& tile) {
  by_slice(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    constexpr int kWords = G * K::kBytes / 4;
#pragma unroll
    for (int i = 0; i < kKept<K, G>; ++i) {
      Slice<K, G> slice{};
      if (i * K::kThreads < slices<K, G>(b)) {
        read_slice(b, slice, b.thread() + i * K::kThreads, tile);
      }
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        ahead[i * kWords + k] = slice.words[k];
      }
    }
  });
}

// The magnitudes of all threads; when it returns, the window may be written. Returns the scale.
template <typename K>
__device__ __forceinline__ float merge_magnitudes(const Block<K>& b, Magnitudes m, bool& exact, float& inverse) {
  auto& warps = b.header().warps;
  m = merge_warps<K::kWarps>(m, warps[threadIdx.x / 32], warps + b.thread_group() * K::kWarps, [&] {
    b.wait_for_stores();
    b.sync();
  });
  inverse = m.inverse();
  exact = b.header().all_exact != 0 || !m.can_split();
  return m.scale();
}

template <typename K>
__device__ __forceinline__ void load_window(const Block<K>& b, const uint32_t (&ahead)[kKeptWords<K>], const Tile& tile,
                                            bool& exact, float& inverse) {
  by_slice(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    constexpr int kWords = G * K::kBytes / 4;
    const auto kept = [&](int i) {
      Slice<K, G> slice;
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        slice.words[k] = ahead[i * kWords + k];
      }
      return slice;
    };
    float scale = 1.0f;
    if constexpr (K::kFloat) {
      Magnitudes m;
      const auto add = [&](const Slice<K, G>& slice) {
#pragma unroll
        for (int i = 0; i < G; ++i) {
          m.add(__uint_as_float(slice.words[i]));
        }
      };
#pragma unroll
      for (int i = 0; i < kKept<K, G>; ++i) {
        if (i * K::kThreads < slices<K, G>(b)) {
          add(kept(i));
        }
      }
      for (int i = b.thread() + kKept<K, G> * K::kThreads; i < slices<K, G>(b); i += K::kThreads) {
        Slice<K, G> slice;
        read_slice(b, slice, i, tile);
        add(slice);
      }
      scale = merge_magnitudes(b, m, exact, inverse);
    } else {
      b.wait_for_stores();
      b.sync();
    }
    if constexpr (K::kFloat) {
      if (exact) {
#pragma unroll 1
        for (int i = b.thread(); i < slices<K, G>(b); i += K::kThreads) {
          Slice<K, G> slice;
          read_slice(b, slice, i, tile);
          store_slice_exactly(b, slice, i);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kKept<K, G>; ++i) {
      if (b.thread() + i * K::kThreads < slices<K, G>(b)) {
        store_slice(b, kept(i), b.thread() + i * K::kThreads, scale);
      }
    }
#pragma unroll 2
    for (int i = b.thread() + kKept<K, G> * K::kThreads; i < slices<K, G>(b); i += K::kThreads) {
      Slice<K, G> slice;
      read_slice(b, slice, i, tile);
      store_slice(b, slice, i, scale);
    }
  });
}

}  // namespace fused_conv_bn::stem_sm80
