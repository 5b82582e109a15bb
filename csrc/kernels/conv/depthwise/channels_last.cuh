// Depthwise convolution of channels_last tensors.
//
// A block has some channels of tile_cols columns, and goes down a range of rows. A ring of steps in shared memory holds
// the inputs: one step is computed while the next ones arrive (cp.async). A thread has two channels, its lane, of
// seven columns. The weights stay in registers. Padding is zeros: that of columns lies in the ring
// from the start, that of rows is copied as such.
//
// It may put out the mean of each image's channels too: a thread adds up what it has stored, and at an image's end the block adds
// up its columns. Where it has less than the image, another kernel adds up the sums of all parts. One order of sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "kernels/ptx/cp_async.cuh"

namespace fused_conv_bn {

// A lane's channels, in shared or global memory.
template <typename T>
__device__ __forceinline__ void load_lane(const T* address, float (&out)[2]) {
  const float2 two = unpack_pair(T(), *reinterpret_cast<const uint32_t*>(address));
  out[0] = two.x, out[1] = two.y;
}
__device__ __forceinline__ void load_lane(const float* address, float (&out)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(address);
  out[0] = two.x, out[1] = two.y;
}

// As many channels as share a word: one or two.
template <typename T>
__device__ __forceinline__ uint32_t pack_word(T, float low, float high) {
  return pack_pair(T(), low, high);
}
__device__ __forceinline__ uint32_t pack_word(float, float v, float) { return __float_as_uint(v); }

// A word of values no smaller than `low` and no larger than `high`, which are words too. NaN passes through.
template <typename T>
__device__ __forceinline__ uint32_t bound_word(uint32_t word, uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float16>) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(low));
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(high));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(low));
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(high));
  } else {
    word = __float_as_uint(at_most(at_least(__uint_as_float(word), __uint_as_float(low)), __uint_as_float(high)));
  }
#endif
  return word;
}

__device__ __forceinline__ void add_to(float2& sum, const float2& v) {
  sum.x += v.x;
  sum.y += v.y;
}

// The range that has a row.
template <typename T>
__device__ __forceinline__ uint32_t range_of(const DepthwiseParams<T>& p, uint32_t row) {
  const uint32_t in_longer = p.longer_ranges * p.rows_of_longer_range.divisor;
  return row < in_longer ? p.rows_of_longer_range.div(row) : p.rows_of_range.div(row - p.longer_ranges);
}

// At the end of an image: its means where the block has all of it, else sums, from what each thread has added up, which is 0 again
// behind this. The range ends in front of row `end`.
template <typename T>
__device__ __forceinline__ void finish_image(const DepthwiseParams<T>& p, float2* sums, uint32_t end) {
  const uint32_t lanes = p.lanes.divisor, image = p.image_rows.div(end - 1);
  __syncthreads();
  float2 total{};
  if (threadIdx.x < lanes) {
    for (uint32_t i = 0; i < p.col_threads.divisor; ++i) {
      add_to(total, sums[i * lanes + threadIdx.x]);
    }
  }
  __syncthreads();
  sums[threadIdx.x] = {0, 0};
  uint32_t chunk = blockIdx.x;  // anew: there are no registers for it
  const uint32_t tile = div_mod(p.chunks, chunk);
  const uint32_t channel = chunk * p.channels + threadIdx.x * kDepthwiseLaneChannels;
  if (threadIdx.x >= lanes || channel >= static_cast<uint32_t>(p.C)) {
    return;
  }
  if (p.means != nullptr) {
    const float pixels = static_cast<float>(p.P) * static_cast<float>(p.Q);
    const uint32_t word = pack_word(T(), total.x / pixels, total.y / pixels);
    *reinterpret_cast<uint32_t*>(p.means + int64_t{image} * p.C + channel) = word;
    return;
  }
  // A tile's last part of an image is followed by zeros, up to as many parts as images have at most.
  const uint32_t of_tile = p.parts / p.tiles_q, part = blockIdx.y - range_of(p, image * p.P);
  const uint32_t behind = end == (image + 1) * p.P ? of_tile : part + 1;
  float* to = p.sums + (int64_t{image} * p.parts + tile * of_tile + part) * p.C + channel;
  for (uint32_t i = part; i < behind; ++i) {
    *reinterpret_cast<float2*>(to) = total;
    total = {0, 0};
    to += p.C;
  }
}

// The steps of a range of rows, image by image: those of an image are one for each row of outputs, behind those that
// only begin to sum.
template <int R, int kStride>
struct DepthwiseWalk {
  static constexpr int kBefore = kDepthwiseSteps<R, kStride> - 1;
  uint32_t row, end;  // of the rows of all images, those that are still to come behind this image
  int rows = 0;       // of outputs in this image
  int left = 0;       // of its steps
  int h = 0;          // the first row of inputs of the step, counted in the image

  // To an image's first step, and its number.
  template <typename T>
  __device__ __forceinline__ uint32_t next_image(const DepthwiseParams<T>& p) {
    const uint32_t n = p.image_rows.div(row);
    const int p0 = static_cast<int>(row - n * p.image_rows.divisor);
    rows = min(static_cast<int>(end - row), p.P - p0);
    row += rows;
    left = rows + kBefore;
    h = p0 * kStride - p.pad_h;
    return n;
  }
  __device__ __forceinline__ void next_step() {
    --left;
    h += kStride;
  }
  // Whether row i of the step exists and is needed: the last step only finishes an output.
  __device__ __forceinline__ bool has_row(int i, int H) const {
    return static_cast<unsigned>(h + i) < static_cast<unsigned>(H) && (i == 0 || left > 1);
  }
  __device__ __forceinline__ bool finishes() const { return left <= rows; }
};

// One long body: cut into functions, kernels took up to 1.05 times as long (960 channels of 7x7: 6.1 and 6.4 us).
//
// kBounds: the activation is a bound. gridDim.x: the chunks of channels, so that the blocks which share lines of x run together,
// of all tiles across the image. gridDim.y: the ranges of rows.
template <typename T, int R, int kStride, bool kBounds>
__global__ void __launch_bounds__(depthwise_lane_threads(R), depthwise_lane_blocks(R))
    conv_depthwise_lanes_kernel(const DepthwiseParams<T> p) {
#if __CUDA_ARCH__ >= 800  // select_plan() leaves older GPUs to PyTorch
  constexpr int V = kDepthwiseLaneChannels;
  constexpr int kCols = kDepthwiseCols;
  constexpr int kIn = (kCols - 1) * kStride + R;
  constexpr int kSteps = kDepthwiseSteps<R, kStride>;
  constexpr int kStages = depthwise_stages(kStride);
  constexpr int kPiece = Vec<T>::kSize;
  constexpr int kPieces = (kIn * V + kPiece - 1) / kPiece;  // of a row, for a thread, at most
  constexpr int kBytes = static_cast<int>(sizeof(T));
  constexpr int kWords = V * kBytes / 4;
  constexpr bool kSums = depthwise_sums(sizeof(T)) && !kBounds;  // these have no registers for it on some GPUs
  const bool has_sums = kSums && p.sums_offset != 0;
  extern __shared__ uint4 shared[];
  float2* const affine = reinterpret_cast<float2*>(shared);  // scale and shift of a channel
  unsigned char* const ring = reinterpret_cast<unsigned char*>(affine + p.channels);
  const int ring_bytes = kStages * p.stage_bytes;
  uint32_t chunk = blockIdx.x;
  const int q0 = static_cast<int>(div_mod(p.chunks, chunk)) * p.tile_cols;
  const int first_channel = static_cast<int>(chunk) * p.channels;
  uint32_t lane = threadIdx.x;
  const int col_thread = static_cast<int>(div_mod(p.lanes, lane));
  const int lane_channel = static_cast<int>(lane) * V;
  const int c0 = first_channel + lane_channel;
  const bool works = col_thread < static_cast<int>(p.col_threads.divisor);
  const int q = q0 + col_thread * kCols;
  const int cols = works && c0 < p.C ? p.Q - q : 0;  // that the thread has to compute, or more
  DepthwiseWalk<R, kStride> walk;
  walk.row = blockIdx.y * p.range_rows + min(blockIdx.y, p.longer_ranges);
  walk.end = min(walk.row + p.range_rows + (blockIdx.y < p.longer_ranges ? 1 : 0), p.all_rows);

  // What the thread copies of a row: 16 bytes of channels of every pixel_step-th pixel. Where a pixel does not exist, the
  // ring has zeros from the start.
  const int pixel_bytes = p.channels * kBytes;
  const int row_bytes = p.in_cols * pixel_bytes;
  const int row_pieces = p.channels / kPiece;
  const int pixel_step = static_cast<int>(p.col_threads.divisor) * kPiece / V;
  const int pixel = static_cast<int>(threadIdx.x) / row_pieces;
  const int piece = (static_cast<int>(threadIdx.x) - pixel * row_pieces) * kPiece;
  const int w = q0 * kStride - p.pad_w + pixel;
  const int from_offset = w * p.C + first_channel + piece, from_step = pixel_step * p.C;
  const int to_offset = pixel * pixel_bytes + piece * kBytes, to_step = pixel_step * pixel_bytes;
  uint32_t copies = 0;  // bit i: piece i is one to copy
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (works && pixel + i * pixel_step < p.in_cols) {
      if (static_cast<unsigned>(w + i * pixel_step) < static_cast<unsigned>(p.W) && first_channel + piece < p.C) {
        copies |= 1u << i;
      } else {
#pragma unroll 1
        for (int to = to_offset + i * to_step; to < ring_bytes; to += row_bytes) {
          *reinterpret_cast<uint4*>(ring + to) = uint4{0, 0, 0, 0};
        }
      }
    }
  }

  // Copies run kStages - 1 steps ahead, into the next image too.
  DepthwiseWalk<R, kStride> ahead = walk;
  const T* from_row = nullptr;
  const auto ring_start = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
  uint32_t stage = ring_start;  // where the next step is copied to; behind that, where the present one is
  const auto copy_step = [&] {
    if (ahead.left == 0 && ahead.row < ahead.end) {
      const int64_t n = ahead.next_image(p);
      from_row = p.x + (n * p.H + ahead.h) * p.W * p.C + from_offset;
    }
    if (ahead.left > 0) {
#pragma unroll
      for (int i = 0; i < kStride; ++i) {
        const bool exists = ahead.has_row(i, p.H);
        const T* from = p.x + from_offset;  // of a row that is there
        if (exists) {
          from = from_row;
        }
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          if (copies & 1u << k) {
            copy_async(stage + i * row_bytes + to_offset + k * to_step, from + k * from_step, exists);
          }
        }
        from_row += p.W * p.C;
      }
      ahead.next_step();
    }
    copy_async_commit();
    stage += p.stage_bytes;
    stage = stage == ring_start + ring_bytes ? ring_start : stage;
  };

  // What is above reads parameters alone. From here on all that the block needs first is under way at once: its filters, one
  // behind the other, scale and shift, and inputs.
  wait_for_previous();
  if (p.next_begins) {
    let_next_begin();
  }
  T* const taps = reinterpret_cast<T*>(ring + ring_bytes);
  const int filters = min(p.channels, p.C - first_channel);
  const int own_filter = static_cast<int>(threadIdx.x);
  typename AffineSource<T>::Values values{};  // they arrive while copies are started
  if (own_filter < filters) {
    values = p.affine.values(first_channel + own_filter);
  }
  if (p.dense_filters) {
    const T* const from = p.w + first_channel * (R * R);
#pragma unroll 1
    for (int i = threadIdx.x * kPiece; i < filters * (R * R); i += blockDim.x * kPiece) {
      copy_async(ring_start + ring_bytes + i * kBytes, from + i, true);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < filters * (R * R); i += blockDim.x) {
      const int k = i / (R * R), tap = i % (R * R);
      taps[i] = p.w[(first_channel + k) * p.w_stride_k + tap / R * p.w_stride_r + tap % R * p.w_stride_s];
    }
  }
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    copy_step();
  }
#pragma unroll 1
  for (int k = own_filter; k < filters; k += blockDim.x) {
    if (k != own_filter) {
      values = p.affine.values(first_channel + k);
    }
    const Affine<float> of_channel = p.affine.pair_of(values);
    affine[k] = {of_channel.scale, of_channel.shift};
  }

  const auto of_threads = [&] {
    return reinterpret_cast<float2*>(reinterpret_cast<unsigned char*>(shared) + p.sums_offset);
  };
  if (has_sums) {
    of_threads()[threadIdx.x] = {0, 0};
  }

  // A lane's taps lie an odd number of words behind the one before, which spreads them over the banks.
  copy_async_wait_all_but<kStages - 2>();
  __syncthreads();
  acc_t<T> weights[R][R][V];
#pragma unroll
  for (int i = 0; i < R * R; ++i) {
    acc_t<T> two[V];
    load_lane(taps + lane_channel * (R * R) + i * V, two);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int tap = (i * V + k) % (R * R);
      weights[tap / R][tap % R][(i * V + k) / (R * R)] = two[k];
    }
  }

  // ReLU and ReLU6 bound the results. Rounding keeps the order of numbers, and these bounds as they are, so they may come
  // behind it, for two channels at a time. Not where a residual is added behind them.
  const bool residual_last = p.residual != nullptr && p.residual_last;
  const Activation bound = kBounds && !residual_last ? p.activation : Activation::none;
  const float least = bound == Activation::none ? -INFINITY : 0.0f, most = bound == Activation::relu6 ? 6.0f : INFINITY;
  const uint32_t low = pack_word(T(), least, least), high = pack_word(T(), most, most);

  acc_t<T> sums[kSteps - 1][kCols][V];  // its first values are not used
#pragma unroll
  for (int i = 0; i < (kSteps - 1) * kCols * V; ++i) {
    sums[i / (kCols * V)][i / V % kCols][i % V] = 0;
  }
  const int in_offset = (col_thread * kCols * kStride * p.channels + lane_channel) * kBytes;
  T* out = p.y + (static_cast<int64_t>(walk.row) * p.Q + q) * p.C + c0;
#pragma unroll 1
  while (walk.row < walk.end) {
    walk.next_image(p);
#pragma unroll 1
    while (walk.left > 0) {
      copy_async_wait_all_but<kStages - 2>();
      __syncthreads();
      copy_step();
      if (cols > 0) {
        step_down<R, kStride, kCols, V>(
            weights, sums,
            [&](int i, acc_t<T>(&in)[kIn][V]) {
              const unsigned char* from = ring + (stage - ring_start) + i * row_bytes + in_offset;
#pragma unroll
              for (int col = 0; col < kIn; ++col) {
                load_lane(reinterpret_cast<const T*>(from), in[col]);
                from += pixel_bytes;
              }
            },
            [&](const acc_t<T>(&sum)[kCols][V]) {
              if (!walk.finishes()) {
                return;
              }
              const float4 of_lane = *reinterpret_cast<const float4*>(affine + lane_channel);
              const Affine<float> of_channel[V] = {{0, of_lane.x, of_lane.y}, {0, of_lane.z, of_lane.w}};
              acc_t<T> z[kCols * V];
#pragma unroll
              for (int k = 0; k < kCols * V; ++k) {
                z[k] = apply_affine(sum[k / V][k % V], of_channel[k % V]);
              }
              const auto add_residual = [&] {
                const T* from = p.residual + (out - p.y);
#pragma unroll
                for (int col = 0; col < kCols; ++col) {
                  if (col < cols) {
                    acc_t<T> residual[V];
                    load_lane(from + col * p.C, residual);
#pragma unroll
                    for (int k = 0; k < V; ++k) {
                      z[col * V + k] += residual[k];
                    }
                  }
                }
              };
              if (p.residual != nullptr && !residual_last) {
                add_residual();
              }
              if constexpr (!kBounds) {
                activate_all<T, false>(p.activation, p.negative_slope, z);
              }
              if (residual_last) [[unlikely]] {
                if constexpr (kBounds) {
                  activate_all<T, true>(p.activation, p.negative_slope, z);
                }
                add_residual();
              }
              T* to = out;
#pragma unroll
              for (int col = 0; col < kCols; ++col) {
                uint32_t words[kWords];
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                  const float* of_word = z + col * V + i * (V / kWords);
                  words[i] = pack_word(T(), of_word[0], of_word[V / kWords - 1]);
                  if constexpr (kBounds) {
                    words[i] = bound_word<T>(words[i], low, high);
                  }
                }
                if (col < cols) {
                  store_words(to, words);
                }
                if constexpr (kSums) {
                  z[col] = __uint_as_float(words[0]);
                }
                to += p.C;
              }
              if constexpr (kSums) {
                if (has_sums) {
                  float2 sum{};
#pragma unroll
                  for (int col = 0; col < kCols; ++col) {
                    if (col < cols) {
                      add_to(sum, unpack_pair(T(), __float_as_uint(z[col])));
                    }
                  }
                  add_to(of_threads()[threadIdx.x], sum);
                }
              }
              out += p.Q * p.C;
            },
            walk.left == 1);
      }
      walk.next_step();
    }
    if (has_sums) {
      finish_image(p, of_threads(), walk.row);
    }
  }
#endif
}

}  // namespace fused_conv_bn
