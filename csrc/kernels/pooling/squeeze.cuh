// The squeeze of squeeze-and-excite blocks in one launch: means over pixels, two layers on them, an activation behind each.
//
// A cluster of blocks takes an image: each block some of its channels, and where those are few, some of its pixels. The first
// layer is linear, so a block multiplies its own part of the sums by its columns of the weights. The blocks read each other's
// products from shared memory, add them up in one order, and each computes some of the outputs. Without clusters a block takes
// an image.
//
// Batch 64 has 512 blocks on an H200, four on each multiprocessor, and reads the weights 64 times from the L2 cache.
#pragma once

#include <algorithm>

#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/shared.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace fused_conv_bn {

constexpr int kSqueezeRows = 4;               // of weights, that a thread reads together
constexpr int kSqueezeColumns = 2;            // vectors of each of them
constexpr int64_t kSqueezeVectors = 8;        // of a pixel, that a block takes at least: a line of the caches
constexpr int64_t kSqueezeLanes = 64;         // vectors of a pixel, at most, that a block reads together
constexpr int64_t kSqueezeShared = 48 << 10;  // bytes, which every GPU has without being asked

template <typename T>
struct SqueezeParams {
  const T* input;
  const T* weight1;
  const T* bias1;
  const T* weight2;
  const T* bias2;
  T* output;
  int64_t pixels;
  int64_t block_pixels;
  uint32_t channels;
  uint32_t hidden;
  uint32_t outputs;
  uint32_t cluster;
  uint32_t slices;          // of the channels: a power of 2, and a divisor of cluster
  uint32_t block_channels;  // whole vectors
  uint32_t block_outputs;
  uint32_t lanes;           // vectors of a pixel that threads read together
  uint32_t lanes1, lanes2;  // threads of a row of weights: a power of 2, up to 32
  bool reads_pixels;        // by vectors; else there is one
  bool vectors1, vectors2;  // whether weights are read by vectors
  Activation activation;
  Activation gate;
  acc_t<T> negative_slope;
};

// What a block has of its image. Worked out anew where it is needed, it takes no registers in between.
struct SqueezePart {
  uint32_t rank;
  uint32_t first_channel;
  uint32_t channels;
  uint32_t first_output;
  uint32_t outputs;

  template <typename T>
  __device__ __forceinline__ explicit SqueezePart(const SqueezeParams<T>& p) : rank(cluster_rank()) {
    first_channel = (rank & (p.slices - 1)) * p.block_channels;
    channels = first_channel < p.channels ? min(p.block_channels, p.channels - first_channel) : 0;
    first_output = rank * p.block_outputs;
    outputs = first_output < p.outputs ? min(p.block_outputs, p.outputs - first_output) : 0;
  }
};

// Of a block's shared memory, in acc_t<T>.
template <typename T>
struct SqueezeShared {
  uint32_t scratch;  // sums of threads, then the outputs
  uint32_t means;
  uint32_t hidden;  // twice: of the block, and of all

  static constexpr uint32_t kPiece = kVecBytes / sizeof(acc_t<T>);

  __host__ __device__ SqueezeShared(uint32_t block_channels, uint32_t block_outputs, uint32_t hidden_channels)
      : scratch(up(max(kMeanThreads * Vec<T>::kSize, static_cast<int>(block_outputs)))),
        means(up(block_channels)),
        hidden(up(hidden_channels)) {}
  __host__ __device__ static uint32_t up(uint32_t elements) { return (elements + kPiece - 1) / kPiece * kPiece; }
  __host__ __device__ static int max(int a, int b) { return a < b ? b : a; }
  __host__ __device__ int64_t bytes() const {
    return (int64_t{scratch} + means + 2 * int64_t{hidden}) * static_cast<int64_t>(sizeof(acc_t<T>));
  }
};

// Sums of rows of weights times values in shared memory: put(row, sum) of each row, by one thread. lanes: of a row.
template <int kElements, typename T, typename Put>
__device__ __forceinline__ void multiply_rows(const T* weights, uint32_t pitch, uint32_t rows, uint32_t columns,
                                              uint32_t lanes, const acc_t<T>* values, const Put& put) {
  using Acc = acc_t<T>;
  const uint32_t lane = threadIdx.x & (lanes - 1);
  const uint32_t groups = kMeanThreads / lanes;
  for (uint32_t first = 0; first < rows; first += kSqueezeRows * groups) {
    const uint32_t row = first + threadIdx.x / lanes;
    Acc sums[kSqueezeRows] = {};
    const uint32_t step = lanes * kElements;
    for (uint32_t begin = lane * kElements; begin < columns; begin += kSqueezeColumns * step) {
      MeanVector<T, kElements> found[kSqueezeColumns][kSqueezeRows];
#pragma unroll
      for (int j = 0; j < kSqueezeColumns; ++j) {
        const uint32_t at = begin + j * step < columns ? begin + j * step : begin;
#pragma unroll
        for (int i = 0; i < kSqueezeRows; ++i) {
          found[j][i].load(weights + static_cast<uint64_t>(min(row + i * groups, rows - 1)) * pitch + at);
        }
      }
#pragma unroll
      for (int j = 0; j < kSqueezeColumns; ++j) {
        const uint32_t at = begin + j * step;
        if (at < columns) {
#pragma unroll
          for (int i = 0; i < kSqueezeRows; ++i) {
            Acc x[kElements];
            found[j][i].get(x);
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
              sums[i] += x[k] * values[at + k];
            }
          }
        }
      }
    }
    for (uint32_t other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
      for (int i = 0; i < kSqueezeRows; ++i) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], static_cast<int>(other));
      }
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kSqueezeRows; ++i) {
        if (row + i * groups < rows) {
          put(row + i * groups, sums[i]);
        }
      }
    }
  }
}
template <typename T, typename Put>
__device__ __forceinline__ void multiply_rows(bool vectors, const T* weights, uint32_t pitch, uint32_t rows,
                                              uint32_t columns, uint32_t lanes, const acc_t<T>* values,
                                              const Put& put) {
  if (vectors) {
    multiply_rows<Vec<T>::kSize>(weights, pitch, rows, columns, lanes, values, put);
  } else {
    multiply_rows<1>(weights, pitch, rows, columns, lanes, values, put);
  }
}

// Has rows of so many elements on their way to the L2 cache. What writes them may still run: it writes there as well.
template <typename T>
__device__ __forceinline__ void prefetch_rows(const T* data, uint32_t pitch, uint32_t rows, uint32_t columns) {
  constexpr uint32_t kLine = 128 / sizeof(T);
  const uint32_t lines = (columns + kLine - 1) / kLine;
  for (uint32_t i = threadIdx.x; i < rows * lines; i += kMeanThreads) {
    const uint32_t row = i / lines;
    prefetch_l2(data + static_cast<uint64_t>(row) * pitch + (i - row * lines) * kLine);
  }
}

// The sums of the blocks' values in shared memory, in the order of the blocks: of whole pieces of 16 bytes.
template <typename Acc>
__device__ __forceinline__ void add_up_cluster(const Acc* values, Acc* sums, uint32_t count, uint32_t cluster) {
  constexpr uint32_t kPiece = kVecBytes / sizeof(Acc);
  for (uint32_t i = threadIdx.x * kPiece; i < count; i += kMeanThreads * kPiece) {
    const uint32_t address = shared_address(values + i);
    float4 found[kMostMeanBlocks];
#pragma unroll
    for (int other = 0; other < kMostMeanBlocks; ++other) {
      found[other] = load_cluster_4(address, static_cast<int>(min(static_cast<uint32_t>(other), cluster - 1)));
    }
    Acc total[kPiece] = {};
#pragma unroll
    for (int other = 0; other < kMostMeanBlocks; ++other) {
      const float4 v = found[other];
      Acc piece[kPiece];
      unpack(Vec<Acc>{{__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)}}, piece);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        total[k] = other < cluster ? total[k] + piece[k] : total[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      sums[i + k] = total[k];
    }
  }
}

// Where launches_dependents() may be true: there are clusters, and pixels are read by vectors.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1000)
constexpr bool kReadsPixels = false;
#else
constexpr bool kReadsPixels = true;
#endif

template <typename T>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocksOfMultiprocessor) squeeze_kernel(const SqueezeParams<T> p) {
  using Acc = acc_t<T>;
  constexpr uint32_t V = Vec<T>::kSize;
  const SqueezeShared<T> shared(p.block_channels, p.block_outputs, p.hidden);
  Acc* const scratch = reinterpret_cast<Acc*>(mean_shared);
  Acc* const means = scratch + shared.scratch;
  Acc* const products = means + shared.means;
  Acc* const hidden = products + shared.hidden;

  const int64_t image = blockIdx.x / p.cluster;
  {
    const SqueezePart part(p);
    prefetch_rows(p.weight1 + part.first_channel, p.channels, p.hidden, part.channels);
    prefetch_rows(p.weight2 + static_cast<uint64_t>(part.first_output) * p.hidden, 0, 1, part.outputs * p.hidden);
  }
  wait_for_previous();

  if (kReadsPixels && p.reads_pixels) {
    const SqueezePart part(p);
    const uint32_t row = threadIdx.x / p.lanes;
    const uint32_t lane = threadIdx.x - row * p.lanes;
    const uint32_t rows = kMeanThreads / p.lanes;
    const uint32_t columns = p.lanes * V;
    const int64_t begin = part.rank / p.slices * p.block_pixels;
    const int64_t end = min(begin + p.block_pixels, p.pixels);
    for (uint32_t first = 0; first < part.channels; first += columns) {
      const uint32_t channel = first + lane * V;
      const bool reads = row < rows && channel < part.channels;
      Acc sums[V] = {};
      add_vectors<kMeanLoads>(p.input + (image * p.pixels + begin + row) * p.channels + part.first_channel + channel,
                              rows, p.channels, reads ? end - begin - row : 0, sums);
      if (row < rows) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          scratch[row * columns + lane * V + k] = sums[k];
        }
      }
      __syncthreads();
      for (uint32_t column = threadIdx.x; column < min(columns, part.channels - first); column += kMeanThreads) {
        Acc sum = 0;
#pragma unroll 8
        for (uint32_t r = 0; r < rows; ++r) {
          sum += scratch[r * columns + column];
        }
        means[first + column] = sum / static_cast<Acc>(p.pixels);
      }
      __syncthreads();
    }
  } else {
    const SqueezePart part(p);
    for (uint32_t channel = threadIdx.x; channel < part.channels; channel += kMeanThreads) {
      means[channel] = to_acc(p.input[image * p.channels + part.first_channel + channel]);
    }
    __syncthreads();
  }

  // Both layers by the same code, half of which are the activations.
  const SqueezePart part(p);
  const T* const weight1 = p.weight1 + part.first_channel;
  const T* const weight2 = p.weight2 + static_cast<uint64_t>(part.first_output) * p.hidden;
#pragma unroll 1
  for (int layer = 1; layer <= 2; ++layer) {
    const bool first = layer == 1;
    const uint32_t rows = first ? p.hidden : part.outputs;
    const T* const bias = first ? p.bias1 : p.bias2 == nullptr ? nullptr : p.bias2 + part.first_output;
    const auto bias_of = [&](uint32_t row) { return bias != nullptr && row < rows ? to_acc(bias[row]) : Acc(0); };
    Acc added = bias_of(threadIdx.x);
    Acc* sums = first ? products : scratch;
    multiply_rows(first ? p.vectors1 : p.vectors2, first ? weight1 : weight2, first ? p.channels : p.hidden, rows,
                  first ? part.channels : p.hidden, first ? p.lanes1 : p.lanes2, first ? means : hidden,
                  [&](uint32_t row, Acc sum) { sums[row] = sum; });
    if (first && p.cluster > 1) {
      if (threadIdx.x < shared.hidden - p.hidden) {
        products[p.hidden + threadIdx.x] = 0;
      }
      cluster_sync();
      add_up_cluster(products, hidden, p.hidden, p.cluster);
      sums = hidden;
    }
    __syncthreads();
    for (uint32_t row = threadIdx.x; row < rows; row += kMeanThreads) {
      Acc y[1] = {sums[row] + added};
      added = bias_of(row + kMeanThreads);
      activate_all<T, false>(first ? p.activation : p.gate, p.negative_slope, y);
      if (first) {
        hidden[row] = y[0];
      } else {
        p.output[image * p.outputs + part.first_output + row] = from_acc<T>(y[0]);
      }
    }
    if (first) {
      __syncthreads();
      if (p.cluster > 1) {
        cluster_arrive_relaxed();  // the others' products are read
      }
    }
  }
  if (p.cluster > 1) {
    cluster_wait();
  }
}

// By how many blocks: a power of 2 for all the channels' slices, and for the pixels of each.
struct SqueezeSplit {
  int64_t slices;
  int64_t parts;
};

template <typename T>
SqueezeSplit split_squeeze(const SqueezeProblem& problem, int multiprocessors) {
  const int64_t most = launches_dependents() ? kMostMeanBlocks : 1;
  const int64_t vectors = (problem.channels + Vec<T>::kSize - 1) / Vec<T>::kSize;
  SqueezeSplit split{1, 1};
  while (split.slices < most && vectors >= 2 * split.slices * kSqueezeVectors) {
    split.slices *= 2;
  }
  // Where there are few blocks, pixels are split as long as threads keep half their loads.
  const int64_t wanted = int64_t{kMeanBlocksOfMultiprocessor} * multiprocessors;
  const int64_t loads = problem.pixels * vectors / (kMeanThreads * kMeanLoads / 2);
  while (split.slices * split.parts < most && problem.images * split.slices * split.parts < wanted &&
         2 * split.slices * split.parts <= loads) {
    split.parts *= 2;
  }
  return split;
}

template <typename T>
bool squeeze_covers(const SqueezeProblem& problem) {
  // In one block.
  const auto of = [](int64_t elements) { return static_cast<uint32_t>(std::min(elements, kSqueezeShared)); };
  return SqueezeShared<T>(of(problem.channels), of(problem.outputs), of(problem.hidden)).bytes() <= kSqueezeShared;
}

template <typename T>
bool squeeze_needs_means(const T* input, const SqueezeProblem& problem) {
  const bool by_vector = problem.channels_last && problem.channels % Vec<T>::kSize == 0 && is_aligned(input);
  return problem.pixels > 1 && !(by_vector && launches_dependents());
}

template <typename T>
cudaError_t launch_squeeze(const T* input, const SqueezeOperands<T>& operands, T* means, T* output,
                           const SqueezeProblem& problem, int multiprocessors, cudaStream_t stream) {
  if (squeeze_needs_means(input, problem)) {
    const int64_t channels = problem.channels_last ? problem.channels : 1;
    const int64_t images = problem.images * problem.channels / channels;
    const cudaError_t status = launch_spatial_mean(input, means, images, problem.pixels, channels, multiprocessors,
                                                   stream);
    if (status != cudaSuccess) {
      return status;
    }
    SqueezeProblem of_means = problem;
    of_means.pixels = 1;
    return launch_squeeze<T>(means, operands, nullptr, output, of_means, multiprocessors, stream);
  }
  constexpr int64_t V = Vec<T>::kSize;
  const SqueezeSplit split = split_squeeze<T>(problem, multiprocessors);
  const int64_t cluster = split.slices * split.parts;
  const int64_t block_vectors = ((problem.channels + V - 1) / V + split.slices - 1) / split.slices;
  const int64_t passes = (block_vectors + kSqueezeLanes - 1) / kSqueezeLanes;
  SqueezeParams<T> p{};
  p.weight1 = operands.weight1;
  p.bias1 = operands.bias1;
  p.weight2 = operands.weight2;
  p.bias2 = operands.bias2;
  p.pixels = problem.pixels;
  p.block_pixels = (problem.pixels + split.parts - 1) / split.parts;
  p.channels = static_cast<uint32_t>(problem.channels);
  p.hidden = static_cast<uint32_t>(problem.hidden);
  p.outputs = static_cast<uint32_t>(problem.outputs);
  p.cluster = static_cast<uint32_t>(cluster);
  p.slices = static_cast<uint32_t>(split.slices);
  p.block_channels = static_cast<uint32_t>(block_vectors * V);
  p.block_outputs = static_cast<uint32_t>((problem.outputs + cluster - 1) / cluster);
  p.lanes = static_cast<uint32_t>((block_vectors + passes - 1) / passes);
  p.reads_pixels = problem.pixels > 1;
  p.vectors1 = problem.channels % V == 0 && is_aligned(operands.weight1);
  p.vectors2 = problem.hidden % V == 0 && is_aligned(operands.weight2);
  p.activation = operands.activation;
  p.gate = operands.gate;
  p.negative_slope = static_cast<acc_t<T>>(operands.negative_slope);
  // As many threads for a row as leave none without one, and none without an element of it.
  const auto lanes_of = [](int64_t rows, int64_t columns) {
    uint32_t lanes = 32;
    while (lanes > 1 && (kMeanThreads / lanes * kSqueezeRows < rows || lanes / 2 >= columns)) {
      lanes /= 2;
    }
    return lanes;
  };
  p.lanes1 = lanes_of(problem.hidden, p.block_channels / (p.vectors1 ? V : 1));
  p.lanes2 = lanes_of(p.block_outputs, problem.hidden / (p.vectors2 ? V : 1));
  const auto shared = static_cast<int>(SqueezeShared<T>(p.block_channels, p.block_outputs, p.hidden).bytes());
  const int64_t step = kMostMeanGrid / cluster;
  for (int64_t begin = 0; begin < problem.images; begin += step) {
    p.input = input + begin * problem.pixels * problem.channels;
    p.output = output + begin * problem.outputs;
    const auto grid = static_cast<unsigned>(std::min(step, problem.images - begin) * cluster);
    const cudaError_t status = launch_cluster(squeeze_kernel<T>, dim3(grid), p.cluster, kMeanThreads, shared, true,
                                              stream, p);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

}  // namespace fused_conv_bn
