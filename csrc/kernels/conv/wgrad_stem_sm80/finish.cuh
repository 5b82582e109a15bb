// From sums over pixels to gradients. With a = weight * invstd * factor for a channel, m its mean, n its number of pixels:
//
//     d(bias) = factor * d       d(weight) = factor * (W G - m d) * invstd       in evaluation d(W) = a * G
//     in training   d(W) = a * (G - d / n * s - d(weight) / factor / n * invstd * (W S - m s))
//
// and the gradient of z, which the input's needs, is a times dv, in training less a constant and a multiple of z. All in float64.
// The algebra was checked against autograd for this project (PyTorch has the usual two passes).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/batch_norm/warp_sum.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/statistics/from_input_sm90/plan.h"
#include "operands.h"
#include "params.cuh"

namespace fused_conv_bn {

namespace wgrad_stem_sm80 {

// ---- the sums of all blocks ------------------------------------------------------------------------------------------

struct Partials {
  const double* data;  // [blocks][sums]
  int blocks;
  uint32_t sums;
};
constexpr int kReduceSums = 32, kReduceParts = 8;

// Of both products; the second one's come behind the first one's.
static __global__ void __launch_bounds__(kReduceSums* kReduceParts)
    wgrad_reduce_kernel(const Partials gradient, const Partials patch, double* sums) {
  __shared__ double parts[kReduceParts][kReduceSums];
  const int lane = threadIdx.x % kReduceSums, part = threadIdx.x / kReduceSums;
  let_next_begin();
  wait_for_previous();
  uint32_t index = blockIdx.x * kReduceSums;
  const bool second = index >= gradient.sums;
  const Partials of{second ? patch.data : gradient.data, second ? patch.blocks : gradient.blocks,
                    second ? patch.sums : gradient.sums};
  index = (second ? index - gradient.sums : index) + lane;
  double sum = 0;
#pragma unroll 4
  for (int block = part; block < of.blocks; block += kReduceParts) {
    sum += of.data[block * int64_t{of.sums} + index];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int i = 1; i < kReduceParts; ++i) {
      sum += parts[i][lane];
    }
    sums[blockIdx.x * kReduceSums + lane] = sum;
  }
}

// ---- gradients -------------------------------------------------------------------------------------------------------

// Where a product's sums are among all of its warps': in a row, and in a column of it.
__device__ __forceinline__ int row_offset(const Layout& t, int row) {
  return row / kWarpRows * t.columns() * t.role_sums() + row % kWarpRows / 16 * t.tile_sums() + row / 8 % 2 * 64 +
         row % 8 * 4;
}
__device__ __forceinline__ int column_offset(const Layout& t, int unit, int value) {
  const int of_block = unit % t.block_units;
  const int column = unit / t.block_units * t.block_columns + of_block / t.role_units;
  return column * t.role_sums() + of_block % t.role_units * 128 + value % 2 * 32 + value / 2;
}
// That of the sum over a row's own values.
__device__ __forceinline__ int row_sum_offset(const Layout& t) { return t.role_units * 128; }

// A value of the patch: its unit, and which of its values it is.
struct PatchValue {
  int unit, value;
};
__device__ __forceinline__ PatchValue locate_term(const Layout& t, int c, int r, int s) {
  const int taps = 8 / t.slots;
  return {c / 8 * t.block_units + r * t.row_units + s / taps, s % taps * t.slots + c % 8};
}

// S and s, from either source. Values are known by a number.
struct PatchSums {
  const double* data;
  bool from_input;
  Layout tile;

  __device__ __forceinline__ int number(const PatchValue& v, int c, int r, int s) const {
    return from_input ? (r * from_input::kTaps + s) * from_input::kChannels + c
                      : row_offset(tile, v.unit * 8 + v.value);
  }
  __device__ __forceinline__ double sum(int number) const {
    return data[from_input ? from_input::tap_sum_index(number / from_input::kChannels, number % from_input::kChannels)
                           : number + row_sum_offset(tile)];
  }
  // column: column_offset() of the other one, which from_input does not need.
  __device__ __forceinline__ double product(int number, int other, int column) const {
    if (from_input) {
      const int first = min(number, other), second = max(number, other);
      constexpr int kChannels = from_input::kChannels;
      return data[from_input::pair_sum_index(first / kChannels, first % kChannels, second / kChannels,
                                             second % kChannels)];
    }
    return data[number + column];
  }
};

template <typename T>
struct FinishParams {
  WgradOperands operands;
  Layout gradient;
  const double* gradient_sums;
  PatchSums patch;
  int C, R, S;
  double pixels;
};

constexpr int kFinishThreads = 256;
constexpr int kMostTerms = kMostUnits * 8;

__device__ __forceinline__ double sum_of_block(double value) {
  __shared__ double warps[kFinishThreads / 32];
  warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = 0;
#pragma unroll
  for (int i = 0; i < kFinishThreads / 32; ++i) {
    value += warps[i];
  }
  return value;
}

// A block has an output channel.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) wgrad_finish_kernel(const __grid_constant__ FinishParams<T> p) {
  __shared__ double weights[kMostTerms];
  __shared__ int numbers[kMostTerms];      // of the patch's sums
  __shared__ double products[kMostTerms];  // W S in parts
  const WgradOperands& o = p.operands;
  const int k = blockIdx.x;
  const int terms = p.C * p.R * p.S;
  const auto weight_at = [&](const WeightBuffer& w, int term) -> int64_t {
    const int s = term % p.S, r = term / p.S % p.R, c = term / (p.S * p.R);
    return k * w.stride_k + c * w.stride_c + r * w.stride_r + s * w.stride_s;
  };
  const auto patch_value = [&](int term) {
    return locate_term(p.gradient, term / (p.S * p.R), term / p.S % p.R, term % p.S);
  };
  for (int term = threadIdx.x; term < terms; term += kFinishThreads) {
    weights[term] = to_acc(static_cast<const T*>(o.w.data)[weight_at(o.w, term)]);
    const PatchValue v = patch_value(term);
    numbers[term] = p.patch.number(v, term / (p.S * p.R), term / p.S % p.R, term % p.S);
  }
  const double factor = o.scaling_factor;
  const double gamma = o.weight.at(k, 1);
  const double invstd = o.has_statistics        ? o.var.at(k, 1)
                        : o.var.data == nullptr ? 1
                                                : rsqrt_acc(o.var.at(k, 1) + o.eps);
  const double a = gamma * invstd * factor;
  const double own_mean = o.mean.at(k, 0) - o.conv_bias.at(k, 0);
  __syncthreads();
  let_next_begin();
  wait_for_previous();
  const double* const of_row = p.gradient_sums + row_offset(p.gradient, k);
  const auto gradient_at = [&](int term) {
    const PatchValue v = patch_value(term);
    return of_row[column_offset(p.gradient, v.unit, v.value)];
  };
  const auto patch_sum = [&](int term) { return p.patch.sum(numbers[term]); };
  const double d = of_row[row_sum_offset(p.gradient)];
  double dot = 0, mean = 0;
  for (int term = threadIdx.x; term < terms; term += kFinishThreads) {
    dot += weights[term] * gradient_at(term);
    mean += o.has_statistics ? weights[term] * patch_sum(term) : 0;
  }
  dot = sum_of_block(dot);
  mean = o.has_statistics ? sum_of_block(mean) / p.pixels : own_mean;
  const double dweight = (dot - mean * d) * invstd;  // without the factor
  const double constant = o.has_statistics ? d / p.pixels : 0;
  const double slope = o.has_statistics ? dweight / p.pixels * invstd : 0;
  if (threadIdx.x == 0) {
    const auto set = [&](const ChannelBuffer& buffer, double value) {
      if (buffer.data != nullptr) {
        buffer.set(k, value);
      }
    };
    set(o.dweight, factor * dweight);
    set(o.dbias, factor * d);
    set(o.dconv_bias, o.has_statistics ? 0 : a * d);
    set(o.input_scale, -slope);
    set(o.input_shift, slope * mean - constant);
  }
  const int parts = o.has_statistics ? max(1, kFinishThreads / terms) : 1;
  if (o.has_statistics && o.dw.data != nullptr) {
    const int length = (terms + parts - 1) / parts;
    for (int item = threadIdx.x; item < terms * parts; item += kFinishThreads) {
      const int part = item / terms, term = item - part * terms;
      const PatchValue v = patch_value(term);
      const int column = column_offset(p.patch.tile, v.unit, v.value);
      double sum = 0;
#pragma unroll 8
      for (int other = part * length; other < min((part + 1) * length, terms); ++other) {
        sum += weights[other] * p.patch.product(numbers[other], numbers[term], column);
      }
      products[item] = sum;
    }
    __syncthreads();
  }
  for (int term = threadIdx.x; term < terms; term += kFinishThreads) {
    if (o.dw.data != nullptr) {
      double value = gradient_at(term);
      if (o.has_statistics) {
        double product = 0;
        for (int part = 0; part < parts; ++part) {
          product += products[part * terms + term];
        }
        value -= constant * patch_sum(term) + slope * (product - mean * patch_sum(term));
      }
      static_cast<T*>(o.dw.data)[weight_at(o.dw, term)] = from_acc<T>(static_cast<float>(a * value));
    }
    if (o.scaled_weight.data != nullptr) {
      static_cast<T*>(o.scaled_weight.data)[weight_at(o.scaled_weight, term)] = from_acc<T>(
          static_cast<float>(a * weights[term]));
    }
  }
}

}  // namespace wgrad_stem_sm80
}  // namespace fused_conv_bn
