// Kernels that copy boxes of tensors and multiply them, for tests of the emulator: right ones, whose results are looked
// at, and the same with a mistake each.
#include <cstring>
#include <iterator>
#include <string>

#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tensor_map.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "machine.h"

namespace fused_conv_bn {
namespace {

extern __shared__ __align__(1024) unsigned char boxes[];

constexpr CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                           : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Where a byte of a box is, as PTX has it.
__device__ uint32_t place(uint32_t address, int row_bytes) {
  const uint32_t chunk = address >> 4, row = address >> 7;
  const uint32_t bits = row_bytes == 128 ? row & 7 : row_bytes == 64 ? row & 3 : row_bytes == 32 ? row & 1 : 0;
  return (chunk ^ bits) << 4 | (address & 15);
}

const char* answer(cudaError_t status) {
  static std::string message;
  message = status == cudaSuccess ? "" : emulated::problem().empty() ? "not launched" : emulated::problem();
  return status == cudaSuccess ? nullptr : message.c_str();
}

// ---- y = a * b, the rows of b being columns ----

enum class Mistake {
  none,
  read_before_barrier,
  stage_released_early,
  products_not_awaited,
  stage_not_awaited,
  no_fence,
  store_overwritten,
  store_not_awaited,
  sums_read_early,
};
constexpr const char* kMistakes[] = {
    "none",     "read_before_barrier", "stage_released_early", "products_not_awaited", "stage_not_awaited",
    "no_fence", "store_overwritten",   "store_not_awaited",    "sums_read_early"};

struct Product {
  CUtensorMap a, b, y;
  int steps;    // of k
  int columns;  // tiles of them
};

// A block has 64 rows of y. Stages of both operands come to shared memory by a warp of their own; a warpgroup has one
// product under way while it starts the next. Results go to memory by boxes as wide as those of the operands.
template <int kRowBytes, Mistake kMistake>
struct BoxProduct {
  static constexpr int kDepth = kRowBytes / 2, kStages = 3, kRows = 64;
  static constexpr uint32_t kOperand = kRows * kRowBytes;
  static constexpr uint32_t kStage = 2 * kOperand;
  static constexpr uint32_t kResult = kRows * 64 * 2;
  static constexpr uint32_t kShared = kStages * kStage + kResult + 2 * kStages * 8;

  const Product& p;
  const uint32_t base = shared_address(boxes);

  __device__ uint32_t stage(int i) const { return base + i % kStages * kStage; }
  __device__ uint32_t result() const { return base + kStages * kStage; }
  __device__ uint32_t full(int i) const { return result() + kResult + i % kStages * 8; }
  __device__ uint32_t empty(int i) const { return full(i % kStages) + kStages * 8; }

  __device__ void produce() const {
    for (int i = 0; i < p.columns * p.steps; ++i) {
      if (i >= kStages && kMistake != Mistake::stage_not_awaited) {
        barrier_wait(empty(i), (i / kStages + 1) & 1);
      }
      barrier_arrive_expect(full(i), kStage);
      fetch_box(stage(i), p.a, i % p.steps * kDepth, blockIdx.x * kRows, full(i));
      fetch_box(stage(i) + kOperand, p.b, i % p.steps * kDepth, i / p.steps * kRows, full(i));
    }
  }

  __device__ void store(const float (&sums)[32], int column) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0 && kMistake != Mistake::store_overwritten) {
      copy_bulk_wait_read();
    }
    named_barrier_sync(1, 128);
    for (int i = 0; i < 32; i += 2) {
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2;
      const uint32_t box = result() + col / kDepth * kOperand;
      const uint16_t low = __float2half_rn(sums[i]).bits, high = __float2half_rn(sums[i + 1]).bits;
      store_shared(place(box + row * kRowBytes + col % kDepth * 2, kRowBytes), low | uint32_t{high} << 16);
    }
    if (kMistake != Mistake::no_fence) {
      fence_async();
    }
    named_barrier_sync(1, 128);
    if (threadIdx.x == 0) {
      for (int col = 0; col < 64; col += kDepth) {
        store_box(p.y, column * 64 + col, blockIdx.x * kRows, result() + col / kDepth * kOperand);
      }
      copy_bulk_commit();
    }
  }

  __device__ void consume() const {
    for (int column = 0, i = 0; column < p.columns; ++column) {
      float sums[32] = {};
      for (int step = 0; step < p.steps; ++step, ++i) {
        if (kMistake != Mistake::read_before_barrier) {
          barrier_wait(full(i), i / kStages & 1);
        }
        product_fence();
        for (int k = 0; k < kRowBytes; k += 32) {
          product_m64n64<float16, true>(sums, swizzled_operand(stage(i) + k, kRowBytes),
                                        swizzled_operand(stage(i) + kOperand + k, kRowBytes));
        }
        product_commit();
        if (kMistake == Mistake::products_not_awaited) {
          barrier_arrive(empty(i));
        } else if (kMistake == Mistake::stage_released_early) {
          product_wait<1>();
          barrier_arrive(empty(i));
        } else if (step > 0) {
          product_wait<1>();
          barrier_arrive(empty(i - 1));
        }
      }
      if (kMistake == Mistake::sums_read_early) {
        store(sums, column);
      }
      product_wait<0>();
      if (kMistake != Mistake::products_not_awaited && kMistake != Mistake::stage_released_early) {
        barrier_arrive(empty(i - 1));
      }
      if (kMistake != Mistake::sums_read_early) {
        store(sums, column);
      }
    }
    if (threadIdx.x == 0 && kMistake != Mistake::store_not_awaited) {
      copy_bulk_wait_read();
    }
  }

  __device__ void run() const {
    if (threadIdx.x == 0) {
      prefetch_map(p.a);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full(i), 1);
        barrier_init(empty(i), 128);
      }
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x < 128) {
      consume();
    } else if (threadIdx.x == 128) {
      produce();
    }
  }
};

template <int kRowBytes, Mistake kMistake>
__global__ void box_product(const __grid_constant__ Product p) {
  BoxProduct<kRowBytes, kMistake>{p}.run();
}

template <int kRowBytes, Mistake kMistake>
cudaError_t launch_product(const Product& p, int rows) {
  return launch_kernel(box_product<kRowBytes, kMistake>, dim3((rows + 63) / 64), 160,
                       BoxProduct<kRowBytes, kMistake>::kShared, true, nullptr, p);
}

template <int kMistake = 0>
cudaError_t launch_with_mistake(const Product& p, int rows, int mistake) {
  if constexpr (kMistake < static_cast<int>(std::size(kMistakes))) {
    return mistake == kMistake ? launch_product<128, static_cast<Mistake>(kMistake)>(p, rows)
                               : launch_with_mistake<kMistake + 1>(p, rows, mistake);
  } else {
    return cudaErrorInvalidValue;
  }
}

// ---- boxes, as they come to shared memory ----

struct BoxCopy {
  CUtensorMap from, to;
  int rank, row_bytes;
  int bytes, offset;  // in shared memory
  int at[3];
  int to_at[2];
  unsigned char* raw;
};

// One thread copies a box from a tensor to another one, and to `raw` row by row.
__global__ void box_copy(const __grid_constant__ BoxCopy p) {
  const uint32_t base = shared_address(boxes) + p.offset, barrier = base + p.bytes;
  barrier_init(barrier, 1);
  barrier_arrive_expect(barrier, p.bytes);
  wait_for_previous();
  if (p.rank == 2) {
    fetch_box(base, p.from, p.at[0], p.at[1], barrier);
  } else {
    fetch_box(base, p.from, p.at[0], p.at[1], p.at[2], barrier);
  }
  barrier_wait(barrier, 0);
  for (int i = 0; i < p.bytes; i += 2) {
    const auto value = static_cast<uint16_t>(load_shared_half(place(base + i, p.row_bytes)));
    *reinterpret_cast<uint16_t*>(p.raw + i) = value;
  }
  if (p.rank == 2) {
    store_box(p.to, p.to_at[0], p.to_at[1], base);
    copy_bulk_commit();
    copy_bulk_wait();
  }
}

// ---- im2col ----

struct Pixels {
  CUtensorMap x;
  uint16_t* y;  // pixel by pixel, tap by tap, channels
  int channels, rows, columns;
  int dilation[2], stride[2], pad[2];
  int P, Q;
  int tile;
};
constexpr int kPixelChannels = 32;  // of a box: 64 bytes

// A block has a tile of pixels, as those of a convolution's output follow each other.
__global__ void im2col(const __grid_constant__ Pixels p) {
  const int bytes = p.tile * kPixelChannels * 2;
  const uint32_t base = shared_address(boxes), barrier = base + (bytes + 7) / 8 * 8;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
  }
  __syncthreads();
  wait_for_previous();
  const int first = blockIdx.x * p.tile;
  const int image = first / (p.P * p.Q), row = first / p.Q % p.P, column = first % p.Q;
  uint32_t parity = 0;
  for (int r = 0; r < p.rows; ++r) {
    for (int s = 0; s < p.columns; ++s) {
      for (int channel = 0; channel < p.channels; channel += kPixelChannels) {
        if (threadIdx.x == 0) {
          barrier_arrive_expect(barrier, bytes);
          fetch_pixels(base, p.x, channel, column * p.stride[1] - p.pad[1], row * p.stride[0] - p.pad[0], image,
                       s * p.dilation[1], r * p.dilation[0], barrier);
        }
        barrier_wait(barrier, parity);
        parity ^= 1;
        for (int i = threadIdx.x; i < p.tile * kPixelChannels; i += blockDim.x) {
          const int c = i % kPixelChannels, pixel = i / kPixelChannels;
          const uint16_t value = load_shared_half(place(base + i * 2, 64));
          p.y[(((first + pixel) * p.rows + r) * p.columns + s) * p.channels + channel + c] = value;
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace

extern "C" {

// a: m x k, b: n x k, y: m x n, of float16. Rows are of multiples of 8 values.
const char* emulated_box_product(void* a, void* b, void* y, int m, int n, int k, int row_bytes, const char* mistake,
                                 uint64_t seed) {
  emulated::begin(seed);
  const auto bytes = [](int rows, int columns) { return static_cast<size_t>(rows) * static_cast<size_t>(columns) * 2; };
  emulated::allow(a, bytes(m, k));
  emulated::allow(b, bytes(n, k));
  emulated::allow(y, bytes(m, n));
  const auto depth = static_cast<cuuint32_t>(row_bytes / 2);
  Product p;
  p.steps = (k + row_bytes / 2 - 1) / (row_bytes / 2);
  p.columns = (n + 63) / 64;
  const auto encode = [&](CUtensorMap& map, void* data, int rows, int columns) {
    const TensorLayout<2> layout{data,
                                 CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                 {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                                 {static_cast<cuuint64_t>(columns) * 2}};
    return encode_tiled(map, layout, {depth, 64}, swizzle_of(row_bytes));
  };
  for (const cudaError_t status : {encode(p.a, a, m, k), encode(p.b, b, n, k), encode(p.y, y, m, n)}) {
    if (status != cudaSuccess) {
      return answer(status);
    }
  }
  for (size_t i = 1; i < std::size(kMistakes); ++i) {
    if (std::strcmp(kMistakes[i], mistake) == 0) {
      return answer(launch_with_mistake(p, m, static_cast<int>(i)));
    }
  }
  return answer(row_bytes == 128  ? launch_product<128, Mistake::none>(p, m)
                : row_bytes == 64 ? launch_product<64, Mistake::none>(p, m)
                                  : launch_product<32, Mistake::none>(p, m));
}

// A box of 16-bit values, of a tensor of `rank` dimensions, dense but for its rows, which are `pitch` bytes apart. to:
// another such tensor of two dimensions. at: of the box in the first, in the other, and in shared memory.
const char* emulated_box_copy(void* from, void* to, void* raw, int rank, const int* sizes, int pitch, const int* box,
                              const int* at, int row_bytes, uint64_t seed) {
  emulated::begin(seed);
  BoxCopy p{};
  p.rank = rank;
  p.row_bytes = row_bytes;
  p.bytes = box[0] * box[1] * (rank == 3 ? box[2] : 1) * 2;
  p.raw = static_cast<unsigned char*>(raw);
  std::copy_n(at, 3, p.at);
  std::copy_n(at + 3, 2, p.to_at);
  p.offset = at[5];
  cuuint64_t extents[3];
  cuuint32_t boxes_of[3];
  std::copy_n(sizes, 3, extents);
  std::copy_n(box, 3, boxes_of);
  const auto row = static_cast<cuuint64_t>(pitch);
  const size_t all = row * (extents[1] * (rank == 3 ? extents[2] : 1) - 1) + extents[0] * 2;
  emulated::allow(from, all);
  emulated::allow(to, all);
  emulated::allow(raw, static_cast<size_t>(p.bytes));
  const CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cudaError_t status;
  if (rank == 2) {
    const cuuint32_t two[] = {boxes_of[0], boxes_of[1]};
    status = encode_tiled(p.from, TensorLayout<2>{from, type, {extents[0], extents[1]}, {row}}, two,
                          swizzle_of(row_bytes));
    if (status == cudaSuccess) {
      status = encode_tiled(p.to, TensorLayout<2>{to, type, {extents[0], extents[1]}, {row}}, two,
                            swizzle_of(row_bytes));
    }
  } else {
    status = encode_tiled(p.from,
                          TensorLayout<3>{from, type, {extents[0], extents[1], extents[2]}, {row, row * extents[1]}},
                          boxes_of, swizzle_of(row_bytes));
  }
  return answer(status == cudaSuccess ? launch_kernel(box_copy, dim3(1), 1, p.offset + p.bytes + 8, true, nullptr, p)
                                      : status);
}

// x: N H W C of float16. Arguments: N, H, W, C; R, S; stride, padding in front and behind, and dilation, each of rows
// and columns; pixels of a tile; and what the first pixel's column is off by. y has whole tiles and boxes of channels.
const char* emulated_im2col(void* x, void* y, const int* arguments, uint64_t seed) {
  const int *a = arguments, N = a[0], H = a[1], W = a[2], C = a[3];
  Pixels p{};
  p.y = static_cast<uint16_t*>(y);
  p.channels = (C + kPixelChannels - 1) / kPixelChannels * kPixelChannels;
  p.rows = a[4];
  p.columns = a[5];
  for (int i = 0; i < 2; ++i) {
    p.stride[i] = a[6 + i];
    p.pad[i] = a[8 + i];
    p.dilation[i] = a[12 + i];
  }
  p.tile = a[14];
  const int span[] = {(p.rows - 1) * p.dilation[0], (p.columns - 1) * p.dilation[1]};
  p.P = (H + p.pad[0] + a[10] - span[0] - 1) / p.stride[0] + 1;
  p.Q = (W + p.pad[1] + a[11] - span[1] - 1) / p.stride[1] + 1;
  const int tiles = (N * p.P * p.Q + p.tile - 1) / p.tile;
  emulated::begin(seed);
  emulated::allow(x, static_cast<size_t>(N * H * W * C) * 2);
  emulated::allow(y, static_cast<size_t>(tiles * p.tile * p.rows * p.columns * p.channels) * 2);
  const auto wide = [](int v) { return static_cast<cuuint64_t>(v); };
  const TensorLayout<4> layout{x,
                               CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                               {wide(C), wide(W), wide(H), wide(N)},
                               {wide(C * 2), wide(W * C * 2), wide(H * W * C * 2)}};
  const int lower[] = {-p.pad[1], -p.pad[0]}, upper[] = {a[11] - span[1], a[10] - span[0]};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(p.stride[1]), static_cast<cuuint32_t>(p.stride[0]), 1};
  const cudaError_t status = encode_im2col(p.x, layout, lower, upper, kPixelChannels, static_cast<cuuint32_t>(p.tile),
                                           steps, CU_TENSOR_MAP_SWIZZLE_64B);
  if (status != cudaSuccess) {
    return answer(status);
  }
  p.pad[1] += a[15];
  return answer(
      launch_kernel(im2col, dim3(tiles), 64, (p.tile * kPixelChannels * 2 + 7) / 8 * 8 + 8, true, nullptr, p));
}

// What the driver says to a map: nullptr if it takes it. numbers: type, rank, swizzle, the address modulo 1024; of five
// dimensions the sizes, strides to the next, element strides, and the box, or channels and pixels for im2col; and of
// three the lower corner and the upper one.
const char* emulated_encode(bool is_im2col, const int64_t* numbers, uint64_t) {
  alignas(1024) static unsigned char data[2048];
  CUtensorMap map;
  cuuint64_t sizes[5], strides[5];
  cuuint32_t steps[5], box[5];
  int lower[3], upper[3];
  const int64_t* v = numbers + 4;
  std::copy_n(v, 5, sizes);
  std::copy_n(v + 5, 5, strides);
  std::copy_n(v + 10, 5, steps);
  std::copy_n(v + 15, 5, box);
  std::copy_n(v + 20, 3, lower);
  std::copy_n(v + 23, 3, upper);
  const auto type = static_cast<CUtensorMapDataType>(numbers[0]);
  const auto swizzle = static_cast<CUtensorMapSwizzle>(numbers[2]);
  const auto rank = static_cast<cuuint32_t>(numbers[1]);
  emulated::begin(0);
  const CUresult result = is_im2col ? cuTensorMapEncodeIm2col(
                                          &map, type, rank, data + numbers[3], sizes, strides, lower, upper, box[0],
                                          box[1], steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                          CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
                                    : cuTensorMapEncodeTiled(&map, type, rank, data + numbers[3], sizes, strides, box,
                                                             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                                             CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return answer(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

}  // extern "C"
}  // namespace fused_conv_bn
