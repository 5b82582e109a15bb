// How an element's position in memory maps to its channel.
//
// Every supported layout is [outer][channels][inner], dense: inner is the size of one plane for a contiguous tensor and 1
// for a channels_last or (N, C) one. So the channel of element e is (e / inner) % channels, and kernels know no layout
// beyond the numbers in ChannelMap.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace fused_conv_bn {

// Division of n < 2^31 by a fixed 1 <= d < 2^31 as a multiplication (Granlund and Montgomery, PLDI 1994).
struct FastDiv {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  FCB_HD uint32_t div(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
#endif
    return (high + n) >> shift;
  }
};

// A dense tensor as the elementwise kernels see it.
struct Shape {
  int64_t numel;
  int64_t channels;
  int64_t inner;
};

// One launch covers at most this many elements, so that device code needs 32-bit indices only.
constexpr int64_t kMaxLaunchElements = int64_t{1} << 30;
// Leaves room for the carry in ChannelMap's sums.
constexpr int64_t kMaxChannels = int64_t{1} << 30;

// Channels of the elements that follow a given one.
struct ChannelMap {
  FastDiv inner;
  FastDiv channels;
  uint32_t first_channel;   // of element 0
  uint32_t first_position;  // of element 0, within its plane

  // The plane of element e, counted so that wrap() gives its channel, and how many elements from e on are in it.
  FCB_HD uint32_t plane(uint32_t e, uint32_t& remaining) const {
    const uint32_t q = inner.div(e + first_position);
    remaining = inner.divisor - (e + first_position - q * inner.divisor);
    return first_channel + q;
  }
  FCB_HD uint32_t channel(uint32_t e, uint32_t& remaining) const { return wrap(plane(e, remaining)); }
  FCB_HD uint32_t wrap(uint32_t c) const { return c - channels.div(c) * channels.divisor; }
};

// The map for elements that start at `begin` of a tensor (begin may be negative: a vector may start before the tensor),
// and in `count` how many elements from max(begin, 0) on it is valid for.
inline ChannelMap make_channel_map(const Shape& shape, int64_t begin, int64_t& count) {
  const int64_t period = shape.channels * shape.inner;
  const int64_t start = ((begin % period) + period) % period;
  ChannelMap map;
  map.channels = FastDiv(static_cast<uint32_t>(shape.channels));
  map.first_channel = static_cast<uint32_t>(start / shape.inner);
  if (shape.inner <= kMaxLaunchElements) {
    map.inner = FastDiv(static_cast<uint32_t>(shape.inner));
    map.first_position = static_cast<uint32_t>(start % shape.inner);
    return map;
  }
  // Planes longer than a launch: stay inside one plane, so that there is one channel.
  const int64_t element = begin < 0 ? 0 : begin;
  const int64_t left = shape.inner - element % shape.inner;
  count = count < left ? count : left;
  map.first_channel = static_cast<uint32_t>((element % period) / shape.inner);
  map.inner = FastDiv((uint32_t{1} << 31) - 1);
  map.first_position = 0;
  return map;
}

}  // namespace fused_conv_bn
