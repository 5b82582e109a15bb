// Convolutions of few input channels as an implicit GEMM on tensor cores, with the epilogue in the same kernel.
//
// A block owns 32 or 64 output channels for good, and takes one tile of up to 256 output pixels after another: it puts the
// input patch into shared memory as [pixel][channel] in 16 bits, multiplies, applies the epilogue and writes. A warp has 32
// pixels and all channels of the block. For a channels_last output, channels are dealt to the rows of the product so that a
// thread ends up with 16 bytes of a pixel's, which it writes. For a contiguous output, results go through shared memory, to
// be written as whole rows of the image. Two blocks share a multiprocessor, so that one moves memory while the other
// multiplies. Contiguous float32 goes further where it can: a block has two groups of threads, each with a tile of its own and
// copies of its next one's input on the way, which multiply by turns. Left alone, both would multiply at the same time, and
// tensor cores idle while both move memory.
//
// The GEMM's depth is cut into quads: four input channels of one filter tap. A tap is an offset in the patch, so im2col is
// a table of offsets, one a quad. mma.sync.m16n8k16 wants four values of its k from each thread; in which order the 16
// values of k come is free as long as both operands agree, so that a thread's four are one quad: 8 bytes of one pixel.
//
// float32 is split in two halves (split_float.cuh). The sum low * high + high * low is formed first, scaled by 2^-11, then
// high * high goes on top. A patch that does not split is computed in plain float32 FMAs from unscaled values instead; so
// are all patches if the weights are like that.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/epilogue.h"
#include "kernels/common/fast_div.h"
#include "kernels/common/split_float.cuh"
#include "kernels/common/vec.cuh"
#include "kernels/elementwise/memory_format.h"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "plan.h"

namespace fused_conv_bn {

template <typename T>
struct FewChannelsParams {
  const T* x;
  const T* w;
  AffineSource<T> affine;
  const T* residual;
  T* y;
  int64_t w_stride_k, w_stride_c, w_stride_r, w_stride_s;
  int C, H, W, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FewChannelsTile tile;
  FastDiv x_cols, pixel_groups, tile_q, tile_p, tiles_q, tiles_p;
  FastDiv channel_vectors, row_vectors;  // kPaired: copies of 16 bytes that a channel and a row take
  uint32_t tiles;
  int run_shift;      // contiguous: 2^run_shift lanes share a run of the output
  bool split;         // float32: in two halves, three products; else one
  bool x_vectors;     // channels_last: a pixel's quads can be read as a whole
  bool whole_groups;  // no group of input channels goes past the last one
  bool y_vectors;     // channels_last: a pixel's channels can be written 16 bytes at a time
  bool stage_pairs;   // contiguous: two neighbouring results can be staged with one store
  bool run_vectors;   // contiguous: rows are whole, and a tile's runs are vectors, long enough for a warp each
  Activation activation;
  bool residual_last;
  float negative_slope;
};

// ---- instructions ----------------------------------------------------------------------------------------------------

template <typename T>  // float16 or bfloat16
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint4& a, const uint2& b) {
  // a: rows g and g + 8 of the first half of k, then of the second; b: the two halves of k.
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
  }
}

// What shared memory begins with. The offsets of the quads follow.
template <int kChannels>
struct FewChannelsHeader {
  uint2 zeros;
  uint32_t all_exact;  // the weights, or their affines, do not split: nothing does
  uint32_t unused;
  float scales[kChannels];
  float shifts[kChannels];
  float unscales[kChannels];  // scale, and the inverse of the weights' scale
  float w_scales[kChannels];
  uint2 warps[kFewChannelsThreads / 32];
  // Per pixel of the tile: from the patch's start to its first input pixel.
  int operands[kFewChannelsPixels];
  // Per pixel of the tile. channels_last: its offset in the image, row and column. Else: its offset in the stage and, where
  // rows are not whole, its row's in the image, in bytes.
  int2 places[kFewChannelsPixels];
};

// ---- the kernel ------------------------------------------------------------------------------------------------------

extern __shared__ __align__(128) unsigned char few_channels_shared[];

// T: the tensors' type. kM: output channels, in sixteens. kLast: channels_last. kPaired: a block is two groups of threads with
// a tile each, which multiply by turns.
// kBounds: the activation is a bound.
template <typename T, int kM, bool kLast, bool kPaired, bool kBounds>
class FewChannels {
 public:
  using Half = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float16>;  // what is multiplied
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kPlanes = kFloat ? 2 : 1;
  static constexpr int kChannels = 16 * kM;
  static constexpr int kGroups = few_channels_groups(kPaired);
  static constexpr int kThreads = kFewChannelsThreads / kGroups;  // of a group
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPixels = kFewChannelsPixels / kWarps;  // of a warp
  static constexpr int kN = kPixels / 8;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  // Whether the next tile's input is read before this one is multiplied. The others have no registers left for it.
  static constexpr bool kAhead = kLast && !kFloat && kM == 4;
  using Product = float[kM][kN][4];  // in fragments of 16 channels by 8 pixels
  // A thread's own part of it.
  static constexpr int kOwnChannels = 2 * kM;
  static constexpr int kOwnPixels = 2 * kN;
  // kLast: so many of its channels lie side by side.
  static constexpr int kChunk = kOwnChannels < kVec ? kOwnChannels : kVec;

  __device__ __forceinline__ FewChannels(const FewChannelsParams<T>& params)
      : p(params), first_channel(blockIdx.y * kChannels) {}

  __device__ __forceinline__ void run() {
    const uint32_t first = blockIdx.x * kGroups + group();
    const uint32_t step = gridDim.x * kGroups;
    if constexpr (kPaired) {
      if (first < p.tiles) {
        start_copies(locate(first));
      }
    }
    set_up();
    if constexpr (kPaired) {
      __syncthreads();  // groups do not meet again
    }
    Ahead ahead;
    if constexpr (kAhead) {
      read_ahead(ahead, locate(first));
    }
    // Little is kept in registers from one step to the next: what is a few instructions away is made anew.
    for (uint32_t index = first; index < p.tiles; index += step) {
      bool exact = false;
      float inverse = 1.0f;
      if constexpr (kPaired) {
        load_copies(exact, inverse);
      } else {
        const Tile tile = locate(index);
        if constexpr (!kAhead) {
          read_ahead(ahead, tile);
        }
        load_patch(ahead, tile, exact, inverse);
      }
      sync();
      if constexpr (kPaired) {
        if (index + step < p.tiles) {
          start_copies(locate(index + step));
        }
        wait_for_turn(index == first);
        if (exact) {
          give_turn(index);
        }
      }
      if constexpr (kAhead) {
        // The next tile's input is on its way while this one is multiplied.
        if (index + step < p.tiles) {
          read_ahead(ahead, locate(index + step));
        }
      }
      inverse = exact ? 0.0f : inverse;  // one register for both
      const bool has_pixels = warp() * kPixels < p.tile.p * p.tile.q;
      Product acc;
      if (has_pixels) {
        if (kFloat && inverse == 0) {
          multiply_exactly(acc);
        } else if constexpr (kPaired) {
          multiply_ahead(acc);
          give_turn(index);
        } else {
          multiply(acc);
        }
        apply_affine(acc, inverse == 0, inverse);
        finish(acc, locate(index));
      }
      const Tile tile = locate(index);
      if constexpr (kLast) {
        if (has_pixels) {
          write_pixels(acc, tile);
        }
      } else {
        sync();
        if (has_pixels) {
          if (writes_vectors()) {
            stage_planes<true, true, true>(acc, tile);
          } else if (!p.stage_pairs) {
            stage_planes<false, false>(acc, tile);
          } else if (p.tile.q == p.Q) {
            stage_planes<true, true>(acc, tile);
          } else {
            stage_planes<true, false>(acc, tile);
          }
        }
        fence_async();
        sync();
        if (writes_vectors()) {
          write_vectors(tile);
        } else if (p.tile.q == p.Q) {
          write_whole_planes(tile);
        } else {
          write_rows(tile);
        }
      }
    }
    wait_for_stores();
  }

 private:
  static __device__ __forceinline__ int group() { return kPaired ? threadIdx.x / kThreads : 0; }
  // Within the group.
  static __device__ __forceinline__ int thread() { return kPaired ? threadIdx.x % kThreads : threadIdx.x; }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // The row and the column group that a thread has in a fragment.
  static __device__ __forceinline__ int g() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int t() { return threadIdx.x % 4; }

  // A group's threads meet.
  static __device__ __forceinline__ void sync() {
    if constexpr (kPaired) {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + group()), "n"(kThreads) : "memory");
    } else {
      __syncthreads();
    }
  }

  // kPaired: groups multiply by turns. Every warp has pixels, so that all give and wait.
  static __device__ __forceinline__ void wait_for_turn(bool is_first) {
    if (group() == 1 || !is_first) {
      asm volatile("bar.sync %0, %1;" ::"r"(3 + group()), "n"(kFewChannelsThreads) : "memory");
    }
  }
  // To the other group, if it has a tile that comes after this one.
  __device__ __forceinline__ void give_turn(uint32_t index) const {
    if ((group() == 0 ? index : index - 2 + kGroups * gridDim.x) + 1 < p.tiles) {
      asm volatile("bar.arrive %0, %1;" ::"r"(4 - group()), "n"(kFewChannelsThreads) : "memory");
    }
  }

  // Shared memory: a header, the table of quads' offsets in the patch (-1: none), the packed weights, the patch. The stage
  // takes the patch's place. kPaired: for each group a patch, and copies of the next one's input behind it.
  static __device__ __forceinline__ FewChannelsHeader<kChannels>& header() {
    return *reinterpret_cast<FewChannelsHeader<kChannels>*>(few_channels_shared);
  }
  static __device__ __forceinline__ uint32_t zeros() { return shared_address(few_channels_shared); }
  static __device__ __forceinline__ uint32_t offsets() { return zeros() + sizeof(FewChannelsHeader<kChannels>); }
  __device__ __forceinline__ uint32_t weights() const {
    return zeros() + few_channels_header(p.tile.k_steps, kChannels);
  }
  __device__ __forceinline__ uint32_t patch() const {
    return weights() + kPlanes * w_plane() + group() * p.tile.group_bytes;
  }
  __device__ __forceinline__ int w_plane() const { return p.tile.k_steps * kM * 512; }
  __device__ __forceinline__ uint32_t copies() const { return patch() + p.tile.copies; }

  // f(i, j, e) for every element of a Product.
  template <typename F>
  static __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(i, j, e);
        }
      }
    }
  }

  // Where a thread's own channels and pixels are in the product, and which they are.
  static __device__ __forceinline__ float& at(Product& acc, int channel, int pixel) {
    return acc[channel / 2][pixel / 2][channel % 2 * 2 + pixel % 2];
  }
  static __device__ __forceinline__ int own_channel(int i, int g) {
    return kLast ? i / kChunk * (8 * kChunk) + g * kChunk + i % kChunk : i / 2 * 16 + g + i % 2 * 8;
  }
  static __device__ __forceinline__ int own_pixel(int j, int t) {
    return warp() * kPixels + 8 * (j / 2) + 2 * t + j % 2;
  }

  // ---- once: weights, affines, tables ----

  static __device__ __forceinline__ float weight(const FewChannelsParams<T>& p, int k, int c, int r, int s) {
    return to_acc(p.w[k * p.w_stride_k + c * p.w_stride_c + r * p.w_stride_r + s * p.w_stride_s]);
  }

  __device__ __forceinline__ void set_up() {
    const int quads = p.R * p.S * p.tile.quads_per_tap;
    if (threadIdx.x == 0) {
      header().zeros = make_uint2(0, 0);
      header().all_exact = 0;
    }
    for (int q = threadIdx.x; q < p.tile.k_steps * 4 + kSparePlaces; q += kFewChannelsThreads) {
      // Past the last quad weights are 0. What is split is finite, so that any value will do: the last quad's, which costs
      // no access of its own.
      const int known = min(q, quads - 1);
      const int tap = known / p.tile.quads_per_tap;
      const int r = tap / p.S;
      const int s = tap - r * p.S;
      const int offset = (r * p.dilation_h * p.tile.x_cols + s * p.dilation_w) * p.tile.x_pitch +
                         (known - tap * p.tile.quads_per_tap) * 8;
      store_shared(offsets() + q * 4, static_cast<uint32_t>(kFloat || q < quads ? offset : -1));
    }
    for (int pixel = threadIdx.x; pixel < kFewChannelsPixels; pixel += kFewChannelsThreads) {
      const int row = p.tile_q.div(pixel);
      const int col = pixel - row * p.tile.q;
      const bool inside = row < p.tile.p;
      header().operands[pixel] = inside ? (row * p.stride_h * p.tile.x_cols + col * p.stride_w) * p.tile.x_pitch : 0;
      if constexpr (kLast) {
        header().places[pixel] = make_int2((row * p.Q + col) * p.K * kBytes, inside ? row << 16 | col : kOutside);
      } else {
        const int place = inside ? row * p.tile.stage_row + col : p.tile.stage_end + pixel - p.tile.p * p.tile.q;
        header().places[pixel] = make_int2(place * kBytes, p.tile.q == p.Q ? 0 : row * p.Q * kBytes);
      }
    }
    // The magnitudes of an output channel's weights, by neighbouring threads.
    constexpr int kSharers = kFewChannelsThreads / kChannels;
    const int channel = threadIdx.x / kSharers;
    const int k = first_channel + channel;
    const Affine<float> affine = k < p.K ? p.affine.pair(k) : Affine<float>{0, 0, 0};
    const float scale = affine.scale;
    bool exact = false;
    float w_scale = 1.0f, unscaled = scale;
    if constexpr (kFloat) {
      Magnitudes m;
#pragma unroll 8
      for (int e = threadIdx.x % kSharers; e < p.C * p.R * p.S && k < p.K; e += kSharers) {
        const int c = e / (p.R * p.S);
        const int tap = e - c * (p.R * p.S);
        const int r = tap / p.S;
        m.add(weight(p, k, c, r, tap - r * p.S));
      }
#pragma unroll
      for (int other = 1; other < kSharers; other *= 2) {
        m.merge(__shfl_xor_sync(0xffffffffu, m.most, other), __shfl_xor_sync(0xffffffffu, m.least, other));
      }
      w_scale = m.scale();
      unscaled = scale * m.inverse();
      exact = !m.can_split() || !is_moderate(unscaled);
    }
    if (threadIdx.x % kSharers == 0) {
      if constexpr (kFloat) {
        header().w_scales[channel] = w_scale;
        header().unscales[channel] = unscaled;
      }
      header().scales[channel] = scale;
      header().shifts[channel] = affine.shift;
    }
    if (__syncthreads_or(exact) && threadIdx.x == 0) {
      header().all_exact = 1;
    }

    // Packed as the instruction wants it: of each k step and each 16 channels, 16 bytes a lane.
#pragma unroll 2
    for (int e = threadIdx.x; e < p.tile.k_steps * kM * 32; e += kFewChannelsThreads) {
      const int e_lane = e % 32;
      const int m = e / 32 % kM;
      const int quad = e / (32 * kM) * 4 + e_lane % 4;
      const int tap = quad / p.tile.quads_per_tap;
      const int c0 = (quad - tap * p.tile.quads_per_tap) * kQuad;
      const int r = tap / p.S;
      const int s = tap - r * p.S;
      uint32_t high[4], low[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own_channel(2 * m + half, e_lane / 4);
        float v[kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          // Read from where there is something, so that no read waits for another.
          const bool inside = quad < quads && c0 + i < p.C && first_channel + row < p.K;
          const float value = weight(p, inside ? first_channel + row : 0, inside ? c0 + i : 0, inside ? r : 0,
                                     inside ? s : 0);
          v[i] = inside ? value : 0.0f;
        }
        if constexpr (kFloat) {
          split(v[0], v[1], header().w_scales[row], high[half], low[half]);
          split(v[2], v[3], header().w_scales[row], high[half + 2], low[half + 2]);
        } else {
          high[half] = pack_pair(T(), v[0], v[1]);
          high[half + 2] = pack_pair(T(), v[2], v[3]);
        }
      }
      store_shared(weights() + e * 16, make_uint4(high[0], high[1], high[2], high[3]));
      if constexpr (kFloat) {
        if (p.split) {
          store_shared(weights() + w_plane() + e * 16, make_uint4(low[0], low[1], low[2], low[3]));
        }
      }
    }
  }

  // ---- a tile ----

  struct Tile {
    int image, p0, q0;
  };

  // Opaque to the compiler, so that it does not keep one call's result for the next.
  __device__ __forceinline__ Tile locate(uint32_t index) const {
    asm volatile("" : "+r"(index));
    const int row = p.tiles_q.div(index);
    const int image = p.tiles_p.div(row);
    return {image, (row - image * p.tile.tiles_p) * p.tile.p,
            static_cast<int>(index - row * p.tile.tiles_q) * p.tile.q};
  }
  __device__ __forceinline__ int rows(const Tile& tile) const { return min(p.tile.p, p.P - tile.p0); }
  __device__ __forceinline__ int cols(const Tile& tile) const { return min(p.tile.q, p.Q - tile.q0); }
  // Of the tile's first pixel, channel `first_channel`.
  __device__ __forceinline__ int64_t y_offset(const Tile& tile) const {
    const int64_t start = static_cast<int64_t>(tile.image) * p.K * p.P * p.Q;
    const int pixel = tile.p0 * p.Q + tile.q0;
    return kLast ? start + pixel * p.K + first_channel : start + first_channel * (p.P * p.Q) + pixel;
  }

  // The patch goes by groups of 4 or 8 channels of a pixel; thread i has groups i, i + 256, ...
  template <int G>
  struct Group {
    uint32_t words[G * kBytes / 4];
  };
  template <int G>
  __device__ __forceinline__ int groups() const {
    return p.tile.x_rows * p.tile.x_cols * (p.tile.quads_per_tap * kQuad / G);
  }
  template <int G>
  __device__ __forceinline__ void split_index(int index, int& pixel, int& channel) const {
    pixel = p.pixel_groups.div(index);
    channel = (index - pixel * p.pixel_groups.divisor) * G;
  }

  // A patch's pixel in the image, and whether the image has it.
  __device__ __forceinline__ bool find_pixel(int pixel, const Tile& tile, int& h, int& w) const {
    const int row = p.x_cols.div(pixel);
    h = tile.p0 * p.stride_h - p.pad_h + row;
    w = tile.q0 * p.stride_w - p.pad_w + pixel - row * p.tile.x_cols;
    return static_cast<unsigned>(h) < static_cast<unsigned>(p.H) &&
           static_cast<unsigned>(w) < static_cast<unsigned>(p.W);
  }
  __device__ __forceinline__ const T* image(const Tile& tile) const {
    return p.x + static_cast<int64_t>(tile.image) * (p.C * p.H * p.W);
  }

  // Past the image, and past the patch, zeros.
  template <int G>
  __device__ __forceinline__ void read_group(Group<G>& group, int index, const Tile& tile) const {
    int pixel, c0;
    split_index<G>(index, pixel, c0);
    int h, w;
    const bool inside = find_pixel(pixel, tile, h, w) && index < groups<G>();
    const T* const x = image(tile);
    constexpr int kWords = G * kBytes / 4;
    if (kLast && p.x_vectors) {
      const T* const source = x + (h * p.W + w) * p.C + c0;
      if constexpr (kWords == 2) {
        const uint2 two = inside ? __ldg(reinterpret_cast<const uint2*>(source)) : make_uint2(0, 0);
        group.words[0] = two.x, group.words[1] = two.y;
      } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          const uint4 four = inside ? __ldg(reinterpret_cast<const uint4*>(source) + i / 4) : make_uint4(0, 0, 0, 0);
          group.words[i] = four.x, group.words[i + 1] = four.y;
          group.words[i + 2] = four.z, group.words[i + 3] = four.w;
        }
      }
    } else {
      using Bits = std::conditional_t<kFloat, uint32_t, uint16_t>;
      const int channel_stride = kLast ? 1 : p.H * p.W;
      const Bits* source = reinterpret_cast<const Bits*>(x) +
                           (kLast ? (h * p.W + w) * p.C + c0 : (c0 * p.H + h) * p.W + w);
      uint32_t v[G];
      if (p.whole_groups) {
#pragma unroll
        for (int i = 0; i < G; ++i) {
          v[i] = inside ? __ldg(source) : 0;
          source += channel_stride;
        }
      } else {
        const int channels = inside ? p.C - c0 : 0;
#pragma unroll
        for (int i = 0; i < G; ++i) {
          v[i] = i < channels ? __ldg(source) : 0;
          source += channel_stride;
        }
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        group.words[i] = kFloat ? v[i] : v[i * 2] | v[i * 2 + 1] << 16;
      }
    }
  }

  template <int G>
  __device__ __forceinline__ void store_exactly(const Group<G>& group, int index) const {
    int pixel, c0;
    split_index<G>(index, pixel, c0);
    const uint32_t target = patch() + 2 * (pixel * p.tile.x_pitch + c0 * 2);
#pragma unroll
    for (int i = 0; i < G; i += 4) {
      store_shared(target + i * 4,
                   make_uint4(group.words[i], group.words[i + 1], group.words[i + 2], group.words[i + 3]));
    }
  }

  template <int G>
  __device__ __forceinline__ void store_group(const Group<G>& group, int index, float scale) const {
    int pixel, c0;
    split_index<G>(index, pixel, c0);
    const uint32_t target = patch() + pixel * p.tile.x_pitch + c0 * 2;
    uint32_t high[G / 2], low[G / 2];
#pragma unroll
    for (int i = 0; i < G / 2; ++i) {
      if constexpr (kFloat) {
        split(__uint_as_float(group.words[2 * i]), __uint_as_float(group.words[2 * i + 1]), scale, high[i], low[i]);
      } else {
        high[i] = group.words[i];
      }
    }
    const auto store = [&](uint32_t address, const uint32_t (&v)[G / 2]) {
      if constexpr (G == 8) {
        store_shared(address, make_uint4(v[0], v[1], v[2], v[3]));
      } else {
        store_shared(address, make_uint2(v[0], v[1]));
      }
    };
    store(target, high);
    if constexpr (kFloat) {
      if (p.split) {
        store(target + p.tile.x_plane, low);
      }
    }
  }

  // The first groups are kept in registers; others are read when they are stored (in float32 before that as well, for
  // their magnitudes: the second time they come from the first-level cache).
  static constexpr int kKeptWords = kFloat ? 16 : 8;
  template <int G>
  static constexpr int kKept = kKeptWords / (G * kBytes / 4);
  using Ahead = uint32_t[kKeptWords];

  // Calls f(integral_constant<G>): groups of 8 where the channels allow it.
  template <typename F>
  __device__ __forceinline__ void by_group(F&& f) const {
    if (p.tile.quads_per_tap % 2 == 0) {
      f(std::integral_constant<int, 8>{});
    } else {
      f(std::integral_constant<int, 4>{});
    }
  }

  __device__ __forceinline__ void read_ahead(Ahead& ahead, const Tile& tile) const {
    by_group([&](auto g_) {
      constexpr int G = decltype(g_)::value;
      constexpr int kWords = G * kBytes / 4;
#pragma unroll
      for (int i = 0; i < kKept<G>; ++i) {
        Group<G> group{};
        if (i * kThreads < groups<G>()) {
          read_group(group, thread() + i * kThreads, tile);
        }
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          ahead[i * kWords + k] = group.words[k];
        }
      }
    });
  }

  // The magnitudes of all threads; when it returns, the patch may be written. Returns the scale.
  __device__ __forceinline__ float meet(Magnitudes m, bool& exact, float& inverse) const {
    m.most = __reduce_max_sync(0xffffffffu, m.most);
    m.least = __reduce_min_sync(0xffffffffu, m.least);
    if (lane() == 0) {
      header().warps[threadIdx.x / 32] = make_uint2(m.most, m.least);
    }
    wait_for_stores();
    sync();
    const uint2 other = header().warps[group() * kWarps + lane() % kWarps];
    m.most = __reduce_max_sync(0xffffffffu, other.x);
    m.least = __reduce_min_sync(0xffffffffu, other.y);
    inverse = m.inverse();
    exact = header().all_exact != 0 || !m.can_split();
    return m.scale();
  }

  __device__ __forceinline__ void load_patch(const Ahead& ahead, const Tile& tile, bool& exact, float& inverse) const {
    by_group([&](auto g_) {
      constexpr int G = decltype(g_)::value;
      constexpr int kWords = G * kBytes / 4;
      const auto kept = [&](int i) {
        Group<G> group;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          group.words[k] = ahead[i * kWords + k];
        }
        return group;
      };
      float scale = 1.0f;
      if constexpr (kFloat) {
        Magnitudes m;
        const auto add = [&](const Group<G>& group) {
#pragma unroll
          for (int i = 0; i < G; ++i) {
            m.add(__uint_as_float(group.words[i]));
          }
        };
#pragma unroll
        for (int i = 0; i < kKept<G>; ++i) {
          if (i * kThreads < groups<G>()) {
            add(kept(i));
          }
        }
        for (int i = thread() + kKept<G> * kThreads; i < groups<G>(); i += kThreads) {
          Group<G> group;
          read_group(group, i, tile);
          add(group);
        }
        scale = meet(m, exact, inverse);
      } else {
        wait_for_stores();
        sync();
      }
      if constexpr (kFloat) {
        if (exact) {
#pragma unroll 1
          for (int i = thread(); i < groups<G>(); i += kThreads) {
            Group<G> group;
            read_group(group, i, tile);
            store_exactly(group, i);
          }
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < kKept<G>; ++i) {
        if (thread() + i * kThreads < groups<G>()) {
          store_group(kept(i), thread() + i * kThreads, scale);
        }
      }
#pragma unroll 2
      for (int i = thread() + kKept<G> * kThreads; i < groups<G>(); i += kThreads) {
        Group<G> group;
        read_group(group, i, tile);
        store_group(group, i, scale);
      }
    });
  }

  // ---- kPaired: whole rows of the image, copied as they are, [channel][row][column] ----

  __device__ __forceinline__ int vectors() const { return p.C * p.tile.x_rows * (p.W / kVec); }

  // Rows that the image lacks become zeros.
  __device__ __forceinline__ void start_copies(const Tile& tile) const {
    const int h0 = tile.p0 * p.stride_h - p.pad_h;
    const T* const x = image(tile) + h0 * p.W;
    const bool all = h0 >= 0 && h0 + p.tile.x_rows <= p.H;
    const int beyond = (p.H - p.tile.x_rows) * p.W;  // from a channel's copied rows to the next one's
    for (int v = thread(); v < vectors(); v += kThreads) {
      const int c = p.channel_vectors.div(v);
      const int row = all ? 0 : p.row_vectors.div(v - c * p.channel_vectors.divisor);
      const bool exists = all || static_cast<unsigned>(h0 + row) < static_cast<unsigned>(p.H);
      copy_async(copies() + v * kVecBytes, exists ? x + (v * kVec + c * beyond) : p.x, exists);
    }
    copy_async_commit();
  }

  // From the copies into the patch. Columns that the image lacks are zeros.
  __device__ __forceinline__ void load_copies(bool& exact, float& inverse) const {
    copy_async_wait_all_but<0>();
    Magnitudes m;
#pragma unroll 4
    for (int v = thread(); v < vectors(); v += kThreads) {
      const uint4 values = load_shared_4(copies() + v * kVecBytes);  // this thread's own
      m.add(__uint_as_float(values.x));
      m.add(__uint_as_float(values.y));
      m.add(__uint_as_float(values.z));
      m.add(__uint_as_float(values.w));
    }
    const float scale = meet(m, exact, inverse);
    by_group([&](auto g_) {
      constexpr int G = decltype(g_)::value;
      const auto for_groups = [&](auto&& store) {
#pragma unroll 2
        for (int index = thread(); index < groups<G>(); index += kThreads) {
          int pixel, c0;
          split_index<G>(index, pixel, c0);
          const int row = p.x_cols.div(pixel);
          const int w = pixel - row * p.tile.x_cols - p.pad_w;
          const bool inside = static_cast<unsigned>(w) < static_cast<unsigned>(p.W);
          const int channel_stride = p.tile.x_rows * p.W * kBytes;
          uint32_t source = copies() + c0 * channel_stride + (row * p.W + w) * kBytes;
          Group<G> group;
#pragma unroll
          for (int i = 0; i < G; ++i) {
            group.words[i] = inside && (p.whole_groups || c0 + i < p.C) ? load_shared_1(source) : 0;
            source += channel_stride;
          }
          store(group, index);
        }
      };
      if (exact) {
        for_groups([&](const auto& group, int index) { store_exactly(group, index); });
      } else {
        for_groups([&](const auto& group, int index) { store_group(group, index, scale); });
      }
    });
  }

  // ---- the product ----

  __device__ __forceinline__ void load_weights(uint4 (&w)[kM], int step, int plane) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      w[i] = load_weight(step, plane, i);
    }
  }
  __device__ __forceinline__ uint4 load_weight(int step, int plane, int i) const {
    return load_shared_4(weights() + plane * w_plane() + (step * kM + i) * 512 + lane() * 16);
  }

  // The pixels' share in a k step. Past the last quad, zeros: 0 times what a patch may hold need not be 0.
  __device__ __forceinline__ void load_pixels(uint2 (&v)[kN], const uint32_t (&base)[kN], int offset, int plane) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const uint32_t address = base[j] + plane * p.tile.x_plane + offset;
      v[j] = load_shared_2(kFloat || offset >= 0 ? address : zeros());
    }
  }

  static __device__ __forceinline__ void multiply_step(Product& acc, const uint4 (&w)[kM], const uint2 (&v)[kN]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        mma_m16n8k16<Half>(acc[i][j], w[i], v[j]);
      }
    }
  }

  __device__ __forceinline__ int quad_offset(int step) const {
    return static_cast<int>(load_shared_1(offsets() + step * 16 + t() * 4));
  }

  // A step's pixels are on their way while the one before it multiplies. The table of offsets goes on for two steps more.
  __device__ __forceinline__ void multiply(Product& acc) const {
    uint32_t base[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      base[j] = patch() + header().operands[warp() * kPixels + 8 * j + g()];
    }
    for_each([&](int i, int j, int e) { acc[i][j][e] = 0; });
    if constexpr (kFloat) {
      if (p.split) {
        int offset = quad_offset(0);
#pragma unroll 1
        for (int step = 0; step < p.tile.k_steps; ++step) {
          uint4 w[kM];
          uint2 v[kN];
          load_weights(w, step, 1);
          load_pixels(v, base, offset, 0);
          multiply_step(acc, w, v);
          load_weights(w, step, 0);
          load_pixels(v, base, offset, 1);
          offset = quad_offset(step + 1);
          multiply_step(acc, w, v);
        }
        for_each([&](int i, int j, int e) { acc[i][j][e] *= 1 / kLowScale; });
      }
    }
    uint2 v[kN];
    load_pixels(v, base, quad_offset(0), 0);
    int offset = quad_offset(1);
#pragma unroll 1
    for (int step = 0; step < p.tile.k_steps; step += 2) {
      uint4 w[kM];
      uint2 following[kN];
      load_weights(w, step, 0);
      load_pixels(following, base, offset, 0);
      offset = quad_offset(step + 2);
      multiply_step(acc, w, v);
      if (step + 1 < p.tile.k_steps) {
        load_weights(w, step + 1, 0);
        load_pixels(v, base, offset, 0);
        offset = quad_offset(step + 3);
        multiply_step(acc, w, following);
      }
    }
  }

  // kPaired, which has registers for weights on their way as well. Behind the last step that is the last one's again.
  __device__ __forceinline__ void multiply_ahead(Product& acc) const {
    uint32_t base[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      base[j] = patch() + header().operands[warp() * kPixels + 8 * j + g()];
    }
    for_each([&](int i, int j, int e) { acc[i][j][e] = 0; });
    uint4 w[kM];
    uint2 v[kN], next[kN];
    int offset = quad_offset(0);
    if (p.split) {
      load_weights(w, 0, 1);
      load_pixels(v, base, offset, 0);
#pragma unroll 1
      for (int step = 0; step < p.tile.k_steps; ++step) {
        load_pixels(next, base, offset, 1);
        offset = quad_offset(step + 1);
        multiply_step(acc, w, v, step, 0);
        load_pixels(v, base, offset, 0);
        multiply_step(acc, w, next, step + 1, 1);
      }
    }
    load_weights(w, 0, 0);
    load_pixels(v, base, quad_offset(0), 0);
    offset = quad_offset(1);
    for_each([&](int i, int j, int e) { acc[i][j][e] *= 1 / kLowScale; });
#pragma unroll 1
    for (int step = 0; step < p.tile.k_steps; step += 2) {
      load_pixels(next, base, offset, 0);
      offset = quad_offset(step + 2);
      multiply_step(acc, w, v, step + 1, 0);
      if (step + 1 < p.tile.k_steps) {
        load_pixels(v, base, offset, 0);
        offset = quad_offset(step + 3);
        multiply_step(acc, w, next, step + 2, 0);
      }
    }
  }
  // A step, and the loading of another one's weights.
  __device__ __forceinline__ void multiply_step(Product& acc, uint4 (&w)[kM], const uint2 (&v)[kN], int step,
                                                int plane) const {
    step = min(step, p.tile.k_steps - 1);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        mma_m16n8k16<Half>(acc[i][j], w[i], v[j]);
      }
      w[i] = load_weight(step, plane, i);
    }
  }

  // float32 as it is, in FMAs: for values that do not split.
  __device__ __forceinline__ void multiply_exactly(Product& acc) const {
    float zero = 0;
    asm volatile("" : "+f"(zero));  // else all zeros are made before it is known which way to go
    for_each([&](int i, int j, int e) { acc[i][j][e] = zero; });
    uint32_t base[kOwnPixels];
#pragma unroll
    for (int j = 0; j < kOwnPixels; ++j) {
      base[j] = patch() + 2 * header().operands[own_pixel(j, t())];
    }
#pragma unroll 1
    for (int tap = 0; tap < p.R * p.S; ++tap) {
      const int r = tap / p.S;
      const int s = tap - r * p.S;
      const int offset = (r * p.dilation_h * p.tile.x_cols + s * p.dilation_w) * 2 * p.tile.x_pitch;
#pragma unroll 1
      for (int c = 0; c < p.C; ++c) {
        float v[kOwnPixels];
#pragma unroll
        for (int j = 0; j < kOwnPixels; ++j) {
          v[j] = __uint_as_float(load_shared_1(base[j] + offset + c * 4));
        }
#pragma unroll
        for (int i = 0; i < kOwnChannels; ++i) {
          int k = first_channel + own_channel(i, g());
          asm volatile("" : "+r"(k));  // the compiler shall not keep the addresses of all channels in registers
          const float w = k < p.K ? weight(p, k, c, r, s) : 0.0f;
#pragma unroll
          for (int j = 0; j < kOwnPixels; ++j) {
            at(acc, i, j) = fmaf(w, v[j], at(acc, i, j));
          }
        }
      }
    }
  }

  // ---- the epilogue ----

  // What was scaled is unscaled on the way: that is a power of two, and can go into the affine's scale.
  __device__ __forceinline__ void apply_affine(Product& acc, bool exact, float inverse) const {
    const float* const source = kFloat && !exact ? header().unscales : header().scales;
    const float factor = kFloat && !exact ? inverse : 1.0f;
#pragma unroll
    for (int i = 0; i < kOwnChannels; ++i) {
      const int channel = own_channel(i, g());
      const Affine<float> affine{0, kFloat ? source[channel] * factor : source[channel], header().shifts[channel]};
#pragma unroll
      for (int j = 0; j < kOwnPixels; ++j) {
        at(acc, i, j) = fused_conv_bn::apply_affine(at(acc, i, j), affine);
      }
    }
  }

  __device__ __forceinline__ void activate(Product& acc) const {
    dispatch_some<kBounds>(p.activation, [&](auto a) {
      if constexpr (a() != Activation::none) {
        for_each([&](int i, int j, int e) {
          acc[i][j][e] = fused_conv_bn::activate<a(), T>(acc[i][j][e], p.negative_slope);
        });
      }
    });
  }

  // What comes behind the affine.
  __device__ __forceinline__ void finish(Product& acc, const Tile& tile) const {
    if (p.residual != nullptr && !p.residual_last) {
      add_residual(acc, tile);
    }
    activate(acc);
    if (p.residual != nullptr && p.residual_last) [[unlikely]] {
      add_residual(acc, tile);
    }
  }

  __device__ __forceinline__ void add_residual(Product& acc, const Tile& tile) const {
    const T* const start = p.residual + y_offset(tile) + own_channel(0, g()) * (kLast ? 1 : p.P * p.Q);
    const int channels = p.K - first_channel - own_channel(0, g());
#pragma unroll
    for (int j = 0; j < kOwnPixels; ++j) {
      int pixel = own_pixel(j, t());
      asm volatile("" : "+r"(pixel));  // the compiler shall not keep every address of every pixel in a register
      const int row = p.tile_q.div(pixel);
      const int col = pixel - row * p.tile.q;
      if (row < rows(tile) && col < cols(tile)) {
        const T* source = start + (row * p.Q + col) * (kLast ? p.K : 1);
#pragma unroll
        for (int i = 0; i < kOwnChannels; ++i) {
          const int beyond = own_channel(i, 0);
          if (beyond < channels) {
            at(acc, i, j) += to_acc(kLast ? source[beyond] : *source);
          }
          source += kLast ? 0 : 8 * (p.P * p.Q);  // own_channel() goes by eights
        }
      }
    }
  }

  // A chunk of a pixel's channels at a time; threads of the same t write 128 bytes side by side.
  __device__ __forceinline__ void write_pixels(const Product& acc, const Tile& tile) const {
    if (p.y_vectors) {
      write_pixels_by(acc, tile, [](T* target, const float (&values)[kChunk], int channels) {
        if (channels > 0) {
          store_chunk(target, values);
        }
      });
    } else {
      write_pixels_by(acc, tile, [](T* target, const float (&values)[kChunk], int channels) {
#pragma unroll
        for (int v = 0; v < kChunk; ++v) {
          if (v < channels) {
            target[v] = from_acc<T>(values[v]);
          }
        }
      });
    }
  }

  template <typename F>
  __device__ __forceinline__ void write_pixels_by(const Product& acc, const Tile& tile, F&& write) const {
    unsigned char* const start = reinterpret_cast<unsigned char*>(p.y + y_offset(tile) + g() * kChunk);
    const int channels = p.K - first_channel - g() * kChunk;
    const int last_row = rows(tile) << 16;
    const int last_col = cols(tile);
#pragma unroll
    for (int j = 0; j < kOwnPixels; ++j) {
      const int2 place = header().places[own_pixel(j, t())];
      if (place.y < last_row && (place.y & 0xffff) < last_col) {
        T* const target = reinterpret_cast<T*>(start + static_cast<uint32_t>(place.x));
#pragma unroll
        for (int chunk = 0; chunk < kOwnChannels / kChunk; ++chunk) {
          float values[kChunk];
#pragma unroll
          for (int v = 0; v < kChunk; ++v) {
            const int i = chunk * kChunk + v;
            values[v] = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
          }
          const int first = chunk * 8 * kChunk;
          write(target + first, values, channels - first);
        }
      }
    }
  }

  static __device__ __forceinline__ void store_chunk(T* target, const float (&values)[kChunk]) {
    if constexpr (kChunk == kVec) {
      Vec<T> vector;
      pack(values, vector);
      store_words(target, vector.words);
    } else {
      static_assert(kChunk * kBytes == 8);
      *reinterpret_cast<uint2*>(target) = {pack_pair(T(), values[0], values[1]), pack_pair(T(), values[2], values[3])};
    }
  }

  // Into the stage, as [channel][pixel]: each run of the output starts there where it starts in memory, modulo 16 bytes.
  // kPairs: two neighbours with one store. kWhole: rows are whole, so that one run has them all. kAligned: at a multiple of
  // 16 bytes.
  template <bool kPairs, bool kWhole, bool kAligned = false>
  __device__ __forceinline__ void stage_planes(const Product& acc, const Tile& tile) const {
    int2 places[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      places[j] = header().places[own_pixel(2 * j, t())];
    }
    // 8 planes on.
    const uint32_t plane = 8 * p.P * p.Q * kBytes;
    uint32_t lead = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.y)) +
                    static_cast<uint32_t>(y_offset(tile) + g() * (p.P * p.Q)) * kBytes;
    uint32_t target = patch() + g() * p.tile.stage_pitch * kBytes;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const uint32_t address = target + places[j].x +
                                 (kAligned ? 0 : (lead + (kWhole ? 0 : places[j].y)) % kVecBytes);
        const float first = acc[i / 2][j][i % 2 * 2];
        const float second = acc[i / 2][j][i % 2 * 2 + 1];
        if constexpr (kFloat) {
          if constexpr (kPairs) {
            store_shared(address, make_uint2(__float_as_uint(first), __float_as_uint(second)));
          } else {
            store_shared(address, __float_as_uint(first));
            store_shared(address + 4, __float_as_uint(second));
          }
        } else {
          const uint32_t pair = pack_pair(T(), first, second);
          if constexpr (kPairs) {
            store_shared(address, pair);
          } else {
            store_shared(address, static_cast<uint16_t>(pair));
            store_shared(address + 2, static_cast<uint16_t>(pair >> 16));
          }
        }
      }
      lead += plane;
      target += 8 * p.tile.stage_pitch * kBytes;
    }
  }

  // From the stage: `length` bytes in a row, by as many lanes as 2^run_shift.
  __device__ __forceinline__ void write_run(unsigned char* target, uint32_t source, int length) const {
    const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(target)) & (kVecBytes - 1);
    const int end = lead + length;
    target -= lead;
    for (int at = (thread() & ((1 << p.run_shift) - 1)) * kVecBytes; at < end; at += kVecBytes << p.run_shift) {
      if (at >= lead && at + kVecBytes <= end) {
        store_words(target + at, load_shared_4(source + at));
      } else {
        for (int e = max(at, lead); e < min(at + kVecBytes, end); e += kBytes) {
          if constexpr (kFloat) {
            *reinterpret_cast<uint32_t*>(target + e) = load_shared_1(source + e);
          } else {
            *reinterpret_cast<uint16_t*>(target + e) = static_cast<uint16_t>(load_shared_1(source + (e & ~3)) >>
                                                                             (e % 4 * 8));
          }
        }
      }
    }
  }

  // Below 9.0 a block that has a tile at a time lacks the registers for it.
  __device__ __forceinline__ bool writes_vectors() const {
#if __CUDA_ARCH__ >= 900
    return p.run_vectors;
#else
    return kPaired && p.run_vectors;
#endif
  }

  // All rows of the tile together, channel by channel, where runs are whole vectors.
  __device__ __forceinline__ void write_vectors(const Tile& tile) const {
    const int length = rows(tile) * p.Q * kBytes;
    const int channels = min(kChannels, p.K - first_channel);
    const int64_t plane = static_cast<int64_t>(p.P * p.Q) * kBytes;
    const int pitch = p.tile.stage_pitch * kBytes;
    unsigned char* target = reinterpret_cast<unsigned char*>(p.y + y_offset(tile));
    uint32_t source = patch();
#if __CUDA_ARCH__ >= 900
    // Each by one thread; all warps have as many of them.
    const int channel = lane() * kWarps + warp();
    if (lane() < kChannels / kWarps && channel < channels) {
      copy_bulk(target + channel * plane, source + channel * pitch, length);
      copy_bulk_commit();
    }
#else
    constexpr int kVectors = kFewChannelsPixels * kBytes / kVecBytes / 32;  // a lane's part of a run, at most
    const int first = lane() * kVecBytes;
    target += warp() * plane + first;
    source += warp() * pitch + first;
#pragma unroll 4
    for (int channel = warp(); channel < channels; channel += kWarps) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = 32 * v * kVecBytes;
        if (first + at < length) {
          store_words(target + at, load_shared_4(source + at));
        }
      }
      target += kWarps * plane;
      source += kWarps * pitch;
    }
#endif
  }

  // Until what write_vectors() started has left the stage. Others know after a barrier.
  __device__ __forceinline__ void wait_for_stores() const {
    if constexpr (!kLast) {
      copy_bulk_wait_read();
    }
  }

  // All rows of the tile together, channel by channel.
  __device__ __forceinline__ void write_whole_planes(const Tile& tile) const {
    const int first = thread() >> p.run_shift;
    const int parallel = kThreads >> p.run_shift;
    const int64_t plane = static_cast<int64_t>(p.P * p.Q) * kBytes;
    const int pitch = p.tile.stage_pitch * kBytes;
    const int length = rows(tile) * p.Q * kBytes;
    const int channels = min(kChannels, p.K - first_channel);
    unsigned char* target = reinterpret_cast<unsigned char*>(p.y + y_offset(tile)) + first * plane;
    uint32_t source = patch() + first * pitch;
    for (int channel = first; channel < channels; channel += parallel) {
      write_run(target, source, length);
      target += parallel * plane;
      source += parallel * pitch;
    }
  }

  // Row by row.
  __device__ __forceinline__ void write_rows(const Tile& tile) const {
    const int channels = min(kChannels, p.K - first_channel);
    const int last_row = rows(tile);
    const int length = cols(tile) * kBytes;
    unsigned char* const start = reinterpret_cast<unsigned char*>(p.y + y_offset(tile));
    for (int run = thread() >> p.run_shift; run < channels * p.tile.p; run += kThreads >> p.run_shift) {
      const int channel = p.tile_p.div(run);
      const int row = run - channel * p.tile.p;
      if (row < last_row) {
        const uint32_t offset = channel * (p.P * p.Q) + row * p.Q;
        write_run(start + static_cast<uint64_t>(offset) * kBytes,
                  patch() + (channel * p.tile.stage_pitch + row * p.tile.stage_row) * kBytes, length);
      }
    }
  }

  static constexpr int kSparePlaces = 12;      // of the table of offsets
  static constexpr int kOutside = 0x7fff0000;  // as a row, below every other

  const FewChannelsParams<T>& p;
  const int first_channel;
};

template <typename T, int kM, bool kLast, bool kPaired, bool kBounds>
__global__ void __launch_bounds__(kFewChannelsThreads, few_channels_residents(kPaired))
    stem_sm80_kernel(const __grid_constant__ FewChannelsParams<T> params) {
#if __CUDA_ARCH__ >= 800  // select_plan() leaves older GPUs to PyTorch
  if constexpr (!kPaired || few_channels_pairs(__CUDA_ARCH__ / 10)) {
    wait_for_previous();
    FewChannels<T, kM, kLast, kPaired, kBounds>(params).run();
  }
#endif
}

template <typename T>
cudaError_t StemSm80::launch(const ConvCall& call, cudaStream_t stream) const {
  const auto& [c, operands, gpu, epilogue] = call;
  FewChannelsParams<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.affine = AffineSource<T>(operands.affine);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_c = operands.w_stride_c;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
  p.C = static_cast<int>(c.C), p.H = static_cast<int>(c.H), p.W = static_cast<int>(c.W);
  p.K = static_cast<int>(c.K), p.R = static_cast<int>(c.R), p.S = static_cast<int>(c.S);
  p.P = static_cast<int>(c.P), p.Q = static_cast<int>(c.Q);
  p.stride_h = static_cast<int>(c.stride_h), p.stride_w = static_cast<int>(c.stride_w);
  p.pad_h = static_cast<int>(c.pad_h), p.pad_w = static_cast<int>(c.pad_w);
  p.dilation_h = static_cast<int>(c.dilation_h), p.dilation_w = static_cast<int>(c.dilation_w);
  p.tile = tile;
  p.x_cols = FastDiv(tile.x_cols);
  const int group = tile.quads_per_tap % 2 == 0 ? 2 * kQuad : kQuad;
  p.pixel_groups = FastDiv(tile.quads_per_tap * kQuad / group);
  p.whole_groups = c.C % group == 0;
  p.tile_q = FastDiv(tile.q);
  p.row_vectors = FastDiv(static_cast<uint32_t>(std::max<int64_t>(1, c.W / Vec<T>::kSize)));
  p.channel_vectors = FastDiv(tile.x_rows * p.row_vectors.divisor);
  p.tiles_q = FastDiv(tile.tiles_q);
  p.tiles_p = FastDiv(tile.tiles_p);
  p.tiles = static_cast<uint32_t>(c.N * tile.tiles_p * tile.tiles_q);
  p.tile_p = FastDiv(tile.p);
  const int run_vectors = (tile.q == c.Q ? tile.p * tile.q : tile.q) / Vec<T>::kSize + 1;
  p.run_shift = run_vectors > 16 ? 5 : (run_vectors > 8 ? 4 : 3);
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % kVecBytes == 0; };
  p.x_vectors = c.channels_last && c.C % kQuad == 0 && aligned(p.x) &&
                c.C * c.element_bytes % (tile.quads_per_tap % 2 == 0 ? 16 : 8) == 0;
  p.y_vectors = c.channels_last && c.K * c.element_bytes % kVecBytes == 0 && aligned(p.y);
  p.stage_pairs = !c.channels_last && c.Q % 2 == 0 && reinterpret_cast<uintptr_t>(p.y) % (2 * sizeof(T)) == 0;
  p.run_vectors = p.stage_pairs && tile.q == c.Q && run_vectors > 16 && aligned(p.y) &&
                  c.P * c.Q % Vec<T>::kSize == 0 && int64_t{tile.p} * tile.q % Vec<T>::kSize == 0;
  p.split = c.element_bytes == 4 && !c.allow_tf32;
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  const auto launch = [&](auto m, auto last, auto paired) {
    const auto kernel = is_bound(epilogue.activation) ? stem_sm80_kernel<T, m(), last(), paired(), true>
                                                      : stem_sm80_kernel<T, m(), last(), paired(), false>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    tile.shared_memory);
    if (status != cudaSuccess) {
      return status;
    }
    const int64_t groups = ceil_div(c.K, tile.channels);
    const int64_t resident = int64_t{gpu.multiprocessors} * std::max(1, few_channels_blocks(tile, gpu));
    const int64_t blocks = std::min<int64_t>(ceil_div(p.tiles, few_channels_groups(paired())),
                                             ceil_div(resident, groups));
    return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
                         kFewChannelsThreads, tile.shared_memory, true, stream, p);
  };
  using std::false_type;
  using std::true_type;
  using Narrow = std::integral_constant<int, 2>;
  using Full = std::integral_constant<int, 4>;
  if constexpr (std::is_same_v<T, float>) {
    if (tile.paired && aligned(p.x)) {
      return launch(Full{}, false_type{}, true_type{});
    }
  }
  if (c.channels_last) {
    return tile.channels == 64 ? launch(Full{}, true_type{}, false_type{})
                               : launch(Narrow{}, true_type{}, false_type{});
  }
  return tile.channels == 64 ? launch(Full{}, false_type{}, false_type{})
                             : launch(Narrow{}, false_type{}, false_type{});
}

}  // namespace fused_conv_bn
