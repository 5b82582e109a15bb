// BatchNorm's batch statistics on the CPU, of one part of a tensor: the moments of its channels (moments.h), in double whatever the
// input's type.
//
// A part is some channels beside each other and some rows or planes of them (train_cpu.h). It is read once, in the order in
// which it lies, and its sums stay in registers and in the nearest cache. They are taken about the mean of its first few
// elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/elementwise/scale_shift_cpu.h"
#include "moments.h"

namespace fused_conv_bn {

constexpr int64_t kPartChannels = 256;  // of a part, at most
constexpr int64_t kShortRun = 1024;     // elements: sums of sums over these, so that fewer roundings add up

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

}  // namespace fused_conv_bn
