// The elementwise kernel on the CPU: the same epilogue over runs of elements, vectorised by the compiler.
//
// Every loop body is one always-inline function, compiled twice: for the baseline instruction set and for x86-64-v3 (AVX2
// and FMA), which is chosen at run time. Large outputs may go to memory by non-temporal stores: an ordinary store first
// reads the line that it overwrites, a third of the traffic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "epilogue.h"
#include "fold.h"
#include "memory_format.h"

namespace fused_conv_bn {

constexpr int kLineBytes = 64;
constexpr int kBlock = 64;  // elements: whole lines for every T
// An output of this size or more that is written again and again goes past the caches. New memory does not: its pages are
// being zeroed by the kernel as we write them, so that their lines are in the cache anyway.
constexpr int64_t kStreamingBytes = int64_t{32} << 20;
// Planes shorter than this are treated as part of a longer period with an affine for each element.
constexpr int64_t kMinRun = 32;
// And such periods are repeated up to this length, so that a run is worth its set-up.
constexpr int64_t kPeriodicRun = 1024;

// One affine for a whole run, or one for each of its elements.
template <typename Acc>
struct UniformAffine {
  Affine<Acc> affine;
  FCB_HD Affine<Acc> operator()(int64_t) const { return affine; }
};
template <typename Acc>
struct ElementAffine {
  const Acc* center;
  const Acc* scale;
  const Acc* shift;
  FCB_HD Affine<Acc> operator()(int64_t i) const { return {center[i], scale[i], shift[i]}; }
};

#if defined(__x86_64__)
// float16 has conversion instructions that compilers do not find by themselves. Calls, not inlined: their callers are
// compiled for the baseline before they are inlined where these instructions exist.
__attribute__((target("avx2,f16c"))) inline void convert(const float16* from, float* to, int n) {
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    _mm256_storeu_ps(to + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k))));
  }
  for (; k < n; ++k) {
    to[k] = to_acc(from[k]);
  }
}
__attribute__((target("avx2,f16c"))) inline void convert(const float* from, float16* to, int n) {
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k), half);
  }
  for (; k < n; ++k) {
    to[k] = from_acc<float16>(from[k]);
  }
}
#endif

template <bool kV3, typename T>
FCB_HD void load(const T* from, acc_t<T>* to, int n) {
#if defined(__x86_64__)
  if constexpr (kV3 && std::is_same_v<T, float16>) {
    return convert(from, to, n);
  }
#endif
  for (int k = 0; k < n; ++k) {
    to[k] = to_acc(from[k]);
  }
}
template <bool kV3, typename T>
FCB_HD void store(const acc_t<T>* from, T* to, int n) {
#if defined(__x86_64__)
  if constexpr (kV3 && std::is_same_v<T, float16>) {
    return convert(from, to, n);
  }
#endif
  for (int k = 0; k < n; ++k) {
    to[k] = from_acc<T>(from[k]);
  }
}

// Elements [i, i + n) with n <= kBlock, by way of the stack: load, compute and store are loops of their own, since
// compilers vectorise the 16-bit conversions only by themselves. `streaming`: n is kBlock and output + i begins a line.
template <bool kV3, typename T, typename AffineOf, Activation A, bool kResidual>
FCB_HD void run_block(const T* input, const T* residual, T* output, int64_t i, int n, const AffineOf& affine,
                      bool streaming) {
  using Acc = acc_t<T>;
  constexpr bool kConverts = !std::is_same_v<T, Acc>;
  alignas(kLineBytes) Acc x[kBlock];
  if constexpr (kConverts) {
    load<kV3>(input + i, x, n);
  }
  Acc r[kResidual ? kBlock : 1];
  if constexpr (kResidual) {
    load<kV3>(residual + i, r, n);
  }
  for (int k = 0; k < n; ++k) {
    Acc value;
    if constexpr (kConverts) {
      value = x[k];
    } else {
      value = input[i + k];  // copied to the stack first, a block of these becomes a slow string instruction
    }
    if constexpr (kResidual) {
      x[k] = epilogue<A>(value, affine(i + k), r[k]);
    } else {
      x[k] = epilogue<A>(value, affine(i + k));
    }
  }
#if defined(__x86_64__)
  if (streaming) {
    alignas(kLineBytes) T converted[kConverts ? kBlock : 1];
    const void* from = x;
    if constexpr (kConverts) {
      store<kV3>(x, converted, kBlock);
      from = converted;
    }
    auto* to = reinterpret_cast<__m128i*>(output + i);
    constexpr int kStores = kBlock * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(__m128i));
    for (int k = 0; k < kStores; ++k) {
      _mm_stream_si128(to + k, _mm_load_si128(static_cast<const __m128i*>(from) + k));
    }
    return;
  }
#endif
  store<kV3>(x, output + i, n);
}

template <bool kV3, typename T, typename AffineOf, Activation A, bool kResidual>
FCB_HD void run_body(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
  int64_t i = 0;
  if (streaming) {
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output) % kLineBytes);
    i = std::min(n, (kLineBytes - misaligned) % kLineBytes / static_cast<int64_t>(sizeof(T)));
    run_block<kV3, T, AffineOf, A, kResidual>(input, residual, output, 0, static_cast<int>(i), affine, false);
    for (; i + kBlock <= n; i += kBlock) {
      run_block<kV3, T, AffineOf, A, kResidual>(input, residual, output, i, kBlock, affine, true);
    }
  }
  for (; i + kBlock <= n; i += kBlock) {
    run_block<kV3, T, AffineOf, A, kResidual>(input, residual, output, i, kBlock, affine, false);
  }
  run_block<kV3, T, AffineOf, A, kResidual>(input, residual, output, i, static_cast<int>(n - i), affine, false);
}

template <typename T, typename AffineOf, Activation A, bool kResidual>
void run_baseline(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
  run_body<false, T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}

#if defined(__x86_64__)
template <typename T, typename AffineOf, Activation A, bool kResidual>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const T* input, const T* residual, T* output, int64_t n,
                                                      const AffineOf& affine, bool streaming) {
  run_body<true, T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}
// ATEN_CPU_CAPABILITY holds PyTorch's own kernels to an instruction set, default being the baseline, and so it does ours.
inline bool is_capability(const char* name) {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  return capability != nullptr && std::strcmp(capability, name) == 0;
}
inline bool use_v3() {
  static const bool result = !is_capability("default") && __builtin_cpu_supports("avx2") &&
                             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return result;
}
// x86-64-v4 has AVX-512 besides.
inline bool use_v4() {
  static const bool result = use_v3() && !is_capability("avx2") && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return result;
}
#endif

template <typename T, typename AffineOf, Activation A, bool kResidual>
void run(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
#if defined(__x86_64__)
  if (use_v3()) {
    return run_v3<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
  }
#endif
  run_baseline<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}

// affine_of(c): the affine of channel c. parallel_for(begin, end, grain, body(begin, end)): as in PyTorch.
// input, residual and output are dense with the given shape; output may be input. `fresh`: output was just allocated.
template <Activation A, bool kResidual, typename T, typename AffineSource, typename ParallelFor>
void launch_scale_shift(const T* input, const T* residual, T* output, bool fresh, const Shape& shape,
                        const AffineSource& affine_of, const ParallelFor& parallel_for) {
  using Acc = acc_t<T>;
  constexpr int64_t kGrain = 16384;
  if (shape.numel == 0) {
    return;
  }
  const bool by_element = shape.inner < kMinRun;
  // A run shares one affine (long planes), or is some periods of the channels with an affine for each element.
  const int64_t period = shape.channels * shape.inner;
  const int64_t periods = std::max<int64_t>(1, std::min(kPeriodicRun, shape.numel) / period);
  const int64_t run_length = by_element ? periods * period : shape.inner;
  const int64_t repeat = by_element ? shape.inner : 1;
  const int64_t affines = by_element ? run_length : shape.channels;
  std::vector<Acc> center(affines), scale(affines), shift(affines);
  for (int64_t i = 0; i < affines; ++i) {
    if (i % repeat == 0 && i < shape.channels * repeat) {
      const Affine<Acc> affine = affine_of(static_cast<uint32_t>(i / repeat));
      center[i] = affine.center;
      scale[i] = affine.scale;
      shift[i] = affine.shift;
    } else {
      const int64_t same = i % repeat == 0 ? i - period : i - 1;
      center[i] = center[same];
      scale[i] = scale[same];
      shift[i] = shift[same];
    }
  }
  const int64_t bytes = shape.numel * static_cast<int64_t>(sizeof(T));
  const bool streaming = !fresh && output != input && bytes >= kStreamingBytes;
  parallel_for(int64_t{0}, shape.numel, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t run_index = begin / run_length;
      const int64_t offset = begin - run_index * run_length;
      const int64_t n = std::min(end - begin, run_length - offset);
      const T* x = input + begin;
      const T* r = kResidual ? residual + begin : nullptr;
      T* y = output + begin;
      if (by_element) {
        const ElementAffine<Acc> affine{&center[offset], &scale[offset], &shift[offset]};
        run<T, ElementAffine<Acc>, A, kResidual>(x, r, y, n, affine, streaming);
      } else {
        const int64_t c = run_index % shape.channels;
        const UniformAffine<Acc> affine{{center[c], scale[c], shift[c]}};
        run<T, UniformAffine<Acc>, A, kResidual>(x, r, y, n, affine, streaming);
      }
      begin += n;
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

}  // namespace fused_conv_bn
