// The elementwise kernel on the CPU: the same epilogue over runs of elements, vectorised by the compiler.
//
// Every loop body is one always-inline function, compiled twice: for the baseline instruction set and for x86-64-v3 (AVX2
// and FMA), which is chosen at run time. Large outputs go to memory by non-temporal stores: an ordinary store first reads
// the line that it overwrites, a third of the traffic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "epilogue.h"
#include "fold.h"
#include "memory_format.h"

namespace fused_conv_bn {

constexpr int kLineBytes = 64;
// Outputs from this size on do not stay in a cache for whoever reads them next.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;
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

template <typename T, typename AffineOf, Activation A, bool kResidual>
FCB_HD void run_span(const T* input, const T* residual, T* output, int64_t begin, int64_t end, const AffineOf& affine) {
  for (int64_t i = begin; i < end; ++i) {
    const acc_t<T> x = to_acc(input[i]);
    if constexpr (kResidual) {
      output[i] = from_acc<T>(epilogue<A>(x, affine(i), to_acc(residual[i])));
    } else {
      output[i] = from_acc<T>(epilogue<A>(x, affine(i)));
    }
  }
}

// One cache line into a buffer, then past the caches.
template <typename T, typename AffineOf, Activation A, bool kResidual>
FCB_HD void run_line(const T* input, const T* residual, T* output, int64_t i, const AffineOf& affine) {
#if defined(__x86_64__)
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  alignas(kLineBytes) T line[kLine];
  for (int k = 0; k < kLine; ++k) {
    const acc_t<T> x = to_acc(input[i + k]);
    if constexpr (kResidual) {
      line[k] = from_acc<T>(epilogue<A>(x, affine(i + k), to_acc(residual[i + k])));
    } else {
      line[k] = from_acc<T>(epilogue<A>(x, affine(i + k)));
    }
  }
  for (int k = 0; k < kLineBytes; k += 16) {
    const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const char*>(line) + k));
    _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(output + i) + k), part);
  }
#else
  run_span<T, AffineOf, A, kResidual>(input, residual, output, i, i + kLineBytes / static_cast<int64_t>(sizeof(T)),
                                      affine);
#endif
}

template <typename T, typename AffineOf, Activation A, bool kResidual>
FCB_HD void run_body(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
  int64_t i = 0;
  if (streaming) {
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output) % kLineBytes);
    const int64_t head = std::min(n, (kLineBytes - misaligned) % kLineBytes / static_cast<int64_t>(sizeof(T)));
    run_span<T, AffineOf, A, kResidual>(input, residual, output, 0, head, affine);
    for (i = head; i + kLine <= n; i += kLine) {
      run_line<T, AffineOf, A, kResidual>(input, residual, output, i, affine);
    }
  }
  run_span<T, AffineOf, A, kResidual>(input, residual, output, i, n, affine);
}

template <typename T, typename AffineOf, Activation A, bool kResidual>
void run_baseline(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
  run_body<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}

#if defined(__x86_64__)
template <typename T, typename AffineOf, Activation A, bool kResidual>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const T* input, const T* residual, T* output, int64_t n,
                                                      const AffineOf& affine, bool streaming) {
  run_body<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}
inline bool has_v3() {
  static const bool result = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return result;
}
#endif

template <typename T, typename AffineOf, Activation A, bool kResidual>
void run(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, bool streaming) {
#if defined(__x86_64__)
  if (has_v3()) {
    return run_v3<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
  }
#endif
  run_baseline<T, AffineOf, A, kResidual>(input, residual, output, n, affine, streaming);
}

// affine_of(c): the affine of channel c. parallel_for(begin, end, grain, body(begin, end)): as in PyTorch.
// input, residual and output are dense with the given shape; output may be input.
template <Activation A, bool kResidual, typename T, typename AffineSource, typename ParallelFor>
void launch_scale_shift(const T* input, const T* residual, T* output, const Shape& shape,
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
  const bool streaming = output != input && shape.numel * static_cast<int64_t>(sizeof(T)) >= kStreamingBytes;
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
