// The depthwise kernels.
#include "../kernels/conv_depthwise.cuh"

namespace fused_conv_bn {

template cudaError_t launch_conv_depthwise<float>(const ConvProblem&, const ConvOperands&, const Epilogue&,
                                                  const DepthwisePlan&, int, cudaStream_t);
template cudaError_t launch_conv_depthwise<float16>(const ConvProblem&, const ConvOperands&, const Epilogue&,
                                                    const DepthwisePlan&, int, cudaStream_t);
template cudaError_t launch_conv_depthwise<bfloat16>(const ConvProblem&, const ConvOperands&, const Epilogue&,
                                                     const DepthwisePlan&, int, cudaStream_t);

}  // namespace fused_conv_bn
