// BatchNorm in training mode on the GPU: the batch's statistics, in one pass over the input.
//
// Each block leaves the Moments of its share of a channel (moments.h), bn_finish_kernel merges them, and the
// elementwise kernels apply what comes of it. No atomics: results are the same bits in every run on the same GPU.
//
// Within a block sums are taken about a pivot, the mean of the first few elements: in acc_t<T> over what a thread has
// loaded at a time, then in double. So they are as good for a mean of 1e4 and a deviation of 1 as for a mean of 0.
//
// Kernels by how channels lie in memory:
//   planes    planes of at least 128 bytes: a block takes one channel, whole planes by groups of threads if they are
//             short.
//   columns   everything else, seen as a matrix whose columns have one channel each: channels_last, (N, C), and planes
//             of a few elements, all of which are columns of their own.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/fast_div.h"
#include "kernels/common/vec.cuh"
#include "kernels/elementwise/memory_format.h"
#include "kernels/elementwise/scale_shift.cuh"
#include "kernels/ptx/launch.cuh"
#include "moments.h"

namespace fused_conv_bn {

// Measured on an H200, where the pass then reads at 3.6 to 4.1 TB/s, a copy moving 4.2. Loading the next elements
// before those at hand are added up gained nothing.
constexpr int kStatsThreads = 256;
constexpr int kPlaneLoads = 4;         // that a thread has under way
constexpr int kPlaneBlocks = 4;        // a multiprocessor's, at a time
constexpr int kPlaneWaves = 4;         // of such blocks that are launched, if there is work for them
constexpr int kColumnLoads = 8;        // of 16 bytes; twice as many smaller ones
constexpr int kStatsColumnBlocks = 3;  // as kPlaneBlocks
constexpr int kColumnWaves = 1;        // as kPlaneWaves
constexpr int kLeastSteps = 4;         // that a block is worth, unless multiprocessors would be left without one

// ---- sums over threads -----------------------------------------------------------------------------------------------

// Each value's sum over a warp, in every lane. A loop, because where the compiler cannot tell that a warp's lanes are
// together it writes each shuffle twice.
template <typename... Values>
__device__ __forceinline__ void warp_sum(Values&... values) {
#pragma unroll 1
  for (int mask = 16; mask > 0; mask /= 2) {
    ((values += __shfl_xor_sync(0xffffffffu, values, mask)), ...);
  }
}

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

template <typename T>
__global__ void __launch_bounds__(kStatsThreads, kPlaneBlocks) bn_stats_planes_kernel(const PlanesParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  constexpr int kWarps = kStatsThreads / 32;
  constexpr int kWarpElements = 32 * kPlaneLoads * V;
  const uint32_t split = p.channels.div(blockIdx.x);
  const uint32_t c = blockIdx.x - split * p.channels.divisor;
  const int64_t step = p.packed ? int64_t{kStatsThreads / p.lanes} * kPlaneLoads : 1;
  const int64_t end = min((split + int64_t{1}) * p.share, p.units);
  Acc pivot = 0;
  double sum = 0, squares = 0;
  uint32_t count = 0;
  bool first = true;
  wait_for_previous();
  for (int64_t unit = split * p.share; unit < end; unit += step) {
    PlaneBatch<T> batch;
    load_batch(p, c, unit, batch);
    if (first) {
      // The mean of what the warp has loaded first. Elements that do not exist are 0.
      first = false;
#pragma unroll
      for (int j = 0; j < kPlaneLoads; ++j) {
        Acc value[V];
        unpack(batch.x[j], value);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          pivot += value[k] * Acc(1.0 / kWarpElements);
        }
      }
      uint32_t number = 0;
#pragma unroll
      for (int j = 0; j < kPlaneLoads; ++j) {
        number += __popc(batch.valid[j]);
      }
      warp_sum(number, pivot);
      pivot = number > 0 ? pivot * static_cast<Acc>(divide_by_count(kWarpElements, number)) : Acc(0);
    }
    Acc batch_sum = 0, batch_squares = 0;
    const auto add = [&](Acc d) {
      batch_sum += d;
      batch_squares += d * d;
    };
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
        add(value[k] - pivot);
      }
      count += __popc(batch.valid[j]);
    }
    sum += batch_sum;
    squares += batch_squares;
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

// Elements that a thread takes of a row at a time: 8 bytes of 16-bit ones, as each has sums of its own in registers.
template <typename T>
constexpr int kColumnVec = sizeof(T) == 8 ? 2 : 4;

// And how many such loads it has under way.
template <typename T, int W>
constexpr int kColumnBatch = W * sizeof(T) == kVecBytes ? kColumnLoads : 2 * kColumnLoads;

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

// W: elements that a thread loads at a time, kColumnVec<T>, or 1 where rows do not allow for that.
template <typename T, int W>
__global__ void __launch_bounds__(kStatsThreads, kStatsColumnBlocks) bn_stats_columns_kernel(const ColumnsParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int U = kColumnBatch<T, W>;
  constexpr uint32_t kPivotRows = 16;
  __shared__ double sums[kStatsThreads * W];
  __shared__ double squares[kStatsThreads * W];
  const uint32_t split = p.chunks.div(blockIdx.x);
  const uint32_t first_lane = (blockIdx.x - split * p.chunks.divisor) * p.lanes;
  const uint32_t row = threadIdx.x / p.lanes;
  const uint32_t lane = threadIdx.x - row * p.lanes;
  const bool active = row < p.rows && first_lane + lane < p.row_vectors;
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
      if (active && r + row < rows) {
        items[j].load(x + r * p.columns);
      }
    }
    if (first == 0) {
      // The mean of the first rows, of a few threads; those that do not exist are 0. `sums` is still free.
      auto* totals = reinterpret_cast<Acc*>(sums);
      const uint32_t pivot_rows = min(p.rows, kPivotRows);
      if (row < pivot_rows) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
          Acc total = 0;
#pragma unroll
          for (int j = 0; j < U; ++j) {
            total += items[j].at(k) * Acc(1.0 / (kPivotRows * U));
          }
          totals[(row * p.lanes + lane) * W + k] = total;
        }
      }
      __syncthreads();
      if (active) {
        uint32_t number = 0;
#pragma unroll 1
        for (uint32_t r = 0; r < min(step, rows); r += p.rows) {
          number += min(rows - r, pivot_rows);
        }
        const auto factor = static_cast<Acc>(divide_by_count(kPivotRows * U, number));
#pragma unroll 1
        for (uint32_t i = 0; i < pivot_rows; ++i) {
#pragma unroll
          for (int k = 0; k < W; ++k) {
            pivot[k] += totals[(i * p.lanes + lane) * W + k];
          }
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
          pivot[k] *= factor;
        }
      }
      __syncthreads();
    }
    Acc batch_sum[W] = {}, batch_squares[W] = {};
    const bool all = first + step <= rows;
#pragma unroll
    for (int j = 0; j < U; ++j) {
      if (all || first + j * p.rows + row < rows) {
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
  const uint32_t slot = threadIdx.x * W;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    sums[slot + k] = sum[k];
    squares[slot + k] = square[k];
  }
  uint32_t half = 1;
  while (half < p.rows) {
    half *= 2;
  }
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half && row + half < p.rows) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sums[slot + k] += sums[slot + half * p.lanes * W + k];
        squares[slot + k] += squares[slot + half * p.lanes * W + k];
      }
    }
  }
  if (row == 0 && active) {  // what is left is this thread's own
#pragma unroll
    for (int k = 0; k < W; ++k) {
      p.partials[split * p.columns + static_cast<int64_t>(first_lane + lane) * W + k] = from_sums(
          rows, pivot[k], sums[slot + k], squares[slot + k]);
    }
  }
}

// ---- the merge -------------------------------------------------------------------------------------------------------

constexpr uint32_t kFinishWarps = 4;  // of a block

// Over the warp, or over the block, in each of the threads.
__device__ __forceinline__ double channel_sum(double value, bool whole_block) {
  warp_sum(value);
  if (whole_block) {
    __shared__ double warps[kFinishWarps];
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (uint32_t i = 1; i < kFinishWarps; ++i) {
      value += warps[i];
    }
  }
  return value;
}

// A channel's partials, of which there are `count`, are [splits][channels][inner]; a block takes one channel, or each of
// its warps does. As merge(), of all at once: first the mean, by distances from that of the first partial, then the
// squared distances from it. One kernel for all element types: it is long and takes next to no time.
__global__ void __launch_bounds__(32 * kFinishWarps)
    bn_finish_kernel(const TrainParams params, const Moments* partials, uint32_t count, FastDiv inner, bool whole_block,
                     AffineBuffer affines) {
  const uint32_t threads = whole_block ? 32 * kFinishWarps : 32;
  const uint32_t c = whole_block ? blockIdx.x : blockIdx.x * kFinishWarps + threadIdx.x / 32;
  if (c >= affines.channels) {
    return;
  }
  const auto each = [&](const auto& f) {
    for (uint32_t i = threadIdx.x % threads; i < count; i += threads) {
      const uint32_t split = inner.div(i);
      f(partials[(static_cast<int64_t>(split) * affines.channels + c) * inner.divisor + (i - split * inner.divisor)]);
    }
  };
  const ChannelValues channel = channel_values(params, c);
  wait_for_previous();
  const double pivot = partials[static_cast<int64_t>(c) * inner.divisor].mean;
  double values = 0, sum = 0, m2 = 0;
  each([&](const Moments& m) {
    values += m.count;
    sum += m.count * (m.mean - pivot);
  });
  values = channel_sum(values, whole_block);
  const double mean = pivot + divide_by_count(channel_sum(sum, whole_block), values);
  each([&](const Moments& m) {
    const double distance = m.mean - mean;
    m2 += m.m2 + m.count * (distance * distance);
  });
  m2 = channel_sum(m2, whole_block);
  if (threadIdx.x % threads == 0) {
    affines.set(c, finish_channel(params, channel, {values, mean, m2}, c, affines.element));
  }
}

inline cudaError_t launch_bn_finish(const TrainParams& params, const Moments* partials, int64_t splits, int64_t inner,
                                    const AffineBuffer& affines, cudaStream_t stream) {
  const auto count = static_cast<uint32_t>(splits * inner);
  const bool whole_block = count > 64;
  const uint32_t blocks = whole_block ? affines.channels : (affines.channels + kFinishWarps - 1) / kFinishWarps;
  return launch_kernel(bn_finish_kernel, blocks, 32 * kFinishWarps, 0, true, stream, params, partials, count,
                       FastDiv(static_cast<uint32_t>(inner)), whole_block, affines);
}

// ---- launches --------------------------------------------------------------------------------------------------------

// How the statistics of a tensor are gathered, and how large a workspace they need.
struct StatsPlan {
  bool planes;
  bool packed;     // of planes: several of them side by side in a block
  bool vectors;    // of columns: loads of kColumnVec<T> elements
  int64_t images;  // of planes, or rows of columns
  int64_t inner;   // of the partials, which are [splits][channels][inner]
  int64_t splits;
  int64_t share;  // of a split: parts of planes, or rows
  uint32_t lanes;
  uint32_t parts;         // of a plane
  uint32_t part_vectors;  // of these, at most
  uint32_t chunks;        // of the columns
  uint32_t row_vectors;   // of the columns

  int64_t partials(const Shape& shape) const { return splits * shape.channels * inner; }
};

// For an x that is dense with the given shape and not empty.
template <typename T>
StatsPlan plan_stats(const T* x, const Shape& shape, int multiprocessors) {
  constexpr int64_t V = Vec<T>::kSize, W = kColumnVec<T>;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto address = reinterpret_cast<uintptr_t>(x);
  StatsPlan plan{};
  plan.images = shape.numel / (shape.channels * shape.inner);
  plan.planes = shape.inner * static_cast<int64_t>(sizeof(T)) >= 128;
  // `units` in steps of so many, split for as many blocks as `most`, with `beside` others for each split.
  const auto set_splits = [&](int64_t units, int64_t step, int64_t beside, int64_t most) {
    const int64_t steps = ceil_div(units, step);
    const int64_t least = std::min<int64_t>(kLeastSteps, steps * beside / (2 * multiprocessors));
    const int64_t share = std::max({int64_t{1}, ceil_div(steps, std::max<int64_t>(1, most / beside)), least});
    plan.splits = ceil_div(steps, share);
    plan.share = share * step;
  };
  if (plan.planes) {
    // A plane that does not begin on a 16-byte boundary has one vector more.
    const bool aligned = address % kVecBytes == 0 && shape.inner % V == 0;
    const int64_t vectors = ceil_div(shape.inner, V) + (aligned ? 0 : 1);
    const int64_t parts = ceil_div(vectors, kStatsThreads * kPlaneLoads);
    plan.inner = 1;
    plan.parts = static_cast<uint32_t>(parts);
    plan.part_vectors = static_cast<uint32_t>(ceil_div(vectors, parts));
    plan.packed = plan.part_vectors <= kStatsThreads;
    plan.lanes = 8;
    while (plan.lanes < plan.part_vectors && plan.lanes < kStatsThreads) {
      plan.lanes *= 2;
    }
    const int64_t step = plan.packed ? kStatsThreads / plan.lanes * kPlaneLoads : 1;
    const int64_t blocks = int64_t{multiprocessors} * kPlaneBlocks;
    set_splits(plan.images * parts, step, shape.channels, blocks * kPlaneWaves);
    return plan;
  }
  const int64_t columns = shape.channels * shape.inner;
  plan.inner = shape.inner;
  plan.vectors = columns % W == 0 && address % (W * sizeof(T)) == 0;
  plan.row_vectors = static_cast<uint32_t>(plan.vectors ? columns / W : columns);
  plan.chunks = static_cast<uint32_t>(ceil_div(plan.row_vectors, plan.vectors ? 32 : 64));
  plan.lanes = static_cast<uint32_t>(ceil_div(plan.row_vectors, plan.chunks));
  const int64_t batch = plan.vectors ? kColumnBatch<T, W> : kColumnBatch<T, 1>;
  set_splits(plan.images, kStatsThreads / plan.lanes * batch, plan.chunks,
             int64_t{multiprocessors} * kStatsColumnBlocks * kColumnWaves);
  return plan;
}

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

// Leaves the partials. Asynchronous on `stream`, as everything here.
template <typename T>
cudaError_t launch_bn_stats(const T* x, const Shape& shape, const StatsPlan& plan, Moments* partials,
                            cudaStream_t stream) {
  if (plan.planes) {
    const auto p = planes_params(x, shape, plan, partials);
    const auto blocks = static_cast<uint32_t>(plan.splits * shape.channels);
    return launch_kernel(bn_stats_planes_kernel<T>, blocks, kStatsThreads, 0, true, stream, p);
  }
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
  const auto blocks = static_cast<uint32_t>(plan.splits * plan.chunks);
  return launch_kernel(plan.vectors ? bn_stats_columns_kernel<T, kColumnVec<T>> : bn_stats_columns_kernel<T, 1>, blocks,
                       kStatsThreads, 0, true, stream, p);
}

}  // namespace fused_conv_bn
