// BatchNorm's batch statistics on the CPU: Moments of each channel (moments.h), in double whatever the input's type.
//
// The work is cut by the tensor's shape alone, and its parts are merged in their order, so that results are the same
// bits however many threads there are. Within a part sums are taken about the mean of its first elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "memory_format.h"
#include "moments.h"
#include "scale_shift_cpu.h"

namespace fused_conv_bn {

constexpr int kSumLanes = 16;             // sums side by side over a run of elements
constexpr int64_t kPartElements = 65536;  // of a part, about
constexpr int64_t kPartColumns = 512;     // of a part where channels lie side by side, at most
// Planes shorter than this are not worth a run of their own.
constexpr int64_t kMinPlane = 100;

// ---- runs of one channel ---------------------------------------------------------------------------------------------

struct Sums {
  double sum[kSumLanes];
  double squares[kSumLanes];
};

// Sums of sums: over this many elements, or rows, first, so that fewer roundings add up.
constexpr int64_t kShortRun = 1024;
constexpr int64_t kShortColumn = 16;

template <bool kV3, typename T>
FCB_HD void sum_run_body(const T* x, int64_t n, double pivot, Sums& sums) {
  for (int64_t begin = 0; begin < n; begin += kShortRun) {
    const int64_t end = std::min(n, begin + kShortRun);
    Sums part{};
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - i));
      acc_t<T> value[kBlock];
      load<kV3>(x + i, value, count);
      int k = 0;
      for (; k + kSumLanes <= count; k += kSumLanes) {
        for (int lane = 0; lane < kSumLanes; ++lane) {
          const double d = static_cast<double>(value[k + lane]) - pivot;
          part.sum[lane] += d;
          part.squares[lane] += d * d;
        }
      }
      for (; k < count; ++k) {
        const double d = static_cast<double>(value[k]) - pivot;
        part.sum[k % kSumLanes] += d;
        part.squares[k % kSumLanes] += d * d;
      }
    }
    for (int lane = 0; lane < kSumLanes; ++lane) {
      sums.sum[lane] += part.sum[lane];
      sums.squares[lane] += part.squares[lane];
    }
  }
}

// ---- rows of many channels -------------------------------------------------------------------------------------------

// Adds to sum[k] and squares[k] those over the rows, for n <= kBlock columns about their pivots.
template <bool kV3, typename T>
FCB_HD void sum_columns_body(const T* x, int64_t rows, int64_t stride, int n, const double* pivot, double* sum,
                             double* squares) {
  for (int64_t begin = 0; begin < rows; begin += kShortColumn) {
    double part[kBlock] = {}, part_squares[kBlock] = {};
    for (int64_t r = begin; r < std::min(rows, begin + kShortColumn); ++r) {
      acc_t<T> value[kBlock];
      load<kV3>(x + r * stride, value, n);
      for (int k = 0; k < n; ++k) {
        const double d = static_cast<double>(value[k]) - pivot[k];
        part[k] += d;
        part_squares[k] += d * d;
      }
    }
    for (int k = 0; k < n; ++k) {
      sum[k] += part[k];
      squares[k] += part_squares[k];
    }
  }
}

template <typename T>
void sum_run_baseline(const T* x, int64_t n, double pivot, Sums& sums) {
  sum_run_body<false>(x, n, pivot, sums);
}
template <typename T>
void sum_columns_baseline(const T* x, int64_t rows, int64_t stride, int n, const double* pivot, double* sum,
                          double* squares) {
  sum_columns_body<false>(x, rows, stride, n, pivot, sum, squares);
}
#if defined(__x86_64__)
template <typename T>
__attribute__((target("arch=x86-64-v3"))) void sum_run_v3(const T* x, int64_t n, double pivot, Sums& sums) {
  sum_run_body<true>(x, n, pivot, sums);
}
template <typename T>
__attribute__((target("arch=x86-64-v3"))) void sum_columns_v3(const T* x, int64_t rows, int64_t stride, int n,
                                                              const double* pivot, double* sum, double* squares) {
  sum_columns_body<true>(x, rows, stride, n, pivot, sum, squares);
}
#endif

template <typename T>
void sum_run(const T* x, int64_t n, double pivot, Sums& sums) {
#if defined(__x86_64__)
  if (use_v3()) {
    return sum_run_v3(x, n, pivot, sums);
  }
#endif
  sum_run_baseline(x, n, pivot, sums);
}
template <typename T>
void sum_columns(const T* x, int64_t rows, int64_t stride, int n, const double* pivot, double* sum, double* squares) {
#if defined(__x86_64__)
  if (use_v3()) {
    return sum_columns_v3(x, rows, stride, n, pivot, sum, squares);
  }
#endif
  sum_columns_baseline(x, rows, stride, n, pivot, sum, squares);
}

// ---- all of a tensor -------------------------------------------------------------------------------------------------

// x as [images][channels][inner], inner being a run.
template <typename T, typename ParallelFor>
std::vector<Moments> planes_moments(const T* x, const Shape& shape, const ParallelFor& parallel_for) {
  const int64_t images = shape.numel / (shape.channels * shape.inner);
  const int64_t pieces = (shape.inner + kPartElements - 1) / kPartElements;  // of a plane
  const int64_t piece = (shape.inner + pieces - 1) / pieces;
  const int64_t units = images * pieces;  // of a channel
  const int64_t share = std::max<int64_t>(1, kPartElements / piece);
  const int64_t parts = (units + share - 1) / share;
  std::vector<Moments> partials(parts * shape.channels);
  parallel_for(int64_t{0}, parts * shape.channels, int64_t{1}, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i / shape.channels, c = i % shape.channels;
      Sums sums{};
      double pivot = 0;
      int64_t count = 0;
      for (int64_t unit = part * share; unit < std::min(units, (part + 1) * share); ++unit) {
        const int64_t begin = unit % pieces * piece;
        const int64_t n = std::min(piece, shape.inner - begin);
        const T* run = x + (unit / pieces * shape.channels + c) * shape.inner + begin;
        if (count == 0) {
          const int64_t few = std::min<int64_t>(n, kBlock);
          for (int64_t k = 0; k < few; ++k) {
            pivot += static_cast<double>(to_acc(run[k])) / static_cast<double>(few);
          }
        }
        sum_run(run, n, pivot, sums);
        count += n;
      }
      double sum = 0, squares = 0;
      for (int lane = 0; lane < kSumLanes; ++lane) {
        sum += sums.sum[lane];
        squares += sums.squares[lane];
      }
      partials[i] = from_sums(static_cast<double>(count), pivot, sum, squares);
    }
  });
  std::vector<Moments> result(shape.channels);
  for (int64_t i = 0; i < parts * shape.channels; ++i) {
    result[i % shape.channels] = merge(result[i % shape.channels], partials[i]);
  }
  return result;
}

// x as a matrix of `rows` rows, whose columns are groups of shape.inner that have a channel each, in turn. Adds to
// `result`.
template <typename T, typename ParallelFor>
void add_columns_moments(const T* x, int64_t rows, int64_t columns, const Shape& shape, std::vector<Moments>& result,
                         const ParallelFor& parallel_for) {
  constexpr int64_t kPivotRows = 4;
  const int64_t inner = shape.inner, groups = columns / inner;
  const int64_t share = std::min(groups, kPartColumns / inner);
  const int64_t height = std::min(rows, kPartElements / (share * inner));
  const int64_t across = (groups + share - 1) / share;
  const int64_t down = (rows + height - 1) / height;
  std::vector<Moments> partials(down * groups);
  parallel_for(int64_t{0}, down * across, int64_t{1}, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i / across, first_group = i % across * share;
      const int64_t row = part * height, count = std::min(height, rows - row);
      const int64_t width = std::min(share, groups - first_group) * inner;
      const T* from = x + row * columns + first_group * inner;
      double pivot[kPartColumns] = {}, sum[kPartColumns] = {}, squares[kPartColumns] = {};
      const auto sum_rows = [&](int64_t n) {
        for (int64_t k = 0; k < width; k += kBlock) {
          const int size = static_cast<int>(std::min<int64_t>(kBlock, width - k));
          sum_columns(from + k, n, columns, size, pivot + k, sum + k, squares + k);
        }
      };
      // f(group, sum, sum of squares), and these are 0 then.
      const auto take_sums = [&](const auto& f) {
        for (int64_t k = 0; k < width; k += inner) {
          f(k, std::accumulate(sum + k, sum + k + inner, 0.0), std::accumulate(squares + k, squares + k + inner, 0.0));
        }
        std::fill_n(sum, width, 0.0);
        std::fill_n(squares, width, 0.0);
      };
      const int64_t few = std::min(count, kPivotRows);
      sum_rows(few);
      take_sums(
          [&](int64_t k, double s, double) { std::fill_n(pivot + k, inner, s / static_cast<double>(few * inner)); });
      sum_rows(count);
      take_sums([&](int64_t k, double s, double q) {
        partials[part * groups + first_group + k / inner] = from_sums(static_cast<double>(count * inner), pivot[k], s,
                                                                      q);
      });
    }
  });
  for (int64_t i = 0; i < down * groups; ++i) {
    Moments& m = result[i % groups % shape.channels];
    m = merge(m, partials[i]);
  }
}

// The moments of each channel of x, which is dense with the given shape and not empty.
template <typename T, typename ParallelFor>
std::vector<Moments> channel_moments(const T* x, const Shape& shape, const ParallelFor& parallel_for) {
  if (shape.inner >= kMinPlane) {
    return planes_moments(x, shape, parallel_for);
  }
  const int64_t period = shape.channels * shape.inner;
  // Some periods make up a row, so that it is worth its set-up; what is left of them is one row more.
  const int64_t rows = shape.numel / period;
  const int64_t repeat = std::min(rows, std::max<int64_t>(1, kBlock / period));
  const int64_t left = rows % repeat;
  std::vector<Moments> result(shape.channels);
  add_columns_moments(x, rows / repeat, repeat * period, shape, result, parallel_for);
  if (left > 0) {
    add_columns_moments(x + (rows - left) * period, 1, left * period, shape, result, parallel_for);
  }
  return result;
}

}  // namespace fused_conv_bn
