// How an element's position in memory maps to its channel.
//
// Every supported layout is [outer][channels][inner], dense: inner is the size of one plane for a contiguous tensor and 1
// for a channels_last or (N, C) one. So the channel of element e is (e / inner) % channels, and kernels know no layout
// beyond the numbers in ChannelMap.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/fast_div.h"

namespace fused_conv_bn {

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

// The map for a launch that covers `count` elements from `begin` on, and whose element 0 lies `lead` elements before that.
// May reduce count.
inline ChannelMap make_channel_map(const Shape& shape, int64_t begin, int lead, int64_t& count) {
  const int64_t period = shape.channels * shape.inner;
  ChannelMap map;
  map.channels = FastDiv(static_cast<uint32_t>(shape.channels));
  if (shape.inner <= kMaxLaunchElements) {
    const int64_t start = (begin % period - lead + period * lead) % period;  // period * lead: lead may exceed a period
    map.inner = FastDiv(static_cast<uint32_t>(shape.inner));
    map.first_channel = static_cast<uint32_t>(start / shape.inner);
    map.first_position = static_cast<uint32_t>(start % shape.inner);
    return map;
  }
  // Planes longer than a launch: stay inside one, so that there is one channel.
  count = std::min(count, shape.inner - begin % shape.inner);
  map.inner = FastDiv((uint32_t{1} << 31) - 1);
  map.first_channel = static_cast<uint32_t>(begin % period / shape.inner);
  map.first_position = 0;
  return map;
}

}  // namespace fused_conv_bn
