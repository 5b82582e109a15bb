// How the threads of a pooling kernel share images: each has 16 bytes of channels, or one element, of a tile of pixels. Consecutive
// threads have consecutive channels, then consecutive columns, so that what columns share comes from the nearest cache.
#pragma once

#include <algorithm>

#include "kernels/common/fast_div.h"
#include "kernels/ptx/launch.cuh"
#include "problem.h"

namespace fused_conv_bn {

// Of a block. Few threads are in small ones, which all multiprocessors get their share of.
constexpr int kPoolThreads = 256, kPoolFewThreads = 64;
// Of a multiprocessor.
constexpr int64_t kPoolFullThreads = 2048;

// A launch's.
struct PoolTiles {
  uint32_t threads;
  int first_row;
  FastDiv lanes;  // threads of a pixel
  FastDiv columns;
  FastDiv rows;
};

// A thread's.
struct PoolTile {
  uint32_t lane;
  int row;
  int column;
  uint32_t image;  // of the launch
};

__device__ __forceinline__ PoolTile pool_tile(const PoolTiles& tiles, uint32_t thread) {
  PoolTile tile;
  tile.lane = thread;
  uint32_t column = div_mod(tiles.lanes, tile.lane);
  uint32_t row = div_mod(tiles.columns, column);
  tile.image = div_mod(tiles.rows, row);
  tile.row = tiles.first_row + static_cast<int>(row);
  tile.column = static_cast<int>(column);
  return tile;
}

// Params: with a PoolTiles `tiles`, which is set here, and skip_images(), which moves its pointers.
template <typename Params>
cudaError_t launch_pool_tiles(void (*kernel)(Params), const Params& params, int64_t images, int64_t rows,
                              int64_t columns, int64_t lanes, int multiprocessors, cudaStream_t stream) {
  // So many images in a launch, or so many rows of one.
  const int64_t row_threads = columns * lanes;
  const int64_t rows_step = std::clamp<int64_t>(kMostPooled / row_threads, 1, rows);
  const int64_t images_step = rows_step < rows ? 1 : std::max<int64_t>(1, kMostPooled / (rows * row_threads));
  for (int64_t image = 0; image < images; image += images_step) {
    const int64_t images_here = std::min(images_step, images - image);
    Params p = params;
    p.skip_images(image);
    p.tiles.lanes = FastDiv(static_cast<uint32_t>(lanes));
    p.tiles.columns = FastDiv(static_cast<uint32_t>(columns));
    for (int64_t row = 0; row < rows; row += rows_step) {
      const int64_t rows_here = std::min(rows_step, rows - row);
      p.tiles.first_row = static_cast<int>(row);
      p.tiles.rows = FastDiv(static_cast<uint32_t>(rows_here));
      p.tiles.threads = static_cast<uint32_t>(images_here * rows_here * row_threads);
      const unsigned size = p.tiles.threads < kPoolFullThreads * multiprocessors ? kPoolFewThreads : kPoolThreads;
      const cudaError_t status = launch_kernel(kernel, dim3((p.tiles.threads + size - 1) / size), size, 0, true, stream,
                                               p);
      if (status != cudaSuccess) {
        return status;
      }
    }
  }
  return cudaSuccess;
}

// Of rows and columns, as kernels count.
struct PoolNumbers {
  int input[2];
  int output[2];
  int kernel[2];
  int stride[2];
  int padding[2];
  int dilation[2];

  PoolNumbers() = default;
  explicit PoolNumbers(const PoolProblem& problem) {
    for (int d = 0; d < 2; ++d) {
      const PoolWindow& window = d == 0 ? problem.rows : problem.columns;
      input[d] = static_cast<int>(window.input);
      output[d] = static_cast<int>(window.output);
      kernel[d] = static_cast<int>(window.kernel);
      stride[d] = static_cast<int>(window.stride);
      padding[d] = static_cast<int>(window.padding);
      dilation[d] = static_cast<int>(window.dilation);
    }
  }
};

// The rows, or columns, of the image that are in a window. d: 0 for rows. at: of the output.
struct PoolSpan {
  int skipped;  // those of the window in front of the image
  int first;
  int end;

  __device__ __forceinline__ PoolSpan(const PoolNumbers& of, int d, int at) : skipped(0) {
    first = at * of.stride[d] - of.padding[d];
    end = min(first + (of.kernel[d] - 1) * of.dilation[d] + 1, of.input[d]);
    if (first < 0) {
      skipped = (of.dilation[d] - 1 - first) / of.dilation[d];
      first += skipped * of.dilation[d];
    }
  }
};

// Whether both dimensions have this window and stride, and no dilation.
inline bool is_square(const PoolProblem& problem, int64_t kernel, int64_t stride) {
  const auto is = [&](const PoolWindow& w) { return w.kernel == kernel && w.stride == stride && w.dilation == 1; };
  return is(problem.rows) && is(problem.columns);
}

}  // namespace fused_conv_bn
