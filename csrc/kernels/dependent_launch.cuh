// Kernels of one stream that begin while the one before still ends (programmatic dependent launch, compute capability 9.0 on):
// what a kernel can do without that one's results it does meanwhile.
#pragma once

#include <cuda_runtime.h>

namespace fused_conv_bn {

// In the kernel that comes first: the next one may be started.
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

// dependent: the kernel waits by wait_for_previous(), all that it reads of others is older than the kernel before.
template <typename Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 blocks, unsigned threads, int shared_memory, bool dependent,
                          cudaStream_t stream, const Params& params) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fused_conv_bn
