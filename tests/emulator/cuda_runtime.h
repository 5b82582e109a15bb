// What the kernels use of CUDA's headers, in terms of machine.h. cuda_fp16.h and cuda_bf16.h include this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace emulated {
template <Index (*read)(), unsigned Index::* member>
struct Coordinate {
  operator unsigned() const { return read().*member; }
};
template <Index (*read)()>
struct Coordinates {
  Coordinate<read, &Index::x> x;
  Coordinate<read, &Index::y> y;
  Coordinate<read, &Index::z> z;
};
}  // namespace emulated
constexpr emulated::Coordinates<emulated::thread_index> threadIdx;
constexpr emulated::Coordinates<emulated::block_index> blockIdx;
constexpr emulated::Coordinates<emulated::grid_size> gridDim;
constexpr emulated::Coordinates<emulated::block_size> blockDim;

// ---- types ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half v) { return emulated::from_half(emulated::Half::float16, v.bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return emulated::from_half(emulated::Half::bfloat16, v.bits); }
inline __half __float2half_rn(float v) { return {emulated::to_half(emulated::Half::float16, v)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {emulated::to_half(emulated::Half::bfloat16, v)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- intrinsics ----

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
inline int __double2loint(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  return static_cast<int>(bits);
}
inline int __double2hiint(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  return static_cast<int>(bits >> 32);
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline float __saturatef(float v) { return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f; }  // NaN: 0
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (s & 7)) & 255;
    if ((s & 8) != 0) {  // its sign, eight times
      byte = (byte & 128) != 0 ? 255 : 0;
    }
    result |= byte << (8 * i);
  }
  return result;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return std::max(a & 0xffff, b & 0xffff) | std::max(a >> 16, b >> 16) << 16;
}
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
using std::isfinite;
inline float rsqrtf(float v) { return static_cast<float>(1 / std::sqrt(double{v})); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulated::shared_address(pointer); }

// ---- threads together ----

inline void __syncthreads() { emulated::meet_at_barrier(0, 0, true); }
inline int __syncthreads_or(int condition) { return emulated::any_in_block(condition != 0) ? 1 : 0; }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulated::meet_in_warp("__syncwarp", mask, nullptr, true, [](auto&) {});
}

namespace emulated {

template <typename T>
struct Exchange {
  T given;
  int from;
  T taken;
};
template <typename T>
T exchange(const char* name, uint32_t mask, T value, int from) {
  Exchange<T> own{value, from, value};
  meet_in_warp(name, mask, &own, false, [&](void* const(&lanes)[kWarp]) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0) {
        auto* const to = static_cast<Exchange<T>*>(lanes[lane]);
        if ((mask >> (to->from & 31) & 1) != 0) {
          to->taken = static_cast<Exchange<T>*>(lanes[to->from & 31])->given;
        }
      }
    }
  });
  return own.taken;
}
template <typename F>
uint32_t reduce(const char* name, uint32_t mask, uint32_t value, F f) {
  Exchange<uint32_t> own{value, 0, 0};
  meet_in_warp(name, mask, &own, false, [&](void* const(&lanes)[kWarp]) {
    bool first = true;
    uint32_t result = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0) {
        const uint32_t given = static_cast<Exchange<uint32_t>*>(lanes[lane])->given;
        result = first ? given : f(result, given);
        first = false;
      }
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0) {
        static_cast<Exchange<uint32_t>*>(lanes[lane])->taken = result;
      }
    }
  });
  return own.taken;
}

}  // namespace emulated

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulated::exchange("__shfl_sync", mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulated::exchange("__shfl_xor_sync", mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return emulated::reduce("__reduce_max_sync", mask, value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  return emulated::reduce("__reduce_min_sync", mask, value, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
inline uint32_t __ballot_sync(uint32_t mask, bool condition) {
  return emulated::reduce("__ballot_sync", mask, condition ? 1u << threadIdx.x % 32 : 0u,
                          [](uint32_t a, uint32_t b) { return a | b; });
}

template <typename T, typename F>
__attribute__((no_sanitize("thread"))) T atomic(T* address, F f) {
  emulated::touch_atomically(address);
  const T before = *address;
  *address = f(before);
  return before;
}
inline int atomicMin(int* address, int value) {
  return atomic(address, [&](int before) { return std::min(before, value); });
}
inline uint32_t atomicOr(uint32_t* address, uint32_t value) {
  return atomic(address, [&](uint32_t before) { return before | value; });
}
inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  return atomic(address, [&](uint32_t before) { return std::max(before, value); });
}
inline int atomicMax(int* address, int value) {
  return atomic(address, [&](int before) { return std::max(before, value); });
}

// ---- the runtime ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorNotSupported };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = emulated::driver_function(name);
  *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = __CUDA_ARCH__ / 100;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= emulated::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  *blocks = std::min<int>(2048 / threads, static_cast<int>(emulated::kSharedBytes / (shared_bytes + 1024)));
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const std::type_identity_t<Params>&... params) {
  const dim3 grid = config->gridDim;
  bool early = false;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& [id, value] = config->attrs[i];
    if (id == cudaLaunchAttributeClusterDimension) {
      cluster = value.clusterDim.y == 1 && value.clusterDim.z == 1 ? value.clusterDim.x : 0;
    } else {
      early = value.programmaticStreamSerializationAllowed != 0;
    }
  }
  return emulated::launch({grid.x, grid.y, grid.z}, cluster, config->blockDim.x, config->dynamicSmemBytes, early,
                          [&]() __attribute__((no_sanitize("thread"))) { kernel(params...); })
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
