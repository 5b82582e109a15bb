// kPaired: whole rows of the image come to shared memory as they are, [channel][row][column], and from there into the patch.
#pragma once

#include "kernels/ptx/cp_async.cuh"
#include "load_input.cuh"

namespace fused_conv_bn::stem_sm80 {

template <typename K>
__device__ __forceinline__ int vectors(const Block<K>& b) {
  const auto& p = b.p;
  return p.C * p.tile.x_rows * (p.W / K::kVec);
}

// Rows that the image lacks become zeros.
template <typename K>
__device__ __forceinline__ void start_copies(const Block<K>& b, const Tile& tile) {
  using T = typename K::Element;
  const auto& p = b.p;
  const int h0 = tile.p0 * p.stride_h - p.pad_h;
  const T* const x = b.image(tile) + h0 * p.W;
  const bool all = h0 >= 0 && h0 + p.tile.x_rows <= p.H;
  const int beyond = (p.H - p.tile.x_rows) * p.W;  // from a channel's copied rows to the next one's
  for (int v = b.thread(); v < vectors(b); v += K::kThreads) {
    const int c = p.channel_vectors.div(v);
    const int row = all ? 0 : p.row_vectors.div(v - c * p.channel_vectors.divisor);
    const bool exists = all || static_cast<unsigned>(h0 + row) < static_cast<unsigned>(p.H);
    copy_async(b.copies() + v * kVecBytes, exists ? x + (v * K::kVec + c * beyond) : p.x, exists);
  }
  copy_async_commit();
}

// From the copies into the patch. Columns that the image lacks are zeros.
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
  const float scale = meet(b, m, exact, inverse);
  by_group(b, [&](auto g_) {
    constexpr int G = decltype(g_)::value;
    const auto for_groups = [&](auto&& store) {
#pragma unroll 2
      for (int index = b.thread(); index < groups<K, G>(b); index += K::kThreads) {
        int pixel, c0;
        split_index<K, G>(b, index, pixel, c0);
        const int row = p.x_cols.div(pixel);
        const int w = pixel - row * p.tile.x_cols - p.pad_w;
        const bool inside = static_cast<unsigned>(w) < static_cast<unsigned>(p.W);
        const int channel_stride = p.tile.x_rows * p.W * K::kBytes;
        uint32_t source = b.copies() + c0 * channel_stride + (row * p.W + w) * K::kBytes;
        Group<K, G> group;
#pragma unroll
        for (int i = 0; i < G; ++i) {
          group.words[i] = inside && (p.whole_groups || c0 + i < p.C) ? load_shared_1(source) : 0;
          source += channel_stride;
        }
        store(group, index);
      }
    };
    if (exact) {
      for_groups([&](const auto& group, int index) { store_exactly(b, group, index); });
    } else {
      for_groups([&](const auto& group, int index) { store_group(b, group, index, scale); });
    }
  });
}

}  // namespace fused_conv_bn::stem_sm80
