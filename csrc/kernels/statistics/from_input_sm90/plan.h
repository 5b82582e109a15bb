// Statistics of a convolution's results from sums over its input: which convolutions they cover, and how the work is shared. Host
// code without CUDA, so that select_plan() and its tests can ask.
//
// The sum of a convolution's results and that of their squares follow from sums over the input alone: of x at each tap of
// the filter, and of x times x at each pair of taps. With a stride of 1 a pair of taps differs from another of the same
// distance in the rows and columns at the image's border only.
//
//   lag      the distance of two taps. Each lag is summed once over the positions that all pairs have in common, and apart
//            from that over each row and column that some of them lack.
//   class    the positions of some rows and some columns of every image that the same pairs have: the inner ones, or a
//            row or column of the border.
//   job      a class, or its odd last row, as equal tasks: what a warp does in one walk.
//   record   the sums of one class by one warp, or by one block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/fast_div.h"
#include "kernels/conv/problem.h"
#include "kernels/elementwise/memory_format.h"

namespace fused_conv_bn {
namespace from_input {

constexpr int kTaps = 3;                 // of a filter, in each direction, at most
constexpr int kChannels = 8;             // of the input, at most
constexpr int kClasses = 2 * kTaps - 1;  // of rows, and of columns; the one in the middle has most of them
constexpr int kWarps = 12;               // of a block: three for each quarter of a multiprocessor
constexpr int kProducts = 7;             // matrices of 16 by 8 sums
// Costs, by time on an H200: of a task to begin with, of a step along one row, and of one down a column.
constexpr int kTaskCost = 36;
constexpr int kAlongCost = 3;
constexpr int kDownCost = 4;
constexpr int kMostBlocks = 150;
constexpr int kMostRecords = 2048;
constexpr int kRecordSums = kProducts * 128;                        // the sums of a class
constexpr int kTapPairs = kTaps * kTaps * (kTaps * kTaps + 1) / 2;  // of taps
constexpr int kPairSums = kChannels * kChannels;
constexpr int kAllSums = kTapPairs * kPairSums + kTaps * kTaps * kChannels;

FCB_HD constexpr int step_cost(int unit_rows) { return unit_rows == 0 ? kDownCost : unit_rows * kAlongCost; }

// Rows and columns of a class, in every image. A task has four units: one or two neighbouring rows, along which the kernel
// walks, or where the class is one column, that column, which it walks down.
struct Job {
  int row_begin, col_begin;
  int unit_rows;    // 0: it is a column
  FastDiv units;    // of an image
  int begin, end;   // of the walk: columns, or rows
  int class_index;  // among those that occur
  uint32_t tasks;
  uint32_t cost;   // of a task
  uint32_t start;  // the costs of all jobs before

  // Where in a task a warp stops, or goes on, whose share ends, or begins, after so much of the task's cost: at one end, or
  // at a position with which the kernel's steps begin.
  FCB_HD int cut(uint32_t spent) const {
    if (spent >= cost) {
      return end;
    }
    const int length = (static_cast<int>(spent) - kTaskCost) / step_cost(unit_rows);
    const int step = (begin + length + 2) / 4 * 4 - 2;
    return length <= 0 || step <= begin ? begin : (step < end ? step : end);
  }
};
constexpr int kMostJobs = kClasses * kClasses + kClasses;
static_assert(kMostBlocks * (kWarps + 1) + kClasses * kClasses <= kMostRecords);

// Of a class that occurs: which warps have tasks of it, and where the first one writes its record. The first class has
// a record of each block's instead.
struct ClassRecords {
  uint32_t first_warp, warps;
  uint32_t record, records;
};

// Where the share of a warp begins, in cost.
FCB_HD uint32_t share_begin(uint32_t cost, uint32_t warp, uint32_t warps) {
  return static_cast<uint32_t>(uint64_t{cost} * warp / warps);
}

// A class' rows or columns: [begin, end) within the image.
struct Range {
  int begin, end;
};
inline Range class_range(int index, int64_t size, int64_t results, int64_t pad) {
  const int64_t first = -pad;
  const int64_t edge = kTaps - 1;
  const int64_t begin = index <= edge ? first + index : first + results + index - edge - 1;
  const int64_t end = index == edge ? first + results : begin + 1;
  return {static_cast<int>(std::clamp<int64_t>(begin, 0, size)), static_cast<int>(std::clamp<int64_t>(end, 0, size))};
}

// Where sums are: of a pair of taps, the first not behind the second in the filter's order, and their channels; and of one.
FCB_HD constexpr int pair_sum_index(int tap, int channel, int second_tap, int second_channel) {
  const int pair = tap * kTaps * kTaps - tap * (tap - 1) / 2 + second_tap - tap;
  return pair * kPairSums + channel * 4 + second_channel / 2 + second_channel % 2 * 32;
}
FCB_HD constexpr int tap_sum_index(int tap, int channel) { return kTapPairs * kPairSums + tap * kChannels + channel; }

}  // namespace from_input

struct FromInputSm90 {
  int jobs;
  int classes;
  int blocks;
  uint32_t records;
  uint32_t cost;
  from_input::Job job[from_input::kMostJobs];
  from_input::ClassRecords of[from_input::kClasses * from_input::kClasses];  // by class_index
  int class_index[from_input::kClasses * from_input::kClasses];  // by row and column; -1: it has no positions

  static bool supports(const Conv2d& c, const GpuTraits& gpu) {
    using namespace from_input;
    constexpr int64_t kLimit = int64_t{1} << 30;
    const int64_t edge = kTaps - 1;  // classes must not overlap
    return gpu.has_wgmma && c.element_bytes <= 4 && c.groups == 1 && c.C <= kChannels && c.R <= kTaps && c.S <= kTaps &&
           c.stride_h == 1 && c.stride_w == 1 && c.dilation_h == 1 && c.dilation_w == 1 && c.P >= edge && c.Q >= edge &&
           c.H <= 1 << 20 && c.W <= 1 << 20 && c.C * c.H * c.W <= kLimit && c.N <= 1 << 20 &&
           c.N * (c.H + 8) * (c.W + 32) <= kLimit / 4;  // the plan's cost, at most
  }

  // Whether the sums take less time than the convolution that gathers moments, stem_sm90's, which computes 64 output channels
  // at a time. Measured on an H200 for 3x3 with 64 output channels, which make no difference to the sums: 8 channels 267 us of
  // 313 in float32, 276 of 272 and 180 of 166 in 16 bits; 3 channels 266 of 315 and 138 of 151. (That is for both passes.)
  static bool is_faster(const Conv2d& c) {
    return c.R == 3 && c.S == 3 && (c.element_bytes == 4 || c.C <= 4 || c.K > 64);
  }

  // For a problem that is in supports().
  static FromInputSm90 make(const Conv2d& c, const GpuTraits& gpu) {
    using namespace from_input;
    FromInputSm90 plan{};
    constexpr int kMiddle = kTaps - 1;
    std::fill(std::begin(plan.class_index), std::end(plan.class_index), -1);
    // The largest first: it ends in a record of each block's.
    plan.add_class(c, kMiddle, kMiddle);
    for (int row_class = 0; row_class < kClasses; ++row_class) {
      for (int col_class = 0; col_class < kClasses; ++col_class) {
        if (row_class != kMiddle || col_class != kMiddle) {
          plan.add_class(c, row_class, col_class);
        }
      }
    }
    // A warp is worth some positions.
    constexpr int64_t kLeast = 100;
    plan.blocks = static_cast<int>(
        std::clamp<int64_t>(plan.cost / (kWarps * kLeast), 1, std::min(gpu.multiprocessors, kMostBlocks)));
    plan.assign_records();
    return plan;
  }

  // Doubles: the records; and the sums of each pair of taps and of each tap.
  int64_t workspace() const { return records * int64_t{from_input::kRecordSums}; }
  static constexpr int64_t kSums = from_input::kAllSums;

#if defined(__CUDACC__)
  // T: float, float16, bfloat16. The plan was made for the problem; operands: the input and the weight. Leaves the channels'
  // affines, and their running statistics.
  template <typename T>
  cudaError_t launch(const Conv2d& problem, const ConvOperands& operands, double* workspace, double* sums,
                     const TrainParams& bn, const AffineBuffer& affines, cudaStream_t stream) const;
  // The sums alone.
  template <typename T>
  cudaError_t launch_sums(const Conv2d& problem, const void* x, double* workspace, double* sums,
                          cudaStream_t stream) const;
#endif

 private:
  // The jobs of a class, if it has any positions.
  void add_class(const Conv2d& c, int row_class, int col_class) {
    using namespace from_input;
    const Range rows = class_range(row_class, c.H, c.P, c.pad_h);
    const Range cols = class_range(col_class, c.W, c.Q, c.pad_w);
    if (rows.begin >= rows.end || cols.begin >= cols.end) {
      return;
    }
    const int index = classes++;
    class_index[row_class * kClasses + col_class] = index;
    const auto add_job = [&](int row, int unit_rows, int units, int begin, int end) {
      const auto task_cost = static_cast<uint32_t>(step_cost(unit_rows) * (end - begin) + kTaskCost);
      const auto tasks = static_cast<uint32_t>(ceil_div(c.N * units, 4));
      job[jobs++] = {row,   cols.begin, unit_rows, FastDiv(static_cast<uint32_t>(units)), begin, end, index,
                     tasks, task_cost,  cost};
      cost += tasks * task_cost;
    };
    if (col_class != kTaps - 1) {
      add_job(rows.begin, 0, 1, rows.begin, rows.end);
      return;
    }
    const int pairs = (rows.end - rows.begin) / 2;
    if (pairs > 0) {
      add_job(rows.begin, 2, pairs, cols.begin, cols.end);
    }
    if (rows.begin + 2 * pairs < rows.end) {
      add_job(rows.end - 1, 1, 1, cols.begin, cols.end);
    }
  }

  // Which warps have tasks of each class, and where their records are.
  void assign_records() {
    using namespace from_input;
    const auto warps = static_cast<uint32_t>(blocks) * kWarps;
    const auto warp_of = [&](uint32_t at) {  // whose share it is in
      auto warp = static_cast<uint32_t>(uint64_t{at} * warps / cost);
      while (warp > 0 && share_begin(cost, warp, warps) > at) {
        --warp;
      }
      while (warp + 1 < warps && share_begin(cost, warp + 1, warps) <= at) {
        ++warp;
      }
      return warp;
    };
    for (int j = 0; j < jobs; ++j) {
      ClassRecords& records_of = of[job[j].class_index];
      if (j == 0 || job[j].class_index != job[j - 1].class_index) {
        records_of.first_warp = warp_of(job[j].start);
      }
      records_of.warps = warp_of(job[j].start + job[j].tasks * job[j].cost - 1) + 1 - records_of.first_warp;
    }
    records = static_cast<uint32_t>(blocks);
    of[0].record = 0;
    of[0].records = records;
    for (int i = 1; i < classes; ++i) {
      of[i].record = records;
      of[i].records = of[i].warps;
      records += of[i].warps;
    }
  }
};

}  // namespace fused_conv_bn
