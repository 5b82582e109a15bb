// What this library needs of PyTorch beyond torch/csrc/stable, and the only file that calls the C shims directly.
//
// Everything here is in the stable ABI of torch 2.10. What every op call needs goes to the narrowest shim there is: the
// torch::stable wrappers of the same operations look the operator up by name and box its arguments each time.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace fused_conv_bn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Becomes a RuntimeError in Python. (STD_TORCH_CHECK would add our file names and line numbers to the sentence.)
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_shim(AOTITorchError status, const char* what) {
  if (status != TORCH_SUCCESS) {
    fail("fused_conv_bn: PyTorch could not ", what, "; its own message is on stderr");
  }
}

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }

  std::string name() const {
    if (is_cpu()) {
      return "cpu";
    }
    const std::string kind = type == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(type);
    return kind + ":" + std::to_string(index);
  }
};

inline Device device_of(const Tensor& tensor) {
  Device device{};
  check_shim(aoti_torch_get_device_type(tensor.get(), &device.type), "read a tensor's device");
  check_shim(aoti_torch_get_device_index(tensor.get(), &device.index), "read a tensor's device");
  return device;
}

// Takes over an argument of schema type `str`. (torch::stable's conversion to std::string leaks it, as of torch 2.13.)
inline std::string take_string(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  check_shim(torch_string_length(handle, &length), "read a string argument");
  check_shim(torch_string_c_str(handle, &data), "read a string argument");
  std::string result(data, length);
  check_shim(torch_delete_string(handle), "release a string argument");
  return result;
}

inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
                            const Device& device) {
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  check_shim(aoti_torch_empty_strided(dim, sizes, strides, shim_dtype, device.type, device.index, &handle),
             "allocate memory for the result");
  return Tensor(handle);
}

// The tensor's memory under other strides, and unknown to autograd.
inline Tensor with_strides(const Tensor& tensor, const int64_t* strides) {
  AtenTensorHandle result = nullptr;
  check_shim(aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), tensor.sizes().data(), strides, 0, &result),
             "name a tensor's memory");
  return Tensor(result);
}

// PyTorch's aten::convolution, without a bias and not transposed: whichever library it chooses, under its own flags. The lists
// have `space` values each. The result is unknown to autograd, whose graph or tangent would be wrong for what callers make of it.
inline Tensor convolution(const Tensor& input, const Tensor& weight, int64_t space, const int64_t* stride,
                          const int64_t* padding, const int64_t* dilation, int64_t groups) {
  constexpr int64_t kNoOutputPadding[] = {0, 0, 0};
  AtenTensorHandle result = nullptr;
#if defined(__CUDACC__)
  const auto shim = aoti_torch_cuda_convolution;
#else
  const auto shim = aoti_torch_cpu_convolution;
#endif
  check_shim(shim(input.get(), weight.get(), nullptr, stride, space, padding, space, dilation, space, 0,
                  kNoOutputPadding, space, groups, &result),
             "run its convolution");
  const Tensor differentiable(result);
  return with_strides(differentiable, differentiable.strides().data());
}

// One of PyTorch's ops that have one result, on a tensor. Unknown to autograd, as above.
template <size_t n>
Tensor call_torch(const char* name, const char* overload, std::array<StableIValue, n> stack, const char* what) {
  check_shim(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), what);
  const auto differentiable = torch::stable::detail::to<Tensor>(stack[0]);
  return with_strides(differentiable, differentiable.strides().data());
}

inline Tensor torch_max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation, bool ceil_mode) {
  using torch::stable::detail::from;
  return call_torch<6>("aten::max_pool2d", "",
                       {from(input), from(kernel_size), from(stride), from(padding), from(dilation), from(ceil_mode)},
                       "pool the input");
}

// dtype: of the result, that of the input if there is none.
inline Tensor torch_mean(const Tensor& input, const std::vector<int64_t>& dims, bool keepdim,
                         const std::optional<ScalarType>& dtype = std::nullopt) {
  using torch::stable::detail::from;
  const std::optional<std::vector<int64_t>> optional_dims = dims;
  return call_torch<4>("aten::mean", "dim", {from(input), from(optional_dims), from(keepdim), from(dtype)},
                       "take a mean");
}

#if defined(__CUDACC__)

inline int device_attribute(int32_t index, cudaDeviceAttr name) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, index);
  return value;
}

// Of a device, asked for once.
inline int multiprocessors(int32_t index) {
  static const std::vector<int> all = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<int> counts;
    for (int i = 0; i < count; ++i) {
      counts.push_back(device_attribute(i, cudaDevAttrMultiProcessorCount));
    }
    return counts;
  }();
  return all.at(static_cast<size_t>(index));
}

// Makes a tensor's device the current one for a scope, and knows the stream that PyTorch is using on it.
class CudaScope {
 public:
  explicit CudaScope(const Device& device) : index_(device.index) {
    int32_t current = -1;
    check_shim(aoti_torch_get_current_device_index(&current), "name the current CUDA device");
    if (current != index_) {
      guard_.emplace(index_);
    }
    void* stream = nullptr;
    check_shim(aoti_torch_get_current_cuda_stream(index_, &stream), "name the current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Call with what a launch returned.
  void check_launch(const char* op, cudaError_t status) const {
    if (status == cudaSuccess) {
      return;
    }
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
      fail(op, ": cuda:", index_, " has compute capability ",
           device_attribute(index_, cudaDevAttrComputeCapabilityMajor), ".",
           device_attribute(index_, cudaDevAttrComputeCapabilityMinor),
           ", and this build of fused_conv_bn has code for ", FCB_CUDA_ARCHS,
           "; install a build that covers it (python -m fused_conv_bn info lists what is installed)");
    }
    fail(op, ": CUDA reports ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ") on cuda:", index_);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  int32_t index_;
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace fused_conv_bn
