// A float32 convolution of channels_last tensors with a packed weight on the CPU, with its epilogue.
//
// A tile is some pixels of a row, and two vectors of output channels. Its sums stay in registers while a value of each pixel is
// multiplied by the weights of those channels: one load of them serves all pixels. A filter's row is one run of memory in the
// input, as is its row in the weight. Where a filter reaches beyond the image, the rows that it needs are copied with their
// padding first. Depthwise, a tile is some pixels and one vector of channels.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/conv/problem.h"
#include "kernels/elementwise/scale_shift_cpu.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

constexpr int kPackedLanes = 8, kPackedVectors = 2, kPackedPixels = 6;
constexpr int kPackedChannels = kPackedLanes * kPackedVectors;  // output channels whose weights lie side by side
// Terms that are summed up by themselves before they are added to those before them: long sums err less.
constexpr int64_t kPackedTerms = 512;

#define FCB_V3 __attribute__((target("arch=x86-64-v3"), always_inline)) inline

// What a tile reads: `rows` rows of a filter, each `terms` values of the input, `row` values from one row to the next.
struct PackedInput {
  int64_t rows, terms, row;
};

// What it writes: the pixels of `y` and `residual` are `pitch` values apart, and `channels` are left from here on.
// `shift` has as many values as there are lanes.
struct PackedOutput {
  const float* shift;
  const float* residual;
  float* y;
  int64_t pitch, channels;
  const Epilogue* epilogue;
};

// One copy of what is rare, for all tiles.
__attribute__((target("arch=x86-64-v3"), noinline)) inline void packed_activate(const Epilogue& epilogue, float* x,
                                                                                int n) {
  activate_block<float>(epilogue, x, n);
}

// activation(sum + shift + residual) of whole vectors of each pixel.
template <int kPixels, int kVectors>
FCB_V3 void packed_finish_whole(__m256 (&sum)[kPixels][kVectors], const PackedOutput& out) {
  constexpr int kWidth = kPackedLanes * kVectors;
  const Epilogue& epilogue = *out.epilogue;
  for (int v = 0; v < kVectors; ++v) {
    const __m256 shift = _mm256_loadu_ps(out.shift + v * kPackedLanes);
    for (int i = 0; i < kPixels; ++i) {
      sum[i][v] = _mm256_add_ps(sum[i][v], shift);
    }
  }
  const bool adds = out.residual != nullptr;
  const auto add_residual = [&]() __attribute__((always_inline, target("arch=x86-64-v3"))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm256_add_ps(sum[i][v], _mm256_loadu_ps(out.residual + i * out.pitch + v * kPackedLanes));
      }
    }
  };
  if (adds && !epilogue.residual_last) {
    add_residual();
  }
  switch (epilogue.activation) {
    case Activation::none:
      break;
    case Activation::relu6:
      // Both return their second operand where one is NaN.
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = _mm256_min_ps(_mm256_set1_ps(6.0f), sum[i][v]);
        }
      }
      [[fallthrough]];
    case Activation::relu:
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = _mm256_max_ps(_mm256_setzero_ps(), sum[i][v]);
        }
      }
      break;
    default:
      alignas(kLineBytes) float rows[kPixels * kWidth];
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          _mm256_store_ps(rows + i * kWidth + v * kPackedLanes, sum[i][v]);
        }
      }
      packed_activate(epilogue, rows, kPixels * kWidth);
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = _mm256_load_ps(rows + i * kWidth + v * kPackedLanes);
        }
      }
  }
  if (adds && epilogue.residual_last) {
    add_residual();
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_ps(out.y + i * out.pitch + v * kPackedLanes, sum[i][v]);
    }
  }
}

// The same where fewer channels are left.
template <int kPixels, int kVectors>
FCB_V3 void packed_finish(__m256 (&sum)[kPixels][kVectors], const PackedOutput& out) {
  constexpr int kWidth = kPackedLanes * kVectors;
  if (out.channels >= kWidth) {
    return packed_finish_whole(sum, out);
  }
  alignas(kLineBytes) float rows[kPixels][kWidth], residual[kPixels][kWidth] = {};
  PackedOutput to = out;
  to.y = rows[0];
  to.pitch = kWidth;
  if (out.residual != nullptr) {
    for (int i = 0; i < kPixels; ++i) {
      std::copy_n(out.residual + i * out.pitch, out.channels, residual[i]);
    }
    to.residual = residual[0];
  }
  packed_finish_whole(sum, to);
  for (int i = 0; i < kPixels; ++i) {
    std::copy_n(rows[i], out.channels, out.y + i * out.pitch);
  }
}

// sum += the products of n terms, from the t-th on.
template <int kPixels, int kVectors>
FCB_V3 void packed_products(__m256 (&sum)[kPixels][kVectors], const float* const (&pixel)[kPixels], int64_t t,
                            int64_t n, const float* weight) {
  for (const int64_t end = t + n; t < end; ++t, weight += kPackedChannels) {
    __m256 w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = _mm256_loadu_ps(weight + v * kPackedLanes);
    }
    for (int i = 0; i < kPixels; ++i) {
      const __m256 value = _mm256_broadcast_ss(pixel[i] + t);
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm256_fmadd_ps(value, w[v], sum[i][v]);
      }
    }
  }
}

// offset: where each pixel of the tile begins in x.
template <int kPixels, int kVectors>
FCB_V3 void packed_tile(const float* x, const int64_t* offset, const PackedInput& in, const float* weight,
                        const PackedOutput& out) {
  const float* pixel[kPixels];
  for (int i = 0; i < kPixels; ++i) {
    pixel[i] = x + offset[i];
    __builtin_prefetch(out.y + i * out.pitch, 1);  // what the results go to comes from memory meanwhile
  }
  __m256 sum[kPixels][kVectors];
  const auto clear = [&]() __attribute__((always_inline, target("arch=x86-64-v3"))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm256_setzero_ps();
      }
    }
  };
  clear();
  if (in.rows * in.terms <= kPackedTerms) {
    for (int64_t r = 0; r < in.rows; ++r) {
      packed_products(sum, pixel, r * in.row, in.terms, weight + r * in.terms * kPackedChannels);
    }
    return packed_finish(sum, out);
  }
  alignas(kLineBytes) float total[kPixels][kVectors * kPackedLanes] = {};
  const auto add = [&]() __attribute__((always_inline, target("arch=x86-64-v3"))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm256_add_ps(sum[i][v], _mm256_load_ps(total[i] + v * kPackedLanes));
      }
    }
  };
  int64_t left = kPackedTerms;
  for (int64_t r = 0; r < in.rows; ++r) {
    for (int64_t t = 0; t < in.terms;) {
      if (left == 0) {
        add();
        for (int i = 0; i < kPixels; ++i) {
          for (int v = 0; v < kVectors; ++v) {
            _mm256_store_ps(total[i] + v * kPackedLanes, sum[i][v]);
          }
        }
        clear();
        left = kPackedTerms;
      }
      const int64_t n = std::min(left, in.terms - t);
      packed_products(sum, pixel, r * in.row + t, n, weight);
      weight += n * kPackedChannels;
      t += n;
      left -= n;
    }
  }
  add();
  packed_finish(sum, out);
}

FCB_V3 PackedOutput packed_from(const PackedOutput& out, int64_t pixel) {
  PackedOutput moved = out;
  moved.y += pixel * out.pitch;
  moved.residual = out.residual == nullptr ? nullptr : out.residual + pixel * out.pitch;
  return moved;
}

// `pixels` pixels, for the channels of a tile. Where they fill one vector, more pixels use the registers.
FCB_V3 void packed_pixels(const float* x, const int64_t* offset, const PackedInput& in, const float* weight,
                          const PackedOutput& out, int64_t pixels) {
  int64_t q = 0;
  const auto run = [&](auto count, auto vectors) __attribute__((always_inline, target("arch=x86-64-v3"))) {
    constexpr int kPixels = decltype(count)::value, kVectors = decltype(vectors)::value;
    for (; q + kPixels <= pixels; q += kPixels) {
      packed_tile<kPixels, kVectors>(x, offset + q, in, weight, packed_from(out, q));
    }
  };
  constexpr auto one = std::integral_constant<int, 1>{};
  if (out.channels <= kPackedLanes) {
    run(std::integral_constant<int, 8>{}, one);
    run(std::integral_constant<int, 4>{}, one);
    return run(one, one);
  }
  constexpr auto two = std::integral_constant<int, kPackedVectors>{};
  run(std::integral_constant<int, kPackedPixels>{}, two);
  run(std::integral_constant<int, 4>{}, two);
  run(std::integral_constant<int, 2>{}, two);
  run(one, two);
}

__attribute__((target("arch=x86-64-v3"))) inline void packed_pixels_v3(const float* x, const int64_t* offset,
                                                                       const PackedInput& in, const float* weight,
                                                                       const PackedOutput& out, int64_t pixels) {
  packed_pixels(x, offset, in, weight, out, pixels);
}

// ---- depthwise -------------------------------------------------------------------------------------------------------

// A row of a depthwise convolution's result. `x` is the image's first row that a filter's first valid row falls on, `rows` are
// valid, and `weight` is that of the first of them.
struct DepthwiseRow {
  const float* x;
  const float* weight;
  int64_t rows, filter, row, channels, width, stride, padding, dilation, columns;
};

constexpr int kDepthwisePixels = 4, kDepthwiseVectors = 6;

// kPixels pixels from `q` on, each filter within the image. kFilter, kStride: of the problem, or 0 where they are not known.
template <int kPixels, int kFilter, int kStride>
FCB_V3 void depthwise_tile(const DepthwiseRow& d, int64_t q, int64_t c, const PackedOutput& out) {
  __m256 sum[kPixels][1];
  for (int i = 0; i < kPixels; ++i) {
    sum[i][0] = _mm256_setzero_ps();
  }
  const float* from = d.x + (q * d.stride - d.padding) * d.channels + c;
  const float* weight = d.weight + c;
  for (int64_t r = 0; r < d.rows; ++r, from += d.row) {
    if constexpr (kFilter > 0) {
      constexpr int kColumns = (kPixels - 1) * kStride + kFilter;
      __m256 x[kColumns];
      for (int j = 0; j < kColumns; ++j) {
        x[j] = _mm256_loadu_ps(from + j * d.channels);
      }
      for (int s = 0; s < kFilter; ++s, weight += d.channels) {
        const __m256 w = _mm256_loadu_ps(weight);
        for (int i = 0; i < kPixels; ++i) {
          sum[i][0] = _mm256_fmadd_ps(x[i * kStride + s], w, sum[i][0]);
        }
      }
    } else {
      for (int64_t s = 0; s < d.filter; ++s, weight += d.channels) {
        const __m256 w = _mm256_loadu_ps(weight);
        for (int i = 0; i < kPixels; ++i) {
          sum[i][0] = _mm256_fmadd_ps(_mm256_loadu_ps(from + (i * d.stride + s * d.dilation) * d.channels), w,
                                      sum[i][0]);
        }
      }
    }
  }
  packed_finish_whole<kPixels, 1>(sum, out);
}

// One pixel, for some vectors of channels at a time: of its filter the columns from `first` to `last`.
template <int kVectors>
FCB_V3 void depthwise_pixel(const DepthwiseRow& d, int64_t q, int64_t c, int64_t first, int64_t last,
                            const PackedOutput& out) {
  __m256 sum[1][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sum[0][v] = _mm256_setzero_ps();
  }
  const float* from = d.x + (q * d.stride - d.padding) * d.channels + c;
  const float* weight = d.weight + c;
  for (int64_t r = 0; r < d.rows; ++r, from += d.row, weight += d.filter * d.channels) {
    for (int64_t s = first; s < last; ++s) {
      for (int v = 0; v < kVectors; ++v) {
        sum[0][v] = _mm256_fmadd_ps(_mm256_loadu_ps(from + s * d.dilation * d.channels + v * kPackedLanes),
                                    _mm256_loadu_ps(weight + s * d.channels + v * kPackedLanes), sum[0][v]);
      }
    }
  }
  packed_finish_whole<1, kVectors>(sum, out);
}

template <int kFilter, int kStride>
FCB_V3 void depthwise_row(const DepthwiseRow& d, const PackedOutput& out) {
  // Columns of the result whose filters are within the image: [begin, end).
  const int64_t reach = (d.filter - 1) * d.dilation;
  const int64_t begin = std::min(ceil_div(d.padding, d.stride), d.columns);
  const int64_t room = d.width - 1 - reach + d.padding;
  const int64_t end = std::clamp(room < 0 ? 0 : room / d.stride + 1, begin, d.columns);
  const auto at = [&](int64_t q, int64_t c) __attribute__((always_inline, target("arch=x86-64-v3"))) {
    PackedOutput moved = packed_from(out, q);
    moved.shift += c;
    moved.y += c;
    moved.residual = out.residual == nullptr ? nullptr : moved.residual + c;
    return moved;
  };
  const auto pixel = [&](int64_t q) __attribute__((always_inline, target("arch=x86-64-v3"))) {
    const int64_t left = q * d.stride - d.padding;
    const int64_t first = left < 0 ? ceil_div(-left, d.dilation) : 0;
    const int64_t last = std::min(d.filter, left >= d.width ? 0 : ceil_div(d.width - left, d.dilation));
    int64_t c = 0;
    for (; c + kDepthwiseVectors * kPackedLanes <= d.channels; c += kDepthwiseVectors * kPackedLanes) {
      depthwise_pixel<kDepthwiseVectors>(d, q, c, first, last, at(q, c));
    }
    for (; c < d.channels; c += kPackedLanes) {
      depthwise_pixel<1>(d, q, c, first, last, at(q, c));
    }
  };
  int64_t q = 0;
  for (; q < begin; ++q) {
    pixel(q);
  }
  for (; q + kDepthwisePixels <= end; q += kDepthwisePixels) {
    for (int64_t c = 0; c < d.channels; c += kPackedLanes) {
      depthwise_tile<kDepthwisePixels, kFilter, kStride>(d, q, c, at(q, c));
    }
  }
  for (; q < d.columns; ++q) {
    pixel(q);
  }
}

__attribute__((target("arch=x86-64-v3"))) inline void depthwise_row_v3(const DepthwiseRow& d, const PackedOutput& out) {
  if (d.dilation == 1 && d.filter == 3 && d.stride == 1) {
    return depthwise_row<3, 1>(d, out);
  }
  if (d.dilation == 1 && d.filter == 3 && d.stride == 2) {
    return depthwise_row<3, 2>(d, out);
  }
  if (d.dilation == 1 && d.filter == 5 && d.stride == 1) {
    return depthwise_row<5, 1>(d, out);
  }
  if (d.dilation == 1 && d.filter == 5 && d.stride == 2) {
    return depthwise_row<5, 2>(d, out);
  }
  depthwise_row<0, 0>(d, out);
}

// ---- launches --------------------------------------------------------------------------------------------------------

// A problem of channels_last tensors, and its packed weight: for each tile of output channels the rows of the filter, each of
// S * C terms, with the weights of a term side by side; depthwise (R, S, C). shift: K values, rounded up to whole tiles.
struct PackedCall {
  const Conv2d& problem;
  const float* x;
  const float* weight;
  const float* shift;
  const float* residual;  // nullptr: none
  float* y;
  const Epilogue& epilogue;
  int64_t threads;
};

template <typename ParallelFor>
void launch_depthwise_packed(const PackedCall& call, const ParallelFor& parallel_for) {
  const Conv2d& p = call.problem;
  constexpr int64_t kLeastProducts = 1 << 17;  // to be worth another thread
  const int64_t grain = ceil_div(kLeastProducts, p.Q * p.C * p.R * p.S);
  parallel_for(int64_t{0}, p.N * p.P, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / p.P, top = i % p.P * p.stride_h - p.pad_h;
      const int64_t first = top < 0 ? ceil_div(-top, p.dilation_h) : 0;
      const int64_t last = std::min(p.R, p.H - top <= 0 ? 0 : ceil_div(p.H - top, p.dilation_h));
      const DepthwiseRow row{.x = call.x + (n * p.H + top + first * p.dilation_h) * p.W * p.C,
                             .weight = call.weight + first * p.S * p.C,
                             .rows = std::max<int64_t>(0, last - first),
                             .filter = p.S,
                             .row = p.dilation_h * p.W * p.C,
                             .channels = p.C,
                             .width = p.W,
                             .stride = p.stride_w,
                             .padding = p.pad_w,
                             .dilation = p.dilation_w,
                             .columns = p.Q};
      const int64_t to = i * p.Q * p.C;
      depthwise_row_v3(row, PackedOutput{.shift = call.shift,
                                         .residual = call.residual == nullptr ? nullptr : call.residual + to,
                                         .y = call.y + to,
                                         .pitch = p.C,
                                         .channels = p.C,
                                         .epilogue = &call.epilogue});
    }
  });
}

template <typename ParallelFor>
void launch_conv_packed(const PackedCall& call, const ParallelFor& parallel_for) {
  const Conv2d& p = call.problem;
  constexpr int64_t kBytes = 128 << 10;  // of the input that a band reads: leaves room for weights in the second level
  constexpr int64_t kLeastPixels = 8 * kPackedPixels;
  const bool pads = p.pad_h != 0 || p.pad_w != 0;
  // A band is some pixels of the result, with padding whole rows. It may reach over several images.
  const int64_t whole = p.N * p.P * p.Q;
  const int64_t unit = pads ? p.Q : 1;
  const int64_t bytes = p.stride_h * p.stride_w * p.C * static_cast<int64_t>(sizeof(float));
  const int64_t wanted = std::max(kLeastPixels, kBytes / bytes);
  const int64_t tiles = ceil_div(p.K, kPackedChannels);
  int64_t count = ceil_div(whole, round_up(wanted, unit));
  int64_t band = round_up(ceil_div(whole, count), unit);
  if (!pads && band > kPackedPixels) {
    band = round_up(band, kPackedPixels);
  }
  count = ceil_div(whole, band);
  // Where there are few bands, threads share the channels of one.
  constexpr int64_t kLeastProducts = 1 << 18;
  const int64_t products = band * p.C * p.R * p.S * kPackedChannels;
  const int64_t items = count;
  int64_t parts = 1;
  if (call.threads > 1 && items < 4 * call.threads) {
    parts = std::min(
        {tiles, ceil_div(4 * call.threads, items), std::max<int64_t>(1, products * tiles / kLeastProducts)});
  }
  const int64_t part = ceil_div(tiles, parts);
  parts = ceil_div(tiles, part);
  const int64_t grain = ceil_div(kLeastProducts, products * part);
  const int64_t width = p.W + 2 * p.pad_w;
  const PackedInput in{.rows = p.R, .terms = p.S * p.C, .row = p.dilation_h * (pads ? width : p.W) * p.C};
  const int64_t step = p.R * p.S * p.C * kPackedChannels;
  parallel_for(int64_t{0}, items * parts, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offset(band);
    std::vector<float> buffer;
    int64_t filled = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / parts, first = i * band;
      const int64_t pixels = std::min(band, whole - first);
      const float* x = call.x;
      if (i != filled) {
        filled = i;
        if (pads) {
          buffer.clear();
          // Image by image: the padded rows that the band's rows of the result in it need.
          for (int64_t j = 0; j < pixels;) {
            const int64_t row = (first + j) / p.Q, n = row / p.P, top = row % p.P * p.stride_h - p.pad_h;
            const int64_t rows = std::min(p.P - row % p.P, (pixels - j) / p.Q);
            const auto start = static_cast<int64_t>(buffer.size());
            const int64_t height = (rows - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
            buffer.resize(start + height * width * p.C);
            float* to = buffer.data() + start;
            for (int64_t h = top; h < top + height; ++h, to += width * p.C) {
              if (h < 0 || h >= p.H) {
                std::fill_n(to, width * p.C, 0.0f);
                continue;
              }
              const float* const from = call.x + (n * p.H + h) * p.W * p.C;
              std::fill_n(to, p.pad_w * p.C, 0.0f);
              std::copy_n(from, p.W * p.C, to + p.pad_w * p.C);
              std::fill_n(to + (p.pad_w + p.W) * p.C, p.pad_w * p.C, 0.0f);
            }
            for (int64_t k = 0; k < rows * p.Q; ++k, ++j) {
              offset[j] = start + (k / p.Q * p.stride_h * width + k % p.Q * p.stride_w) * p.C;
            }
          }
        } else {
          int64_t q = first % p.Q, row = first / p.Q % p.P, image = first / (p.P * p.Q);
          for (int64_t j = 0; j < pixels; ++j) {
            offset[j] = ((image * p.H + row * p.stride_h) * p.W + q * p.stride_w) * p.C;
            if (++q == p.Q) {
              q = 0;
              if (++row == p.P) {
                row = 0;
                ++image;
              }
            }
          }
        }
      }
      if (pads) {
        x = buffer.data();
      }
      const int64_t from = item % parts * part;
      for (int64_t tile = from; tile < std::min(from + part, tiles); ++tile) {
        const int64_t k = tile * kPackedChannels;
        const int64_t to = first * p.K + k;
        packed_pixels_v3(x, offset.data(), in, call.weight + tile * step,
                         PackedOutput{.shift = call.shift + k,
                                      .residual = call.residual == nullptr ? nullptr : call.residual + to,
                                      .y = call.y + to,
                                      .pitch = p.K,
                                      .channels = p.K - k,
                                      .epilogue = &call.epilogue},
                         pixels);
      }
    }
  });
}

#endif

}  // namespace fused_conv_bn
