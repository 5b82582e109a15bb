// The sums of BatchNorm's backward on the GPU, in one pass over its operands (backward.h).
//
// Work is cut as for the batch's statistics (stats_plan.cuh). No atomics: results are the same bits in every run on the same GPU.
// Sums are in acc_t<T> over what a thread has loaded at a time, then in double.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backward_derivative.cuh"
#include "backward_launch.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/launch.cuh"
#include "stats.cuh"

namespace fused_conv_bn {

constexpr int kSumLoads = 2;   // that a thread has under way of each operand; divides kPlaneLoads
constexpr int kSumBlocks = 3;  // a multiprocessor's, at a time
// Those that registers are to suffice for. From 10.0 on the compiler needs many more for the same: with 3 it spilled 900 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kSumColumnBlocks = 1;
#else
template <typename T>
constexpr int kSumColumnBlocks = sizeof(T) == 8 ? kSumBlocks - 1 : kSumBlocks;
#endif
// As kSumLoads, of columns.
template <typename T, int W, bool kOther>
constexpr int kSumColumnLoads = kOther && W * sizeof(T) == kVecBytes ? 2 : 4;

// ---- planes ----------------------------------------------------------------------------------------------------------

template <typename T>
struct PlaneSumsParams {
  PlanesParams<T> planes;  // of dy
  const T* z;
  const T* other;
  bool z_aligned;  // as dy is
  bool other_aligned;
  Derivative<T> derivative;
  BackwardParams bn;
  double* partials;  // [splits][s1, s2][channels]
};

// A vector of each operand, and which of its elements exist.
template <typename T>
struct SumItem {
  Vec<T> dy, z, other;
  uint32_t valid;
};

// Load number `load` of this thread, of those that begin at `unit`.
template <typename T, bool kOther>
__device__ __forceinline__ SumItem<T> load_sum_item(const PlaneSumsParams<T>& p, uint32_t c, int64_t unit, int load) {
  constexpr int V = Vec<T>::kSize;
  const uint32_t row = threadIdx.x / p.planes.lanes;
  uint32_t vector = threadIdx.x - row * p.planes.lanes;
  if (p.planes.packed) {
    unit += row + static_cast<uint32_t>(load) * (kStatsThreads / p.planes.lanes);
  } else {
    unit += row;
    vector += static_cast<uint32_t>(load) * kStatsThreads;
  }
  const PlanePart part = plane_part(p.planes, c, unit);
  const int e = part.first + static_cast<int>(vector) * V;
  const bool whole = e >= 0 && e + V <= part.n;
  SumItem<T> item{};
  item.valid = PlaneBatch<T>::kAll;
  if (!whole) {
    const int from = max(-e, 0), until = min(V, part.n - e);
    item.valid = until > from ? (1u << until) - (1u << from) : 0;
  }
  item.dy = load_vec(p.planes.x + part.offset, e, part.n, whole, true);
  if (p.z != nullptr) {
    item.z = load_vec(p.z + part.offset, e, part.n, whole, p.z_aligned);
  }
  if constexpr (kOther) {
    item.other = load_vec(p.other + part.offset, e, part.n, whole, p.other_aligned);
  }
  return item;
}

template <typename T, bool kOther, bool kBounds>
__global__ void __launch_bounds__(kStatsThreads, kSumBlocks) backward_sums_planes_kernel(const PlaneSumsParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  constexpr int kWarps = kStatsThreads / 32;
  const uint32_t channels = p.planes.channels.divisor;
  const uint32_t split = p.planes.channels.div(blockIdx.x);
  const uint32_t c = blockIdx.x - split * channels;
  const int64_t step = p.planes.packed ? int64_t{kStatsThreads / p.planes.lanes} * kPlaneLoads : 1;
  const int64_t end = min((split + int64_t{1}) * p.planes.share, p.planes.units);
  Affine<Acc> affine{};
  double s1 = 0, s2 = 0;
  bool first = true;
  wait_for_previous();
  for (int64_t unit = split * p.planes.share; unit < end; unit += step) {
#pragma unroll 1
    for (int load = 0; load < kPlaneLoads; load += kSumLoads) {
      SumItem<T> items[kSumLoads];
#pragma unroll
      for (int j = 0; j < kSumLoads; ++j) {
        items[j] = load_sum_item<T, kOther>(p, c, unit, load + j);
      }
      if (first) {
        first = false;
        affine = backward_affine<Acc>(p.bn, c);
      }
      Acc sum = 0, product = 0;
#pragma unroll
      for (int j = 0; j < kSumLoads; ++j) {
        Acc dy[V], d[V], other[V] = {};
        unpack(items[j].dy, dy);
        unpack(items[j].z, d);
        if constexpr (kOther) {
          unpack(items[j].other, other);
        }
        // A branch for each vector: for all at once the compiler runs out of registers.
        with_derivative<T, kOther, kBounds>(p.derivative, [&](const auto& dv_of) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            d[k] -= affine.center;
            const Acc dv = dv_of(dy[k], d[k], other[k], affine);
            const bool valid = items[j].valid >> k & 1;
            sum += valid ? dv : Acc(0);
            product += valid ? dv * d[k] : Acc(0);
          }
        });
      }
      s1 += sum;
      s2 += product;
    }
  }
  warp_sum(s1, s2);
  __shared__ double warps[2][kWarps];
  if (threadIdx.x % 32 == 0) {
    warps[0][threadIdx.x / 32] = s1;
    warps[1][threadIdx.x / 32] = s2;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) {
      sum += warps[threadIdx.x][i];
    }
    p.partials[(static_cast<int64_t>(split) * 2 + threadIdx.x) * channels + c] = sum;
  }
}

// ---- columns ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ColumnSumsParams {
  ColumnsParams<T> columns;  // of dy
  const T* z;
  const T* other;
  FastDiv inner;  // columns of a channel
  Derivative<T> derivative;
  BackwardParams bn;
  double* partials;  // [splits][s1, s2][columns]
};

// Adds the elements of a thread's columns in U rows. Rows that do not exist hold zeros, and are left out.
template <typename T, int W, bool kOther, bool kBounds, int U>
__device__ __forceinline__ void add_products(const ColumnSumsParams<T>& p, const ColumnItem<T, W> (&dy)[U],
                                             const ColumnItem<T, W> (&z)[U], const ColumnItem<T, W> (&other)[U],
                                             uint32_t exist, const Affine<acc_t<T>> (&affine)[W], double (&s1)[W],
                                             double (&s2)[W]) {
  using Acc = acc_t<T>;
  Acc sum[W] = {}, product[W] = {};
  with_derivative<T, kOther, kBounds>(p.derivative, [&](const auto& dv_of) {
#pragma unroll
    for (int j = 0; j < U; ++j) {
      const bool exists = exist >> j & 1;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const Acc d = z[j].at(k) - affine[k].center;
        const Acc dv = dv_of(dy[j].at(k), d, kOther ? other[j].at(k) : Acc(0), affine[k]);
        sum[k] += exists ? dv : Acc(0);
        product[k] += exists ? dv * d : Acc(0);
      }
    }
  });
#pragma unroll
  for (int k = 0; k < W; ++k) {
    s1[k] += sum[k];
    s2[k] += product[k];
  }
}

// W: as of bn_stats_columns_kernel.
template <typename T, int W, bool kOther, bool kBounds>
__global__ void __launch_bounds__(kStatsThreads, kSumColumnBlocks<T>)
    backward_sums_columns_kernel(const ColumnSumsParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int U = kSumColumnLoads<T, W, kOther>;
  __shared__ double sums[2][kStatsThreads * W];
  const ColumnsParams<T>& m = p.columns;
  const uint32_t split = m.chunks.div(blockIdx.x);
  const uint32_t first_lane = (blockIdx.x - split * m.chunks.divisor) * m.lanes;
  const uint32_t row = threadIdx.x / m.lanes;
  const uint32_t lane = threadIdx.x - row * m.lanes;
  const ColumnThread thread{row, lane, row < m.rows && first_lane + lane < m.row_vectors};
  const int64_t begin = split * m.share;
  const auto rows = static_cast<uint32_t>(min(m.share, m.matrix_rows - begin));  // of the matrix, for this block
  const int64_t column = static_cast<int64_t>(first_lane + lane) * W;
  const int64_t from = (begin + row) * m.columns + column;
  Affine<Acc> affine[W] = {};
  double s1[W] = {}, s2[W] = {};
  wait_for_previous();
  for (uint32_t first = 0; first < rows; first += m.rows * U) {
    ColumnItem<T, W> dy[U] = {}, z[U] = {}, other[U] = {};
    uint32_t exist = 0;
#pragma unroll
    for (int j = 0; j < U; ++j) {
      const uint32_t r = first + j * m.rows;
      if (thread.active && r + row < rows) {
        exist |= 1u << j;
        const int64_t at = from + r * m.columns;
        dy[j].load(m.x + at);
        if (p.z != nullptr) {
          z[j].load(p.z + at);
        }
        if constexpr (kOther) {
          other[j].load(p.other + at);
        }
      }
    }
    if (first == 0 && thread.active) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        affine[k] = backward_affine<Acc>(p.bn, p.inner.div(static_cast<uint32_t>(column) + k));
      }
    }
    add_products<T, W, kOther, kBounds>(p, dy, z, other, exist, affine, s1, s2);
  }
  const uint32_t slot = threadIdx.x * W;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    sums[0][slot + k] = s1[k];
    sums[1][slot + k] = s2[k];
  }
  add_up_rows<W>(m, thread, sums[0], sums[1]);
  if (row == 0 && thread.active) {  // what is left is this thread's own
#pragma unroll
    for (int k = 0; k < W; ++k) {
      p.partials[int64_t{2} * split * m.columns + column + k] = sums[0][slot + k];
      p.partials[(int64_t{2} * split + 1) * m.columns + column + k] = sums[1][slot + k];
    }
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <bool kOther, bool kBounds, typename T>
cudaError_t launch_backward_sums_with(const BackwardTensors<T>& t, const Shape& shape, const StatsPlan& plan,
                                      const BackwardParams& bn, const Derivative<T>& derivative, double* partials,
                                      cudaStream_t stream) {
  if (plan.planes) {
    const auto misalignment = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kVecBytes; };
    const PlaneSumsParams<T> p{
        planes_params(t.dy, shape, plan, nullptr),   t.z,        t.other, misalignment(t.z) == misalignment(t.dy),
        misalignment(t.other) == misalignment(t.dy), derivative, bn,      partials};
    const auto blocks = static_cast<uint32_t>(plan.splits * shape.channels);
    return launch_kernel(backward_sums_planes_kernel<T, kOther, kBounds>, blocks, kStatsThreads, 0, true, stream, p);
  }
  const ColumnSumsParams<T> p{columns_params(t.dy, shape, plan, nullptr),
                              t.z,
                              t.other,
                              FastDiv(static_cast<uint32_t>(shape.inner)),
                              derivative,
                              bn,
                              partials};
  const auto blocks = static_cast<uint32_t>(plan.splits * plan.chunks);
  return launch_kernel(plan.vectors ? backward_sums_columns_kernel<T, kColumnVec<T>, kOther, kBounds>
                                    : backward_sums_columns_kernel<T, 1, kOther, kBounds>,
                       blocks, kStatsThreads, 0, true, stream, p);
}

template <typename T>
cudaError_t launch_backward_sums(const BackwardTensors<T>& t, const Shape& shape, const StatsPlan& plan,
                                 const BackwardParams& bn, const Epilogue& epilogue, double* partials,
                                 cudaStream_t stream) {
  const Derivative<T> derivative{epilogue.activation, t.from_result, static_cast<acc_t<T>>(epilogue.negative_slope)};
  const auto with = [&](auto other) {
    return is_bound(epilogue.activation)
               ? launch_backward_sums_with<other(), true>(t, shape, plan, bn, derivative, partials, stream)
               : launch_backward_sums_with<other(), false>(t, shape, plan, bn, derivative, partials, stream);
  };
  return t.other != nullptr ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace fused_conv_bn
