// Means over the pixels of each channel of each image, in one launch, and in one order of sums for a shape and an alignment.
//
//   columns  channels innermost: a block takes up to 32 vectors of channels, and its threads' rows every so many pixels; what they
//            have is added up through shuffles and shared memory. Where images have few channels, the pixels are those of a
//            cluster of blocks, whose first one reads the others' sums from their shared memory.
//   planes   contiguous: 8, 32 or 256 threads take a plane, whose first elements may lie before a 16-byte boundary.
#pragma once

#include <algorithm>

#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/shared.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace fused_conv_bn {

template <typename T, typename Out>
struct MeanColumnsParams {
  const T* input;
  Out* output;
  int64_t pixels;
  int64_t block_pixels;  // of a block of the cluster
  int64_t divisor;       // of the sums
  uint32_t channels;
  uint32_t lanes;   // vectors of a block: a power of 2, up to 32
  uint32_t groups;  // of so many vectors, in an image
  uint32_t cluster;
};

// kElements: of a vector, 16 bytes of them or one.
template <typename T, int kElements, typename Out>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocksOfMultiprocessor)
    mean_columns_kernel(const MeanColumnsParams<T, Out> p) {
  using Acc = acc_t<T>;
  constexpr int kPiece = kVecBytes / static_cast<int>(sizeof(Acc));
  const uint32_t lane = threadIdx.x & (p.lanes - 1);
  const uint32_t row = threadIdx.x / p.lanes;
  const uint32_t rows = kMeanThreads / p.lanes;
  const uint32_t rank = cluster_rank();
  const uint32_t block = blockIdx.x / p.cluster;
  const uint32_t image = block / p.groups;
  const int64_t first_channel = int64_t{block - image * p.groups} * p.lanes * kElements;
  const int64_t channel = first_channel + lane * kElements;
  const int64_t begin = rank * p.block_pixels;
  const int64_t end = channel < p.channels ? min(begin + p.block_pixels, p.pixels) : 0;
  Acc sums[kElements] = {};
  wait_for_previous();
  add_vectors<kMeanLoads>(p.input + (image * p.pixels + begin + row) * p.channels + channel, rows, p.channels,
                          end - begin - row, sums);
  // The rows of a warp, then the warps of the block, then the blocks of the cluster.
  for (uint32_t other = p.lanes; other < 32; other *= 2) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], static_cast<int>(other));
    }
  }
  const uint32_t columns = p.lanes * kElements;
  Acc* const of_warps = reinterpret_cast<Acc*>(mean_shared);
  Acc* const of_block = of_warps + kMeanWarps * columns;
  if (threadIdx.x % 32 < p.lanes) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      of_warps[threadIdx.x / 32 * columns + lane * kElements + k] = sums[k];
    }
  }
  __syncthreads();
  if (threadIdx.x < columns) {
    Acc sum = of_warps[threadIdx.x];
#pragma unroll
    for (int w = 1; w < kMeanWarps; ++w) {
      sum += of_warps[w * columns + threadIdx.x];
    }
    of_block[threadIdx.x] = sum;
  }
  Out* const output = p.output + image * p.channels + first_channel;
  const auto store = [&](uint32_t column, Acc sum) {
    if (first_channel + column < p.channels) {
      output[column] = from_acc<Out>(sum / static_cast<Acc>(p.divisor));
    }
  };
  if (p.cluster == 1) {
    if (threadIdx.x < columns) {
      store(threadIdx.x, of_block[threadIdx.x]);
    }
    return;
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x * kPiece < columns) {
    const uint32_t address = shared_address(of_block + threadIdx.x * kPiece);
    Acc total[kPiece] = {};
    for (uint32_t other = 0; other < p.cluster; ++other) {
      const float4 v = load_cluster_4(address, static_cast<int>(other));
      Acc piece[kPiece];
      unpack(Vec<Acc>{{__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)}}, piece);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        total[k] += piece[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      store(threadIdx.x * kPiece + k, total[k]);
    }
  }
  cluster_sync();  // until then the first block reads
}

template <typename T>
struct MeanPlanesParams {
  const T* input;
  T* output;
  int64_t planes;
  int64_t pixels;
};

// kPlaneThreads: 8, 32, or all of the block.
template <typename T, int kPlaneThreads>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocksOfMultiprocessor)
    mean_planes_kernel(const MeanPlanesParams<T> p) {
  using Acc = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  const int64_t plane = int64_t{blockIdx.x} * (kMeanThreads / kPlaneThreads) + threadIdx.x / kPlaneThreads;
  const int lane = threadIdx.x % kPlaneThreads;
  Acc sums[V] = {};
  if (plane < p.planes) {
    const T* data = p.input + plane * p.pixels;
    const auto beyond = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kVecBytes / sizeof(T));
    const int64_t head = min(static_cast<int64_t>(beyond == 0 ? 0 : V - beyond), p.pixels);
    const int64_t vectors = (p.pixels - head) / V;
    const int64_t tail = head + vectors * V;
    wait_for_previous();
    add_vectors<kMeanLoads / 2>(data + head + lane * V, kPlaneThreads, V, vectors - lane, sums);
    // Fewer elements than a vector has on either side, each side by its own threads.
    if (lane < head) {
      sums[0] += to_acc(data[lane]);
    }
    if (tail + lane < p.pixels) {
      sums[0] += to_acc(data[tail + lane]);
    }
  }
#pragma unroll
  for (int k = V / 2; k > 0; k /= 2) {
#pragma unroll
    for (int i = 0; i < k; ++i) {
      sums[i] += sums[i + k];
    }
  }
  Acc sum = sums[0];
#pragma unroll
  for (int other = 1; other < min(kPlaneThreads, 32); other *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, other);
  }
  if constexpr (kPlaneThreads > 32) {
    Acc* const of_warps = reinterpret_cast<Acc*>(mean_shared);
    if (threadIdx.x % 32 == 0) {
      of_warps[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      sum = of_warps[0];
#pragma unroll
      for (int w = 1; w < kMeanWarps; ++w) {
        sum += of_warps[w];
      }
    }
  }
  if (lane == 0 && plane < p.planes) {
    p.output[plane] = from_acc<T>(sum / static_cast<Acc>(p.pixels));
  }
}

template <typename T>
cudaError_t launch_mean_planes(const T* input, T* output, int64_t planes, int64_t pixels, cudaStream_t stream) {
  const auto launch = [&](void (*kernel)(MeanPlanesParams<T>), int plane_threads) {
    const int64_t in_block = kMeanThreads / plane_threads;
    for (int64_t begin = 0; begin < planes; begin += kMostMeanGrid * in_block) {
      const int64_t count = std::min(planes - begin, kMostMeanGrid * in_block);
      const MeanPlanesParams<T> p{input + begin * pixels, output + begin, count, pixels};
      const auto blocks = static_cast<unsigned>((count + in_block - 1) / in_block);
      const int shared = plane_threads > 32 ? kMeanWarps * static_cast<int>(sizeof(acc_t<T>)) : 0;
      const cudaError_t status = launch_kernel(kernel, dim3(blocks), kMeanThreads, shared, true, stream, p);
      if (status != cudaSuccess) {
        return status;
      }
    }
    return cudaSuccess;
  };
  const int64_t vectors = pixels / Vec<T>::kSize;
  if (vectors <= 32) {
    return launch(mean_planes_kernel<T, 8>, 8);
  }
  return vectors <= 1024 ? launch(mean_planes_kernel<T, 32>, 32) : launch(mean_planes_kernel<T, 256>, 256);
}

template <int kElements, typename T, typename Out>
cudaError_t launch_mean_columns(const T* input, Out* output, int64_t images, int64_t pixels, int64_t channels,
                                int64_t divisor, int multiprocessors, cudaStream_t stream) {
  const int64_t vectors = (channels + kElements - 1) / kElements;
  const int64_t wanted = int64_t{kMeanBlocksOfMultiprocessor} * multiprocessors;
  // Vectors of a block: a line of the caches, and more where pixels are too few for all loads of a thread.
  int64_t lanes = kElements == 1 ? 32 : 8;
  while (lanes < 32 && lanes < vectors && pixels * lanes * 2 <= kMeanThreads * kMeanLoads) {
    lanes *= 2;
  }
  // Not less than the 32 bytes that memory is read in, and 16 bytes of sums.
  const int64_t least = kElements == 1 ? 16 : 2;
  while (lanes > least && lanes / 2 >= vectors) {
    lanes /= 2;
  }
  const auto blocks = [&] { return images * ((vectors + lanes - 1) / lanes); };
  // Where there are few blocks, pixels are split as long as threads keep half their loads, and then lines.
  const unsigned most = launches_dependents() ? kMostMeanBlocks : 1;
  unsigned cluster = 1;
  while (cluster < most && blocks() * cluster < wanted && pixels >= cluster * (kMeanThreads / lanes) * kMeanLoads) {
    cluster *= 2;
  }
  while (lanes > least && 2 * blocks() * cluster <= wanted) {
    lanes /= 2;
  }
  MeanColumnsParams<T, Out> p{};
  p.pixels = pixels;
  p.divisor = divisor;
  p.block_pixels = (pixels + cluster - 1) / cluster;
  p.channels = static_cast<uint32_t>(channels);
  p.lanes = static_cast<uint32_t>(lanes);
  p.groups = static_cast<uint32_t>((vectors + lanes - 1) / lanes);
  p.cluster = cluster;
  const int shared = (kMeanWarps + 1) * static_cast<int>(lanes * kElements * sizeof(acc_t<T>));
  const int64_t step = std::max<int64_t>(1, kMostMeanGrid / (int64_t{p.groups} * cluster));
  for (int64_t begin = 0; begin < images; begin += step) {
    p.input = input + begin * pixels * channels;
    p.output = output + begin * channels;
    const auto grid = static_cast<unsigned>(std::min(step, images - begin) * p.groups * cluster);
    const cudaError_t status = launch_cluster(mean_columns_kernel<T, kElements, Out>, dim3(grid), cluster, kMeanThreads,
                                              shared, true, stream, p);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_spatial_mean(const T* input, T* output, int64_t images, int64_t pixels, int64_t channels,
                                int multiprocessors, cudaStream_t stream) {
  if (channels == 1) {
    return launch_mean_planes(input, output, images, pixels, stream);
  }
  const bool by_vector = channels % Vec<T>::kSize == 0 && is_aligned(input);
  return by_vector ? launch_mean_columns<Vec<T>::kSize>(input, output, images, pixels, channels, pixels,
                                                        multiprocessors, stream)
                   : launch_mean_columns<1>(input, output, images, pixels, channels, pixels, multiprocessors, stream);
}

// The same of sums that somebody has taken over parts of the pixels: (images, parts, channels), aligned vectors of them.
template <typename T>
cudaError_t launch_mean_of_sums(const float* sums, T* output, int64_t images, int64_t parts, int64_t channels,
                                int64_t pixels, int multiprocessors, cudaStream_t stream) {
  return launch_mean_columns<Vec<float>::kSize>(sums, output, images, parts, channels, pixels, multiprocessors, stream);
}

}  // namespace fused_conv_bn
