// BatchNorm's backward on the CPU (backward.h): a pass for the sums, and a pass for dz and the residual's gradient.
//
// Both go by blocks of elements, whose dv is computed on the stack, once: the first pass leaves it where a result is to be.
// A block lies in one plane; where planes are short, blocks are pieces of rows, of some periods of the channels each (as in
// scale_shift_cpu.h), and elements have numbers of their own. The work is cut by the tensor's shape alone and its parts are merged
// in their order, so that results are the same bits however many threads there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "backward.h"
#include "kernels/elementwise/scale_shift_cpu.h"
#include "stats_cpu.h"
#include "train_cpu.h"

namespace fused_conv_bn {

constexpr int kRunBlock = 512;  // elements of a run that are at hand at a time; of a row it is kBlock of them
constexpr int kSumRows = 8;     // rows that are added up before they are added in double
// Elements of a part of the sums: as many parts, of a size within these bounds.
constexpr int64_t kSumParts = 32;
constexpr int64_t kLeastSumPart = 16384, kLargestSumPart = 65536;

// What of the channels a block's elements take: one number for all of them, or one each.
template <typename Acc>
struct UniformNumbers {
  BackwardAffine<Acc> of_all;
  FCB_HD BackwardAffine<Acc> operator()(int64_t) const { return of_all; }
  FCB_HD UniformNumbers from(int64_t) const { return *this; }
};
template <typename Acc>
struct ElementNumbers {
  const Acc* center;
  const Acc* scale;
  const Acc* shift;
  const Acc* slope;
  const Acc* offset;
  FCB_HD BackwardAffine<Acc> operator()(int64_t i) const {
    return {{center[i], scale[i], shift[i]}, slope[i], offset[i]};
  }
  FCB_HD ElementNumbers from(int64_t i) const { return {center + i, scale + i, shift + i, slope + i, offset + i}; }
};

// Some elements: their dv and z, in memory or converted here.
template <typename T, int kSize>
struct BackwardBlock {
  const acc_t<T>* dv;
  const acc_t<T>* z;  // nullptr: it was not given
  alignas(kLineBytes) acc_t<T> gradients[kSize];
  alignas(kLineBytes) acc_t<T> inputs[kSize];
};

// n elements as acc_t<T>: where they lie, or in the buffer.
template <bool kV3, typename T>
FCB_HD const acc_t<T>* loaded(const T* from, acc_t<T>* buffer, int n) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return from;
  } else {
    load<kV3>(from, buffer, n);
    return buffer;
  }
}

// Of the n <= kSize elements from i on. numbers(k): those of element k of the block.
template <bool kV3, typename T, int kSize, typename Numbers>
FCB_HD void differentiate_block(const BackwardTensors<T>& t, const Epilogue& epilogue, int64_t i, int n,
                                const Numbers& numbers, BackwardBlock<T, kSize>& block) {
  using Acc = acc_t<T>;
  block.z = t.z == nullptr ? nullptr : loaded<kV3>(t.z + i, block.inputs, n);
  const Acc* const dy = loaded<kV3>(t.dy + i, block.gradients, n);
  block.dv = dy;
  if (epilogue.activation == Activation::none) {
    return;
  }
  block.dv = block.gradients;
  Acc* const dv = block.gradients;
  const Acc* const z = block.z;
  const auto negative_slope = static_cast<Acc>(epilogue.negative_slope);
  alignas(kLineBytes) Acc buffer[kSize];
  const Acc* const other = t.other == nullptr ? nullptr : loaded<kV3>(t.other + i, buffer, n);
  if (!t.from_result) {
    // To the activation's input, in loops of their own, which are there once for all activations.
    if (other != nullptr) {
#pragma GCC ivdep
      for (int k = 0; k < n; ++k) {
        buffer[k] = apply_affine(z[k], numbers(k).affine) + other[k];
      }
    } else {
#pragma GCC ivdep
      for (int k = 0; k < n; ++k) {
        buffer[k] = apply_affine(z[k], numbers(k).affine);
      }
    }
  }
  // Inlined at all costs, as in activate_block().
  dispatch_activation(epilogue.activation, [&](auto a) __attribute__((always_inline)) {
    if constexpr (a() != Activation::none) {
      if constexpr (derives_from_result(a())) {
        if (t.from_result) {
#pragma GCC ivdep
          for (int k = 0; k < n; ++k) {
            dv[k] = derivative_from_result<a(), T>(dy[k], other[k]);
          }
          return;
        }
      }
#pragma GCC ivdep
      for (int k = 0; k < n; ++k) {
        dv[k] = derivative_from_input<a(), T>(dy[k], buffer[k], negative_slope);
      }
    }
  });
}

// Leaves a block's dv for the next pass. Of 16-bit tensors what is added up is what the next pass will find, or else dz would
// not be the gradient of anything where it cancels.
template <bool kV3, typename T, int kSize>
FCB_HD void keep_block(T* scratch, int n, BackwardBlock<T, kSize>& block) {
  store<kV3>(block.dv, scratch, n);
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    load<kV3>(scratch, block.gradients, n);
  }
}

// ---- how tensors are walked ------------------------------------------------------------------------------------------

// Whether planes are runs. Else the channels' numbers are expanded to rows of elements, which takes as long as the sums of several
// rows, and is worth it the less the fewer rows there are. Measured for 1 to 128 images and planes of 9 to 400 elements.
inline bool has_runs(const Shape& shape) {
  const int64_t images = shape.numel / (shape.channels * shape.inner);
  return shape.inner >= (images < kSumRows ? 48 : 128);
}

// Short planes as rows of columns: a row is some periods of the channels, and a task some columns of some rows.
struct BackwardRows {
  int64_t length;
  int64_t width;  // columns of a task, at most kPeriodicRun
  int64_t across;
  int64_t rows;
  int64_t numel;
  int64_t height = 1;  // rows of a task
  int64_t down = 1;

  // size: elements of a task.
  BackwardRows(const Shape& shape, int64_t size) : numel(shape.numel) {
    const int64_t period = shape.channels * shape.inner;
    length = std::max<int64_t>(1, std::min(kPeriodicRun, shape.numel) / period) * period;
    width = std::min(length, kPeriodicRun / shape.inner * shape.inner);
    across = divide_up(length, width);
    rows = divide_up(shape.numel, length);
    height = std::min(rows, std::max<int64_t>(1, size / width));
    down = divide_up(rows, height);
  }

  int64_t tasks() const { return across * down; }
  int64_t first(int64_t task) const { return task % across * width; }
  int64_t columns(int64_t task) const { return std::min(width, length - first(task)); }
  int64_t first_row(int64_t task) const { return task / across * height; }
  int64_t end_row(int64_t task) const { return std::min(rows, first_row(task) + height); }
  // Of a row, of which there may be fewer in the last one.
  int64_t elements(int64_t task, int64_t row) const {
    return std::min(columns(task), numel - (row * length + first(task)));
  }
};

// The channels' numbers: [center, scale, shift, slope, offset][channels].
template <typename Acc>
struct ChannelNumbers {
  const Acc* arrays;
  int64_t channels;
  bool takes_affine;  // else only centers are read
  bool takes_sums;    // slopes and offsets are read

  UniformNumbers<Acc> of(int64_t c) const {
    const Acc* from = arrays + c;
    return {{{from[0], from[channels], from[2 * channels]}, from[3 * channels], from[4 * channels]}};
  }
};

// Those of some columns. What is not read is not there.
template <typename Acc>
struct ExpandedNumbers {
  Acc arrays[BackwardBuffer::kArrays][kPeriodicRun];

  ExpandedNumbers(const ChannelNumbers<Acc>& numbers, const Shape& shape, int64_t first, int64_t n) {
    for (int64_t i = 0; i < BackwardBuffer::kArrays; ++i) {
      if (i == 0 || (i < 3 ? numbers.takes_affine : numbers.takes_sums)) {
        expand(numbers.arrays + i * numbers.channels, shape, first, n, arrays[i]);
      }
    }
  }
  ElementNumbers<Acc> elements() const { return {arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]}; }
};

// ---- sums ------------------------------------------------------------------------------------------------------------

// The sums of runs, in so many parts each, which become few vectors.
constexpr int kSumLanes = 32;
struct LaneSums {
  double s1[kSumLanes] = {};
  double s2[kSumLanes] = {};
};

// Adds those of n <= kRunBlock elements of one channel: in acc_t<T>, then in double.
template <bool kHasZ, typename Acc>
FCB_HD void add_block_sums(const Acc* dv, const Acc* z, Acc center, int n, LaneSums& sums) {
  Acc sum[kSumLanes] = {}, product[kSumLanes] = {};
  const auto add = [&](int k, int count) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int l = 0; l < count; ++l) {
      sum[l] += dv[k + l];
      if constexpr (kHasZ) {
        product[l] += dv[k + l] * (z[k + l] - center);
      }
    }
  };
  int k = 0;
  for (; k + kSumLanes <= n; k += kSumLanes) {
    add(k, kSumLanes);
  }
  add(k, n - k);
  for (int l = 0; l < kSumLanes; ++l) {
    sums.s1[l] += static_cast<double>(sum[l]);
    sums.s2[l] += static_cast<double>(product[l]);
  }
}

// Adds those of n elements of one channel, from i on. scratch: where dv goes, or nullptr.
template <bool kV3, typename T>
FCB_HD void add_run_sums(const BackwardTensors<T>& t, const Epilogue& epilogue, int64_t i, int64_t n,
                         const UniformNumbers<acc_t<T>>& numbers, T* scratch, LaneSums& sums) {
  BackwardBlock<T, kRunBlock> block;
  for (int64_t at = 0; at < n; at += kRunBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kRunBlock, n - at));
    differentiate_block<kV3>(t, epilogue, i + at, count, numbers, block);
    if (scratch != nullptr) {
      keep_block<kV3>(scratch + i + at, count, block);
    }
    if (block.z != nullptr) {
      add_block_sums<true>(block.dv, block.z, numbers(0).affine.center, count, sums);
    } else {
      add_block_sums<false>(block.dv, block.z, numbers(0).affine.center, count, sums);
    }
  }
}

// Adds to s1 and s2, which have an element each of n columns, those of kRows rows from i on.
template <bool kV3, int kRows, typename T>
FCB_HD void add_row_sums(const BackwardTensors<T>& t, const Epilogue& epilogue, int64_t i, int64_t stride, int64_t n,
                         const ElementNumbers<acc_t<T>>& numbers, T* scratch, double* s1, double* s2) {
  using Acc = acc_t<T>;
  BackwardBlock<T, kBlock> blocks[kRows];
  for (int64_t at = 0; at < n; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n - at));
    const auto own = numbers.from(at);
    const Acc *dv[kRows], *z[kRows];
    for (int r = 0; r < kRows; ++r) {
      differentiate_block<kV3>(t, epilogue, i + r * stride + at, count, own, blocks[r]);
      if (scratch != nullptr) {
        keep_block<kV3>(scratch + i + r * stride + at, count, blocks[r]);
      }
      dv[r] = blocks[r].dv;
      z[r] = blocks[r].z;
    }
    Acc a[kBlock], b[kBlock];
#pragma GCC ivdep
    for (int k = 0; k < count; ++k) {
      Acc sum = dv[0][k];
      for (int r = 1; r < kRows; ++r) {
        sum += dv[r][k];
      }
      a[k] = sum;
    }
    for (int k = 0; k < count; ++k) {
      s1[at + k] += static_cast<double>(a[k]);
    }
    if (z[0] == nullptr) {
      continue;
    }
#pragma GCC ivdep
    for (int k = 0; k < count; ++k) {
      Acc sum = dv[0][k] * (z[0][k] - own.center[k]);
      for (int r = 1; r < kRows; ++r) {
        sum += dv[r][k] * (z[r][k] - own.center[k]);
      }
      b[k] = sum;
    }
    for (int k = 0; k < count; ++k) {
      s2[at + k] += static_cast<double>(b[k]);
    }
  }
}

// [s1, s2][channels] of planes that are runs.
template <typename T, typename ParallelFor>
void sums_of_runs(const BackwardTensors<T>& t, const Shape& shape, const Epilogue& epilogue,
                  const ChannelNumbers<acc_t<T>>& numbers, T* scratch, double* sums, const ParallelFor& parallel_for) {
  const int64_t channels = shape.channels, inner = shape.inner;
  const int64_t size = std::clamp(shape.numel / kSumParts, kLeastSumPart, kLargestSumPart);
  // A unit is a plane, or a piece of one; a part is some units of one channel.
  const int64_t images = shape.numel / (channels * inner);
  const int64_t piece = divide_up(inner, divide_up(inner, size));
  const Planes planes{channels, inner, divide_up(inner, piece), piece};
  const int64_t units = images * planes.pieces;
  const int64_t share = std::max<int64_t>(1, size / piece);
  const int64_t parts = divide_up(units, share);
  std::vector<double> partials(static_cast<size_t>(2 * parts * channels));
  parallel_for(int64_t{0}, parts * channels, std::max<int64_t>(1, kStatsGrain / (share * piece)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t p = i / channels, c = i % channels;
                   const auto own = numbers.of(c);
                   LaneSums lanes;
                   with_isa([&](auto isa) __attribute__((always_inline)) {
                     for (int64_t unit = p * share; unit < std::min(units, (p + 1) * share); ++unit) {
                       add_run_sums<isa.kV3>(t, epilogue, planes.offset(unit, c), planes.size(unit), own, scratch,
                                             lanes);
                     }
                   });
                   for (int l = 0; l < kSumLanes; ++l) {
                     partials[2 * i] += lanes.s1[l];
                     partials[2 * i + 1] += lanes.s2[l];
                   }
                 }
               });
  for (int64_t i = 0; i < parts * channels; ++i) {
    sums[i % channels] += partials[2 * i];
    sums[channels + i % channels] += partials[2 * i + 1];
  }
}

// The same of short planes.
template <typename T, typename ParallelFor>
void sums_of_rows(const BackwardTensors<T>& t, const Shape& shape, const Epilogue& epilogue,
                  const ChannelNumbers<acc_t<T>>& numbers, T* scratch, double* sums, const ParallelFor& parallel_for) {
  const BackwardRows r(shape, std::clamp(shape.numel / kSumParts, kLeastSumPart, kLargestSumPart));
  std::vector<double> partials(static_cast<size_t>(2 * r.width * r.tasks()));
  parallel_for(int64_t{0}, r.tasks(), std::max<int64_t>(1, kStatsGrain / (r.width * r.height)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t n = r.columns(task), last = r.end_row(task);
                   const ExpandedNumbers<acc_t<T>> own(numbers, shape, r.first(task), n);
                   double* const s1 = partials.data() + 2 * r.width * task;
                   with_isa([&](auto isa) __attribute__((always_inline)) {
                     int64_t row = r.first_row(task);
                     const auto add = [&](auto count) __attribute__((always_inline)) {
                       add_row_sums<isa.kV3, count()>(t, epilogue, row * r.length + r.first(task), r.length,
                                                      std::max<int64_t>(0, r.elements(task, row + count() - 1)),
                                                      own.elements(), scratch, s1, s1 + r.width);
                       row += count();
                     };
                     while (row + kSumRows <= last && r.elements(task, row + kSumRows - 1) == n) {
                       add(std::integral_constant<int, kSumRows>{});
                     }
                     while (row < last) {
                       add(std::integral_constant<int, 1>{});
                     }
                   });
                 }
               });
  for (int64_t task = 0; task < r.tasks(); ++task) {
    const double* const s1 = partials.data() + 2 * r.width * task;
    int64_t c = r.first(task) / shape.inner % shape.channels;
    for (int64_t k = 0; k < r.columns(task); k += shape.inner) {
      for (int64_t i = 0; i < shape.inner; ++i) {
        sums[c] += s1[k + i];
        sums[shape.channels + c] += s1[r.width + k + i];
      }
      c = c + 1 < shape.channels ? c + 1 : 0;
    }
  }
}

// ---- dz and the residual's gradient ----------------------------------------------------------------------------------

// Of n elements from i on.
template <bool kV3, typename T, typename Numbers>
FCB_HD void apply_run(const BackwardTensors<T>& t, const Epilogue& epilogue, int64_t i, int64_t n,
                      const Numbers& numbers, bool corrects) {
  using Acc = acc_t<T>;
  BackwardBlock<T, kRunBlock> block;
  Acc buffer[kRunBlock];
  for (int64_t at = 0; at < n; at += kRunBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kRunBlock, n - at));
    const auto own = numbers.from(at);
    differentiate_block<kV3>(t, epilogue, i + at, count, own, block);
    if (t.dresidual != nullptr) {
      store<kV3>(block.dv, t.dresidual + i + at, count);
    }
    if (t.dz == nullptr) {
      continue;
    }
    Acc* to = buffer;
    if constexpr (std::is_same_v<T, Acc>) {
      to = t.dz + i + at;
    }
    const Acc *const dv = block.dv, *const z = block.z;
    // dv may be where the result goes, element for element.
    if (corrects) {
#pragma GCC ivdep
      for (int k = 0; k < count; ++k) {
        // Not by way of a local variable: then loops of one number for all are not vectorised.
        to[k] = dv[k] * own(k).affine.scale + ((z[k] - own(k).affine.center) * own(k).slope + own(k).offset);
      }
    } else {
#pragma GCC ivdep
      for (int k = 0; k < count; ++k) {
        to[k] = dv[k] * own(k).affine.scale;
      }
    }
    if constexpr (!std::is_same_v<T, Acc>) {
      store<kV3>(buffer, t.dz + i + at, count);
    }
  }
}

template <typename T, typename ParallelFor>
void backward_apply(const BackwardTensors<T>& t, const Shape& shape, const Epilogue& epilogue,
                    const ChannelNumbers<acc_t<T>>& numbers, const ParallelFor& parallel_for) {
  const bool corrects = numbers.takes_sums;
  if (has_runs(shape)) {
    parallel_for(int64_t{0}, shape.numel, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t plane = begin / shape.inner;
        const int64_t n = std::min(end, (plane + 1) * shape.inner) - begin;
        const auto own = numbers.of(plane % shape.channels);
        with_isa([&](auto isa)
                     __attribute__((always_inline)) { apply_run<isa.kV3>(t, epilogue, begin, n, own, corrects); });
        begin += n;
      }
    });
    return;
  }
  const BackwardRows r(shape, 2 * kGrain);
  parallel_for(int64_t{0}, r.tasks(), std::max<int64_t>(1, kGrain / (r.width * r.height)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const ExpandedNumbers<acc_t<T>> own(numbers, shape, r.first(task), r.columns(task));
                   with_isa([&](auto isa) __attribute__((always_inline)) {
                     for (int64_t row = r.first_row(task); row < r.end_row(task); ++row) {
                       apply_run<isa.kV3>(t, epilogue, row * r.length + r.first(task), r.elements(task, row),
                                          own.elements(), corrects);
                     }
                   });
                 }
               });
}

// ---- all of it -------------------------------------------------------------------------------------------------------

// given: [s1, s2][channels] of which dz is to be made, or nullptr. Tensors are dense with the given shape and not empty.
template <typename T, typename ParallelFor>
void run_backward(BackwardTensors<T> t, const Shape& shape, const BackwardParams& bn, Epilogue epilogue,
                  const double* given, const ParallelFor& parallel_for) {
  using Acc = acc_t<T>;
  const int64_t channels = shape.channels;
  const std::unique_ptr<Acc[]> arrays(new Acc[BackwardBuffer::kArrays * channels]);
  for (int64_t c = 0; c < channels; ++c) {
    const auto affine = backward_affine<Acc>(bn, static_cast<uint32_t>(c));
    arrays[c] = affine.center;
    arrays[channels + c] = affine.scale;
    arrays[2 * channels + c] = affine.shift;
    arrays[3 * channels + c] = arrays[4 * channels + c] = 0;
  }
  const bool corrects = bn.trains() && t.dz != nullptr;
  const bool from_input = epilogue.activation != Activation::none && !t.from_result;
  ChannelNumbers<Acc> numbers{arrays.get(), channels, from_input, false};
  std::vector<double> sums;
  if (bn.wants_sums() || (corrects && given == nullptr)) {
    sums.resize(static_cast<size_t>(2 * channels));
    // What follows takes dv from here.
    T* const scratch = epilogue.activation == Activation::none ? nullptr : t.dresidual != nullptr ? t.dresidual : t.dz;
    const auto gather = has_runs(shape) ? sums_of_runs<T, ParallelFor> : sums_of_rows<T, ParallelFor>;
    gather(t, shape, epilogue, numbers, scratch, sums.data(), parallel_for);
    given = sums.data();
    if (scratch != nullptr) {
      t = {scratch, corrects ? t.z : nullptr, nullptr, t.dz, nullptr, false};
      epilogue.activation = Activation::none;
    }
  }
  if (!sums.empty() || corrects) {
    const BackwardBuffer buffer{corrects ? arrays.get() : nullptr, static_cast<uint32_t>(channels), kElement<T>};
    for (int64_t c = 0; c < channels; ++c) {
      finish_backward(bn, static_cast<uint32_t>(c), given[c], given[channels + c], buffer);
    }
  }
  if (t.dz != nullptr || t.dresidual != nullptr) {
    numbers.takes_affine = true;
    numbers.takes_sums = corrects;
    backward_apply(t, shape, epilogue, numbers, parallel_for);
  }
}

}  // namespace fused_conv_bn
