// A rival for the benchmark, not part of the package: eval BatchNorm and a factor as a first CUDA kernel does them.
//
// fp32 NCHW only. One thread per element; each thread finds its channel with two 64-bit divisions and computes 1/sqrt of
// the variance for itself. `python -m benchmarks` compiles it with NVRTC, which passes Python ints as int and floats as
// double; the two floats therefore come as bits, so that their conversion costs the kernel nothing.
extern "C" __global__ void naive_bn_scale(const float* x, const float* running_mean, const float* running_var,
                                          const float* weight, const float* bias, float* y, int images, int channels_,
                                          int plane_, int scaling_factor_bits, int eps_bits) {
  const long long channels = channels_;
  const long long plane = plane_;
  const long long numel = images * channels * plane;
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= numel) {
    return;
  }
  const long long c = (i / plane) % channels;
  const float inv_std = 1.0f / sqrtf(running_var[c] + __int_as_float(eps_bits));
  y[i] = ((x[i] - running_mean[c]) * inv_std * weight[c] + bias[c]) * __int_as_float(scaling_factor_bits);
}
