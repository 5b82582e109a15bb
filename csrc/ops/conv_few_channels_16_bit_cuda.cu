// The few_channels kernels for float16 and bfloat16.
#include "../kernels/conv_few_channels.cuh"

namespace fused_conv_bn {

template cudaError_t launch_conv_few_channels<float16>(const ConvProblem&, const ConvOperands&, const FewChannelsTile&,
                                                       const GpuTraits&, const Epilogue&, cudaStream_t);
template cudaError_t launch_conv_few_channels<bfloat16>(const ConvProblem&, const ConvOperands&, const FewChannelsTile&,
                                                        const GpuTraits&, const Epilogue&, cudaStream_t);

}  // namespace fused_conv_bn
