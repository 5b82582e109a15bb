// Chunks of dy, and of the activation's result: a warp copies its own, 32 output channels by 32 pixels, some ahead of what
// it multiplies, and makes fragments of a product of them.
//
// Which of a step's 16 pixels is which value of k is free, as long as the patch is read in the same order. It is
// chosen so that neither reads of dy nor those of units meet in a bank: contiguous, a lane has four pixels side by side;
// channels_last, every fourth one, and in 16 bits the order is as it is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/activation_backward.h"
#include "kernels/common/vec.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/mma.cuh"
#include "params.cuh"

namespace fused_conv_bn::wgrad_stem_sm80 {

// The pixel of a step that value k is.
template <typename C>
__device__ __forceinline__ int pixel_of(int k) {
  const int t = k % 8 / 2, second = k / 8;
  if constexpr (C::kRows == Rows::patch || (C::kChannelsLast && !C::kFloat32)) {
    return k;
  } else if constexpr (C::kChannelsLast) {
    return t + second * 8 + k % 2 * 4;
  } else {
    return 4 * t + ((t < 2) == (second == 0) ? 0 : 2) + k % 2;
  }
}

// A chunk of the block's tile of this number.
struct ChunkPlace {
  uint32_t number;
  int chunk;
};

// The chunk whose copies start next, and of its tile: where the warp's first channel begins, and how many rows and columns there
// are, none behind the last tile.
struct NextChunk {
  ChunkPlace place;
  int64_t start;
  int rows, cols;
};

// A row tile's share in a step: as an operand, in each term.
template <typename C>
struct RowFragment {
  uint4 terms[C::kTerms];
};

template <typename C>
struct ChunkReader {
  using T = typename C::T;
  static constexpr int kBytes = C::kBytes;
  static constexpr int kLeastCopy = kBytes < 4 ? kBytes : 4;

  const Block<C>& block;
  const int first_channel;
  const Params<T>& p = block.p;

  __device__ __forceinline__ NextChunk find(const ChunkPlace& place) const {
    NextChunk next{place, 0, 0, 0};
    const uint32_t index = block.tile_index(place.number);
    if (index < p.tiles) {
      const Tile tile = block.tiles().locate(index);
      next.start = output_offset<C::kChannelsLast>(tile, p, first_channel);
      next.rows = block.tiles().rows(tile, p), next.cols = block.tiles().cols(tile, p);
    }
    return next;
  }

  // By a warp. Channels that do not exist are left as they are: they make rows of the product that nobody reads.
  __device__ __forceinline__ void start_copies(const NextChunk& next, int stage) const {
    if (next.rows > 0) {
      copy(p.dy, next, block.chunk_stage(stage));
      if (p.result != nullptr) {
        copy(p.result, next, block.chunk_stage(stage) + C::kChunkTensor);
      }
    }
  }

  // fragments: of each step and tile of rows. inverses: float32: what their scales have to be undone by, for a lane's two rows
  // in each tile.
  __device__ __forceinline__ void load(int stage, RowFragment<C> (&fragments)[kSteps][kWarpTiles],
                                       float (&inverses)[kWarpTiles][2]) const {
    const uint32_t start = block.chunk_stage(stage);
    if constexpr (C::kFloat32) {
      load_float32(start, fragments, inverses);
    } else {
      for_each_tile([&](int step, int i) { fragments[step][i].terms[0] = load_halves(start, step, i); });
      derive_by([&](auto derivative) {
        for_each_tile([&](int step, int i) {
          uint4& v = fragments[step][i].terms[0];
          const uint4 y = load_halves(start + C::kChunkTensor, step, i);
          v = make_uint4(derivative(v.x, y.x), derivative(v.y, y.y), derivative(v.z, y.z), derivative(v.w, y.w));
        });
      });
    }
  }

 private:
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  __device__ __forceinline__ void copy(const T* from, const NextChunk& next, uint32_t target) const {
    switch (p.copy_bytes) {
      case 16:
        return copy_by<16>(from, next, target);
      case 8:
        return copy_by<8>(from, next, target);
      case 4:
        return copy_by<4>(from, next, target);
      default:
        return copy_by<kLeastCopy>(from, next, target);
    }
  }

  // A lane has the same pixels or channels in all lines. What its addresses are made of goes through empty assembly, or the
  // compiler works each of them out anew.
  template <int kCopy>
  __device__ __forceinline__ void copy_by(const T* from, const NextChunk& next, uint32_t target) const {
    constexpr int kElements = kCopy / kBytes, kPieces = (C::kChannelsLast ? kWarpRows : kChunk) / kElements;
    constexpr int kAcross = kPieces < 32 ? kPieces : 32, kLines = 32 / kAcross;  // at once
    constexpr int kAllLines = C::kChannelsLast ? kChunk : kWarpRows;
    int line = block.lane() / kAcross, piece = block.lane() % kAcross * kElements;
    const auto offset_of = [&](int pixel) {
      const auto [row, col] = locate_pixel(pixel, p.tile_q);
      return row < next.rows && col < next.cols ? row * p.Q + col : -1;
    };
    target += line * C::kChunkPitch + piece * kBytes;
    asm volatile("" : "+r"(target));
    if constexpr (C::kChannelsLast) {
      if (first_channel + piece >= p.K) {
        return;
      }
      const T* const own = from + next.start + piece;
#pragma unroll
      for (int i = 0; i < kAllLines; i += kLines) {
        const int pixel = offset_of(next.place.chunk * kChunk + i + line);
        copy_piece<kCopy>(target + i * C::kChunkPitch, pixel < 0 ? from : own + pixel * p.K, pixel >= 0);
      }
    } else {
      const int plane = p.P * p.Q;
      int channels = p.K - first_channel - line;
      asm volatile("" : "+r"(channels));
      const int64_t own = next.start + line * plane;
#pragma unroll
      for (int j = 0; j < kPieces; j += kAcross) {
        const int pixel = offset_of(next.place.chunk * kChunk + piece + j * kElements);
        const T* source = pixel < 0 ? from : from + own + pixel;
        int64_t step = pixel < 0 ? 0 : int64_t{kLines} * plane;
        asm volatile("" : "+l"(step));
#pragma unroll
        for (int i = 0; i < kAllLines; i += kLines) {
          if (i < channels) {
            copy_piece<kCopy>(target + i * C::kChunkPitch + j * kCopy, source, pixel >= 0);
          }
          source += step;
          asm volatile("" : "+l"(source));
        }
      }
    }
  }

  // Where a row's values of a step are: two for the first half of k, or for the second.
  __device__ __forceinline__ uint32_t contiguous_pair(uint32_t start, int step, int i, int row, int second) const {
    return start + (i * 16 + row * 8 + g()) * C::kChunkPitch + (step * 16 + pixel_of<C>(second * 8 + 2 * t())) * kBytes;
  }

  // 16 bits.
  __device__ __forceinline__ uint4 load_halves(uint32_t start, int step, int i) const {
    if constexpr (C::kChannelsLast) {
      // Matrices: rows 0 to 7, rows 8 to 15, then the second half of k.
      const int lane = threadIdx.x % 32, matrix = lane / 8;
      return load_matrices_transposed(start + (step * 16 + matrix / 2 * 8 + lane % 8) * C::kChunkPitch +
                                      (i * 16 + matrix % 2 * 8) * 2);
    } else {
      return make_uint4(
          load_shared_1(contiguous_pair(start, step, i, 0, 0)), load_shared_1(contiguous_pair(start, step, i, 1, 0)),
          load_shared_1(contiguous_pair(start, step, i, 0, 1)), load_shared_1(contiguous_pair(start, step, i, 1, 1)));
    }
  }

  __device__ __forceinline__ float2 load_floats(uint32_t start, int step, int i, int row, int second) const {
    if constexpr (C::kChannelsLast) {
      const int k = second * 8 + 2 * t(), channel = i * 16 + row * 8 + g();
      const uint32_t at = start + (step * 16 + pixel_of<C>(k)) * C::kChunkPitch + channel * 4;
      const int next = pixel_of<C>(k + 1) - pixel_of<C>(k);
      return {__uint_as_float(load_shared_1(at)), __uint_as_float(load_shared_1(at + next * C::kChunkPitch))};
    } else {
      const uint2 v = load_shared_2(contiguous_pair(start, step, i, row, second));
      return {__uint_as_float(v.x), __uint_as_float(v.y)};
    }
  }

  __device__ __forceinline__ void load_float32(uint32_t start, RowFragment<C> (&fragments)[kSteps][kWarpTiles],
                                               float (&inverses)[kWarpTiles][2]) const {
    float2 values[kSteps][kWarpTiles][2][2];  // step, tile, row, half of k
    const auto for_each = [&](auto act) {
      for_each_tile([&](int step, int i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          act(values[step][i][e / 2][e % 2], step, i, e / 2, e % 2);
        }
      });
    };
    for_each([&](float2& v, int step, int i, int row, int second) { v = load_floats(start, step, i, row, second); });
    derive_by([&](auto derivative) {
      for_each([&](float2& v, int step, int i, int row, int second) {
        v = derivative(v, load_floats(start + C::kChunkTensor, step, i, row, second));
      });
    });
    float most[kWarpTiles][2] = {};
    for_each([&](const float2& v, int, int i, int row, int) {
      most[i][row] = fmaxf(most[i][row], fmaxf(fabsf(v.x), fabsf(v.y)));
    });
    float scales[kWarpTiles][2];
#pragma unroll
    for (int e = 0; e < 2 * kWarpTiles; ++e) {
      float m = most[e / 2][e % 2];
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      const int exponent = scale_exponent(__float_as_uint(m));
      scales[e / 2][e % 2] = exp2_of(exponent);
      inverses[e / 2][e % 2] = exp2_of(-exponent);
    }
#pragma unroll
    for (int e = 0; e < kSteps * kWarpTiles; ++e) {
      const int step = e / kWarpTiles, i = e % kWarpTiles;
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // row, then half of k
        const float2 v = values[step][i][j % 2][j / 2];
        split_two(v.x * scales[i][j % 2], v.y * scales[i][j % 2], high[j], low[j]);
      }
      fragments[step][i].terms[0] = make_uint4(high[0], high[1], high[2], high[3]);
      fragments[step][i].terms[C::kTerms - 1] = make_uint4(low[0], low[1], low[2], low[3]);
    }
  }

  template <typename Act>
  __device__ __forceinline__ static void for_each_tile(Act act) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        act(step, i);
      }
    }
  }

  // ---- the activation's derivative, by its result ----

  // act gets it as a function, if there is one to take: code of its own, since jumps around it would come between the loads.
  template <typename Act>
  __device__ __forceinline__ void derive_by(Act act) const {
    if (p.result == nullptr) {
      return;
    }
    if (p.activation == Activation::relu) {
      act(Derivative<Activation::relu>{});
    } else if (p.activation == Activation::sigmoid) {
      act(Derivative<Activation::sigmoid>{});
    } else {
      act(Derivative<Activation::tanh>{});
    }
  }
  template <Activation kActivation>
  struct Derivative {
    __device__ __forceinline__ float2 operator()(const float2& dy, const float2& y) const {
      return {derivative_from_result<kActivation, T>(dy.x, y.x), derivative_from_result<kActivation, T>(dy.y, y.y)};
    }
    // A pair in 16 bits.
    __device__ __forceinline__ uint32_t operator()(uint32_t dy, uint32_t y) const {
      const float2 v = (*this)(unpack_pair(T(), dy), unpack_pair(T(), y));
      return pack_pair(T(), v.x, v.y);
    }
  };
};

}  // namespace fused_conv_bn::wgrad_stem_sm80
