// Kernels of one stream that begin while the one before still ends (programmatic dependent launch, compute capability 9.0): what
// a kernel can do without that one's results it does meanwhile. Starting a kernel alone takes more than a
// microsecond: a 1x1 convolution with one pass behind it went from 8.1 to 6.8 us on an H200.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace fused_conv_bn {

// In the kernel that comes first: the next one may be started. What that reads before it waits has to be there by now.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In the next one, before it touches what the first writes: that has ended. Nothing, if it was not launched as below.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the current device has it, and only code that waits. Newer GPUs have it too, but it was measured on 9.0 alone, and of
// 12.0 failures are known while a graph is captured. Graphs know it since CUDA 12.3.
inline bool launches_dependents() {
#if defined(FCB_OLD_PTX)  // PTX of older GPUs does not, and newer ones run it
  return false;
#else
  static const bool driver_knows = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  int device = 0, major = 0;
  return driver_knows && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#endif
}

// Blocks in clusters of so many next to each other. dependent: the kernel waits by wait_for_previous(), unless what it
// touches is older than the kernel before.
template <typename... Params>
cudaError_t launch_cluster(void (*kernel)(Params...), dim3 blocks, unsigned cluster, unsigned threads,
                           int shared_memory, bool dependent, cudaStream_t stream,
                           const std::type_identity_t<Params>&... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependent && launches_dependents()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, params...);
}
template <typename... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 blocks, unsigned threads, int shared_memory, bool dependent,
                          cudaStream_t stream, const std::type_identity_t<Params>&... params) {
  return launch_cluster(kernel, blocks, 1, threads, shared_memory, dependent, stream, params...);
}

}  // namespace fused_conv_bn
