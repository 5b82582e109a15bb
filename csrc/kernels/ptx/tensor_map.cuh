// Copies of boxes of a tensor between global and shared memory (cp.async.bulk.tensor), of compute capability 9.0a; elsewhere
// they compile to nothing. A tensor map says how the tensor lies, what a box of it is, and how the box is swizzled. What a box
// has outside of the tensor is read as zeros, and not written.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fused_conv_bn {

// ---- on the host -----------------------------------------------------------------------------------------------------

// Dimensions come fastest first. Bytes: from one index of a dimension to the next; of the first it is the element itself.
template <int kRank>
struct TensorLayout {
  const void* data;  // a multiple of 16
  CUtensorMapDataType type;
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank - 1];  // in bytes, multiples of 16, from the second dimension on
};

// The driver's function of this name, which nobody links to; nullptr where the driver has none.
template <typename Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(function)
                                                                       : nullptr;
}

// A box of so many elements of each dimension.
template <int kRank>
cudaError_t encode_tiled(CUtensorMap& map, const TensorLayout<kRank>& tensor, const cuuint32_t (&box)[kRank],
                         CUtensorMapSwizzle swizzle) {
  static auto* const encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) {
    return cudaErrorNotSupported;
  }
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) {
    step = 1;
  }
  const CUresult result = encode(&map, tensor.type, kRank, const_cast<void*>(tensor.data), tensor.sizes, tensor.strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A box of so many channels of so many pixels that follow each other in the rows of the output of a convolution, from one
// row and one image to the next. Of the dimensions, channels come first and images last. lower, upper: where the first tap of
// the window may be, from the first pixel and from the last, in each of the others; steps: the strides.
template <int kRank>
cudaError_t encode_im2col(CUtensorMap& map, const TensorLayout<kRank>& tensor, const int (&lower)[kRank - 2],
                          const int (&upper)[kRank - 2], cuuint32_t channels, cuuint32_t pixels,
                          const cuuint32_t (&steps)[kRank], CUtensorMapSwizzle swizzle) {
  static auto* const encode = driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) {
    return cudaErrorNotSupported;
  }
  const CUresult result = encode(&map, tensor.type, kRank, const_cast<void*>(tensor.data), tensor.sizes, tensor.strides,
                                 lower, upper, channels, pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- on the device ---------------------------------------------------------------------------------------------------
// Maps are parameters of the kernel (__grid_constant__). Coordinates are those of a box's first element.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FCB_TENSOR(...) asm volatile(__VA_ARGS__ : "memory")
#else
#define FCB_TENSOR(...)
#endif

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  FCB_TENSOR("prefetch.tensormap [%0];" ::"l"(&map));
}
// A box to shared memory, counted by a barrier there.
__device__ __forceinline__ void fetch_box(uint32_t to_shared, const CUtensorMap& map, int x, int y, uint32_t barrier) {
  FCB_TENSOR(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to_shared),
      "l"(&map), "r"(x), "r"(y), "r"(barrier));
}
__device__ __forceinline__ void fetch_box(uint32_t to_shared, const CUtensorMap& map, int x, int y, int z,
                                          uint32_t barrier) {
  FCB_TENSOR(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to_shared),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier));
}
// Of an im2col map: the pixels from (column, row, image) on, as the window's first tap has them, which may be outside; then the
// tap (right, down) of each.
__device__ __forceinline__ void fetch_pixels(uint32_t to_shared, const CUtensorMap& map, int channel, int column,
                                             int row, int image, uint16_t right, uint16_t down, uint32_t barrier) {
  FCB_TENSOR(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(to_shared),
      "l"(&map), "r"(channel), "r"(column), "r"(row), "r"(image), "r"(barrier), "h"(right), "h"(down));
}
// A box from shared memory, as one of the thread's bulk copies (tma.cuh).
__device__ __forceinline__ void store_box(const CUtensorMap& map, int x, int y, uint32_t from_shared) {
  FCB_TENSOR("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
             "r"(y), "r"(from_shared));
}

#undef FCB_TENSOR

}  // namespace fused_conv_bn
