// BatchNorm's batch statistics on the CPU: Moments of each channel (moments.h), in double whatever the input's type.
//
// The work is cut by the tensor's shape alone, and its parts are merged in their order, so that results are the same
// bits however many threads there are. Within a part sums are taken about the mean of its first few elements.
//
// A part is some channels beside each other and some rows or planes of them. It is read once, in the order in which it
// lies, and its sums stay in registers and in the nearest cache. What is made of a channel's moments is computed where
// they are there: in the same task if the channel has no other part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/elementwise/memory_format.h"
#include "kernels/elementwise/scale_shift_cpu.h"
#include "moments.h"

namespace fused_conv_bn {

// Elements of a part: that many parts, of a size within these bounds.
constexpr int64_t kParts = 128;
constexpr int64_t kLeastPart = 8192, kLargestPart = 65536;
constexpr int64_t kPartChannels = 256;  // at most
constexpr int64_t kShortRun = 1024;     // elements: sums of sums over these, so that fewer roundings add up
constexpr int64_t kStatsGrain = 16384;  // elements that are worth a thread
constexpr int64_t kFinishCost = 16;     // of a channel, in elements

template <int kLanes>
struct Lanes {
  typedef double Vector __attribute__((vector_size(kLanes * sizeof(double))));
  typedef int64_t Mask __attribute__((vector_size(kLanes * sizeof(double))));
};

// Vectors are passed by reference: by value their ABI would depend on the instruction set. One of floats is written as
// its elements: GCC cuts __builtin_convertvector into the baseline's pieces before it knows the caller's instructions.
template <int kLanes>
FCB_HD void load_vector(const double* from, typename Lanes<kLanes>::Vector& to) {
  typedef double Unaligned __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));
  to = *reinterpret_cast<const Unaligned*>(from);
}
template <int kLanes>
FCB_HD void load_vector(const float* from, typename Lanes<kLanes>::Vector& to) {
  [&]<size_t... k>(std::index_sequence<k...>) __attribute__((always_inline)) {
    to = typename Lanes<kLanes>::Vector{static_cast<double>(from[k])...};
  }(std::make_index_sequence<kLanes>{});
}
template <int kLanes>
FCB_HD void store_vector(const typename Lanes<kLanes>::Vector& from, double* to) {
  typedef double Unaligned __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));
  *reinterpret_cast<Unaligned*>(to) = from;
}

// Whether load_any_order() puts elements into another order: those at even places first, then those at odd ones. To
// take two bfloat16 apart is a shift and a mask, half the instructions of converting one after the other.
template <typename T>
constexpr bool kReorders = std::is_same_v<T, bfloat16>;
constexpr int64_t kLeastReordered = 16;  // elements of a run

template <bool kV3, typename T>
FCB_HD void load_any_order(const T* from, acc_t<T>* to, int n) {
  if constexpr (kReorders<T>) {
    const int pairs = n / 2;
    for (int k = 0; k < pairs; ++k) {
      uint32_t pair;
      std::memcpy(&pair, from + 2 * k, sizeof(pair));
      to[k] = float_of(pair << 16);
      to[pairs + k] = float_of(pair & 0xffff0000u);
    }
    if (n % 2 != 0) {
      to[n - 1] = to_acc(from[n - 1]);
    }
  } else {
    load<kV3>(from, to, n);
  }
}

// mean[k] and m2[k] for n channels whose pivots and sums these are.
FCB_HD void moments_from_sums(int n, double count, const double* pivot, const double* sum, const double* squares,
                              double* mean, double* m2) {
  for (int k = 0; k < n; ++k) {
    const Moments m = from_sums(count, pivot[k], sum[k], squares[k]);
    mean[k] = m.mean;
    m2[k] = m.m2;
  }
}

// ---- planes: runs of one channel -------------------------------------------------------------------------------------

// x as [images][channels][inner]. A unit is a plane, or a piece of one; units follow each other image by image.
struct Planes {
  int64_t channels;
  int64_t inner;
  int64_t pieces;  // of a plane
  int64_t piece;   // elements of one, the last may have fewer

  FCB_HD int64_t size(int64_t unit) const { return std::min(piece, inner - unit % pieces * piece); }
  FCB_HD int64_t offset(int64_t unit, int64_t c) const {
    return (unit / pieces * channels + c) * inner + unit % pieces * piece;
  }
};

// Adds to sums and squares, a vector of them each, those of n elements about the pivot. n <= kShortRun.
template <int kLanes, typename Acc>
FCB_HD void add_run(const Acc* x, int n, double pivot, double* sum, double* squares) {
  using Vector = typename Lanes<kLanes>::Vector;
  using Mask = typename Lanes<kLanes>::Mask;
  constexpr int kVectors = 4;
  Vector s[kVectors] = {}, q[kVectors] = {};
  const auto add = [&](int v, const Vector& d) __attribute__((always_inline)) {
    s[v] += d;
    q[v] += d * d;
  };
  int i = 0;
  for (; i + kVectors * kLanes <= n; i += kVectors * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector d;
      load_vector<kLanes>(x + i + v * kLanes, d);
      d -= pivot;
      add(v, d);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors - 1; ++v) {
    if (i + kLanes <= n) {
      Vector d;
      load_vector<kLanes>(x + i, d);
      d -= pivot;
      add(v, d);
      i += kLanes;
    }
  }
  if (i < n && n >= kLanes) {
    // The last vector, without what it has in common with the one before.
    Vector d;
    load_vector<kLanes>(x + n - kLanes, d);
    d -= pivot;
    Mask mask;
    for (int k = 0; k < kLanes; ++k) {
      mask[k] = n - kLanes + k >= i ? -1 : 0;
    }
    add(kVectors - 1, (Vector)((Mask)d & mask));
  } else {
    for (; i < n; ++i) {
      Vector d = {};
      d[0] = static_cast<double>(x[i]) - pivot;
      add(0, d);
    }
  }
  Vector before;
  load_vector<kLanes>(sum, before);
  store_vector<kLanes>(before + ((s[0] + s[1]) + (s[2] + s[3])), sum);
  load_vector<kLanes>(squares, before);
  store_vector<kLanes>(before + ((q[0] + q[1]) + (q[2] + q[3])), squares);
}

// The moments of `width` channels from the first one on, over the units [begin, end), of which there is one at least.
// width * piece <= kShortRun, or width is 1.
template <int kLanes, bool kV3, typename T>
FCB_HD void planes_part(const T* x, const Planes& planes, int64_t begin, int64_t end, int64_t first, int width,
                        double* mean, double* m2) {
  using Acc = acc_t<T>;
  double pivot[kPartChannels];
  double sum[kPartChannels * kLanes], squares[kPartChannels * kLanes];
  std::fill_n(sum, width * kLanes, 0.0);
  std::fill_n(squares, width * kLanes, 0.0);
  int64_t count = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t size = planes.size(unit);
    const int64_t all = width * size;
    for (int64_t i = 0; i < all; i += kShortRun) {
      const int n = static_cast<int>(std::min(kShortRun, all - i));
      const T* from = x + planes.offset(unit, first) + i;
      Acc buffer[kShortRun];
      const Acc* values = buffer;
      if constexpr (std::is_same_v<T, Acc>) {
        values = from;
      } else if (kReorders<T> && size >= kLeastReordered) {
        for (int k = 0; k < n; k += static_cast<int>(size)) {
          load_any_order<kV3>(from + k, buffer + k, static_cast<int>(std::min<int64_t>(size, n - k)));
        }
      } else {
        load<kV3>(from, buffer, n);
      }
      const int run = width == 1 ? n : static_cast<int>(size);
      if (count == 0) {
        const int few = run >= 4 ? 4 : run >= 2 ? 2 : 1;  // powers of 2: the mean of equal values is the same value
        for (int c = 0; c < width; ++c) {
          double first_few = 0;
          for (int k = 0; k < few; ++k) {
            first_few += static_cast<double>(values[c * run + k]);
          }
          pivot[c] = first_few / few;
        }
      }
      for (int c = 0; c < width; ++c) {
        add_run<kLanes>(values + c * run, run, pivot[c], sum + c * kLanes, squares + c * kLanes);
      }
      count += run;
    }
  }
  for (int c = 0; c < width; ++c) {
    double s = 0, q = 0;
    for (int k = 0; k < kLanes; ++k) {
      s += sum[c * kLanes + k];
      q += squares[c * kLanes + k];
    }
    sum[c] = s;
    squares[c] = q;
  }
  moments_from_sums(width, static_cast<double>(count), pivot, sum, squares, mean, m2);
}

// ---- rows of many channels -------------------------------------------------------------------------------------------

// Adds to sum[k] and squares[k] those over the rows, for kLanes columns about their pivots.
template <int kLanes, int kRows, typename Acc>
FCB_HD void add_rows(const Acc* x, int64_t stride, const double* pivot, double* sum, double* squares) {
  using Vector = typename Lanes<kLanes>::Vector;
  Vector p, s[2] = {}, q[2] = {};
  load_vector<kLanes>(pivot, p);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Vector d;
    load_vector<kLanes>(x + r * stride, d);
    d -= p;
    s[r % 2] += d;
    q[r % 2] += d * d;
  }
  Vector before;
  load_vector<kLanes>(sum, before);
  store_vector<kLanes>(before + (s[0] + s[1]), sum);
  load_vector<kLanes>(squares, before);
  store_vector<kLanes>(before + (q[0] + q[1]), squares);
}
template <int kLanes, int kRows, typename Acc>
FCB_HD void add_rows(const Acc* x, int64_t stride, int n, const double* pivot, double* sum, double* squares) {
  int k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    add_rows<kLanes, kRows>(x + k, stride, pivot + k, sum + k, squares + k);
  }
  for (; k < n; ++k) {
    add_rows<1, kRows>(x + k, stride, pivot + k, sum + k, squares + k);
  }
}

// f(kRows rows as acc_t<T>, their stride, the first of their columns, how many) for blocks of `width` columns, each in
// the order of load_any_order().
template <bool kV3, int kRows, typename T, typename F>
FCB_HD void with_rows(const T* x, int64_t stride, int width, const F& f) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    f(x, stride, 0, width);
  } else {
    acc_t<T> buffer[kRows * kBlock];
    for (int k = 0; k < width; k += kBlock) {
      const int n = std::min(kBlock, width - k);
      for (int r = 0; r < kRows; ++r) {
        load_any_order<kV3>(x + r * stride + k, buffer + r * kBlock, n);
      }
      f(buffer, kBlock, k, n);
    }
  }
}

// The moments of `width` columns of a matrix whose rows are `stride` elements apart.
template <int kLanes, bool kV3, typename T>
FCB_HD void columns_part(const T* x, int64_t rows, int64_t stride, int width, double* mean, double* m2) {
  using Acc = acc_t<T>;
  double pivot[kPartChannels], sum[kPartChannels], squares[kPartChannels];
  std::fill_n(sum, width, 0.0);
  std::fill_n(squares, width, 0.0);
  const auto first_rows = [&](auto few) __attribute__((always_inline)) {
    with_rows<kV3, few()>(x, stride, width,
                          [&](const Acc* from, int64_t s, int k, int n) __attribute__((always_inline)) {
                            for (int i = 0; i < n; ++i) {
                              double first_few = 0;
                              for (int r = 0; r < few(); ++r) {
                                first_few += static_cast<double>(from[r * s + i]);
                              }
                              pivot[k + i] = first_few / few();
                            }
                          });
  };
  // Powers of 2: the mean of equal values is the same value.
  if (rows >= 4) {
    first_rows(std::integral_constant<int, 4>{});
  } else if (rows >= 2) {
    first_rows(std::integral_constant<int, 2>{});
  } else {
    first_rows(std::integral_constant<int, 1>{});
  }
  const auto add = [&](int64_t row, auto count) __attribute__((always_inline)) {
    with_rows<kV3, count()>(x + row * stride, stride, width,
                            [&](const Acc* from, int64_t s, int k, int n) __attribute__((always_inline)) {
                              add_rows<kLanes, count()>(from, s, n, pivot + k, sum + k, squares + k);
                            });
  };
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) {
    add(row, std::integral_constant<int, 8>{});
  }
  if (row + 4 <= rows) {
    add(row, std::integral_constant<int, 4>{});
    row += 4;
  }
  for (; row < rows; ++row) {
    add(row, std::integral_constant<int, 1>{});
  }
  if constexpr (kReorders<T>) {
    double means[kPartChannels], m2s[kPartChannels];
    moments_from_sums(width, static_cast<double>(rows), pivot, sum, squares, means, m2s);
    for (int begin = 0; begin < width; begin += kBlock) {
      const int n = std::min(kBlock, width - begin), pairs = n / 2;
      for (int k = 0; k < pairs; ++k) {
        mean[begin + 2 * k] = means[begin + k];
        mean[begin + 2 * k + 1] = means[begin + pairs + k];
        m2[begin + 2 * k] = m2s[begin + k];
        m2[begin + 2 * k + 1] = m2s[begin + pairs + k];
      }
      if (n % 2 != 0) {
        mean[begin + n - 1] = means[begin + n - 1];
        m2[begin + n - 1] = m2s[begin + n - 1];
      }
    }
  } else {
    moments_from_sums(width, static_cast<double>(rows), pivot, sum, squares, mean, m2);
  }
}

// ---- what is made of the moments -------------------------------------------------------------------------------------

// Adds up the partials of n channels, [parts][stride] of means and m2s, in their order.
FCB_HD void merge_parts(int n, int64_t parts, const double* counts, const double* means, const double* m2s,
                        int64_t stride, double* mean, double* m2) {
  std::copy_n(means, n, mean);
  std::copy_n(m2s, n, m2);
  double count = counts[0];
  for (int64_t p = 1; p < parts; ++p) {
    for (int k = 0; k < n; ++k) {
      const Moments m = merge({count, mean[k], m2[k]}, {counts[p], means[p * stride + k], m2s[p * stride + k]});
      mean[k] = m.mean;
      m2[k] = m.m2;
    }
    count += counts[p];
  }
}

// f(a null pointer to the element type).
template <typename F>
FCB_HD void with_element(Element element, const F& f) {
  switch (element) {
    case Element::float16:
      return f(static_cast<float16*>(nullptr));
    case Element::bfloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case Element::float32:
      return f(static_cast<float*>(nullptr));
    default:
      return f(static_cast<double*>(nullptr));
  }
}

// ChannelBuffer's at() and set() for n channels from the first one on.
FCB_HD void read_channels(const ChannelBuffer& from, int64_t first, int n, double missing, double* to) {
  if (from.data == nullptr) {
    std::fill_n(to, n, missing);
    return;
  }
  with_element(from.element, [&](auto* type) __attribute__((always_inline)) {
    const auto* data = static_cast<decltype(type)>(from.data) + first * from.stride;
    if (from.stride == 1) {
      for (int k = 0; k < n; ++k) {
        to[k] = static_cast<double>(to_acc(data[k]));
      }
    } else {
      for (int k = 0; k < n; ++k) {
        to[k] = static_cast<double>(to_acc(data[k * from.stride]));
      }
    }
  });
}
FCB_HD void write_channels(const double* from, int64_t first, int n, const ChannelBuffer& to) {
  with_element(to.element, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* data = static_cast<T*>(to.data) + first * to.stride;
    if (to.stride == 1) {
      for (int k = 0; k < n; ++k) {
        data[k] = from_acc<T>(static_cast<acc_t<T>>(from[k]));
      }
    } else {
      for (int k = 0; k < n; ++k) {
        data[k * to.stride] = from_acc<T>(static_cast<acc_t<T>>(from[k]));
      }
    }
  });
}

// finish_channel for n <= kPartChannels channels from the first one on, whose affines become center[k], scale[k] and
// shift[k].
template <typename T>
FCB_HD void finish_channels(const TrainParams& p, int64_t first, int n, double count, const double* mean,
                            const double* m2, acc_t<T>* center, acc_t<T>* scale, acc_t<T>* shift) {
  double running_mean[kPartChannels], running_var[kPartChannels], weight[kPartChannels], bias[kPartChannels],
      conv_bias[kPartChannels], new_mean[kPartChannels], new_var[kPartChannels];
  read_channels(p.running_mean, first, n, 0, running_mean);
  read_channels(p.running_var, first, n, 0, running_var);
  read_channels(p.weight, first, n, 1, weight);
  read_channels(p.bias, first, n, 0, bias);
  read_channels(p.conv_bias, first, n, 0, conv_bias);
  TrainParams local = p;
  local.running_mean = {new_mean, 1, Element::float64};
  local.running_var = {new_var, 1, Element::float64};
  if (p.saved_mean != nullptr) {
    local.saved_mean = static_cast<acc_t<T>*>(p.saved_mean) + first;
    local.saved_invstd = static_cast<acc_t<T>*>(p.saved_invstd) + first;
  }
  for (int k = 0; k < n; ++k) {
    const Affine<double> affine = finish_channel(local,
                                                 {running_mean[k], running_var[k], weight[k], bias[k], conv_bias[k]},
                                                 {count, mean[k], m2[k]}, static_cast<uint32_t>(k), kElement<T>);
    center[k] = static_cast<acc_t<T>>(affine.center);
    scale[k] = static_cast<acc_t<T>>(affine.scale);
    shift[k] = static_cast<acc_t<T>>(affine.shift);
  }
  if (p.running_mean.data != nullptr) {
    write_channels(new_mean, first, n, p.running_mean);
    write_channels(new_var, first, n, p.running_var);
  }
}

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

// The moments of each channel of x, which is dense with the given shape and not empty.
template <typename T, typename ParallelFor>
std::vector<Moments> channel_moments(const T* x, const Shape& shape, const ParallelFor& parallel_for) {
  std::vector<Moments> result(shape.channels);
  reduce_channels(x, shape, parallel_for,
                  [&](int64_t first, int n, double count, const double* mean, const double* m2) {
                    for (int k = 0; k < n; ++k) {
                      result[first + k] = {count, mean[k], m2[k]};
                    }
                  });
  return result;
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
