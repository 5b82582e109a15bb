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
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/batch_norm/fold.h"
#include "kernels/common/epilogue.h"
#include "memory_format.h"
#include "parts.h"

namespace fused_conv_bn {

constexpr int kLineBytes = 64;
constexpr int kBlock = 64;  // elements: whole lines for every T
// An output of this size or more that is written again and again goes past the caches. New memory does not: its pages are
// being zeroed by the kernel as we write them, so that their lines are in the cache anyway.
constexpr int64_t kStreamingBytes = int64_t{32} << 20;
// Planes shorter than this are treated as part of a longer period with an affine for each element.
constexpr int64_t kMinRun = 32;
// And these where there are so many images that writing out affines is worth it.
constexpr int64_t kMinRepeatedRun = 200;
constexpr int64_t kFewImages = 4;
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
// from_acc<bfloat16>, with fewer instructions for the NaNs and for the narrowing than compilers find.
__attribute__((target("avx2,f16c"))) inline void convert(const float* from, bfloat16* to, int n) {
  int k = 0;
  for (; k + 16 <= n; k += 16) {
    __m256i halves[2];
    for (int i = 0; i < 2; ++i) {
      const __m256 value = _mm256_loadu_ps(from + k + 8 * i);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256 checked = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                              _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                              _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      halves[i] = _mm256_srli_epi32(_mm256_castps_si256(checked), 16);
    }
    // packus goes by halves of registers
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves[0], halves[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), packed);
  }
  for (; k < n; ++k) {
    to[k] = from_acc<bfloat16>(from[k]);
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
  if constexpr (kV3 && !std::is_same_v<T, acc_t<T>>) {
    return convert(from, to, n);
  }
#endif
  for (int k = 0; k < n; ++k) {
    to[k] = from_acc<T>(from[k]);
  }
}

// The activation of n values: a branch for all of them, and a loop that vectorises.
template <typename T>
FCB_HD void activate_block(const Epilogue& epilogue, acc_t<T>* x, int n) {
  const auto negative_slope = static_cast<acc_t<T>>(epilogue.negative_slope);
  // Inlined at all costs: by itself it would be compiled for the baseline.
  dispatch_activation(epilogue.activation, [&](auto a) __attribute__((always_inline)) {
    if constexpr (a() != Activation::none) {
      for (int k = 0; k < n; ++k) {
        x[k] = activate<a(), T>(x[k], negative_slope);
      }
    }
  });
}

// Elements [i, i + n) with n <= kBlock, by way of the stack: load, compute and store are loops of their own, since
// compilers vectorise the 16-bit conversions only by themselves. `streaming`: n is kBlock and output + i begins a line.
// `kPlain`: there is no activation and no residual. Then what is between load and store stays in registers.
template <bool kV3, typename T, typename AffineOf, bool kResidual, bool kPlain>
FCB_HD void run_block(const T* input, const T* residual, T* output, int64_t i, int n, const AffineOf& affine,
                      const Epilogue& epilogue, bool streaming) {
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
  const bool residual_first = kResidual && !epilogue.residual_last;
  for (int k = 0; k < n; ++k) {
    Acc value;
    if constexpr (kConverts) {
      value = x[k];
    } else {
      value = input[i + k];  // copied to the stack first, a block of these becomes a slow string instruction
    }
    x[k] = apply_affine(value, affine(i + k));
  }
  const auto add_residual = [&]() __attribute__((always_inline)) {
    for (int k = 0; k < n; ++k) {
      x[k] += r[kResidual ? k : 0];
    }
  };
  if constexpr (!kPlain) {
    if (residual_first) {
      add_residual();
    }
    activate_block<T>(epilogue, x, n);
    if (kResidual && epilogue.residual_last) {
      add_residual();
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

template <bool kV3, bool kPlain, typename T, typename AffineOf, bool kResidual>
FCB_HD void run_blocks(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine,
                       const Epilogue& epilogue, bool streaming) {
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output) % kLineBytes);
  int64_t size = streaming ? (kLineBytes - misaligned) % kLineBytes / static_cast<int64_t>(sizeof(T)) : 0;
  size = size > 0 ? size : kBlock;
  for (int64_t i = 0; i < n; i += size, size = kBlock) {
    size = std::min(size, n - i);
    if (size == kBlock) {
      run_block<kV3, T, AffineOf, kResidual, kPlain>(input, residual, output, i, kBlock, affine, epilogue, streaming);
    } else {
      run_block<kV3, T, AffineOf, kResidual, kPlain>(input, residual, output, i, static_cast<int>(size), affine,
                                                     epilogue, false);
    }
  }
}

template <bool kV3, typename T, typename AffineOf, bool kResidual>
FCB_HD void run_body(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine,
                     const Epilogue& epilogue, bool streaming) {
  if (kResidual || epilogue.activation != Activation::none) {
    return run_blocks<kV3, false, T, AffineOf, kResidual>(input, residual, output, n, affine, epilogue, streaming);
  }
  if (!std::is_same_v<T, acc_t<T>> || streaming) {
    return run_blocks<kV3, true, T, AffineOf, kResidual>(input, residual, output, n, affine, epilogue, streaming);
  }
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    // The output may be the input, element for element, and then no iteration depends on another one either.
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      output[i] = apply_affine(input[i], affine(i));
    }
  }
}

template <typename T, typename AffineOf, bool kResidual>
void run_baseline(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine,
                  const Epilogue& epilogue, bool streaming) {
  run_body<false, T, AffineOf, kResidual>(input, residual, output, n, affine, epilogue, streaming);
}

#if defined(__x86_64__)
template <typename T, typename AffineOf, bool kResidual>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const T* input, const T* residual, T* output, int64_t n,
                                                      const AffineOf& affine, const Epilogue& epilogue,
                                                      bool streaming) {
  run_body<true, T, AffineOf, kResidual>(input, residual, output, n, affine, epilogue, streaming);
}
template <typename T, typename AffineOf, bool kResidual>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const T* input, const T* residual, T* output, int64_t n,
                                                      const AffineOf& affine, const Epilogue& epilogue,
                                                      bool streaming) {
  run_body<true, T, AffineOf, kResidual>(input, residual, output, n, affine, epilogue, streaming);
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

template <typename T, typename AffineOf>
void run(const T* input, const T* residual, T* output, int64_t n, const AffineOf& affine, const Epilogue& epilogue,
         bool streaming) {
  const auto with = [&](auto has_residual) {
#if defined(__x86_64__)
    if (!is_short(epilogue.activation) && use_v4()) {  // others wait for memory
      return run_v4<T, AffineOf, has_residual()>(input, residual, output, n, affine, epilogue, streaming);
    }
    if (use_v3()) {
      return run_v3<T, AffineOf, has_residual()>(input, residual, output, n, affine, epilogue, streaming);
    }
#endif
    run_baseline<T, AffineOf, has_residual()>(input, residual, output, n, affine, epilogue, streaming);
  };
  residual != nullptr ? with(std::true_type{}) : with(std::false_type{});
}

// The affines of channels, one behind the other.
template <typename Acc>
struct ChannelAffines {
  const Acc* center;
  const Acc* scale;
  const Acc* shift;
};

// Values of channels as those of n elements, from element `first` of a row of periods on, which begins a plane.
template <typename Acc>
void expand(const Acc* values, const Shape& shape, int64_t first, int64_t n, Acc* to) {
  int64_t c = first / shape.inner % shape.channels;
  if (shape.inner == 1) {
    for (int64_t i = 0; i < n; c = 0) {
      const int64_t count = std::min(n - i, shape.channels - c);
      std::copy_n(values + c, count, to + i);
      i += count;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += shape.inner) {
    std::fill_n(to + i, shape.inner, values[c]);
    c = c + 1 < shape.channels ? c + 1 : 0;
  }
}

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

// parallel_for(begin, end, grain, body(begin, end)): as in PyTorch. residual: nullptr for none. input_at(i, n): where the
// elements [i, i + n) of the input are; it is called once for each run, before that is written. residual and output are dense
// with the given shape.
template <typename T, typename InputAt, typename ParallelFor>
void launch_runs(const InputAt& input_at, const T* residual, T* output, bool streaming, const Shape& shape,
                 const ChannelAffines<acc_t<T>>& affines, const Epilogue& epilogue, const ParallelFor& parallel_for) {
  using Acc = acc_t<T>;
  if (shape.numel == 0) {
    return;
  }
  const auto run_at = [&](int64_t i, int64_t n, const auto& affine) {
    run(input_at(i, n), residual == nullptr ? nullptr : residual + i, output + i, n, affine, epilogue, streaming);
  };
  const int64_t period = shape.channels * shape.inner;
  const int64_t images = shape.numel / period;
  if (shape.inner >= (images >= kFewImages ? kMinRepeatedRun : kMinRun)) {
    // Each plane is a run.
    parallel_for(int64_t{0}, shape.numel, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t plane = begin / shape.inner, c = plane % shape.channels;
        const int64_t n = std::min(end, (plane + 1) * shape.inner) - begin;
        run_at(begin, n, UniformAffine<Acc>{{affines.center[c], affines.scale[c], affines.shift[c]}});
        begin += n;
      }
#if defined(__x86_64__)
      _mm_sfence();
#endif
    });
    return;
  }
  // Some periods of the channels make up a row, so that a run is worth its set-up. A task is a part of some rows, with an
  // affine for each element of a row.
  const int64_t periods = std::max<int64_t>(1, std::min(kPeriodicRun, shape.numel) / period);
  const int64_t length = periods * period;
  const bool expanded = length != shape.channels;
  const int64_t width = std::min(length, expanded ? kPeriodicRun / shape.inner * shape.inner : kGrain / 4);
  const int64_t across = (length + width - 1) / width;
  const int64_t rows = (shape.numel + length - 1) / length;
  const int64_t height = std::min(rows, std::max<int64_t>(1, kGrain / width));
  const int64_t down = (rows + height - 1) / height;
  parallel_for(int64_t{0}, across * down, std::max<int64_t>(1, kGrain / (width * height)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t first = task % across * width;
                   const int64_t n = std::min(width, length - first);
                   Acc center[kPeriodicRun], scale[kPeriodicRun], shift[kPeriodicRun];
                   ElementAffine<Acc> affine{affines.center + first, affines.scale + first, affines.shift + first};
                   if (expanded) {
                     expand(affines.center, shape, first, n, center);
                     expand(affines.scale, shape, first, n, scale);
                     expand(affines.shift, shape, first, n, shift);
                     affine = {center, scale, shift};
                   }
                   const int64_t row = task / across * height;
                   for (int64_t r = row; r < std::min(rows, row + height); ++r) {
                     const int64_t at = r * length + first;
                     if (at < shape.numel) {  // the last row may be shorter
                       run_at(at, std::min(n, shape.numel - at), affine);
                     }
                   }
                 }
#if defined(__x86_64__)
                 _mm_sfence();
#endif
               });
}

// An input that is dense, too; output may be input. `fresh`: output was just allocated.
template <typename T, typename ParallelFor>
void launch_scale_shift(const T* input, const T* residual, T* output, bool fresh, const Shape& shape,
                        const ChannelAffines<acc_t<T>>& affines, const Epilogue& epilogue,
                        const ParallelFor& parallel_for) {
  const int64_t bytes = shape.numel * static_cast<int64_t>(sizeof(T));
  const bool streaming = !fresh && output != input && bytes >= kStreamingBytes;
  launch_runs([&](int64_t i, int64_t) { return input + i; }, residual, output, streaming, shape, affines, epilogue,
              parallel_for);
}

// Of a source of affines: f(ChannelAffines) with those of all channels.
template <typename T, typename AffineOf, typename ParallelFor, typename F>
void with_affines(int64_t channels, const AffineOf& affine_of, const ParallelFor& parallel_for, const F& f) {
  using Acc = acc_t<T>;
  constexpr int64_t kFoldGrain = 1024;  // channels that are worth a thread
  const std::unique_ptr<Acc[]> affines(new Acc[3 * channels]);
  Acc* const center = affines.get();
  Acc* const scale = center + channels;
  Acc* const shift = scale + channels;
  parallel_for(int64_t{0}, channels, kFoldGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Affine<Acc> affine = affine_of(static_cast<uint32_t>(c));
      center[c] = affine.center;
      scale[c] = affine.scale;
      shift[c] = affine.shift;
    }
  });
  f(ChannelAffines<Acc>{center, scale, shift});
}

// With affine_of(c): the affine of channel c.
template <typename T, typename AffineOf, typename ParallelFor>
void launch_scale_shift(const T* input, const T* residual, T* output, bool fresh, const Shape& shape,
                        const AffineOf& affine_of, const Epilogue& epilogue, const ParallelFor& parallel_for) {
  with_affines<T>(shape.channels, affine_of, parallel_for, [&](const ChannelAffines<acc_t<T>>& affines) {
    launch_scale_shift(input, residual, output, fresh, shape, affines, epilogue, parallel_for);
  });
}

// Inputs that are concatenated over their channels: each run is put together in the output, and computed there while it is in
// the cache. shape: of the result.
template <typename T, typename AffineOf, typename ParallelFor>
void launch_cat(const Parts<T>& parts, T* output, const Shape& shape, const AffineOf& affine_of,
                const Epilogue& epilogue, const ParallelFor& parallel_for) {
  const int64_t row_elements = shape.channels * shape.inner;
  const auto input_at = [&](int64_t i, int64_t n) {
    T* to = output + i;
    int64_t row = i / row_elements, position = i % row_elements;
    int part = parts.find(static_cast<uint32_t>(position / shape.inner));
    position -= parts.first[part] * shape.inner;
    while (n > 0) {
      const int64_t length = parts.channels(part) * shape.inner;
      const int64_t count = std::min(n, length - position);
      std::memcpy(to, parts.data[part] + row * length + position, static_cast<size_t>(count) * sizeof(T));
      to += count;
      n -= count;
      position = 0;
      if (++part == parts.count) {
        part = 0;
        ++row;
      }
    }
    return static_cast<const T*>(output + i);
  };
  with_affines<T>(shape.channels, affine_of, parallel_for, [&](const ChannelAffines<acc_t<T>>& affines) {
    launch_runs(input_at, static_cast<const T*>(nullptr), output, false, shape, affines, epilogue, parallel_for);
  });
}

// epilogue(input * gate), with a gate for each channel of each image. pixels: of an image.
template <typename T, typename ParallelFor>
void launch_gate(const T* input, const T* gate, const T* residual, T* output, const Shape& shape, int64_t pixels,
                 const Epilogue& epilogue, const ParallelFor& parallel_for) {
  using Acc = acc_t<T>;
  const auto launch = [&](int64_t begin, const Shape& part, const T* gates, const auto& parallel) {
    const auto affine_of = [&](uint32_t c) { return Affine<Acc>{0, to_acc(gates[c]), 0}; };
    launch_scale_shift(input + begin, residual == nullptr ? nullptr : residual + begin, output + begin, true, part,
                       affine_of, epilogue, parallel);
  };
  // Where each plane is in one piece, an image is as good as more channels.
  if (shape.inner != 1 || pixels == 1) {
    return launch(0, {shape.numel, shape.numel / shape.inner, shape.inner}, gate, parallel_for);
  }
  const int64_t image = pixels * shape.channels, images = shape.numel / image;
  const auto one = [&](int64_t n, const auto& parallel) {
    launch(n * image, {image, shape.channels, 1}, gate + n * shape.channels, parallel);
  };
  constexpr int64_t kManyImages = 4;
  if (images < kManyImages) {
    for (int64_t n = 0; n < images; ++n) {
      one(n, parallel_for);
    }
    return;
  }
  parallel_for(int64_t{0}, images, std::max<int64_t>(1, kGrain / image), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      one(n, [](int64_t first, int64_t last, int64_t, const auto& body) { body(first, last); });
    }
  });
}

}  // namespace fused_conv_bn
