// The statistics of a convolution's results from sums over its input (plan.h), in float64 throughout: products of
// two float32 are exact there, and Hopper's tensor cores multiply and add float64 as fast as anything else could
// (compute capability 9.0). Whatever the number of output channels, the convolution itself need not be computed.
//
//   statistics_from_input_kernel         sums for each lag, pair of channels and class
//   statistics_from_input_pairs_kernel   for each pair of taps and pair of channels: all classes that it has
//   statistics_from_input_finish_kernel  for each output channel: its moments, by its weights, and what BatchNorm makes of them
//
// A product of 16x4 by 4x8 adds four positions at a time, one of each lane of four that share a channel. Its rows are the
// channels at an anchor and at a neighbour of it, its columns the channels at a third position, so that it serves two
// lags at once:
//
//   product  rows 0 to 7   rows 8 to 15   columns           lags
//   0 to 4   (h, w)        (h - 1, w)     (h + 1, w + d)    (1, d) and (2, d), d from -2 to 2
//   5        (h, w)        (h, w - 1)     (h, w + 1)        (0, 1) and (0, 2)
//   6        (h, w)        1              (h, w)            (0, 0) and the sum
//
// Lanes walk along rows, or down columns, with what they need of them in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/launch.cuh"
#include "plan.h"

namespace fused_conv_bn {
namespace from_input {

template <typename T>
struct LagParams {
  const T* x;
  int64_t image;  // elements
  int C, H, W;
  int x_stride_c, x_stride_h, x_stride_w;
  uint32_t N;
  double* records;  // [records][kRecordSums]
  FromInputSm90 plan;
};

template <typename T, bool kVectors>
class LagSums {
 public:
  __device__ __forceinline__ explicit LagSums(const LagParams<T>& params) : p(params) {}

  // records: one for each warp of the block.
  __device__ __forceinline__ void run(double (*records)[kRecordSums]) {
    const uint32_t warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;  // costly ends of the list go to all blocks
    const uint32_t warps = kWarps * gridDim.x;
    const uint32_t begin = share_begin(p.plan.cost, warp, warps);
    const uint32_t end = share_begin(p.plan.cost, warp + 1, warps);
    Sums own;
    clear(own);
    int class_index = 0;
    const auto store = [&] {
      const ClassRecords& of = p.plan.of[class_index];
      write(own, class_index == 0 ? records[threadIdx.x / 32]
                                  : p.records + (of.record + warp - of.first_warp) * int64_t{kRecordSums});
    };
#pragma unroll 1
    for (int j = 0; j < p.plan.jobs; ++j) {
      const Job& job = p.plan.job[j];
      const uint32_t all = job.tasks * job.cost;
      if (job.start + all <= begin || job.start >= end) {
        continue;
      }
      if (job.class_index != class_index) {
        store();
        clear(own);
        class_index = job.class_index;
      }
      const uint32_t from = max(begin, job.start) - job.start;
      const uint32_t to = min(end - job.start, all);
#pragma unroll 1
      for (uint32_t task = from / job.cost; task * job.cost < to; ++task) {
        const int first = job.cut(max(from, task * job.cost) - task * job.cost);
        const int last = job.cut(to - task * job.cost);
        if (job.unit_rows == 2) {
          walk_along<2>(job, task, first, last, own);
        } else if (job.unit_rows == 1) {
          walk_along<1>(job, task, first, last, own);
        } else {
          walk_down(job, task, first, last, own);
        }
      }
    }
    store();
    __syncthreads();
    for (int e = threadIdx.x; e < kRecordSums; e += 32 * kWarps) {
      double sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        sum += records[i][e];
      }
      p.records[blockIdx.x * int64_t{kRecordSums} + e] = sum;
    }
  }

 private:
  using Sums = double[kProducts][4];

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int channel() { return threadIdx.x % 32 / 4; }

  static __device__ __forceinline__ void multiply(double (&sums)[4], double a, double b, double columns) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+d"(sums[0]), "+d"(sums[1]), "+d"(sums[2]), "+d"(sums[3])
                 : "d"(a), "d"(b), "d"(columns));
#endif
  }

  static __device__ __forceinline__ void clear(Sums& own) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        own[i][e] = 0;
      }
    }
  }

  // An anchor's products: its own value, those above and to the left, and those around it that columns are.
  static __device__ __forceinline__ void add(Sums& own, double anchor, double above, double left, double right,
                                             const double (&below)[5]) {
#pragma unroll
    for (int d = 0; d < 5; ++d) {
      multiply(own[d], anchor, above, below[d]);
    }
    multiply(own[5], anchor, left, right);
    multiply(own[6], anchor, 1, anchor);
  }

  // Where a lane's unit is: its image, and whether it and the lane's channel exist.
  struct Unit {
    const T* image;
    int index;  // in the image
    bool there;
  };
  __device__ __forceinline__ Unit find(const Job& job, uint32_t task) const {
    const uint32_t unit = task * 4 + lane() % 4;
    const uint32_t image = job.units.div(unit);
    return {p.x + image * p.image + channel() * p.x_stride_c, static_cast<int>(unit - image * job.units.divisor),
            image < p.N && channel() < p.C};
  }
  static __device__ __forceinline__ uint32_t load(const T* source) {
    if constexpr (sizeof(T) == 4) {
      return __ldg(reinterpret_cast<const uint32_t*>(source));
    } else {
      return __ldg(reinterpret_cast<const uint16_t*>(source));
    }
  }
  static __device__ __forceinline__ double value(uint32_t bits) {
    if constexpr (sizeof(T) == 4) {
      return static_cast<double>(__uint_as_float(bits));
    } else {
      return static_cast<double>(unpack_pair(T(), bits).x);
    }
  }

  // Along the rows of a unit, with the one before and the one behind it; anchors are in columns [first, last).
  template <int kRows>
  __device__ __forceinline__ void walk_along(const Job& job, uint32_t task, int first, int last, Sums& own) const {
    // Four values of a row, as loaded.
    constexpr int kWords = kVectors ? static_cast<int>(sizeof(T)) : 4;
    const Unit unit = find(job, task);
    const int row = job.row_begin + unit.index * kRows - 1;
    const T* const start = unit.image + static_cast<int64_t>(row) * p.x_stride_h;
    using Words = uint32_t[kRows + 2][kWords];
    const auto load_columns = [&](int col, Words& next) {
#pragma unroll
      for (int i = 0; i < kRows + 2; ++i) {
        const bool inside = unit.there && static_cast<unsigned>(row + i) < static_cast<unsigned>(p.H);
        const T* const source = start + i * p.x_stride_h + col * p.x_stride_w;
        if constexpr (kVectors) {
          load_words_if(inside && static_cast<unsigned>(col) < static_cast<unsigned>(p.W), source, next[i]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool there = inside && static_cast<unsigned>(col + e) < static_cast<unsigned>(p.W);
            next[i][e] = there ? load(source + e * p.x_stride_w) : 0;
          }
        }
      }
    };
    // Columns from col - 4 to col + 3; anchors are those from col - 2 to col + 1.
    double x[kRows + 2][8];
    const auto take = [&](int e, const Words& next) {
#pragma unroll
      for (int i = 0; i < kRows + 2; ++i) {
        const bool high = kVectors && sizeof(T) == 2 && e % 2 != 0;
        const uint32_t word = next[i][kVectors && sizeof(T) == 2 ? e / 2 : e];
        x[i][4 + e] = value(high ? word >> 16 : word);
      }
    };
    int col = (first + 2) / 4 * 4;
    Words before, next;
    load_columns(col - 4, before);
    load_columns(col, next);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      take(e, before);
    }
#pragma unroll 1
    for (; col - 2 < last; col += 4) {
#pragma unroll
      for (int i = 0; i < kRows + 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[i][e] = x[i][4 + e];
        }
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        // As late as registers want it, and yet long before the next are needed.
        if (a == 0) {
          take(0, next);
        }
        if (a < 3) {
          take(a + 1, next);
        }
        if (a == 2) {
          load_columns(col + 4, next);
        }
        const int w = col - 2 + a;
        if (w < first || w >= last) {
          continue;
        }
#pragma unroll
        for (int i = 1; i <= kRows; ++i) {
          const double below[5] = {x[i + 1][a], x[i + 1][a + 1], x[i + 1][a + 2], x[i + 1][a + 3], x[i + 1][a + 4]};
          add(own, x[i][a + 2], x[i - 1][a + 2], x[i][a + 1], x[i][a + 3], below);
        }
      }
    }
  }

  // Down a column; anchors are in rows [first, last).
  __device__ __forceinline__ void walk_down(const Job& job, uint32_t task, int first, int last, Sums& own) const {
    constexpr int kRows = 4;  // at a time
    const Unit unit = find(job, task);
    const int col = job.col_begin - 2;
    using Row = uint32_t[5];
    const auto load_row = [&](int row, Row& next) {
      const bool inside = unit.there && static_cast<unsigned>(row) < static_cast<unsigned>(p.H);
      const T* const source = unit.image + static_cast<int64_t>(row) * p.x_stride_h + col * p.x_stride_w;
#pragma unroll
      for (int d = 0; d < 5; ++d) {
        next[d] = inside && static_cast<unsigned>(col + d) < static_cast<unsigned>(p.W)
                      ? load(source + d * p.x_stride_w)
                      : 0;
      }
    };
    const auto take = [&](const Row& next, double (&x)[5]) {
#pragma unroll
      for (int d = 0; d < 5; ++d) {
        x[d] = value(next[d]);
      }
    };
    // Rows from `row` - 1 on; anchors are in the middle of all but the first and the last.
    double x[kRows + 2][5];
    Row before[2], next[kRows];
    load_row(first - 1, before[0]);
    load_row(first, before[1]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      load_row(first + 1 + i, next[i]);
    }
    take(before[0], x[kRows]);
    take(before[1], x[kRows + 1]);
#pragma unroll 1
    for (int row = first; row < last; row += kRows) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 0; d < 5; ++d) {
          x[i][d] = x[kRows + i][d];
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        take(next[i], x[2 + i]);
        load_row(row + 1 + kRows + i, next[i]);
      }
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (row + a < last) {
          add(own, x[a + 1][2], x[a][2], x[a + 1][1], x[a + 1][3], x[a + 2]);
        }
      }
    }
  }

  static __device__ __forceinline__ void write(const Sums& own, double* record) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        record[(i * 4 + e) * 32 + lane()] = own[i][e];
      }
    }
  }

  const LagParams<T>& p;
};

extern __shared__ double warp_records[][kRecordSums];

template <typename T, bool kVectors>
__global__ void __launch_bounds__(32 * kWarps, 1)
    statistics_from_input_kernel(const __grid_constant__ LagParams<T> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wait_for_previous();
  let_next_begin();
  LagSums<T, kVectors>(params).run(warp_records);
#endif
}

// ---- pairs of taps ---------------------------------------------------------------------------------------------------

// Two taps, the second not before the first in the filter's order.
struct TapPair {
  int a, b;
};
FCB_HD TapPair tap_pair(int index) {
  constexpr int kAllTaps = kTaps * kTaps;
  int a = 0;
  while (index >= kAllTaps - a) {
    index -= kAllTaps - a;
    ++a;
  }
  return {a, a + index};
}
// Where channels are among a product's sums of one lag: those of its rows, and of its columns.
__device__ __forceinline__ int row_channel(int e) { return e % 32 / 4; }
__device__ __forceinline__ int col_channel(int e) { return e % 4 * 2 + e / 32; }

struct PairParams {
  const double* records;
  double* sums;                          // [kAllSums]
  ClassRecords of[kClasses * kClasses];  // by row and column
};
constexpr int kPairWarps = 16;
constexpr int kPairBlocks = kTapPairs * kPairSums / 32;
constexpr int kPairGrid = kPairBlocks + kTaps * kTaps;

// A block has half a pair's sums, or a tap's; its warps share the records of all classes that these have.
static __global__ void __launch_bounds__(32 * kPairWarps)
    statistics_from_input_pairs_kernel(const __grid_constant__ PairParams p) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // Where the sums are in a record, and the first of the classes in each direction.
  int entry, row_class, col_class, lanes = 32;
  const int tap = static_cast<int>(blockIdx.x) - kPairBlocks;
  if (tap < 0) {
    const TapPair pair = tap_pair(blockIdx.x * 32 / kPairSums);
    const int r = pair.a / kTaps, s = pair.a % kTaps;
    const int dr = pair.b / kTaps - r, ds = pair.b % kTaps - s;
    // Of a product's two lags the second's anchor lies one on from the first tap.
    const bool down = dr == 2, right = dr == 0 && ds == 2;
    const int product = dr > 0 ? ds + 2 : (ds > 0 ? 5 : 6);
    entry = product * 128 + (down || right ? 64 : 0) + blockIdx.x * 32 % kPairSums;
    row_class = r + (down ? 1 : 0);
    col_class = s + (right ? 1 : 0);
  } else {
    entry = 6 * 128 + 64;
    row_class = tap / kTaps;
    col_class = tap % kTaps;
    lanes = kChannels;
  }
  __shared__ uint32_t records[kMostRecords];
  __shared__ double parts[kPairWarps][32];
  uint32_t count = 0;
#pragma unroll 1
  for (int i = 0; i < kTaps * kTaps; ++i) {
    const ClassRecords& of = p.of[(row_class + i / kTaps) * kClasses + col_class + i % kTaps];
    for (uint32_t record = threadIdx.x; record < of.records; record += 32 * kPairWarps) {
      records[count + record] = of.record + record;
    }
    count += of.records;
  }
  __syncthreads();
  let_next_begin();
  wait_for_previous();
  double sum = 0;
  if (lane < lanes) {
    // The sum of a channel is in the first row, in every column.
    const double* const source = p.records + entry + (tap < 0 ? lane : lane % 2 * 32 + lane / 2);
#pragma unroll 8
    for (uint32_t i = warp; i < count; i += kPairWarps) {
      sum += source[records[i] * int64_t{kRecordSums}];
    }
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && lane < lanes) {
    sum = 0;
#pragma unroll
    for (int i = 0; i < kPairWarps; ++i) {
      sum += parts[i][lane];
    }
    p.sums[tap < 0 ? blockIdx.x * 32 + lane : kTapPairs * kPairSums + tap * kChannels + lane] = sum;
  }
}

// ---- output channels -------------------------------------------------------------------------------------------------

template <typename T>
struct FinishParams {
  const double* sums;
  const T* w;
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  int C, R, S;
  double count;  // of an output channel's results
  TrainParams bn;
  AffineBuffer affines;
};
constexpr int kFinishThreads = 288;
constexpr int kFinishSums = kTapPairs * kPairSums / kFinishThreads;  // a thread's
static_assert(kFinishSums * kFinishThreads == kTapPairs * kPairSums);

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    statistics_from_input_finish_kernel(const __grid_constant__ FinishParams<T> p) {
  __shared__ double weights[kTaps * kTaps * kChannels];
  __shared__ TapPair pairs[kTapPairs];
  __shared__ double parts[2][kFinishThreads / 32];
  const int thread = threadIdx.x;
  const auto exists = [&](int tap, int c) { return tap / kTaps < p.R && tap % kTaps < p.S && c < p.C; };
  double w = 0;
  if (thread < kTaps * kTaps * kChannels) {
    const int tap = thread / kChannels, c = thread % kChannels;
    if (exists(tap, c)) {
      w = static_cast<double>(to_acc(
          p.w[blockIdx.x * p.w_stride_k + c * p.w_stride_c + tap / kTaps * p.w_stride_r + tap % kTaps * p.w_stride_s]));
    }
    weights[thread] = w;
  }
  if (thread < kTapPairs) {
    pairs[thread] = tap_pair(thread);
  }
  const ChannelValues channel = thread == 0 ? channel_values(p.bn, blockIdx.x) : ChannelValues{};
  __syncthreads();
  let_next_begin();
  wait_for_previous();
  double own[kFinishSums];
#pragma unroll
  for (int i = 0; i < kFinishSums; ++i) {
    own[i] = p.sums[thread + i * kFinishThreads];
  }
  double sum = 0, squares = 0;
  if (thread < kTaps * kTaps * kChannels && exists(thread / kChannels, thread % kChannels)) {
    sum = w * p.sums[kTapPairs * kPairSums + thread];
  }
#pragma unroll
  for (int i = 0; i < kFinishSums; ++i) {
    const int index = thread + i * kFinishThreads;
    const TapPair pair = pairs[index / kPairSums];
    const int c = row_channel(index % kPairSums), d = col_channel(index % kPairSums);
    if (exists(pair.a, c) && exists(pair.b, d)) {  // what is not there may be Inf or NaN times 0
      const double both = weights[pair.a * kChannels + c] * weights[pair.b * kChannels + d] * own[i];
      squares += pair.a == pair.b ? both : 2 * both;
    }
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, other);
    squares += __shfl_xor_sync(0xffffffffu, squares, other);
  }
  if (thread % 32 == 0) {
    parts[0][thread / 32] = sum;
    parts[1][thread / 32] = squares;
  }
  __syncthreads();
  if (thread == 0) {
    sum = squares = 0;
#pragma unroll
    for (int i = 0; i < kFinishThreads / 32; ++i) {
      sum += parts[0][i];
      squares += parts[1][i];
    }
    p.affines.set(blockIdx.x,
                  finish_channel(p.bn, channel, from_sums(p.count, 0, sum, squares), blockIdx.x, p.affines.element));
  }
}

template <typename T>
LagParams<T> lag_params(const FromInputSm90& plan, const Conv2d& c, const void* x, double* records) {
  LagParams<T> p{};
  p.x = static_cast<const T*>(x);
  p.image = c.C * c.H * c.W;
  p.C = static_cast<int>(c.C), p.H = static_cast<int>(c.H), p.W = static_cast<int>(c.W);
  p.x_stride_c = static_cast<int>(c.channels_last ? 1 : c.H * c.W);
  p.x_stride_h = static_cast<int>(c.channels_last ? c.W * c.C : c.W);
  p.x_stride_w = static_cast<int>(c.channels_last ? c.C : 1);
  p.N = static_cast<uint32_t>(c.N);
  p.records = records;
  p.plan = plan;
  return p;
}

inline PairParams pair_params(const FromInputSm90& plan, const double* records, double* sums) {
  PairParams p{};
  p.records = records;
  p.sums = sums;
  for (int i = 0; i < kClasses * kClasses; ++i) {
    p.of[i] = plan.class_index[i] < 0 ? ClassRecords{} : plan.of[plan.class_index[i]];
  }
  return p;
}

template <typename T>
FinishParams<T> finish_params(const Conv2d& c, const ConvOperands& operands, const double* sums, const TrainParams& bn,
                              const AffineBuffer& affines) {
  FinishParams<T> p{};
  p.sums = sums;
  p.w = static_cast<const T*>(operands.w);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_c = operands.w_stride_c;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
  p.C = static_cast<int>(c.C), p.R = static_cast<int>(c.R), p.S = static_cast<int>(c.S);
  p.count = static_cast<double>(c.N * c.P * c.Q);
  p.bn = bn;
  p.affines = affines;
  return p;
}

}  // namespace from_input

template <typename T>
cudaError_t FromInputSm90::launch_sums(const Conv2d& c, const void* x, double* workspace, double* sums,
                                       cudaStream_t stream) const {
  using namespace from_input;
  const LagParams<T> lags = lag_params<T>(*this, c, x, workspace);
  const bool vectors = !c.channels_last && c.W % 4 == 0 && reinterpret_cast<uintptr_t>(lags.x) % (4 * sizeof(T)) == 0;
  const auto kernel = vectors ? statistics_from_input_kernel<T, true> : statistics_from_input_kernel<T, false>;
  constexpr int kShared = kWarps * kRecordSums * static_cast<int>(sizeof(double));
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status == cudaSuccess) {
    status = launch_kernel(kernel, static_cast<unsigned>(blocks), 32 * kWarps, kShared, true, stream, lags);
  }
  if (status == cudaSuccess) {
    status = launch_kernel(statistics_from_input_pairs_kernel, kPairGrid, 32 * kPairWarps, 0, true, stream,
                           pair_params(*this, workspace, sums));
  }
  return status;
}

template <typename T>
cudaError_t FromInputSm90::launch(const Conv2d& c, const ConvOperands& operands, double* workspace, double* sums,
                                  const TrainParams& bn, const AffineBuffer& affines, cudaStream_t stream) const {
  using namespace from_input;
  const cudaError_t status = launch_sums<T>(c, operands.x, workspace, sums, stream);
  if (status != cudaSuccess) {
    return status;
  }
  return launch_kernel(statistics_from_input_finish_kernel<T>, static_cast<unsigned>(c.K), kFinishThreads, 0, true,
                       stream, finish_params<T>(c, operands, sums, bn, affines));
}

}  // namespace fused_conv_bn
