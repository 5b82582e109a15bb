// The pass (plan.h). Consumers multiply, producers make the window of the next tile meanwhile (window.cuh). A consumer has a role: 32
// rows of the product by up to kMostRoleUnits units of columns, for some of the chunks of all tiles. It copies its own chunks of dy.
//
// Tensor cores cut off what does not fit when they add, so that long sums lose more than float32 does. A chunk's sums start at 0,
// and are added to float32 sums by the usual rule; those of warps and blocks are added up in float64.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "chunk.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "params.cuh"
#include "window.cuh"

namespace fused_conv_bn::wgrad_stem_sm80 {

template <typename Factor>
constexpr uint32_t kOnes = std::is_same_v<Factor, bfloat16> ? 0x3f803f80u : 0x3c003c00u;

// A warp's share of its role: tiles of 16 rows by units, and the sums of rows. kUnits: a role's.
template <typename C, int kUnits>
using SumsOf = float[kWarpTiles][kUnits + 1][4];

template <typename C>
struct Role {
  const Block<C>& block;
  const Params<typename C::T>& p = block.p;
  const int index = blockIdx.y * p.tile.block_roles + block.consumer() % p.tile.block_roles;
  const int group = block.consumer() / p.tile.block_roles;
  const bool exists = index < p.tile.roles;
  const int row_tile = index / p.tile.columns() * kWarpTiles;  // the first one
  const int column = index % p.tile.columns();
  const int channel_block = column / p.tile.block_columns;
};

// Adds a chunk's sums. inverses: of the scales of a lane's rows; columns: of its columns.
template <typename C, int kUnits>
__device__ __forceinline__ void add_chunk(SumsOf<C, kUnits>& sums, const SumsOf<C, kUnits>& acc,
                                          const float (&inverses)[kWarpTiles][2], const float (&columns)[2]) {
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
    for (int j = 0; j <= kUnits; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (C::kFloat32) {
          const float factor = j < kUnits ? inverses[i][e / 2] * columns[e % 2] : inverses[i][e / 2];
          sums[i][j][e] = fmaf(acc[i][j][e], factor, sums[i][j][e]);
        } else {
          sums[i][j][e] += acc[i][j][e];
        }
      }
    }
  }
}

// Of the scale of a value in units of a block of channels.
template <typename C>
__device__ __forceinline__ float column_inverse(const Block<C>& block, uint32_t number, int channel_block, int value) {
  const int channel = min(channel_block * 8 + (value & (block.p.tile.slots - 1)), block.p.C - 1);
  return exp2_of(-scale_exponent(load_shared_1(shared_address(block.most(number) + channel))));
}

template <typename C, int kUnits>
struct Multiplier {
  using Sums = SumsOf<C, kUnits>;
  static constexpr uint32_t kOne = kOnes<typename C::Factor>;

  const Block<C>& block;
  const Role<C>& role;
  const Params<typename C::T>& p = block.p;

  // The lane's row in loads of columns: of which term, or which one of two units, and its pixel.
  __device__ __forceinline__ int matrix() const { return block.lane() / 8; }

  // The window of a chunk's pixel; those behind the tile have any that exists, and 0 for a factor.
  __device__ __forceinline__ uint32_t window_of(int pixel, int pixels, uint32_t window) const {
    const auto [row, col] = locate_pixel(pixel < pixels ? pixel : 0, p.tile_q);
    return window + (row * p.stride_h * p.tile.x_pitch + col) * 16;
  }
  __device__ __forceinline__ int tap(int unit) const {
    return static_cast<int>(load_shared_1(shared_address(block.header().taps + unit)));
  }
  __device__ __forceinline__ uint32_t role_taps() const {
    return shared_address(block.header().role_taps[role.column]);
  }

  // The patch as rows: tile i of them, in a term.
  __device__ __forceinline__ uint4 load_rows(uint32_t window, bool inside, int i, int term) const {
    // Matrices: the first unit, the second, then the second half of k.
    const int unit = (role.row_tile + i) * 2 + matrix() % 2;
    const bool there = inside && unit < p.tile.units;
    return load_matrices_transposed(there ? window + tap(min(unit, p.tile.units - 1)) + term * p.tile.x_term
                                          : shared_address(block.header().zeros));
  }

  // Units behind the role's last one are that one again. Products follow those that they do not wait for.
  __device__ __forceinline__ void multiply_step(Sums& acc, const RowFragment<C> (&rows)[kWarpTiles],
                                                uint32_t window) const {
    if constexpr (C::kTerms == 2) {
      const uint32_t base = window + matrix() / 2 * p.tile.x_term;
#pragma unroll
      for (int first = 0; first < kUnits; first += 3) {
        const uint4 taps = load_shared_4(role_taps() + first / 3 * 16);
        const uint4 v[3] = {load_matrices_transposed(base + taps.x), load_matrices_transposed(base + taps.y),
                            load_matrices_transposed(base + taps.z)};  // both terms of a unit
#pragma unroll
        for (int product = 0; product < 3; ++product) {
#pragma unroll
          for (int j = 0; j < 3; ++j) {
#pragma unroll
            for (int i = 0; i < kWarpTiles; ++i) {
              mma_m16n8k16<float16>(acc[i][first + j], rows[i].terms[product == 0 ? 1 : 0],
                                    product == 1 ? make_uint2(v[j].z, v[j].w) : make_uint2(v[j].x, v[j].y));
            }
          }
        }
      }
    } else {
      const uint32_t own = role_taps() + matrix() / 2 * (kRoleTaps * 2);
      const uint4 taps = load_shared_4(own);
#pragma unroll
      for (int j = 0; j < kUnits; j += 2) {  // two units
        const uint32_t tap = j < 2   ? taps.x
                             : j < 4 ? taps.y
                             : j < 6 ? taps.z
                             : j < 8 ? taps.w
                                     : load_shared_1(own + 16);
        const uint4 v = load_matrices_transposed(window + tap);
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          mma_m16n8k16<typename C::Factor>(acc[i][j], rows[i].terms[0], make_uint2(v.x, v.y));
          if (j + 1 < kUnits) {
            mma_m16n8k16<typename C::Factor>(acc[i][j + 1], rows[i].terms[0], make_uint2(v.z, v.w));
          }
        }
      }
    }
    if (role.column == 0) {
#pragma unroll
      for (int term = 0; term < C::kTerms; ++term) {
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          mma_m16n8k16<typename C::Factor>(acc[i][kUnits], rows[i].terms[term], make_uint2(kOne, kOne));
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(Sums& sums, const ChunkPlace& place, const ChunkReader<C>& reader, int stage,
                                           const float (&columns)[2]) const {
    RowFragment<C> rows[kSteps][kWarpTiles];
    float inverses[kWarpTiles][2] = {};  // float32
    const int pixels = p.tile.p * p.tile.q;
    if constexpr (C::kRows == Rows::gradient) {
      reader.load(stage, rows, inverses);
    } else if constexpr (C::kFloat32) {
#pragma unroll
      for (int e = 0; e < 2 * kWarpTiles; ++e) {
        const int unit = min((role.row_tile + e / 2) * 2 + e % 2, p.tile.units - 1);
        inverses[e / 2][e % 2] = column_inverse(block, place.number, unit / p.tile.block_units, block.lane() / 4);
      }
    }
    Sums acc;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
      for (int j = 0; j <= kUnits; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[i][j][e] = 0;
        }
      }
    }
    const uint32_t window = block.window(place.number);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int first = place.chunk * kChunk + step * 16;
      if constexpr (C::kRows == Rows::patch) {
        const Tile tile = block.tiles().locate(block.tile_index(place.number));
        const int pixel = first + matrix() / 2 * 8 + block.lane() % 8;
        const auto [row, col] = locate_pixel(pixel, p.tile_q);
        const bool inside = row < block.tiles().rows(tile, p) && col < block.tiles().cols(tile, p);
        const uint32_t at = window_of(pixel, pixels, window);
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
          for (int term = 0; term < C::kTerms; ++term) {
            rows[step][i].terms[term] = load_rows(at, inside, i, term);
          }
        }
      }
      const int pixel = first + pixel_of<C>(matrix() % 2 * 8 + block.lane() % 8);
      multiply_step(acc, rows[step], window_of(pixel, pixels, window));
    }
    add_chunk<C, kUnits>(sums, acc, inverses, columns);
  }
};

template <typename C, int kUnits>
struct Consumer {
  using Sums = SumsOf<C, kUnits>;
  const Block<C>& block;
  const Params<typename C::T>& p = block.p;

  __device__ __forceinline__ void run() const {
    const Role<C> role{block};
    const ChunkReader<C> reader{block, role.row_tile * 16};
    const Multiplier<C, kUnits> multiplier{block, role};
    Sums sums = {};
    // Chunks whose copies are under way run ahead by kChunkStages - 1.
    NextChunk ahead = reader.find({0, role.group});
    int ahead_stage = 0;
    const auto start_chunk = [&] {
      if constexpr (C::kRows == Rows::gradient) {
        if (role.exists) {
          reader.start_copies(ahead, ahead_stage);
        }
        copy_async_commit();
        ahead_stage = ahead_stage + 1 == kChunkStages ? 0 : ahead_stage + 1;
        ahead.place.chunk += p.tile.groups;
        if (ahead.place.chunk >= p.tile.chunks) {
          ahead = reader.find({ahead.place.number + 1, ahead.place.chunk - p.tile.chunks});
        }
      }
    };
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < kChunkStages - 1; ++i) {
      start_chunk();
    }
    int stage = 0, chunk = role.group;
#pragma unroll 1
    for (uint32_t number = 0; block.exists(number); ++number) {
      block.hand_over();
      float columns[2] = {1, 1};
      if constexpr (C::kFloat32) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          columns[e] = column_inverse(block, number, role.channel_block, block.lane() % 4 * 2 + e);
        }
      }
      // The groups take turns through all tiles.
#pragma unroll 1
      for (; chunk < p.tile.chunks; chunk += p.tile.groups) {
        __syncwarp();  // nobody reads the stage any more that is to be filled
        start_chunk();
        copy_async_wait_all_but<kChunkStages - 1>();
        __syncwarp();
        if (role.exists) {
          multiplier.multiply(sums, {number, chunk}, reader, stage, columns);
        }
        stage = stage + 1 == kChunkStages ? 0 : stage + 1;
      }
      chunk -= p.tile.chunks;
    }
    let_next_begin();
    write(role, sums);
  }

 private:
  // The sums of all groups, as lanes have them.
  __device__ __forceinline__ void write(const Role<C>& role, const Sums& sums) const {
    copy_async_wait_all_but<0>();
    block.sync_consumers();  // and producers write nothing any more
    const uint32_t start = block.shared() + kHeaderBytes;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
      for (int j = 0; j <= kUnits; ++j) {
        const int unit = j < kUnits ? j : p.tile.role_units;
        if (unit < p.tile.role_units || j == kUnits) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = block.consumer() * p.tile.role_sums() + i * p.tile.tile_sums() + (unit * 4 + e) * 32 +
                           block.lane();
            store_shared(start + at * 4, __float_as_uint(sums[i][j][e]));
          }
        }
      }
    }
    block.sync_consumers();
    const int first_role = blockIdx.y * p.tile.block_roles;
    const int role_sums = p.tile.role_sums();
    const int count = min(p.tile.block_roles, p.tile.roles - first_role) * role_sums;
    double* const target = p.partials + (static_cast<int64_t>(blockIdx.x) * p.tile.roles + first_role) * role_sums;
    for (int i = block.consumer() * 32 + block.lane(); i < count; i += 32 * p.tile.consumers()) {
      double sum = 0;
      for (int group = 0; group < p.tile.groups; ++group) {
        sum += __uint_as_float(load_shared_1(start + (group * p.tile.block_roles * role_sums + i) * 4));
      }
      target[i] = sum;
    }
  }
};

template <typename C>
__device__ __forceinline__ void set_up(const Block<C>& block) {
  const auto& p = block.p;
  Header& header = block.header();
  if (threadIdx.x < 4) {
    header.zeros[threadIdx.x] = 0;
  }
  const auto tap_of = [&](int unit) {
    const int channel_block = unit / p.tile.block_units, of_block = unit % p.tile.block_units;
    const int r = of_block / p.tile.row_units;
    const int column = of_block % p.tile.row_units * (8 / p.tile.slots) * p.dilation_w;
    const int place = column % p.stride_w * p.tile.phase_cols + column / p.stride_w;
    const int row = channel_block * p.tile.x_rows + r * p.dilation_h;
    return (row * p.tile.x_pitch + place) * 16;
  };
  for (int unit = threadIdx.x; unit < p.tile.units; unit += blockDim.x) {
    header.taps[unit] = tap_of(unit);
  }
  for (int i = threadIdx.x; i < p.tile.columns() * kRoleTaps; i += blockDim.x) {
    const int column = i / kRoleTaps, place = i % kRoleTaps;
    // float32: three units and nothing. 16 bits: even ones, then odd ones.
    const int j = C::kTerms == 2 ? place / 4 * 3 + min(place % 4, 2) : place % 8 * 2 + place / 8;
    const int first = column % p.tile.block_columns * p.tile.role_units;
    header.role_taps[column][place] = tap_of(column / p.tile.block_columns * p.tile.block_units +
                                             min(first + min(j, p.tile.role_units - 1), p.tile.block_units - 1));
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kThreads = 32 * (kWarps90.producers + kWarps90.consumers);
#else
constexpr int kThreads = 32 * (kWarpsElsewhere.producers + kWarpsElsewhere.consumers);
#endif

template <typename T, bool kChannelsLast, Rows kRows, int kUnits>
__global__ void __launch_bounds__(kThreads, 1) wgrad_stem_sm80_kernel(const __grid_constant__ Params<T> params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using C = Config<T, kChannelsLast, kRows>;
  const Block<C> block{params};
  set_up(block);
  __syncthreads();
  if (block.warp() < params.tile.producers) {
    release_registers<56>();
    Producer<C>{block}.run();
  } else {
    acquire_registers<152>();
    if (block.consumer() < params.tile.consumers()) {
      Consumer<C, kUnits>{block}.run();
    }
  }
#endif
}

}  // namespace fused_conv_bn::wgrad_stem_sm80
