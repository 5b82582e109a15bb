// Depthwise convolution: y = activation(conv(x, w) * scale + shift + residual), where each channel has its own filter.
//
// There is no product of matrices here, so the goal is to move x and y once while the FMAs, conversions and addresses
// of 9 or 25 taps an output hide behind that. Both kernels work alike:
//   - A block takes one tile after the other, and copies the next one to shared memory (cp.async) while it computes.
//   - A thread walks down some rows of outputs, a few columns wide. Each row of inputs is read from shared memory and
//     converted once for all the rows of the filter: kLive output rows are being summed at any time.
//   - The weights stay in registers, in the accumulator's type. Sums are plain FMAs in filter order. Padding is zeros.
// They differ in what is contiguous:
//   channels_last  a thread has a few channels of two or four columns; a tile is in_rows x in_cols pixels of 64 bytes,
//                  padding included; outputs are stored as they are finished.
//   planes         a thread has one channel of seven columns; a tile is full rows of a plane, or whole planes, so it is
//                  one contiguous piece of x and gives one of y. Both are copied 16 bytes at a time, through shared
//                  memory, however odd the width.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "conv_depthwise.h"
#include "conv_params.h"
#include "copy_async.cuh"
#include "epilogue.h"
#include "memory_format.h"
#include "vec.cuh"

namespace fused_conv_bn {

template <typename T>
struct DepthwiseParams {
  const T* x;
  const T* w;
  const T* residual;  // nullptr: none
  T* y;
  const acc_t<T>* scale;
  const acc_t<T>* shift;
  int64_t w_stride_k, w_stride_r, w_stride_s;
  int C, H, W, P, Q;
  int pad_h, pad_w;
  Activation activation;
  int rows, groups;
  int tile_rows, tile_cols;
  int in_rows, in_cols;
  int planes, all_planes;
  uint32_t tiles;
  int stage_bytes;
  FastDiv col_threads;
  FastDiv tile_groups;
  FastDiv tiles_p;
  FastDiv tiles_q;
  FastDiv channels;
  // channels_last: whether pixels of x can be copied 16 bytes at a time, and a thread's channels be stored at once.
  bool x_vectors;
  bool y_vectors;
  bool residual_vectors;
};

// The quotient; n becomes the remainder.
__device__ __forceinline__ uint32_t div_mod(const FastDiv& d, uint32_t& n) {
  const uint32_t q = d.div(n);
  n -= q * d.divisor;
  return q;
}

// ---- 8 or 16 bytes of channels --------------------------------------------------------------------------------------

template <typename T, int V>
struct Lanes {
  static constexpr int kWords = V * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
};

template <typename T, int V>
__device__ __forceinline__ void load_shared(const T* address, Lanes<T, V>& lanes) {
  if constexpr (Lanes<T, V>::kWords == 4) {
    const uint4 w = *reinterpret_cast<const uint4*>(address);
    lanes.words[0] = w.x, lanes.words[1] = w.y, lanes.words[2] = w.z, lanes.words[3] = w.w;
  } else {
    static_assert(Lanes<T, V>::kWords == 2);
    const uint2 w = *reinterpret_cast<const uint2*>(address);
    lanes.words[0] = w.x, lanes.words[1] = w.y;
  }
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Lanes<T, V>& lanes, acc_t<T> (&out)[V]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const float2 pair = unpack_pair(T(), lanes.words[k / 2]);
      out[k] = pair.x;
      out[k + 1] = pair.y;
    }
  } else {
    static_assert(sizeof(T) == 4);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = __uint_as_float(lanes.words[k]);
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ void pack(const acc_t<T> (&in)[V], Lanes<T, V>& lanes) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      lanes.words[k / 2] = pack_pair(T(), in[k], in[k + 1]);
    }
  } else {
    static_assert(sizeof(T) == 4);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      lanes.words[k] = __float_as_uint(in[k]);
    }
  }
}

// The first n of V channels of a pixel in global memory; all are there and at a multiple of their size if `whole`.
template <typename T, int V>
__device__ __forceinline__ void load_channels(const T* address, int n, bool whole, acc_t<T> (&out)[V]) {
  if (whole) {
    Lanes<T, V> lanes;
    load_words(address, lanes.words);
    unpack(lanes, out);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = k < n ? to_acc(address[k]) : acc_t<T>(0);
    }
  }
}
template <typename T, int V>
__device__ __forceinline__ void store_channels(T* address, int n, bool whole, const acc_t<T> (&in)[V]) {
  if (whole) {
    Lanes<T, V> lanes;
    pack(in, lanes);
    store_words(address, lanes.words);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k < n) {
        address[k] = from_acc<T>(in[k]);
      }
    }
  }
}

// ---- what the kernels share -----------------------------------------------------------------------------------------

// The activation is chosen at run time: a uniform branch for many outputs, and a fifth of the code. Where it is long,
// it is there for kAtOnce values, and the others take their turn in the same registers.
template <int kAtOnce, typename Acc, int kCount>
__device__ __forceinline__ void activate(Activation activation, Acc (&z)[kCount]) {
  static_assert(kCount % kAtOnce == 0);
  const auto all = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = f(z[i]);
    }
  };
  const auto in_turn = [&](auto f) {
#pragma unroll 1
    for (int turn = 0; turn < kCount / kAtOnce; ++turn) {
      Acc next[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        next[i] = i < kCount - kAtOnce ? z[i + kAtOnce] : f(z[i - (kCount - kAtOnce)]);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        z[i] = next[i];
      }
    }
  };
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      all([](Acc v) { return activate<Activation::relu>(v); });
      break;
    case Activation::relu6:
      all([](Acc v) { return activate<Activation::relu6>(v); });
      break;
    case Activation::silu:
      in_turn([](Acc v) { return activate<Activation::silu>(v); });
      break;
    case Activation::hardswish:
      in_turn([](Acc v) { return activate<Activation::hardswish>(v); });
      break;
  }
}

// The filter of channel c, as the thread's channel k.
template <typename T, int R, int V>
__device__ __forceinline__ void load_filter(const DepthwiseParams<T>& p, int c, acc_t<T> (&w)[R][R][V], int k) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int s = 0; s < R; ++s) {
      w[r][s][k] = to_acc(p.w[c * p.w_stride_k + r * p.w_stride_r + s * p.w_stride_s]);
    }
  }
}

// Calls f(integral_constant<int, i>) for the run-time i, kFirst <= i < kEnd.
template <int kEnd, int kFirst = 0, typename F>
__device__ __forceinline__ void with_constant(int i, F&& f) {
  if constexpr (kFirst + 1 < kEnd) {
    if (i != kFirst) {
      return with_constant<kEnd, kFirst + 1>(i, f);
    }
  }
  f(std::integral_constant<int, kFirst>{});
}

// Sums `rows` rows of outputs, kCols wide, of V channels. load(in): the next row of the inputs; finish(sum): the next
// row of the outputs. Output t takes inputs t * kStride to t * kStride + R - 1, so input t * kStride + i is under row
// i + j * kStride of the filter for output t - j, for each j < kLive for which there is such a row.
//
// Output t is summed in sums[t % kLive]: which one that is must be known at compile time, so there is code for each
// t % kLive. Finishing is long code and there once.
template <int R, int kStride, int kCols, int V, typename Acc, typename Load, typename Finish>
__device__ __forceinline__ void walk_rows(int rows, const Acc (&w)[R][R][V], Load load, Finish finish) {
  static_assert((R - 1) % kStride == 0, "the first input of a step finishes an output");
  constexpr int kLive = (R - 1) / kStride + 1;
  constexpr int kIn = (kCols - 1) * kStride + R;
  Acc sums[kLive][kCols][V];
  int u = 0;  // t % kLive
#pragma unroll 1
  for (int t = 0; t < rows + kLive - 1; ++t) {
    Acc done[kCols][V];
    with_constant<kLive>(u, [&](auto constant) {
      constexpr int kU = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < kStride; ++i) {
        const int oldest = (R - 1 - i) / kStride;
        if (i > 0 && t - oldest >= rows) {
          continue;
        }
        Acc in[kIn][V];
        load(in);
#pragma unroll
        for (int j = 0; j <= oldest; ++j) {
          if (j == kLive - 1 ? t < j : static_cast<unsigned>(t - j) >= static_cast<unsigned>(rows)) {
            continue;
          }
          const int r = i + j * kStride;
          auto& from = sums[(kU - j + kLive) % kLive];
          auto& to = r == R - 1 ? done : from;
#pragma unroll
          for (int s = 0; s < R; ++s) {
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
#pragma unroll
              for (int k = 0; k < V; ++k) {
                const Acc x = in[q * kStride + s][k];
                to[q][k] = r == 0 && s == 0 ? x * w[0][0][k] : fma(x, w[r][s][k], s == 0 ? from[q][k] : to[q][k]);
              }
            }
          }
        }
      }
    });
    if (t >= kLive - 1) {
      finish(done);
    }
    u = u + 1 == kLive ? 0 : u + 1;
  }
}

// ---- channels_last --------------------------------------------------------------------------------------------------

// Channels of a block.
template <typename T>
constexpr int kDepthwiseChunk = kDepthwiseChunkBytes / static_cast<int>(sizeof(T));
// Columns of a thread.
template <typename T, int R, int kStride>
constexpr int kDepthwiseCols = depthwise_cols(sizeof(T), R, kStride);

// A tile of channels_last outputs.
struct DepthwisePixels {
  uint32_t n;
  int p, q;
};

template <typename T>
__device__ __forceinline__ DepthwisePixels pixels_of(const DepthwiseParams<T>& p, uint32_t tile) {
  uint32_t tile_p = p.tiles_q.div(tile);
  const uint32_t tile_q = tile - tile_p * p.tiles_q.divisor;
  const uint32_t n = div_mod(p.tiles_p, tile_p);
  return {n, static_cast<int>(tile_p) * p.tile_rows, static_cast<int>(tile_q) * p.tile_cols};
}

// Starts the copy of a tile's inputs: stage[row][col][channel]. A warp takes a row, so that whether it exists is
// decided once, and 8 pixels at a time.
template <int kStride, typename T>
__device__ __forceinline__ void copy_pixels(const DepthwiseParams<T>& p, uint32_t tile, int first_channel, T* stage) {
  constexpr int kChunk = kDepthwiseChunk<T>;
  constexpr int V = Vec<T>::kSize;
  const DepthwisePixels at = pixels_of(p, tile);
  const T* image = p.x + static_cast<int64_t>(at.n) * p.C * p.H * p.W + first_channel;
  const int h0 = at.p * kStride - p.pad_h;
  const int w0 = at.q * kStride - p.pad_w;
  const int channels = min(kChunk, p.C - first_channel);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < p.in_rows; row += blockDim.x / 32) {
    const int h = h0 + row;
    const bool row_exists = static_cast<unsigned>(h) < static_cast<unsigned>(p.H);
    const T* from = image + (row_exists ? h * p.W * p.C : 0);
    T* to = stage + row * p.in_cols * kChunk;
    if (p.x_vectors) {
      constexpr int kPixels = 32 / kDepthwiseChunkWords;
      const int k = lane % kDepthwiseChunkWords * V;
      const int first = lane / kDepthwiseChunkWords;
      const bool exists = row_exists && k < channels;
      from += (w0 + first) * p.C + k;
      to += first * kChunk + k;
#pragma unroll 1
      for (int col = w0 + first; col < w0 + p.in_cols; col += kPixels) {
        copy_async(to, from, exists && static_cast<unsigned>(col) < static_cast<unsigned>(p.W));
        from += kPixels * p.C;
        to += kPixels * kChunk;
      }
    } else {
#pragma unroll 1
      for (int e = lane; e < p.in_cols * kChunk; e += 32) {
        const int col = w0 + e / kChunk;
        const int k = e % kChunk;
        const bool exists = row_exists && k < channels && static_cast<unsigned>(col) < static_cast<unsigned>(p.W);
        to[e] = exists ? from[col * p.C + k] : from_acc<T>(0);
      }
    }
  }
}

// gridDim.x: the chunks of channels, so that the blocks which share lines of x run together. gridDim.y: the blocks that
// share the tiles of a chunk.
template <typename T, int R, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads) conv_depthwise_channels_last_kernel(const DepthwiseParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int V = kDepthwiseLaneChannels;
  constexpr int kChunk = kDepthwiseChunk<T>;
  constexpr int kCols = kDepthwiseCols<T, R, kStride>;
  constexpr int kIn = (kCols - 1) * kStride + R;
  extern __shared__ uint4 shared[];
  const int first_channel = blockIdx.x * kChunk;
  const auto stage = [&](int i) {
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(shared) + i * p.stage_bytes);
  };
  // The last chunk may have fewer channels: its pixels then need fewer threads, and whole warps have nothing to do.
  const unsigned lanes = (min(kChunk, p.C - first_channel) + V - 1) / V;
  uint32_t col_thread = threadIdx.x / lanes;
  const int k0 = static_cast<int>(threadIdx.x - col_thread * lanes) * V;
  const int c0 = first_channel + k0;
  const int group = static_cast<int>(div_mod(p.col_threads, col_thread));  // those from p.groups on: no rows
  const int first_col = static_cast<int>(col_thread) * kCols;
  Acc w[R][R][V];
  Affine<Acc> affine[V];

  const uint32_t step = gridDim.y;
#pragma unroll 1
  for (uint32_t next = blockIdx.y, i = 0; next < p.tiles + step; next += step, i ^= 1) {
    if (next < p.tiles) {
      copy_pixels<kStride>(p, next, first_channel, stage(i));
    }
    copy_async_commit();
    if (next == blockIdx.y) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int c = min(c0 + k, p.C - 1);
        affine[k] = {0, p.scale[c], p.shift[c]};
        load_filter(p, c, w, k);
      }
      continue;
    }
    copy_async_wait_all_but<1>();
    __syncthreads();

    const DepthwisePixels at = pixels_of(p, next - step);
    const int first_row = at.p + group * p.rows;
    const int rows = min(p.rows, min(p.P, at.p + p.tile_rows) - first_row);
    const int cols = min(p.Q - at.q, p.tile_cols) - first_col;
    if (rows > 0 && cols > 0) {
      const T* in_at = stage(i ^ 1) + (group * p.rows * kStride * p.in_cols + first_col * kStride) * kChunk + k0;
      T* out = p.y + static_cast<int64_t>(at.n) * p.C * p.P * p.Q + ((first_row * p.Q + at.q + first_col) * p.C + c0);
      walk_rows<R, kStride, kCols, V>(
          rows, w,
          [&](Acc(&in)[kIn][V]) {
#pragma unroll
            for (int col = 0; col < kIn; ++col) {
              Lanes<T, V> lanes;
              load_shared(in_at + col * kChunk, lanes);
              unpack(lanes, in[col]);
            }
            in_at += p.in_cols * kChunk;
          },
          [&](const Acc(&sum)[kCols][V]) {
            Acc z[kCols * V];
#pragma unroll
            for (int k = 0; k < kCols * V; ++k) {
              z[k] = epilogue<Activation::none>(sum[k / V][k % V], affine[k % V]);
            }
            if (p.residual != nullptr) {
#pragma unroll
              for (int q = 0; q < kCols; ++q) {
                if (q < cols) {
                  Acc residual[V];
                  load_channels(p.residual + (out - p.y) + q * p.C, p.C - c0, p.residual_vectors, residual);
#pragma unroll
                  for (int k = 0; k < V; ++k) {
                    z[q * V + k] = epilogue<Activation::none>(sum[q][k], affine[k], residual[k]);
                  }
                }
              }
            }
            activate<V>(p.activation, z);
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              if (q < cols) {
                Acc values[V];
#pragma unroll
                for (int k = 0; k < V; ++k) {
                  values[k] = z[q * V + k];
                }
                store_channels(out + q * p.C, p.C - c0, p.y_vectors, values);
              }
            }
            out += p.Q * p.C;
          });
    }
    __syncthreads();
  }
}

// ---- contiguous -----------------------------------------------------------------------------------------------------

// A tile of contiguous outputs, and the rows of inputs that it needs and that exist. Whole planes if there are many.
struct DepthwiseRows {
  int plane, planes;
  int p0, p1;
  int h0, h1;
};

template <int R, int kStride, typename T>
__device__ __forceinline__ DepthwiseRows rows_of(const DepthwiseParams<T>& p, uint32_t tile) {
  DepthwiseRows at;
  at.plane = static_cast<int>(div_mod(p.tiles_p, tile)) * p.planes;
  at.planes = min(p.planes, p.all_planes - at.plane);
  at.p0 = static_cast<int>(tile) * p.tile_rows;
  at.p1 = min(p.P, at.p0 + p.tile_rows);
  if (p.planes > 1) {
    at.h0 = 0;
    at.h1 = p.H;
  } else {
    at.h0 = min(p.H, max(0, at.p0 * kStride - p.pad_h));
    at.h1 = max(at.h0, min(p.H, (at.p1 - 1) * kStride - p.pad_h + R));
  }
  return at;
}

// How many elements a tensor's address lies behind a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ int phase_of(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kVecBytes / sizeof(T));
}

// The first element of the tile's rows, and how many elements they have.
template <typename T>
__device__ __forceinline__ const T* input_span(const DepthwiseParams<T>& p, const DepthwiseRows& at, int& count) {
  count = ((at.planes - 1) * p.H + at.h1 - at.h0) * p.W;
  return p.x + (static_cast<int64_t>(at.plane) * p.H + at.h0) * p.W;
}

// Starts the copy of a tile's inputs, which keep their phase.
template <int R, int kStride, typename T>
__device__ __forceinline__ void copy_rows(const DepthwiseParams<T>& p, uint32_t tile, T* stage) {
  constexpr int V = Vec<T>::kSize;
  int count;
  const T* from = input_span(p, rows_of<R, kStride>(p, tile), count);
  const int phase = phase_of(from);
  from -= phase;
  count += phase;
#pragma unroll 1
  for (int e = threadIdx.x * V; e < count; e += blockDim.x * V) {
    if (e >= phase && e + V <= count) {
      copy_async(stage + e, from + e);
    } else {
#pragma unroll 1
      for (int k = max(e, phase); k < min(e + V, count); ++k) {
        stage[k] = from[k];
      }
    }
  }
}

// CUDA 12's compiler tries for 128 registers with 5x5 filters, and spills; with 2 blocks named, which is as many, it does not.
template <int R>
constexpr int kDepthwisePlaneBlocks = __CUDACC_VER_MAJOR__ < 13 && R == 5 ? 2 : 0;  // 0: unnamed

template <typename T, int R, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwisePlaneBlocks<R>)
    conv_depthwise_planes_kernel(const DepthwiseParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int kCols = kDepthwisePlaneCols;
  constexpr int kIn = (kCols - 1) * kStride + R;
  static_assert(kIn * sizeof(T) <= kDepthwiseZeroBytes);
  extern __shared__ uint4 shared[];
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(shared);
  T* const zeros = reinterpret_cast<T*>(bytes);
  const auto stage = [&](int i) { return reinterpret_cast<T*>(bytes + kDepthwiseZeroBytes + i * p.stage_bytes); };
  T* const result = stage(2);
  if (threadIdx.x < kIn) {
    zeros[threadIdx.x] = from_acc<T>(0);
  }

  const uint32_t step = gridDim.x;
#pragma unroll 1
  for (uint32_t next = blockIdx.x, i = 0; next < p.tiles + step; next += step, i ^= 1) {
    if (next < p.tiles) {
      copy_rows<R, kStride>(p, next, stage(i));
    }
    copy_async_commit();
    if (next == blockIdx.x) {
      continue;
    }
    copy_async_wait_all_but<1>();
    __syncthreads();

    const DepthwiseRows at = rows_of<R, kStride>(p, next - step);
    const int64_t out_at = (static_cast<int64_t>(at.plane) * p.P + at.p0) * p.Q;
    const int out_phase = phase_of(p.y + out_at);
    const uint32_t units = at.planes * p.groups * p.col_threads.divisor;
#pragma unroll 1
    for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
      uint32_t col_thread = unit;
      uint32_t group = div_mod(p.col_threads, col_thread);
      const int plane = static_cast<int>(div_mod(p.tile_groups, group));
      const int first_row = at.p0 + static_cast<int>(group) * p.rows;
      const int rows = min(p.rows, at.p1 - first_row);
      if (rows <= 0) {
        continue;
      }
      const int first_col = static_cast<int>(col_thread) * kCols;
      const int cols = p.Q - first_col;
      const uint32_t image_plane = static_cast<uint32_t>(at.plane + plane);
      const int c = static_cast<int>(image_plane - p.channels.div(image_plane) * p.channels.divisor);
      Acc w[R][R][1];
      load_filter(p, c, w, 0);
      const Affine<Acc> affine = {0, p.scale[c], p.shift[c]};

      const int w0 = first_col * kStride - p.pad_w;
      uint32_t exists = 0;  // bit i: column w0 + i
#pragma unroll
      for (int col = 0; col < kIn; ++col) {
        exists |= (static_cast<unsigned>(w0 + col) < static_cast<unsigned>(p.W) ? 1u : 0u) << col;
      }
      int count;
      const int in_phase = phase_of(input_span(p, at, count));
      int h = first_row * kStride - p.pad_h;
      const T* in_at = stage(i ^ 1) + (in_phase + (plane * p.H - at.h0 + h) * p.W + w0);
      int e = (plane * p.P + first_row - at.p0) * p.Q + first_col;
      walk_rows<R, kStride, kCols, 1>(
          rows, w,
          [&](Acc(&in)[kIn][1]) {
            const T* from = static_cast<unsigned>(h) < static_cast<unsigned>(p.H) ? in_at : zeros;
#pragma unroll
            for (int col = 0; col < kIn; ++col) {
              in[col][0] = exists >> col & 1 ? to_acc(from[col]) : Acc(0);
            }
            ++h;
            in_at += p.W;
          },
          [&](const Acc(&sum)[kCols][1]) {
            Acc z[kCols];
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              z[q] = epilogue<Activation::none>(sum[q][0], affine);
            }
            if (p.residual != nullptr) {
#pragma unroll
              for (int q = 0; q < kCols; ++q) {
                if (q < cols) {
                  z[q] = epilogue<Activation::none>(sum[q][0], affine, to_acc(p.residual[out_at + e + q]));
                }
              }
            }
            activate<1>(p.activation, z);
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              if (q < cols) {
                result[out_phase + e + q] = from_acc<T>(z[q]);
              }
            }
            e += p.Q;
          });
    }
    __syncthreads();

    constexpr int V = Vec<T>::kSize;
    T* const to = p.y + out_at - out_phase;
    const int end = out_phase + ((at.planes - 1) * p.P + at.p1 - at.p0) * p.Q;
#pragma unroll 1
    for (int e = threadIdx.x * V; e < end; e += blockDim.x * V) {
      if (e >= out_phase && e + V <= end) {
        store_words(to + e, *reinterpret_cast<const uint4*>(result + e));
      } else {
#pragma unroll 1
        for (int k = max(e, out_phase); k < min(e + V, end); ++k) {
          to[k] = result[k];
        }
      }
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T>
DepthwiseParams<T> make_depthwise_params(const ConvProblem& c, const ConvOperands& operands, Activation activation,
                                         const DepthwisePlan& plan) {
  const auto aligned = [&](const void* address, int64_t bytes, int64_t channels) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0 && c.C % channels == 0;
  };
  const int64_t lane_bytes = kDepthwiseLaneChannels * c.element_bytes;
  DepthwiseParams<T> p;
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.scale = static_cast<const acc_t<T>*>(operands.scale);
  p.shift = static_cast<const acc_t<T>*>(operands.shift);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
  p.C = static_cast<int>(c.C);
  p.H = static_cast<int>(c.H);
  p.W = static_cast<int>(c.W);
  p.P = static_cast<int>(c.P);
  p.Q = static_cast<int>(c.Q);
  p.pad_h = static_cast<int>(c.pad_h);
  p.pad_w = static_cast<int>(c.pad_w);
  p.activation = activation;
  p.rows = plan.rows;
  p.groups = plan.groups;
  p.tile_rows = plan.tile_rows;
  p.tile_cols = plan.tile_cols;
  p.in_rows = plan.in_rows;
  p.in_cols = plan.in_cols;
  p.planes = plan.planes;
  p.all_planes = static_cast<int>(c.N * c.C);
  p.tiles = static_cast<uint32_t>(plan.tiles);
  p.stage_bytes = plan.stage_bytes;
  p.col_threads = FastDiv(static_cast<uint32_t>(plan.col_threads));
  p.tile_groups = FastDiv(static_cast<uint32_t>(plan.groups));
  p.tiles_p = FastDiv(static_cast<uint32_t>(plan.tiles_p));
  p.tiles_q = FastDiv(static_cast<uint32_t>(plan.tiles_q));
  p.channels = FastDiv(static_cast<uint32_t>(c.C));
  p.x_vectors = aligned(p.x, kVecBytes, kVecBytes / c.element_bytes);
  p.y_vectors = aligned(p.y, lane_bytes, kDepthwiseLaneChannels);
  p.residual_vectors = aligned(p.residual, lane_bytes, kDepthwiseLaneChannels);
  return p;
}

// Calls f(kernel) with the kernel of this layout, filter and stride.
template <typename T, typename F>
cudaError_t dispatch_depthwise(const ConvProblem& c, F&& f) {
  const auto with = [&](auto r, auto stride) {
    constexpr int R = decltype(r)::value;
    constexpr int kStride = decltype(stride)::value;
    return c.channels_last ? f(conv_depthwise_channels_last_kernel<T, R, kStride>)
                           : f(conv_depthwise_planes_kernel<T, R, kStride>);
  };
  const auto with_stride = [&](auto r) {
    return c.stride_h == 1 ? with(r, std::integral_constant<int, 1>{}) : with(r, std::integral_constant<int, 2>{});
  };
  switch (c.R) {
    case 3:
      return with_stride(std::integral_constant<int, 3>{});
    case 5:
      return with_stride(std::integral_constant<int, 5>{});
  }
  return cudaErrorInvalidValue;
}

// The plan's tiles are shared out evenly to no more blocks than run at a time.
template <typename T>
cudaError_t launch_conv_depthwise(const ConvProblem& c, const ConvOperands& operands, Activation activation,
                                  const DepthwisePlan& plan, int multiprocessors, cudaStream_t stream) {
  if (c.N == 0) {
    return cudaSuccess;
  }
  const DepthwiseParams<T> p = make_depthwise_params<T>(c, operands, activation, plan);
  return dispatch_depthwise<T>(c, [&](auto kernel) {
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              kDepthwiseMaxSharedBytes);
    if (status != cudaSuccess) {
      return status;
    }
    int resident = 0;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.shared_bytes);
    if (status != cudaSuccess) {
      return status;
    }
    const int64_t most = std::max<int64_t>(int64_t{resident} * multiprocessors / plan.chunks, 1);
    const auto blocks = static_cast<unsigned>(ceil_div(plan.tiles, ceil_div(plan.tiles, most)));
    const dim3 grid = c.channels_last ? dim3(static_cast<unsigned>(plan.chunks), blocks) : dim3(blocks);
    kernel<<<grid, plan.threads, plan.shared_bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t launch_conv_depthwise(const ConvProblem& c, const ConvOperands& operands, Activation activation,
                                  int multiprocessors, cudaStream_t stream) {
  return launch_conv_depthwise<T>(c, operands, activation, plan_depthwise(c, multiprocessors), multiprocessors, stream);
}

}  // namespace fused_conv_bn
