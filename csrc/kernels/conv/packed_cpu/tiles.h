// What a convolution with a packed weight computes at a time, on vectors of FCB_LANES floats: compiled for each instruction set,
// FCB_ARCH, in a namespace of its own. kernel.h includes it.

#define FCB_INLINE __attribute__((target(FCB_ARCH), always_inline)) inline

#if FCB_LANES == 16
using Vector = __m512;
#define FCB_MM(name) _mm512_##name##_ps
constexpr int kPixelsOfTile = 14, kPixelsOfVector = 14;
#else
using Vector = __m256;
#define FCB_MM(name) _mm256_##name##_ps
constexpr int kPixelsOfTile = 6, kPixelsOfVector = 8;
#endif
constexpr int kLanes = FCB_LANES, kVectorsOfTile = 2;
constexpr int kChannelsOfTile = kLanes * kVectorsOfTile;  // output channels whose weights lie side by side

#if FCB_LANES == 16
// numerator * sigmoid(x), with exp2_acc()'s polynomial and instructions for the rest: loops in C++ take half as long again.
// min and max return their second operand where one is NaN.
FCB_INLINE Vector packed_sigmoid(Vector x, Vector numerator) {
  const Vector least = _mm512_set1_ps(-151.0f), most = _mm512_set1_ps(129.0f);
  const Vector v = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))));
  const Vector whole = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector f = _mm512_sub_ps(v, whole);
  Vector p = _mm512_set1_ps(1.54762994e-4f);
  for (const float c : {1.34002697e-3f, 9.61800385e-3f, 5.55032790e-2f, 2.40226507e-1f, 6.93147182e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return _mm512_div_ps(numerator, _mm512_add_ps(_mm512_scalef_ps(p, whole), _mm512_set1_ps(1.0f)));
}
#endif

// One copy of what is rare, for all tiles. n: of whole vectors.
__attribute__((target(FCB_ARCH), noinline)) inline void packed_activate(const Epilogue& epilogue, float* x, int n) {
#if FCB_LANES == 16
  const bool silu = epilogue.activation == Activation::silu;
  if (silu || epilogue.activation == Activation::sigmoid) {
    for (int i = 0; i < n; i += kLanes) {
      const Vector value = _mm512_load_ps(x + i);
      _mm512_store_ps(x + i, packed_sigmoid(value, silu ? value : _mm512_set1_ps(1.0f)));
    }
    return;
  }
#endif
  activate_block<float>(epilogue, x, n);
}

// activation(sum + shift + residual) of whole vectors of each pixel.
template <int kPixels, int kVectors>
FCB_INLINE void packed_finish_whole(Vector (&sum)[kPixels][kVectors], const PackedOutput& out) {
  constexpr int kWidth = kLanes * kVectors;
  const Epilogue& epilogue = *out.epilogue;
  for (int v = 0; v < kVectors; ++v) {
    const Vector shift = FCB_MM(loadu)(out.shift + v * kLanes);
    for (int i = 0; i < kPixels; ++i) {
      sum[i][v] = FCB_MM(add)(sum[i][v], shift);
    }
  }
  const bool adds = out.residual != nullptr;
  const auto add_residual = [&]() __attribute__((always_inline, target(FCB_ARCH))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = FCB_MM(add)(sum[i][v], FCB_MM(loadu)(out.residual + i * out.pitch + v * kLanes));
      }
    }
  };
  if (adds && !epilogue.residual_last) {
    add_residual();
  }
  switch (epilogue.activation) {
    case Activation::none:
      break;
    case Activation::relu6:
      // Both return their second operand where one is NaN.
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = FCB_MM(min)(FCB_MM(set1)(6.0f), sum[i][v]);
        }
      }
      [[fallthrough]];
    case Activation::relu:
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = FCB_MM(max)(FCB_MM(setzero)(), sum[i][v]);
        }
      }
      break;
    default:
      alignas(kLineBytes) float rows[kPixels * kWidth];
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          FCB_MM(store)(rows + i * kWidth + v * kLanes, sum[i][v]);
        }
      }
      packed_activate(epilogue, rows, kPixels * kWidth);
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = FCB_MM(load)(rows + i * kWidth + v * kLanes);
        }
      }
  }
  if (adds && epilogue.residual_last) {
    add_residual();
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      FCB_MM(storeu)(out.y + i * out.pitch + v * kLanes, sum[i][v]);
    }
  }
}

// The same where fewer channels are left.
template <int kPixels, int kVectors>
FCB_INLINE void packed_finish(Vector (&sum)[kPixels][kVectors], const PackedOutput& out) {
  constexpr int kWidth = kLanes * kVectors;
  if (out.channels >= kWidth) {
    return packed_finish_whole(sum, out);
  }
  alignas(kLineBytes) float rows[kPixels][kWidth], residual[kPixels][kWidth] = {};
  PackedOutput to = out;
  to.y = rows[0];
  to.pitch = kWidth;
  if (out.residual != nullptr) {
    for (int i = 0; i < kPixels; ++i) {
      std::copy_n(out.residual + i * out.pitch, out.channels, residual[i]);
    }
    to.residual = residual[0];
  }
  packed_finish_whole(sum, to);
  for (int i = 0; i < kPixels; ++i) {
    std::copy_n(rows[i], out.channels, out.y + i * out.pitch);
  }
}

// Where the pixels of a tile begin: each by itself, or all the same distance apart. Then few registers tell it, for addresses
// of the form p, p + step and p + 2 * step cost no more than p.
template <int kPixels, bool kEven>
struct Pixels {
  static constexpr int kEach = kEven ? 3 : 1;
  const float* base[(kPixels + kEach - 1) / kEach];
  int64_t step;

  FCB_INLINE const float* at(int i) const { return base[i / kEach] + i % kEach * step; }
};

// sum += the products of n terms, from the t-th on. ahead: how far behind these the weights of the next channels are; what is
// read but once comes from memory meanwhile. (Measured with AVX-512 alone.)
template <int kPixels, int kVectors, bool kEven>
FCB_INLINE void packed_products(Vector (&sum)[kPixels][kVectors], const Pixels<kPixels, kEven>& pixel, int64_t t,
                                int64_t n, const float* weight, int64_t ahead) {
  for (const int64_t end = t + n; t < end; ++t, weight += kChannelsOfTile) {
    Vector w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = FCB_MM(loadu)(weight + v * kLanes);
      if constexpr (kLanes == 16 && kPixels > 8) {
        __builtin_prefetch(weight + ahead + v * kLanes, 0, 2);
      }
    }
    for (int i = 0; i < kPixels; ++i) {
      const Vector value = FCB_MM(set1)(*(pixel.at(i) + t));
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = FCB_MM(fmadd)(value, w[v], sum[i][v]);
      }
    }
  }
}

// offset: where each pixel of the tile begins in x.
template <int kPixels, int kVectors, bool kEven>
FCB_INLINE void packed_tile(const float* x, const int64_t* offset, const PackedInput& in, const float* weight,
                            const PackedOutput& out) {
  const int64_t ahead = in.rows * in.terms * kChannelsOfTile;
  Pixels<kPixels, kEven> pixel;
  pixel.step = kEven ? offset[1] - offset[0] : 0;
  for (int i = 0; i < kPixels; ++i) {
    if (i % pixel.kEach == 0) {
      pixel.base[i / pixel.kEach] = x + offset[i];
    }
    // What the next tile's results go to comes from memory meanwhile.
    for (int v = 0; v < kVectors * kLanes; v += kLineBytes / 4) {
      __builtin_prefetch(out.y + (kPixels + i) * out.pitch + v, 1);
    }
  }
  Vector sum[kPixels][kVectors];
  const auto clear = [&]() __attribute__((always_inline, target(FCB_ARCH))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = FCB_MM(setzero)();
      }
    }
  };
  clear();
  if (in.rows * in.terms <= kPackedTerms) {
    for (int64_t r = 0; r < in.rows; ++r) {
      packed_products(sum, pixel, r * in.row, in.terms, weight + r * in.terms * kChannelsOfTile, ahead);
    }
    return packed_finish(sum, out);
  }
  alignas(kLineBytes) float total[kPixels][kVectors * kLanes] = {};
  const auto add = [&]() __attribute__((always_inline, target(FCB_ARCH))) {
    for (int i = 0; i < kPixels; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = FCB_MM(add)(sum[i][v], FCB_MM(load)(total[i] + v * kLanes));
      }
    }
  };
  int64_t left = kPackedTerms;
  for (int64_t r = 0; r < in.rows; ++r) {
    for (int64_t t = 0; t < in.terms;) {
      if (left == 0) {
        add();
        for (int i = 0; i < kPixels; ++i) {
          for (int v = 0; v < kVectors; ++v) {
            FCB_MM(store)(total[i] + v * kLanes, sum[i][v]);
          }
        }
        clear();
        left = kPackedTerms;
      }
      const int64_t n = std::min(left, in.terms - t);
      packed_products(sum, pixel, r * in.row + t, n, weight, ahead);
      weight += n * kChannelsOfTile;
      t += n;
      left -= n;
    }
  }
  add();
  packed_finish(sum, out);
}

FCB_INLINE PackedOutput packed_from(const PackedOutput& out, int64_t pixel) {
  PackedOutput moved = out;
  moved.y += pixel * out.pitch;
  moved.residual = out.residual == nullptr ? nullptr : out.residual + pixel * out.pitch;
  return moved;
}

FCB_INLINE bool is_even(const int64_t* offset, int count) {
  for (int i = 2; i < count; ++i) {
    if (offset[i] - offset[i - 1] != offset[1] - offset[0]) {
      return false;
    }
  }
  return true;
}

// `pixels` pixels, for the channels of a tile. Where they fill one vector, more pixels use the registers.
__attribute__((target(FCB_ARCH))) inline void run_pixels(const float* x, const int64_t* offset, const PackedInput& in,
                                                         const float* weight, const PackedOutput& out, int64_t pixels) {
  int64_t q = 0;
  const auto run = [&](auto count, auto vectors) __attribute__((always_inline, target(FCB_ARCH))) {
    constexpr int kPixels = decltype(count)::value, kVectors = decltype(vectors)::value;
    for (; q + kPixels <= pixels; q += kPixels) {
      // So many pointers do not fit into registers.
      if constexpr (kPixels > 8) {
        if (is_even(offset + q, kPixels)) {
          packed_tile<kPixels, kVectors, true>(x, offset + q, in, weight, packed_from(out, q));
          continue;
        }
      }
      packed_tile<kPixels, kVectors, false>(x, offset + q, in, weight, packed_from(out, q));
    }
  };
  constexpr auto one = std::integral_constant<int, 1>{};
  if (out.channels <= kLanes) {
    run(std::integral_constant<int, kPixelsOfVector>{}, one);
    run(std::integral_constant<int, 4>{}, one);
    return run(one, one);
  }
  constexpr auto two = std::integral_constant<int, kVectorsOfTile>{};
  run(std::integral_constant<int, kPixelsOfTile>{}, two);
  if constexpr (kPixelsOfTile > 8) {
    run(std::integral_constant<int, 7>{}, two);
  }
  run(std::integral_constant<int, 4>{}, two);
  run(std::integral_constant<int, 2>{}, two);
  run(one, two);
}

// ---- depthwise -------------------------------------------------------------------------------------------------------

constexpr int kDepthwisePixels = 4, kDepthwiseVectors = 6;

// kPixels pixels from `q` on, each filter within the image. kFilter, kStride: of the problem, or 0 where they are not known.
template <int kPixels, int kFilter, int kStride>
FCB_INLINE void depthwise_tile(const DepthwiseRow& d, int64_t q, int64_t c, const PackedOutput& out) {
  Vector sum[kPixels][1];
  for (int i = 0; i < kPixels; ++i) {
    sum[i][0] = FCB_MM(setzero)();
  }
  const float* from = d.x + (q * d.stride - d.padding) * d.channels + c;
  const float* weight = d.weight + c;
  for (int64_t r = 0; r < d.rows; ++r, from += d.row) {
    if constexpr (kFilter > 0) {
      constexpr int kColumns = (kPixels - 1) * kStride + kFilter;
      Vector x[kColumns];
      for (int j = 0; j < kColumns; ++j) {
        x[j] = FCB_MM(loadu)(from + j * d.channels);
      }
      for (int s = 0; s < kFilter; ++s, weight += d.channels) {
        const Vector w = FCB_MM(loadu)(weight);
        for (int i = 0; i < kPixels; ++i) {
          sum[i][0] = FCB_MM(fmadd)(x[i * kStride + s], w, sum[i][0]);
        }
      }
    } else {
      for (int64_t s = 0; s < d.filter; ++s, weight += d.channels) {
        const Vector w = FCB_MM(loadu)(weight);
        for (int i = 0; i < kPixels; ++i) {
          sum[i][0] = FCB_MM(fmadd)(FCB_MM(loadu)(from + (i * d.stride + s * d.dilation) * d.channels), w, sum[i][0]);
        }
      }
    }
  }
  packed_finish_whole<kPixels, 1>(sum, out);
}

// One pixel, for some vectors of channels at a time: of its filter the columns from `first` to `last`.
template <int kVectors>
FCB_INLINE void depthwise_pixel(const DepthwiseRow& d, int64_t q, int64_t c, int64_t first, int64_t last,
                                const PackedOutput& out) {
  Vector sum[1][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sum[0][v] = FCB_MM(setzero)();
  }
  const float* from = d.x + (q * d.stride - d.padding) * d.channels + c;
  const float* weight = d.weight + c;
  for (int64_t r = 0; r < d.rows; ++r, from += d.row, weight += d.filter * d.channels) {
    for (int64_t s = first; s < last; ++s) {
      for (int v = 0; v < kVectors; ++v) {
        sum[0][v] = FCB_MM(fmadd)(FCB_MM(loadu)(from + s * d.dilation * d.channels + v * kLanes),
                                  FCB_MM(loadu)(weight + s * d.channels + v * kLanes), sum[0][v]);
      }
    }
  }
  packed_finish_whole<1, kVectors>(sum, out);
}

template <int kFilter, int kStride>
FCB_INLINE void depthwise_row(const DepthwiseRow& d, const PackedOutput& out) {
  // Columns of the result whose filters are within the image: [begin, end).
  const int64_t reach = (d.filter - 1) * d.dilation;
  const int64_t begin = std::min(ceil_div(d.padding, d.stride), d.columns);
  const int64_t room = d.width - 1 - reach + d.padding;
  const int64_t end = std::clamp(room < 0 ? 0 : room / d.stride + 1, begin, d.columns);
  const auto at = [&](int64_t q, int64_t c) __attribute__((always_inline, target(FCB_ARCH))) {
    PackedOutput moved = packed_from(out, q);
    moved.shift += c;
    moved.y += c;
    moved.residual = out.residual == nullptr ? nullptr : moved.residual + c;
    return moved;
  };
  const auto pixel = [&](int64_t q) __attribute__((always_inline, target(FCB_ARCH))) {
    const int64_t left = q * d.stride - d.padding;
    const int64_t first = left < 0 ? ceil_div(-left, d.dilation) : 0;
    const int64_t last = std::min(d.filter, left >= d.width ? 0 : ceil_div(d.width - left, d.dilation));
    int64_t c = d.first_channel;
    for (; c + kDepthwiseVectors * kLanes <= d.last_channel; c += kDepthwiseVectors * kLanes) {
      depthwise_pixel<kDepthwiseVectors>(d, q, c, first, last, at(q, c));
    }
    for (; c < d.last_channel; c += kLanes) {
      depthwise_pixel<1>(d, q, c, first, last, at(q, c));
    }
  };
  int64_t q = 0;
  for (; q < begin; ++q) {
    pixel(q);
  }
  for (; q + kDepthwisePixels <= end; q += kDepthwisePixels) {
    for (int64_t c = d.first_channel; c < d.last_channel; c += kLanes) {
      depthwise_tile<kDepthwisePixels, kFilter, kStride>(d, q, c, at(q, c));
    }
  }
  for (; q < d.columns; ++q) {
    pixel(q);
  }
}

__attribute__((target(FCB_ARCH))) inline void run_depthwise_row(const DepthwiseRow& d, const PackedOutput& out) {
  if (d.dilation == 1 && d.filter == 3 && d.stride == 1) {
    return depthwise_row<3, 1>(d, out);
  }
  if (d.dilation == 1 && d.filter == 3 && d.stride == 2) {
    return depthwise_row<3, 2>(d, out);
  }
  if (d.dilation == 1 && d.filter == 5 && d.stride == 1) {
    return depthwise_row<5, 1>(d, out);
  }
  if (d.dilation == 1 && d.filter == 5 && d.stride == 2) {
    return depthwise_row<5, 2>(d, out);
  }
  depthwise_row<0, 0>(d, out);
}

#undef FCB_INLINE
#undef FCB_MM
