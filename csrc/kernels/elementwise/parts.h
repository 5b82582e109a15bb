// Tensors that are read as if they were concatenated over their channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/scalar.h"

namespace fused_conv_bn {

constexpr int kMaxParts = 128;

template <typename T>
struct Parts;

// Of a dtype that is to be found out.
template <>
struct Parts<void> {
  int count = 0;
  const void* data[kMaxParts];
  uint32_t first[kMaxParts + 1] = {};
};

// Each is dense, in the layout of the result: [rows][its channels][inner], and has channels. (With channels innermost a row is a
// pixel, else it is an image.)
template <typename T>
struct Parts {
  int count = 0;
  const T* data[kMaxParts];
  uint32_t first[kMaxParts + 1] = {};  // channel of the result, of each part, and behind the last one

  Parts() = default;
  explicit Parts(const Parts<void>& other) : count(other.count) {
    for (int i = 0; i < count; ++i) {
      data[i] = static_cast<const T*>(other.data[i]);
    }
    std::copy_n(other.first, count + 1, first);
  }

  // Which part has channel c.
  FCB_HD int find(uint32_t c) const {
    int low = 0, high = count;  // in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (c < first[middle] ? high : low) = middle;
    }
    return low;
  }
  FCB_HD uint32_t channels(int part) const { return first[part + 1] - first[part]; }
  // The plane of a row that has channel c: `inner` elements.
  FCB_HD const T* plane(int64_t row, uint32_t c, int64_t inner) const {
    const int part = find(c);
    return data[part] + (row * channels(part) + (c - first[part])) * inner;
  }
};

}  // namespace fused_conv_bn
