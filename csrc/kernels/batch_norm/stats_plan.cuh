// How the statistics of a tensor are gathered on the GPU: host code, which starts nothing.
//
// Kernels by how channels lie in memory:
//   planes    planes of at least 128 bytes: a block takes one channel, whole planes by groups of threads if they are
//             short.
//   columns   everything else, seen as a matrix whose columns have one channel each: channels_last, (N, C), and planes
//             of a few elements, all of which are columns of their own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/vec.cuh"
#include "kernels/elementwise/memory_format.h"

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

// Elements that a thread takes of a row at a time: 8 bytes of 16-bit ones, as each has sums of its own in registers.
template <typename T>
constexpr int kColumnVec = sizeof(T) == 8 ? 2 : 4;

// And how many such loads it has under way.
template <typename T, int W>
constexpr int kColumnBatch = W * sizeof(T) == kVecBytes ? kColumnLoads : 2 * kColumnLoads;

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

// For tensors that are dense with the given shape and not empty. address: theirs, or of several tensors the bits of all.
template <typename T>
StatsPlan plan_stats(uintptr_t address, const Shape& shape, int multiprocessors) {
  constexpr int64_t V = Vec<T>::kSize, W = kColumnVec<T>;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
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
StatsPlan plan_stats(const T* x, const Shape& shape, int multiprocessors) {
  return plan_stats<T>(reinterpret_cast<uintptr_t>(x), shape, multiprocessors);
}

}  // namespace fused_conv_bn
