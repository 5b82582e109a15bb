// How tensors lie in memory: PyTorch's rules for strides and memory formats.
#pragma once

#include "kernels/elementwise/memory_format.h"
#include "operand.h"

namespace fused_conv_bn {

// The dimensions from the innermost to the outermost one of a channels_last tensor: C, then space from the last, then N.
inline int64_t channels_last_order(int64_t dim, int64_t position) {
  return position == 0 ? 1 : (position == dim - 1 ? 0 : dim - position);
}

// Whether the strides read as those of channels innermost, from 3 dimensions on. Extents of 1 make strides ambiguous, and what is
// ambiguous counts as contiguous.
inline bool has_channels_last(const Operand& x) {
  if (x.dim < 3 || x.strides[1] == 0) {
    return false;
  }
  int64_t least = 0;
  for (int64_t position = 0; position < x.dim; ++position) {
    const int64_t d = channels_last_order(x.dim, position);
    if (x.sizes[d] == 0 || x.strides[d] < least || (d == 0 && least == x.strides[1])) {
      return false;
    }
    least = x.strides[d] * (x.sizes[d] > 1 ? x.sizes[d] : 1);
  }
  return true;
}

// PyTorch's Tensor.suggest_memory_format(): whether it says channels_last (4-D) or channels_last_3d (5-D).
inline bool suggests_channels_last(const Operand& x) { return x.dim >= 4 && has_channels_last(x); }

inline Strides dense_strides(int64_t dim, const int64_t* sizes, bool channels_last) {
  Strides strides{};
  int64_t next = 1;
  for (int64_t position = 0; position < dim; ++position) {
    const int64_t d = channels_last ? channels_last_order(dim, position) : dim - 1 - position;
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

inline Strides dense_strides(const Operand& x, bool channels_last) {
  return dense_strides(x.dim, x.sizes, channels_last);
}

// Whether x's elements lie as the given strides say. The strides of extents of 1 do not count.
inline bool has_strides(const Operand& x, const Strides& strides) {
  for (int64_t d = 0; d < x.dim; ++d) {
    if (x.sizes[d] > 1 && x.strides[d] != strides[d]) {
      return x.numel == 0;
    }
  }
  return true;
}

inline bool is_dense(const Operand& x) {
  return has_strides(x, dense_strides(x, false)) || (x.dim >= 4 && has_strides(x, dense_strides(x, true)));
}

// Whether eager's F.batch_norm would put out x's shape as channels_last. Its CPU kernels ask for a dense layout first,
// contiguous before channels_last; cuDNN's go by the strides alone. They differ where extents of 1 leave a choice.
inline bool computes_channels_last(const Operand& x) {
  if (!x.device.is_cpu()) {
    return suggests_channels_last(x);
  }
  if (x.dim < 4 || has_strides(x, dense_strides(x, false))) {
    return false;
  }
  return has_strides(x, dense_strides(x, true)) || suggests_channels_last(x);
}

inline MemoryFormat memory_format(int64_t dim, bool channels_last) {
  if (!channels_last) {
    return MemoryFormat::Contiguous;
  }
  return dim == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// Whether eager's convolution puts its result out as channels_last: cuDNN and PyTorch's CPU kernels do if the input or
// the weight reads as that, but for float64 on CUDA and in 5 dimensions, and for empty batches. In 3 dimensions PyTorch makes the
// input contiguous first, and a permuted weight alone counts.
inline bool computes_channels_last(const PlainConv& c) {
  const bool on_cpu = c.input.device.is_cpu();
  if (c.numel == 0 || (c.input.dtype == ScalarType::Double && !(on_cpu && c.input.dim == 4))) {
    return false;
  }
  return suggests_channels_last(c.input) || has_channels_last(c.weight);
}

}  // namespace fused_conv_bn
