// A float32 convolution of contiguous tensors with few input channels on the CPU, with its epilogue.
//
// A thread takes some rows of an image's result at a time. It copies the input rows that these need, with their
// padding, to a buffer where each tap of the filter is one offset for all pixels of a row. A tile of output channels
// and pixels is then summed up in registers, from shifted rows and weights, and written once. No memory but the output
// is as large as it: new pages cost more than the arithmetic.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/conv/problem.h"
#include "kernels/elementwise/scale_shift_cpu.h"
#include "plan.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

// Values in a vector, and the output channels and vectors of pixels whose sums, with a few operands, fill the
// registers.
struct DirectV3 {
  static constexpr int kLanes = 8, kChannels = 6, kVectors = 2;
};
struct DirectV4 {
  static constexpr int kLanes = 16, kChannels = 8, kVectors = 2;
};

// A row of the result, for the channels of a tile: `plane` elements from one to the next.
struct DirectOutput {
  const float* scale;
  const float* shift;
  const float* residual;  // nullptr: none
  float* y;
  int64_t plane;
  int64_t channels;
  int64_t columns;
  const Epilogue* epilogue;
};

// For the output channels k and pixels q of a tile, q from `begin` on:
// y[k][q] = activation((the sum over taps t of weight[t][k] * x[offset[t] + q]) * scale[k] + shift[k] +
// residual[k][q]).
template <typename Isa, int kVectors>
FCB_HD void direct_tile(const float* x, const int64_t* offset, int64_t taps, const float* weight,
                        const DirectOutput& out, int64_t begin) {
  constexpr int kLanes = Isa::kLanes, kChannels = Isa::kChannels, kWidth = kLanes * kVectors;
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  // What the results go to comes from memory meanwhile.
  for (int64_t k = 0; k < out.channels; ++k) {
    for (int i = 0; i <= kWidth; i += kLineBytes / static_cast<int>(sizeof(float))) {
      __builtin_prefetch(out.y + k * out.plane + begin + i, 1);
      if (out.residual != nullptr) {
        __builtin_prefetch(out.residual + k * out.plane + begin + i);
      }
    }
  }
  Vector sum[kChannels][kVectors];
  for (int k = 0; k < kChannels; ++k) {
    for (int i = 0; i < kVectors; ++i) {
      sum[k][i] = Vector{};
    }
  }
  for (int64_t t = 0; t < taps; ++t) {
    const float* from = x + offset[t] + begin;
    Vector value[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      value[i] = *reinterpret_cast<const Unaligned*>(from + i * kLanes);
    }
    for (int k = 0; k < kChannels; ++k) {
      for (int i = 0; i < kVectors; ++i) {
        sum[k][i] += value[i] * weight[t * kChannels + k];
      }
    }
  }
  for (int k = 0; k < kChannels; ++k) {
    if (k >= out.channels) {
      return;
    }
    // As whole vectors, what comes before the activation need not pass through memory.
    const Epilogue& epilogue = *out.epilogue;
    const bool residual_first = out.residual != nullptr && !epilogue.residual_last;
    const bool residual_last = out.residual != nullptr && epilogue.residual_last;
    const float* const residual = out.residual == nullptr ? nullptr : out.residual + k * out.plane + begin;
    float* const y = out.y + k * out.plane + begin;
    alignas(kLineBytes) float row[kWidth];
    float* const to = epilogue.activation == Activation::none && !residual_last ? y : row;
    for (int i = 0; i < kVectors; ++i) {
      Vector value = sum[k][i] * out.scale[k] + out.shift[k];
      if (residual_first) {
        value += *reinterpret_cast<const Unaligned*>(residual + i * kLanes);
      }
      *reinterpret_cast<Unaligned*>(to + i * kLanes) = value;
    }
    if (to == row) {
      activate_block<float>(epilogue, row, kWidth);
      for (int i = 0; i < kWidth; ++i) {
        y[i] = residual_last ? row[i] + residual[i] : row[i];
      }
    }
  }
}

template <typename Isa>
FCB_HD void direct_row(const float* x, const int64_t* offset, int64_t taps, const float* weight,
                       const DirectOutput& out) {
  constexpr int64_t kLanes = Isa::kLanes, kWidth = kLanes * Isa::kVectors;
  static_assert(kWidth <= kDirectLeastColumns);
  int64_t q = 0;
  for (; q + kWidth <= out.columns; q += kWidth) {
    direct_tile<Isa, Isa::kVectors>(x, offset, taps, weight, out, q);
  }
  // The last tile overlaps the one before it: what is computed twice is the same.
  if (out.columns - q > kLanes) {
    direct_tile<Isa, Isa::kVectors>(x, offset, taps, weight, out, out.columns - kWidth);
  } else if (out.columns > q) {
    direct_tile<Isa, 1>(x, offset, taps, weight, out, out.columns - kLanes);
  }
}

__attribute__((target("arch=x86-64-v3"))) inline void direct_row_v3(const float* x, const int64_t* offset, int64_t taps,
                                                                    const float* weight, const DirectOutput& out) {
  direct_row<DirectV3>(x, offset, taps, weight, out);
}
__attribute__((target("arch=x86-64-v4"))) inline void direct_row_v4(const float* x, const int64_t* offset, int64_t taps,
                                                                    const float* weight, const DirectOutput& out) {
  direct_row<DirectV4>(x, offset, taps, weight, out);
}

struct DirectKernel {
  int64_t channels;  // of a tile
  void (*row)(const float* x, const int64_t* offset, int64_t taps, const float* weight, const DirectOutput& out);
};

inline DirectKernel direct_kernel() {
  return use_v4() ? DirectKernel{DirectV4::kChannels, direct_row_v4} : DirectKernel{DirectV3::kChannels, direct_row_v3};
}

// The padded input rows that a band of rows of the result needs, channel by channel. Where columns are strided, those
// of one remainder lie side by side.
struct DirectBuffer {
  int64_t band;   // rows of the result
  int64_t rows;   // of the input, for each channel
  int64_t phase;  // columns of one remainder
  int64_t pitch;  // of a row
};

inline DirectBuffer direct_buffer(const Conv2d& p, int64_t threads) {
  constexpr int64_t kBytes = 64 << 10;     // leaves room for weights and results in a cache of the second level
  constexpr int64_t kBandsForAThread = 4;  // at least, so that all threads have their share
  const int64_t phase = ceil_div(p.W + 2 * p.pad_w, p.stride_w);
  const int64_t pitch = phase * p.stride_w;
  const int64_t taps = (p.R - 1) * p.dilation_h + 1;
  const int64_t rows = kBytes / (p.C * pitch * static_cast<int64_t>(sizeof(float)));
  const int64_t fits = std::max<int64_t>(1, (rows - taps) / p.stride_h + 1);
  const int64_t shared = ceil_div(p.N * p.P, threads * kBandsForAThread);
  const int64_t band = ceil_div(p.P, ceil_div(p.P, std::min(fits, shared)));
  return {band, (band - 1) * p.stride_h + taps, phase, pitch};
}

// Fills `to` from an image, from its row `first` on.
inline void direct_fill(const Conv2d& p, const DirectBuffer& b, const float* image, int64_t first, float* to) {
  for (int64_t c = 0; c < p.C; ++c) {
    for (int64_t h = first; h < first + b.rows; ++h, to += b.pitch) {
      if (h < 0 || h >= p.H) {
        std::fill_n(to, b.pitch, 0.0f);
        continue;
      }
      const float* const row = image + (c * p.H + h) * p.W;
      for (int64_t remainder = 0; remainder < p.stride_w; ++remainder) {
        // Column j of the phase is column j * stride_w + lead of the input.
        float* const phase = to + remainder * b.phase;
        const int64_t lead = remainder - p.pad_w;
        const int64_t begin = std::min(b.phase, ceil_div(std::max<int64_t>(0, -lead), p.stride_w));
        const int64_t end = std::clamp(ceil_div(p.W - lead, p.stride_w), begin, b.phase);
        std::fill(phase, phase + begin, 0.0f);
        if (p.stride_w == 1) {
          std::copy(row + begin + lead, row + end + lead, phase + begin);
        } else {
          for (int64_t j = begin; j < end; ++j) {
            phase[j] = row[2 * j + lead];  // a stride that the compiler knows becomes shuffles of vectors
          }
        }
        std::fill(phase + end, phase + b.phase, 0.0f);
      }
    }
  }
}

// What the kernel is launched for: a problem that covers_direct() says yes to. operands.affine is not looked at: scale
// and shift have K values.
struct DirectCall {
  const Conv2d& problem;
  const ConvOperands& operands;
  const float* scale;
  const float* shift;
  const Epilogue& epilogue;
  int64_t threads;
};

// Where each tap's row is in the buffer, and the weights tile by tile, tap by tap.
struct DirectFilter {
  std::vector<int64_t> offset;
  std::vector<float> weight;
};

inline DirectFilter pack_filter(const Conv2d& p, const ConvOperands& o, const DirectKernel& kernel,
                                const DirectBuffer& b) {
  const int64_t taps = p.C * p.R * p.S;
  std::vector<int64_t> offset(taps);
  std::vector<float> weight(round_up(p.K, kernel.channels) * taps);
  for (int64_t c = 0, t = 0; c < p.C; ++c) {
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t s = 0; s < p.S; ++s, ++t) {
        const int64_t column = s * p.dilation_w;
        offset[t] = (c * b.rows + r * p.dilation_h) * b.pitch + column % p.stride_w * b.phase + column / p.stride_w;
        const float* from = static_cast<const float*>(o.w) + c * o.w_stride_c + r * o.w_stride_r + s * o.w_stride_s;
        for (int64_t k = 0; k < p.K; ++k) {
          weight[(k / kernel.channels * taps + t) * kernel.channels + k % kernel.channels] = from[k * o.w_stride_k];
        }
      }
    }
  }
  return {std::move(offset), std::move(weight)};
}

template <typename ParallelFor>
void launch_conv_direct(const DirectCall& call, const ParallelFor& parallel_for) {
  const Conv2d& p = call.problem;
  const ConvOperands& o = call.operands;
  const DirectKernel kernel = direct_kernel();
  const DirectBuffer b = direct_buffer(p, call.threads);
  const DirectFilter filter = pack_filter(p, o, kernel, b);
  const int64_t taps = p.C * p.R * p.S;
  const auto* const x = static_cast<const float*>(o.x);
  const auto* const residual = static_cast<const float*>(o.residual);
  auto* const y = static_cast<float*>(o.y);
  const int64_t bands = ceil_div(p.P, b.band);
  constexpr int64_t kLeastProducts = 1 << 20;  // to be worth another thread
  const int64_t grain = ceil_div(kLeastProducts, b.band * p.Q * p.K * taps);
  parallel_for(int64_t{0}, p.N * bands, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(p.C * b.rows * b.pitch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / bands;
      const int64_t first = i % bands * b.band;
      direct_fill(p, b, x + n * p.C * p.H * p.W, first * p.stride_h - p.pad_h, buffer.data());
      for (int64_t row = first; row < std::min(first + b.band, p.P); ++row) {
        const float* from = buffer.data() + (row - first) * p.stride_h * b.pitch;
        for (int64_t k = 0; k < p.K; k += kernel.channels) {
          const int64_t to = ((n * p.K + k) * p.P + row) * p.Q;
          const DirectOutput out{.scale = call.scale + k,
                                 .shift = call.shift + k,
                                 .residual = residual == nullptr ? nullptr : residual + to,
                                 .y = y + to,
                                 .plane = p.P * p.Q,
                                 .channels = std::min(kernel.channels, p.K - k),
                                 .columns = p.Q,
                                 .epilogue = &call.epilogue};
          kernel.row(from, filter.offset.data(), taps, &filter.weight[k * taps], out);
        }
      }
    }
  });
}

#endif

}  // namespace fused_conv_bn
