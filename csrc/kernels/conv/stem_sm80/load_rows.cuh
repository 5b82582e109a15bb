// kAlternating: whole rows of the image come to shared memory as they are, [channel][row][column], and from
// there into the window.
#pragma once

#include "kernels/ptx/cp_async.cuh"
#include "load_input.cuh"

namespace fused_conv_bn::stem_sm80 {

template <typename K>
__device__ __forceinline__ int vectors(const Block<K>& b) {
  const auto& p = b.p;
  return p.c.C * p.tile.x_rows * (p.c.W / K::kVec);
}

// Rows that the image lacks become zeros.
template <typename K>
__device__ __forceinline__ void start_copies(const Block<K>& b, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  const int h0 = input_window(tile, p.c).h0;
  const T* const x = input_image(p.x, tile, p.c) + h0 * p.c.W;
  const bool all = h0 >= 0 && h0 + p.tile.x_rows <= p.c.H;
  const int beyond = (p.c.H - p.tile.x_rows) * p.c.W;  // from a channel's copied rows to the next one's
  for (int v = b.thread(); v < vectors(b); v += K::kThreads) {
    const int c = p.channel_vectors.div(v);
    const int row = all ? 0 : p.row_vectors.div(v - c * p.channel_vectors.divisor);
    const bool there = all || exists(h0 + row, p.c.H);
    copy_async(b.copies() + v * kVecBytes, there ? x + (v * K::kVec + c * beyond) : p.x, there);
  }
  copy_async_commit();
}

// From the copies into the window. Columns that the image lacks are zeros.
template <typename K>
__device__ __forceinline__ void load_copies(const Block<K>& b, bool& exact, float& inverse) {
  const auto& p = b.p;
  copy_async_wait_all_but<0>();
  Magnitudes m;
#pragma unroll 4
  for (int v = b.thread(); v < vectors(b); v += K::kThreads) {
    const uint4 values = load_shared_4(b.copies() + v * kVecBytes);  // this thread's own
    m.add(__uint_as_float(values.x));
    m.add(__uint_as_float(values.y));
    m.add(__uint_as_float(values.z));
    m.add(__uint_as_float(values.w));
  }
  const float scale = merge_magnitudes(b, m, exact, inverse);
  by_slice(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    const auto for_slices = [&](auto&& store) {
#pragma unroll 2
      for (int index = b.thread(); index < slices<K, G>(b); index += K::kThreads) {
        int pixel, c0;
        locate_slice<K, G>(b, index, pixel, c0);
        const auto [row, col] = locate_pixel(pixel, p.x_cols);
        const int w = col - p.c.pad_w;
        const bool inside = exists(w, p.c.W);
        const int channel_stride = p.tile.x_rows * p.c.W * K::kBytes;
        uint32_t source = b.copies() + c0 * channel_stride + (row * p.c.W + w) * K::kBytes;
        Slice<K, G> slice;
#pragma unroll
        for (int i = 0; i < G; ++i) {
          slice.words[i] = inside && (p.whole_slices || c0 + i < p.c.C) ? load_shared_1(source) : 0;
          source += channel_stride;
        }
        store(slice, index);
      }
    };
    if (exact) {
      for_slices([&](const auto& slice, int index) { store_slice_exactly(b, slice, index); });
    } else {
      for_slices([&](const auto& slice, int index) { store_slice(b, slice, index, scale); });
    }
  });
}

}  // namespace fused_conv_bn::stem_sm80
