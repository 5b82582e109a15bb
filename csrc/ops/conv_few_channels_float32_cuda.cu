// The few_channels kernels for float32.
#include "../kernels/conv_few_channels.cuh"

namespace fused_conv_bn {

template cudaError_t launch_conv_few_channels<float>(const ConvProblem&, const ConvOperands&, const FewChannelsTile&,
                                                     const GpuTraits&, const Epilogue&, cudaStream_t);

}  // namespace fused_conv_bn
