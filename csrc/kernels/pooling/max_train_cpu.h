// max_train.cuh and max_backward.cuh on the CPU, a row of pixels at a time.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/common/scalar.h"
#include "problem.h"

namespace fused_conv_bn {

// Elements that are worth a task of their own.
constexpr int64_t kPoolGrain = 1 << 14;

inline int64_t pool_grain(const PoolProblem& problem, int64_t columns) {
  const int64_t row = columns * problem.channels * problem.rows.kernel * problem.columns.kernel;
  return std::max<int64_t>(1, kPoolGrain / std::max<int64_t>(1, row));
}

// The elements of the input, in one dimension, that are in a window: the k-th is at begin(at) + k * dilation.
inline int64_t window_begin(const PoolWindow& w, int64_t at) { return at * w.stride - w.padding; }
inline int64_t first_inside(const PoolWindow& w, int64_t begin) {
  return begin < 0 ? (w.dilation - 1 - begin) / w.dilation : 0;
}
inline int64_t end_inside(const PoolWindow& w, int64_t begin) {
  return std::min(w.kernel, (w.input - 1 - begin) / w.dilation + 1);
}

// One row of an output.
template <typename T>
void max_pool_train_row(const T* image, T* output, uint8_t* position, const PoolProblem& problem, int64_t row) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t channels = problem.channels, first_row = window_begin(rows, row);
  std::vector<acc_t<T>> kept(static_cast<size_t>(channels));
  for (int64_t column = 0; column < columns.output; ++column, output += channels, position += channels) {
    const int64_t first_column = window_begin(columns, column);
    const int64_t r_begin = first_inside(rows, first_row), s_begin = first_inside(columns, first_column);
    const int64_t r_end = end_inside(rows, first_row), s_end = end_inside(columns, first_column);
    std::fill(kept.begin(), kept.end(), -std::numeric_limits<acc_t<T>>::infinity());
    std::fill_n(position, channels, static_cast<uint8_t>(r_begin * columns.kernel + s_begin));
    for (int64_t r = r_begin; r < r_end; ++r) {
      for (int64_t s = s_begin; s < s_end; ++s) {
        const int64_t pixel = (first_row + r * rows.dilation) * columns.input + first_column + s * columns.dilation;
        const T* const data = image + pixel * channels;
        const auto place = static_cast<uint8_t>(r * columns.kernel + s);
        for (int64_t c = 0; c < channels; ++c) {
          const acc_t<T> found = to_acc(data[c]);
          const bool replaces = found > kept[static_cast<size_t>(c)] || found != found;
          kept[static_cast<size_t>(c)] = replaces ? found : kept[static_cast<size_t>(c)];
          position[c] = replaces ? place : position[c];
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      output[c] = from_acc<T>(kept[static_cast<size_t>(c)]);
    }
  }
}

template <typename T, typename ParallelFor>
void max_pool_train(const T* input, T* output, uint8_t* position, const PoolProblem& problem,
                    const ParallelFor& parallel_for) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t output_row = columns.output * problem.channels;
  parallel_for(
      int64_t{0}, problem.images * rows.output, pool_grain(problem, columns.output), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* const image = input + row / rows.output * rows.input * columns.input * problem.channels;
          max_pool_train_row(image, output + row * output_row, position + row * output_row, problem, row % rows.output);
        }
      });
}

// One row of the input's gradient.
template <typename T>
void max_pool_backward_row(const T* gradient, const uint8_t* position, T* result, const PoolProblem& problem,
                           int64_t row) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t channels = problem.channels;
  std::vector<acc_t<T>> sums(static_cast<size_t>(columns.input * channels));
  for (int64_t r = rows.kernel - 1; r >= 0; --r) {  // windows in the order of their rows
    const int64_t begin = row + rows.padding - r * rows.dilation;
    if (begin < 0 || begin % rows.stride != 0 || begin / rows.stride >= rows.output) {
      continue;
    }
    for (int64_t column = 0; column < columns.output; ++column) {
      const int64_t at = (begin / rows.stride * columns.output + column) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t place = position[at + c];
        if (place / columns.kernel == r) {
          const int64_t to = window_begin(columns, column) + place % columns.kernel * columns.dilation;
          if (to >= 0 && to < columns.input) {  // a position that no forward made may be outside
            sums[static_cast<size_t>(to * channels + c)] += to_acc(gradient[at + c]);
          }
        }
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    result[i] = from_acc<T>(sums[i]);
  }
}

template <typename T, typename ParallelFor>
void max_pool_backward(const T* gradient, const uint8_t* position, T* result, const PoolProblem& problem,
                       const ParallelFor& parallel_for) {
  const PoolWindow &rows = problem.rows, &columns = problem.columns;
  const int64_t output_image = rows.output * columns.output * problem.channels;
  parallel_for(int64_t{0}, problem.images * rows.input, pool_grain(problem, columns.input),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t image = row / rows.input * output_image;
                   max_pool_backward_row(gradient + image, position + image,
                                         result + row * columns.input * problem.channels, problem, row % rows.input);
                 }
               });
}

}  // namespace fused_conv_bn
