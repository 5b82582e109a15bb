// BatchNorm in training mode on the GPU: the batch's statistics, in one pass over the input.
//
// Each block leaves the Moments of its share of a channel (moments.h), which bn_finish_kernel merges (finish.cuh). No
// atomics: results are the same bits in every run on the same GPU.
//
// Within a block sums are taken about a pivot, the mean of the first few elements: in acc_t<T> over what a thread has
// loaded at a time, then in double. So they are as good for a mean of 1e4 and a deviation of 1 as for a mean of 0.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/launch.cuh"
#include "launch.cuh"
#include "moments.h"
#include "stats_plan.cuh"
#include "warp_sum.cuh"

namespace fused_conv_bn {

// ---- sums over threads -----------------------------------------------------------------------------------------------

// Of the Moments of all of a warp's lanes, in every lane. As merge(), in three sums.
__device__ __forceinline__ Moments warp_merge(const Moments& m) {
  const double pivot = __shfl_sync(0xffffffffu, m.mean, 0);
  double count = m.count, sum = m.count * (m.mean - pivot);
  warp_sum(count, sum);
  const double mean = count > 0 ? pivot + divide_by_count(sum, count) : 0;
  const double distance = m.mean - mean;
  double m2 = m.m2 + m.count * (distance * distance);
  warp_sum(m2);
  return {count, mean, m2};
}

// ---- planes ----------------------------------------------------------------------------------------------------------

template <typename T>
struct PlanesParams {
  const T* x;
  Moments* partials;  // [splits][channels]
  int64_t inner;      // elements of a plane
  int64_t units;      // of a channel: parts of its planes
  int64_t share;      // of them, for a block
  FastDiv channels;
  FastDiv parts;          // of a plane
  uint32_t part_vectors;  // at most
  uint32_t lanes;         // threads that a part gets, a power of two
  bool packed;            // a thread's loads are of different parts, of no more vectors than threads; else of the same
  int misalignment;       // elements between a 16-byte boundary and x
};

// A part of a plane: the n elements from x + offset on. `first`: that of a vector's elements which is the part's first
// one, at most 0, so that vectors begin on 16-byte boundaries.
struct PlanePart {
  int64_t offset;
  int n;
  int first;
};

// What a thread loads at a time, and which elements of each load exist, a bit for each.
template <typename T>
struct PlaneBatch {
  static constexpr uint32_t kAll = (1u << Vec<T>::kSize) - 1;
  Vec<T> x[kPlaneLoads];
  uint32_t valid[kPlaneLoads];
};

template <typename T>
__device__ __forceinline__ PlanePart plane_part(const PlanesParams<T>& p, uint32_t c, int64_t unit) {
  constexpr int V = Vec<T>::kSize;
  if (unit >= p.units) {
    return {0, 0, 0};
  }
  // Only long planes have several parts, so that there are fewer than 2^31 of them.
  const int64_t image = p.parts.divisor == 1 ? unit : p.parts.div(static_cast<uint32_t>(unit));
  const auto part = static_cast<uint32_t>(unit - image * p.parts.divisor);
  const int64_t plane = (image * p.channels.divisor + c) * p.inner;
  const int lead = static_cast<int>(p.misalignment + plane) & (V - 1);
  const int64_t begin = static_cast<int64_t>(part) * p.part_vectors * V - lead;
  const int64_t end = min(begin + static_cast<int64_t>(p.part_vectors) * V, p.inner);
  const int64_t first = max(begin, int64_t{0});
  return {plane + first, static_cast<int>(end - first), static_cast<int>(begin - first)};
}

template <typename T>
__device__ __forceinline__ void load_batch(const PlanesParams<T>& p, uint32_t c, int64_t unit, PlaneBatch<T>& batch) {
  constexpr int V = Vec<T>::kSize;
  const uint32_t row = threadIdx.x / p.lanes;
  uint32_t vector = threadIdx.x - row * p.lanes;
  unit += row;
  PlanePart part = plane_part(p, c, unit);
#pragma unroll
  for (int j = 0; j < kPlaneLoads; ++j) {
    const int e = part.first + static_cast<int>(vector) * V;
    const bool whole = e >= 0 && e + V <= part.n;
    batch.valid[j] = PlaneBatch<T>::kAll;
    if (!whole) {
      const int from = max(-e, 0), until = min(V, part.n - e);
      batch.valid[j] = until > from ? (1u << until) - (1u << from) : 0;
    }
    batch.x[j] = load_vec(p.x + part.offset, e, part.n, whole, true);
    if (j == kPlaneLoads - 1) {
      break;
    }
    if (p.packed) {
      unit += kStatsThreads / p.lanes;
      part = plane_part(p, c, unit);
    } else {
      vector += kStatsThreads;
    }
  }
}

// Adds the mean of what a warp has loaded to `mean`, which is 0. Elements that do not exist are 0.
template <typename T>
__device__ __forceinline__ void warp_mean(const PlaneBatch<T>& batch, acc_t<T>& mean) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  constexpr int kWarpElements = 32 * kPlaneLoads * V;
#pragma unroll
  for (int j = 0; j < kPlaneLoads; ++j) {
    Acc value[V];
    unpack(batch.x[j], value);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      mean += value[k] * Acc(1.0 / kWarpElements);
    }
  }
  uint32_t number = 0;
#pragma unroll
  for (int j = 0; j < kPlaneLoads; ++j) {
    number += __popc(batch.valid[j]);
  }
  warp_sum(number, mean);
  mean = number > 0 ? mean * static_cast<Acc>(divide_by_count(kWarpElements, number)) : Acc(0);
}

// Adds a batch's elements, as distances from the pivot.
template <typename T>
__device__ __forceinline__ void add_batch(const PlaneBatch<T>& batch, acc_t<T> pivot, double& sum, double& squares,
                                          uint32_t& count) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  Acc batch_sum = 0, batch_squares = 0;
#pragma unroll
  for (int j = 0; j < kPlaneLoads; ++j) {
    Acc value[V];
    unpack(batch.x[j], value);
    if (batch.valid[j] != PlaneBatch<T>::kAll) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        value[k] = batch.valid[j] >> k & 1 ? value[k] : pivot;  // which adds 0
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Acc d = value[k] - pivot;
      batch_sum += d;
      batch_squares += d * d;
    }
    count += __popc(batch.valid[j]);
  }
  sum += batch_sum;
  squares += batch_squares;
}

template <typename T>
__global__ void __launch_bounds__(kStatsThreads, kPlaneBlocks) bn_stats_planes_kernel(const PlanesParams<T> p) {
  constexpr int kWarps = kStatsThreads / 32;
  const uint32_t split = p.channels.div(blockIdx.x);
  const uint32_t c = blockIdx.x - split * p.channels.divisor;
  const int64_t step = p.packed ? int64_t{kStatsThreads / p.lanes} * kPlaneLoads : 1;
  const int64_t end = min((split + int64_t{1}) * p.share, p.units);
  acc_t<T> pivot = 0;
  double sum = 0, squares = 0;
  uint32_t count = 0;
  bool first = true;
  wait_for_previous();
  for (int64_t unit = split * p.share; unit < end; unit += step) {
    PlaneBatch<T> batch;
    load_batch(p, c, unit, batch);
    if (first) {
      first = false;
      warp_mean(batch, pivot);
    }
    add_batch(batch, pivot, sum, squares, count);
  }
  warp_sum(sum, squares, count);
  __shared__ Moments warps[kWarps];
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = from_sums(count, pivot, sum, squares);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const Moments m = warp_merge(threadIdx.x < kWarps ? warps[threadIdx.x] : Moments{0, 0, 0});
    if (threadIdx.x == 0) {
      p.partials[static_cast<int64_t>(split) * p.channels.divisor + c] = m;
    }
  }
}

// ---- columns ---------------------------------------------------------------------------------------------------------

template <typename T>
struct ColumnsParams {
  const T* x;
  Moments* partials;  // [splits][columns]
  int64_t matrix_rows;
  int64_t columns;
  int64_t share;         // of the rows, for a block
  FastDiv chunks;        // of columns, a block's each
  uint32_t lanes;        // threads side by side in a chunk
  uint32_t rows;         // of threads in a block
  uint32_t row_vectors;  // of the matrix
};

// W adjacent elements as they lie in memory: they are converted when they are needed, and take up fewer registers till
// then.
template <typename T, int W>
struct ColumnItem {
  static constexpr int kWords = W * static_cast<int>(sizeof(T)) < 4 ? 1 : W * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (sizeof(T) * W == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    } else {
      load_words(from, words);
    }
  }
  __device__ __forceinline__ acc_t<T> at(int k) const {
    if constexpr (sizeof(T) == 2) {
      const float2 pair = unpack_pair(T(), words[k / 2]);
      return k % 2 ? pair.y : pair.x;
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[k]);
    } else {
      return __hiloint2double(static_cast<int>(words[2 * k + 1]), static_cast<int>(words[2 * k]));
    }
  }
};

// What a thread has of a block's rows: one in each `rows` of them, W columns wide.
struct ColumnThread {
  uint32_t row;   // of the first one, within the block
  uint32_t lane;  // of the columns
  bool active;    // these columns exist
};

// Of each of a thread's columns the mean over the block's first rows, by a few of its threads; rows that do not exist are 0.
// totals: shared memory, W elements a thread. rows: of the matrix, for this block.
template <typename T, int W, int U>
__device__ __forceinline__ void column_means(const ColumnsParams<T>& p, const ColumnThread& thread,
                                             const ColumnItem<T, W> (&items)[U], uint32_t rows, acc_t<T>* totals,
                                             acc_t<T> (&means)[W]) {
  using Acc = acc_t<T>;
  constexpr uint32_t kPivotRows = 16;
  const uint32_t pivot_rows = min(p.rows, kPivotRows);
  if (thread.row < pivot_rows) {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      Acc total = 0;
#pragma unroll
      for (int j = 0; j < U; ++j) {
        total += items[j].at(k) * Acc(1.0 / (kPivotRows * U));
      }
      totals[(thread.row * p.lanes + thread.lane) * W + k] = total;
    }
  }
  __syncthreads();
  if (thread.active) {
    uint32_t number = 0;
#pragma unroll 1
    for (uint32_t r = 0; r < min(p.rows * U, rows); r += p.rows) {
      number += min(rows - r, pivot_rows);
    }
    const auto factor = static_cast<Acc>(divide_by_count(kPivotRows * U, number));
#pragma unroll 1
    for (uint32_t i = 0; i < pivot_rows; ++i) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        means[k] += totals[(i * p.lanes + thread.lane) * W + k];
      }
    }
#pragma unroll
    for (int k = 0; k < W; ++k) {
      means[k] *= factor;
    }
  }
  __syncthreads();
}

// Adds the elements of a thread's columns in U rows, from row `first` on, as distances from the pivots.
template <typename T, int W, int U>
__device__ __forceinline__ void add_items(const ColumnsParams<T>& p, const ColumnThread& thread,
                                          const ColumnItem<T, W> (&items)[U], uint32_t first, uint32_t rows,
                                          const acc_t<T> (&pivot)[W], double (&sum)[W], double (&square)[W]) {
  using Acc = acc_t<T>;
  Acc batch_sum[W] = {}, batch_squares[W] = {};
  const bool all = first + p.rows * U <= rows;
#pragma unroll
  for (int j = 0; j < U; ++j) {
    if (all || first + j * p.rows + thread.row < rows) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const Acc d = items[j].at(k) - pivot[k];
        batch_sum[k] += d;
        batch_squares[k] += d * d;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) {
    sum[k] += batch_sum[k];
    square[k] += batch_squares[k];
  }
}

// Adds up the sums of a block's threads over its rows, into those of row 0. Both are shared memory, W elements a thread.
template <int W, typename T>
__device__ __forceinline__ void add_up_rows(const ColumnsParams<T>& p, const ColumnThread& thread, double* sums,
                                            double* squares) {
  const uint32_t slot = threadIdx.x * W;
  uint32_t half = 1;
  while (half < p.rows) {
    half *= 2;
  }
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread.row < half && thread.row + half < p.rows) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sums[slot + k] += sums[slot + half * p.lanes * W + k];
        squares[slot + k] += squares[slot + half * p.lanes * W + k];
      }
    }
  }
}

// W: elements that a thread loads at a time, kColumnVec<T>, or 1 where rows do not allow for that.
template <typename T, int W>
__global__ void __launch_bounds__(kStatsThreads, kStatsColumnBlocks) bn_stats_columns_kernel(const ColumnsParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int U = kColumnBatch<T, W>;
  __shared__ double sums[kStatsThreads * W];
  __shared__ double squares[kStatsThreads * W];
  const uint32_t split = p.chunks.div(blockIdx.x);
  const uint32_t first_lane = (blockIdx.x - split * p.chunks.divisor) * p.lanes;
  const uint32_t row = threadIdx.x / p.lanes;
  const uint32_t lane = threadIdx.x - row * p.lanes;
  const ColumnThread thread{row, lane, row < p.rows && first_lane + lane < p.row_vectors};
  const int64_t begin = split * p.share;
  const auto rows = static_cast<uint32_t>(min(p.share, p.matrix_rows - begin));  // of the matrix, for this block
  const uint32_t step = p.rows * U;
  const T* x = p.x + (begin + row) * p.columns + static_cast<int64_t>(first_lane + lane) * W;
  Acc pivot[W] = {};
  double sum[W] = {}, square[W] = {};
  wait_for_previous();
  for (uint32_t first = 0; first < rows; first += step) {
    ColumnItem<T, W> items[U];
#pragma unroll
    for (int j = 0; j < U; ++j) {
      const uint32_t r = first + j * p.rows;
      items[j] = {};
      if (thread.active && r + row < rows) {
        items[j].load(x + r * p.columns);
      }
    }
    if (first == 0) {  // `sums` is still free
      column_means(p, thread, items, rows, reinterpret_cast<Acc*>(sums), pivot);
    }
    add_items(p, thread, items, first, rows, pivot, sum, square);
  }
  const uint32_t slot = threadIdx.x * W;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    sums[slot + k] = sum[k];
    squares[slot + k] = square[k];
  }
  add_up_rows<W>(p, thread, sums, squares);
  if (row == 0 && thread.active) {  // what is left is this thread's own
#pragma unroll
    for (int k = 0; k < W; ++k) {
      p.partials[split * p.columns + static_cast<int64_t>(first_lane + lane) * W + k] = from_sums(
          rows, pivot[k], sums[slot + k], squares[slot + k]);
    }
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <typename T>
PlanesParams<T> planes_params(const T* x, const Shape& shape, const StatsPlan& plan, Moments* partials) {
  PlanesParams<T> p{};
  p.x = x;
  p.partials = partials;
  p.inner = shape.inner;
  p.units = plan.images * plan.parts;
  p.share = plan.share;
  p.channels = FastDiv(static_cast<uint32_t>(shape.channels));
  p.parts = FastDiv(plan.parts);
  p.part_vectors = plan.part_vectors;
  p.lanes = plan.lanes;
  p.packed = plan.packed;
  p.misalignment = static_cast<int>(reinterpret_cast<uintptr_t>(x) % kVecBytes / sizeof(T));
  return p;
}

template <typename T>
ColumnsParams<T> columns_params(const T* x, const Shape& shape, const StatsPlan& plan, Moments* partials) {
  ColumnsParams<T> p{};
  p.x = x;
  p.partials = partials;
  p.matrix_rows = plan.images;
  p.columns = shape.channels * shape.inner;
  p.share = plan.share;
  p.chunks = FastDiv(plan.chunks);
  p.lanes = plan.lanes;
  p.rows = kStatsThreads / plan.lanes;
  p.row_vectors = plan.row_vectors;
  return p;
}

template <typename T>
cudaError_t launch_bn_stats(const T* x, const Shape& shape, const StatsPlan& plan, Moments* partials,
                            cudaStream_t stream) {
  if (plan.planes) {
    const auto p = planes_params(x, shape, plan, partials);
    const auto blocks = static_cast<uint32_t>(plan.splits * shape.channels);
    return launch_kernel(bn_stats_planes_kernel<T>, blocks, kStatsThreads, 0, true, stream, p);
  }
  const auto p = columns_params(x, shape, plan, partials);
  const auto blocks = static_cast<uint32_t>(plan.splits * plan.chunks);
  return launch_kernel(plan.vectors ? bn_stats_columns_kernel<T, kColumnVec<T>> : bn_stats_columns_kernel<T, 1>, blocks,
                       kStatsThreads, 0, true, stream, p);
}

}  // namespace fused_conv_bn
