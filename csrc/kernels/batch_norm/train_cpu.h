// BatchNorm in training mode on the CPU, from its input to the channels' affines: how the work is cut, and by which instructions.
//
// The work is cut by the tensor's shape alone, and its parts are merged in their order, so that results are the same
// bits however many threads there are. What is made of a channel's moments is computed where they are there: in the same task
// if the channel has no other part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "finish_cpu.h"
#include "kernels/elementwise/memory_format.h"
#include "kernels/elementwise/scale_shift_cpu.h"
#include "moments.h"
#include "stats_cpu.h"

namespace fused_conv_bn {

// Elements of a part: that many parts, of a size within these bounds.
constexpr int64_t kParts = 128;
constexpr int64_t kLeastPart = 8192, kLargestPart = 65536;
constexpr int64_t kStatsGrain = 16384;  // elements that are worth a thread
constexpr int64_t kFinishCost = 16;     // of a channel, in elements

// ---- instruction sets ------------------------------------------------------------------------------------------------

template <int kLanesOf, bool kV3Of>
struct StatsIsa {
  static constexpr int kLanes = kLanesOf;  // doubles in a vector
  static constexpr bool kV3 = kV3Of;
};
template <typename Body>
void with_baseline(const Body& body) {
  body(StatsIsa<2, false>{});
}
#if defined(__x86_64__)
template <typename Body>
__attribute__((target("arch=x86-64-v3"))) void with_v3(const Body& body) {
  body(StatsIsa<4, true>{});
}
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) void with_v4(const Body& body) {
  body(StatsIsa<8, true>{});
}
#endif
// body(StatsIsa), which is always inlined, compiled for the instruction set that there is.
template <typename Body>
void with_isa(const Body& body) {
#if defined(__x86_64__)
  if (use_v4()) {
    return with_v4(body);
  }
  if (use_v3()) {
    return with_v3(body);
  }
#endif
  with_baseline(body);
}

// ---- all of a tensor -------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// part(p, first channel, how many, mean, m2): the moments of these channels in part p, all of counts[p] values. Then
// finish(first channel, how many, count, mean, m2) for all channels, some at a time, on whichever thread.
template <typename ParallelFor, typename Part, typename Finish>
void reduce_parts(int64_t channels, int64_t width, const std::vector<double>& counts, const ParallelFor& parallel_for,
                  const Part& part, const Finish& finish) {
  const int64_t across = divide_up(channels, width);
  const auto parts = static_cast<int64_t>(counts.size());
  const auto grain = [](double cost) { return std::max<int64_t>(1, static_cast<int64_t>(kStatsGrain / cost)); };
  const bool whole = parts == 1;
  const std::unique_ptr<double[]> partials(whole ? nullptr : new double[2 * parts * channels]);
  double* const means = partials.get();
  double* const m2s = means + parts * channels;
  const double cost = static_cast<double>(width) * (counts[0] + kFinishCost);
  parallel_for(int64_t{0}, parts * across, grain(cost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / across, first = i % across * width;
      const int n = static_cast<int>(std::min(width, channels - first));
      if (whole) {
        double mean[kPartChannels], m2[kPartChannels];
        part(p, first, n, mean, m2);
        finish(first, n, counts[0], mean, m2);
      } else {
        part(p, first, n, means + p * channels + first, m2s + p * channels + first);
      }
    }
  });
  if (whole) {
    return;
  }
  double count = 0;
  for (double c : counts) {
    count += c;
  }
  const int64_t block = std::min<int64_t>(channels, kBlock);
  parallel_for(int64_t{0}, divide_up(channels, block), grain(static_cast<double>(block * (parts + kFinishCost))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i * block;
                   const int n = static_cast<int>(std::min(block, channels - first));
                   double mean[kBlock], m2[kBlock];
                   with_isa([&](auto) __attribute__((always_inline)) {
                     merge_parts(n, parts, counts.data(), means + first, m2s + first, channels, mean, m2);
                   });
                   finish(first, n, count, mean, m2);
                 }
               });
}

// finish(first channel, how many, how many values each, their means, their m2s) for the channels of x, which is dense
// with the given shape and not empty: some at a time, kPartChannels at most, on whichever thread.
template <typename T, typename ParallelFor, typename Finish>
void reduce_channels(const T* x, const Shape& shape, const ParallelFor& parallel_for, const Finish& finish) {
  const int64_t channels = shape.channels, inner = shape.inner;
  const int64_t images = shape.numel / (channels * inner);
  const int64_t size = std::clamp(shape.numel / kParts, kLeastPart, kLargestPart);
  std::vector<double> counts;
  if (inner > 1) {
    const int64_t piece = divide_up(inner, divide_up(inner, size));
    const Planes planes{channels, inner, divide_up(inner, piece), piece};
    const int64_t units = images * planes.pieces;
    const int64_t most = std::clamp<int64_t>(kShortRun / piece, 1, std::min(channels, kPartChannels));
    const int64_t width = divide_up(channels, divide_up(channels, most));
    const int64_t share = divide_up(units, divide_up(units, std::max<int64_t>(1, size / (width * piece))));
    for (int64_t unit = 0; unit < units; unit += share) {
      double count = 0;
      for (int64_t u = unit; u < std::min(units, unit + share); ++u) {
        count += static_cast<double>(planes.size(u));
      }
      counts.push_back(count);
    }
    const auto part = [&](int64_t p, int64_t first, int n, double* mean, double* m2) {
      with_isa([&](auto isa) __attribute__((always_inline)) {
        planes_part<isa.kLanes, isa.kV3>(x, planes, p * share, std::min(units, (p + 1) * share), first, n, mean, m2);
      });
    };
    return reduce_parts(channels, width, counts, parallel_for, part, finish);
  }
  // Some rows make up a longer one where they are short; what is left of them is a part by itself.
  const int64_t repeat = std::min(images, std::max<int64_t>(1, kBlock / channels));
  const int64_t rows = images / repeat, left = images % repeat;
  const int64_t even = divide_up(channels, divide_up(channels, kPartChannels));
  const int64_t width = std::min(channels, divide_up(even, kLineBytes) * kLineBytes);
  const int64_t down = divide_up(rows, std::max<int64_t>(1, size / (width * repeat)));
  const int64_t height = divide_up(divide_up(rows, down), 8) * 8;
  for (int64_t row = 0; row < rows; row += height) {
    counts.push_back(static_cast<double>(std::min(height, rows - row) * repeat));
  }
  const auto whole_parts = static_cast<int64_t>(counts.size());
  if (left > 0) {
    counts.push_back(static_cast<double>(left));
  }
  const auto part = [&](int64_t p, int64_t first, int n, double* mean, double* m2) {
    const bool last = p == whole_parts;
    const int64_t row = p * height;
    const int64_t count = last ? 1 : std::min(height, rows - row);
    const int64_t times = last ? left : repeat;
    const T* from = x + (last ? rows : row) * repeat * channels + first;
    with_isa([&](auto isa) __attribute__((always_inline)) {
      if (times == 1) {
        columns_part<isa.kLanes, isa.kV3>(from, count, repeat * channels, n, mean, m2);
        return;
      }
      // Columns of the same channel, equally many values in each.
      double means[kBlock], m2s[kBlock];
      columns_part<isa.kLanes, isa.kV3>(from, count, repeat * channels, static_cast<int>(times) * n, means, m2s);
      for (int c = 0; c < n; ++c) {
        double sum = 0, between = 0, within = 0;
        for (int t = 0; t < times; ++t) {
          sum += means[t * n + c];
        }
        mean[c] = sum / static_cast<double>(times);
        for (int t = 0; t < times; ++t) {
          const double delta = means[t * n + c] - mean[c];
          between += delta * delta;
          within += m2s[t * n + c];
        }
        m2[c] = within + between * static_cast<double>(count);
      }
    });
  };
  reduce_parts(channels, width, counts, parallel_for, part, finish);
}

// The affine of each channel of x in training mode: [center, scale, shift][channel]. Updates the running statistics.
template <typename T, typename ParallelFor>
std::unique_ptr<acc_t<T>[]> train_affines(const T* x, const Shape& shape, const TrainParams& params,
                                          const ParallelFor& parallel_for) {
  using Acc = acc_t<T>;
  const int64_t channels = shape.channels;
  std::unique_ptr<Acc[]> affines(new Acc[3 * channels]);
  reduce_channels(x, shape, parallel_for,
                  [&](int64_t first, int n, double count, const double* mean, const double* m2) {
                    Acc* const to = affines.get() + first;
                    with_isa([&](auto) __attribute__((always_inline)) {
                      finish_channels<T>(params, first, n, count, mean, m2, to, to + channels, to + 2 * channels);
                    });
                  });
  return affines;
}

}  // namespace fused_conv_bn
