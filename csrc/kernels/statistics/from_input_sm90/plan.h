// Which convolutions the patches kernels gather statistics of, and how their work is shared: host code without CUDA, so that
// select_plan() and its tests can ask.
//
// The sum of a convolution's results and that of their squares follow from sums over the input alone: of x at each tap of
// the filter, and of x times x at each pair of taps. With a stride of 1 a pair of taps differs from another of the same
// distance (a lag) in the rows and columns at the image's border only. So each lag is summed once over the positions that
// all pairs have in common, and apart from that over each row and column that some of them lack: the classes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/batch_norm/moments.h"
#include "kernels/common/fast_div.h"
#include "kernels/conv/problem.h"
#include "kernels/elementwise/memory_format.h"

namespace fused_conv_bn {

constexpr int kPatchTaps = 3;                      // of a filter, in each direction, at most
constexpr int kPatchChannels = 8;                  // of the input, at most
constexpr int kPatchClasses = 2 * kPatchTaps - 1;  // of rows, and of columns; the one in the middle has most of them
constexpr int kPatchWarps = 12;                    // of a block: three for each quarter of a multiprocessor
constexpr int kPatchProducts = 7;                  // matrices of 16 by 8 sums
// Costs, by time on an H200: of a task to begin with, of a step along one row, and of one down a column.
constexpr int kPatchBegin = 36;
constexpr int kPatchAlong = 3;
constexpr int kPatchDown = 4;
constexpr int kPatchMostBlocks = 150;
constexpr int kPatchMostRecords = 2048;
constexpr int kPatchRecord = kPatchProducts * 128;                                        // the sums of a class
constexpr int kPatchPairs = kPatchTaps * kPatchTaps * (kPatchTaps * kPatchTaps + 1) / 2;  // of taps
constexpr int kPatchPairSums = kPatchChannels * kPatchChannels;
constexpr int kPatchSums = kPatchPairs * kPatchPairSums + kPatchTaps * kPatchTaps * kPatchChannels;

FCB_HD constexpr int patch_step_cost(int unit_rows) { return unit_rows == 0 ? kPatchDown : unit_rows * kPatchAlong; }

// Rows and columns of a class, in every image. A task has four units: one or two neighbouring rows, along which the kernel
// walks, or where the class is one column, that column, which it walks down.
struct PatchJob {
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
    const int length = (static_cast<int>(spent) - kPatchBegin) / patch_step_cost(unit_rows);
    const int step = (begin + length + 2) / 4 * 4 - 2;
    return length <= 0 || step <= begin ? begin : (step < end ? step : end);
  }
};
constexpr int kPatchJobs = kPatchClasses * kPatchClasses + kPatchClasses;
static_assert(kPatchMostBlocks * (kPatchWarps + 1) + kPatchClasses * kPatchClasses <= kPatchMostRecords);

// Of those that occur: which warps have tasks of it, and where the first one leaves its record. The first class has
// a record of each block's instead.
struct PatchClass {
  uint32_t first_warp, warps;
  uint32_t record, records;
};

struct PatchPlan {
  int jobs;
  int classes;
  int blocks;
  uint32_t records;
  uint32_t cost;
  PatchJob job[kPatchJobs];
  PatchClass of[kPatchClasses * kPatchClasses];    // by class_index
  int class_index[kPatchClasses * kPatchClasses];  // by row and column; -1: it has no positions
};

// Where the share of warp number `warp` begins.
FCB_HD uint32_t patch_share(uint32_t cost, uint32_t warp, uint32_t warps) {
  return static_cast<uint32_t>(uint64_t{cost} * warp / warps);
}

// A class' rows or columns: [begin, end) within the image.
struct PatchRange {
  int begin, end;
};
inline PatchRange patch_range(int index, int64_t size, int64_t results, int64_t pad) {
  const int64_t first = -pad;
  const int64_t edge = kPatchTaps - 1;
  const int64_t begin = index <= edge ? first + index : first + results + index - edge - 1;
  const int64_t end = index == edge ? first + results : begin + 1;
  return {static_cast<int>(std::clamp<int64_t>(begin, 0, size)), static_cast<int>(std::clamp<int64_t>(end, 0, size))};
}

inline bool patches_support(const Conv2d& c, const GpuTraits& gpu) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const int64_t edge = kPatchTaps - 1;  // classes must not overlap
  return gpu.has_wgmma && c.element_bytes <= 4 && c.groups == 1 && c.C <= kPatchChannels && c.R <= kPatchTaps &&
         c.S <= kPatchTaps && c.stride_h == 1 && c.stride_w == 1 && c.dilation_h == 1 && c.dilation_w == 1 &&
         c.P >= edge && c.Q >= edge && c.H <= 1 << 20 && c.W <= 1 << 20 && c.C * c.H * c.W <= kLimit &&
         c.N <= 1 << 20 && c.N * (c.H + 8) * (c.W + 32) <= kLimit / 4;  // the plan's cost, at most
}

// Doubles of the workspace.
inline int64_t patches_workspace(const PatchPlan& plan) { return plan.records * int64_t{kPatchRecord} + kPatchSums; }

inline PatchPlan plan_patches(const Conv2d& c, const GpuTraits& gpu) {
  PatchPlan plan{};
  constexpr int kMiddle = kPatchTaps - 1;
  std::fill(std::begin(plan.class_index), std::end(plan.class_index), -1);
  const auto add = [&](int row_class, int col_class) {
    const PatchRange rows = patch_range(row_class, c.H, c.P, c.pad_h);
    const PatchRange cols = patch_range(col_class, c.W, c.Q, c.pad_w);
    if (rows.begin >= rows.end || cols.begin >= cols.end) {
      return;
    }
    const int index = plan.classes++;
    plan.class_index[row_class * kPatchClasses + col_class] = index;
    const auto add_job = [&](int row, int unit_rows, int units, int begin, int end) {
      const auto cost = static_cast<uint32_t>(patch_step_cost(unit_rows) * (end - begin) + kPatchBegin);
      const auto tasks = static_cast<uint32_t>(ceil_div(c.N * units, 4));
      plan.job[plan.jobs++] = {row,   cols.begin, unit_rows, FastDiv(static_cast<uint32_t>(units)), begin, end, index,
                               tasks, cost,       plan.cost};
      plan.cost += tasks * cost;
    };
    if (col_class != kMiddle) {
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
  };
  // The largest first: it ends in a record of each block's.
  add(kMiddle, kMiddle);
  for (int row_class = 0; row_class < kPatchClasses; ++row_class) {
    for (int col_class = 0; col_class < kPatchClasses; ++col_class) {
      if (row_class != kMiddle || col_class != kMiddle) {
        add(row_class, col_class);
      }
    }
  }
  // A warp is worth some positions.
  constexpr int64_t kLeast = 100;
  plan.blocks = static_cast<int>(
      std::clamp<int64_t>(plan.cost / (kPatchWarps * kLeast), 1, std::min(gpu.multiprocessors, kPatchMostBlocks)));
  const auto warps = static_cast<uint32_t>(plan.blocks) * kPatchWarps;
  const auto warp_of = [&](uint32_t cost) {  // whose share it is in
    auto warp = static_cast<uint32_t>(uint64_t{cost} * warps / plan.cost);
    while (warp > 0 && patch_share(plan.cost, warp, warps) > cost) {
      --warp;
    }
    while (warp + 1 < warps && patch_share(plan.cost, warp + 1, warps) <= cost) {
      ++warp;
    }
    return warp;
  };
  plan.records = static_cast<uint32_t>(plan.blocks);
  for (int j = 0; j < plan.jobs; ++j) {
    const PatchJob& job = plan.job[j];
    PatchClass& of = plan.of[job.class_index];
    if (j == 0 || job.class_index != plan.job[j - 1].class_index) {
      of.first_warp = warp_of(job.start);
    }
    of.warps = warp_of(job.start + job.tasks * job.cost - 1) + 1 - of.first_warp;
  }
  plan.of[0].record = 0;
  plan.of[0].records = static_cast<uint32_t>(plan.blocks);
  for (int i = 1; i < plan.classes; ++i) {
    plan.of[i].record = plan.records;
    plan.of[i].records = plan.of[i].warps;
    plan.records += plan.of[i].warps;
  }
  return plan;
}

#if defined(__CUDACC__)
// T: float, float16, bfloat16. The plan was made for the problem; the workspace has patches_workspace(plan) doubles. Leaves the
// channels' affines, and their running statistics.
template <typename T>
cudaError_t launch_conv_patches(const Conv2d& problem, const ConvOperands& operands, const PatchPlan& plan,
                                double* workspace, const TrainParams& bn, const AffineBuffer& affines,
                                cudaStream_t stream);
#endif

}  // namespace fused_conv_bn
