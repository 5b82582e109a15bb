// The instructions that kernels have in inline assembly, as functions: names and operands are those of PTX. translate.py makes
// calls of them, so that one which is missing here does not compile.
#pragma once

#include <array>

#include "cuda_runtime.h"

namespace emulated::ptx {

// Operands in braces, by reference.
template <typename T, typename... More>
std::array<std::remove_const_t<T>*, 1 + sizeof...(More)> list(T& first, More&... more) {
  return {const_cast<std::remove_const_t<T>*>(&first), const_cast<std::remove_const_t<T>*>(&more)...};
}
template <typename T, size_t n>
using List = std::array<T*, n>;

// ---- predicates ----

inline void setp_lt_s32(bool& p, int a, int b) { p = a < b; }
template <typename T>
void setp_ne_b32(bool& p, T a, T b) {
  p = a != b;
}
template <typename T>
void mov_u32(T& to, uint32_t value) {
  to = value;
}

// ---- memory ----

template <typename T>
void ld_shared_u16(T& to, uint32_t address) {
  uint16_t v;
  load_shared(address, &v, 2);
  to = v;
}
inline void ld_shared_u32(uint32_t& to, uint32_t address) { load_shared(address, &to, 4); }
template <size_t n>
void load_words(const List<uint32_t, n>& to, const uint32_t (&words)[n]) {
  for (size_t i = 0; i < n; ++i) {
    *to[i] = words[i];
  }
}
inline void ld_shared_v2_u32(const List<uint32_t, 2>& to, uint32_t address) {
  uint32_t words[2];
  load_shared(address, words, 8);
  load_words(to, words);
}
inline void ld_shared_v4_u32(const List<uint32_t, 4>& to, uint32_t address) {
  uint32_t words[4];
  load_shared(address, words, 16);
  load_words(to, words);
}
inline void st_shared_u16(uint32_t address, uint16_t v) { store_shared(address, &v, 2); }
inline void st_shared_u32(uint32_t address, uint32_t v) { store_shared(address, &v, 4); }
inline void st_shared_v2_u32(uint32_t address, const List<uint32_t, 2>& v) {
  const uint32_t words[] = {*v[0], *v[1]};
  store_shared(address, words, 8);
}
inline void st_shared_v4_u32(uint32_t address, const List<uint32_t, 4>& v) {
  const uint32_t words[] = {*v[0], *v[1], *v[2], *v[3]};
  store_shared(address, words, 16);
}
inline void ld_global_u16(uint32_t& to, const void* from) {
  uint16_t v;
  load_global(from, &v, 2);
  to = v;
}
inline void ld_global_u32(uint32_t& to, const void* from) { load_global(from, &to, 4); }
inline void ld_global_v2_u32(const List<uint32_t, 2>& to, const void* from) {
  uint32_t words[2];
  load_global(from, words, 8);
  load_words(to, words);
}
inline void ld_global_v4_u32(const List<uint32_t, 4>& to, const void* from) {
  uint32_t words[4];
  load_global(from, words, 16);
  load_words(to, words);
}
inline void st_global_u32(void* to, uint32_t v) { store_global(to, &v, 4); }
inline void st_global_v2_u32(void* to, const List<uint32_t, 2>& v) {
  const uint32_t words[] = {*v[0], *v[1]};
  store_global(to, words, 8);
}
inline void st_global_v4_u32(void* to, const List<uint32_t, 4>& v) {
  const uint32_t words[] = {*v[0], *v[1], *v[2], *v[3]};
  store_global(to, words, 16);
}
inline void prefetch_global_L2(const void*) {}

// ---- barriers ----

inline void bar_sync(int id, int threads) { meet_at_barrier(id, threads, true); }
inline void bar_arrive(int id, int threads) { meet_at_barrier(id, threads, false); }
inline void mbarrier_init_shared__cta_b64(uint32_t barrier, uint32_t arrivals) { barrier_init(barrier, arrivals); }
inline void mbarrier_arrive_shared__cta_b64(uint32_t barrier) { barrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx_shared__cta_b64(uint32_t barrier, uint32_t bytes) {
  barrier_arrive(barrier, bytes);
}
inline void cp_async_mbarrier_arrive_noinc_shared__cta_b64(uint32_t barrier) { barrier_arrive_behind_copies(barrier); }
inline void mbarrier_try_wait_parity_shared__cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
  done = true;
}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void griddepcontrol_launch_dependents() { let_next_begin(); }
inline void griddepcontrol_wait() { wait_for_previous(); }

inline uint32_t cluster_ctarank() { return cluster_rank(); }
inline void barrier_cluster_arrive_release_aligned() { cluster_arrive(); }
inline void barrier_cluster_arrive_relaxed_aligned() { cluster_arrive(); }
inline void barrier_cluster_wait_acquire_aligned() { cluster_wait(); }
inline void mapa_shared__cluster_u32(uint32_t& to, uint32_t address, int rank) { to = map_to_rank(address, rank); }
inline void ld_shared__cluster_v4_f32(const List<float, 4>& to, uint32_t address) {
  float values[4];
  load_cluster(address, values, 16);
  for (size_t i = 0; i < 4; ++i) {
    *to[i] = values[i];
  }
}

// ---- copies ----

inline void cp_async_cg_shared_global(uint32_t to, const void* from, int size, int bytes) {
  copy_async(to, from, size, bytes);
}
inline void cp_async_ca_shared_global(uint32_t to, const void* from, int size) { copy_async(to, from, size, size); }
inline void cp_async_ca_shared_global(uint32_t to, const void* from, int size, int bytes) {
  copy_async(to, from, size, bytes);
}
inline void cp_async_commit_group() { copy_async_commit(); }
inline void cp_async_wait_group(int groups) { copy_async_wait(groups); }
inline void cp_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(uint32_t to, const void* from,
                                                                              uint32_t bytes, uint32_t barrier) {
  fetch_bulk(to, from, bytes, barrier);
}
inline void cp_async_bulk_global_shared__cta_bulk_group(void* to, uint32_t from, uint32_t bytes) {
  copy_bulk(to, from, bytes);
}
inline void cp_async_bulk_global_shared__cta_bulk_group_L2__cache_hint(void* to, uint32_t from, uint32_t bytes,
                                                                       uint64_t) {
  copy_bulk(to, from, bytes);
}
inline void prefetch_tensormap(const void* map) { check_map(map); }
template <size_t n>
void fetch_tile(uint32_t to, const void* map, const List<int, n>& at, uint32_t barrier) {
  int coordinates[n];
  for (size_t i = 0; i < n; ++i) {
    coordinates[i] = *at[i];
  }
  fetch_box(to, map, n, coordinates, nullptr, barrier);
}
inline void cp_async_bulk_tensor_2d_shared__cluster_global_tile_mbarrier__complete_tx__bytes(uint32_t to,
                                                                                             const void* map,
                                                                                             const List<int, 2>& at,
                                                                                             uint32_t barrier) {
  fetch_tile(to, map, at, barrier);
}
inline void cp_async_bulk_tensor_3d_shared__cluster_global_tile_mbarrier__complete_tx__bytes(uint32_t to,
                                                                                             const void* map,
                                                                                             const List<int, 3>& at,
                                                                                             uint32_t barrier) {
  fetch_tile(to, map, at, barrier);
}
inline void cp_async_bulk_tensor_4d_shared__cluster_global_im2col_mbarrier__complete_tx__bytes(
    uint32_t to, const void* map, const List<int, 4>& at, uint32_t barrier, const List<uint16_t, 2>& by) {
  const int coordinates[] = {*at[0], *at[1], *at[2], *at[3]};
  const uint16_t offsets[] = {*by[0], *by[1]};
  fetch_box(to, map, 4, coordinates, offsets, barrier);
}
inline void cp_async_bulk_tensor_2d_global_shared__cta_tile_bulk_group(const void* map, const List<int, 2>& at,
                                                                       uint32_t from) {
  const int coordinates[] = {*at[0], *at[1]};
  store_box(map, 2, coordinates, from);
}
inline void createpolicy_fractional_L2__evict_first_b64(uint64_t& policy, double) { policy = 1; }
inline void createpolicy_fractional_L2__evict_normal_b64(uint64_t& policy, double) { policy = 2; }
inline void cp_async_bulk_commit_group() { copy_bulk_commit(); }
inline void cp_async_bulk_wait_group_read(int groups) { copy_bulk_wait(groups); }
inline void cp_async_bulk_wait_group(int groups) { copy_bulk_wait(groups); }
inline void fence_proxy_async_shared__cta() { fence_async(); }

// ---- arithmetic ----

inline void multiply_pairs(Half type, uint32_t& product, uint32_t a, uint32_t b) {
  product = 0;
  for (const int shift : {0, 16}) {
    const float x = from_half(type, static_cast<uint16_t>(a >> shift));
    const float y = from_half(type, static_cast<uint16_t>(b >> shift));
    product |= static_cast<uint32_t>(to_half(type, x * y)) << shift;
  }
}
inline void mul_rn_f16x2(uint32_t& product, uint32_t a, uint32_t b) { multiply_pairs(Half::float16, product, a, b); }
inline void mul_rn_bf16x2(uint32_t& product, uint32_t a, uint32_t b) { multiply_pairs(Half::bfloat16, product, a, b); }
inline float extreme_or_nan(float a, float b, bool largest) {
  if (std::isnan(a) || std::isnan(b)) {
    return __uint_as_float(0x7fffffff);
  }
  return largest ? std::max(a, b) : std::min(a, b);
}
inline uint32_t extremes_or_nan(Half type, uint32_t a, uint32_t b, bool largest) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = from_half(type, static_cast<uint16_t>(a >> shift));
    const float y = from_half(type, static_cast<uint16_t>(b >> shift));
    result |= static_cast<uint32_t>(to_half(type, extreme_or_nan(x, y, largest))) << shift;
  }
  return result;
}
inline void max_NaN_f32(float& to, float a, float b) { to = extreme_or_nan(a, b, true); }
inline void min_NaN_f32(float& to, float a, float b) { to = extreme_or_nan(a, b, false); }
inline void max_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b) { to = extremes_or_nan(Half::float16, a, b, true); }
inline void min_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b) { to = extremes_or_nan(Half::float16, a, b, false); }
inline void max_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b) { to = extremes_or_nan(Half::bfloat16, a, b, true); }
inline void min_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b) { to = extremes_or_nan(Half::bfloat16, a, b, false); }
// Words of ones where it holds, of the two halves each.
template <typename Holds>
inline uint32_t compare_pairs(Half type, uint32_t a, uint32_t b, const Holds& holds) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = from_half(type, static_cast<uint16_t>(a >> shift));
    const float y = from_half(type, static_cast<uint16_t>(b >> shift));
    result |= holds(x, y) ? 0xffffu << shift : 0u;
  }
  return result;
}
constexpr auto is_greater = [](float a, float b) { return a > b; };
constexpr auto is_unordered = [](float a, float b) { return std::isnan(a) || std::isnan(b); };
inline void set_gt_u32_f16x2(uint32_t& to, uint32_t a, uint32_t b) {
  to = compare_pairs(Half::float16, a, b, is_greater);
}
inline void set_gt_u32_bf16x2(uint32_t& to, uint32_t a, uint32_t b) {
  to = compare_pairs(Half::bfloat16, a, b, is_greater);
}
inline void set_nan_u32_f16x2(uint32_t& to, uint32_t a, uint32_t b) {
  to = compare_pairs(Half::float16, a, b, is_unordered);
}
inline void set_nan_u32_bf16x2(uint32_t& to, uint32_t a, uint32_t b) {
  to = compare_pairs(Half::bfloat16, a, b, is_unordered);
}
inline uint32_t pack_relu(Half type, float high, float low) {
  const auto half = [&](float v) { return uint32_t{to_half(type, std::isnan(v) || v > 0 ? v : 0.0f)}; };
  return half(high) << 16 | half(low);
}
inline void cvt_rn_relu_f16x2_f32(uint32_t& to, float high, float low) { to = pack_relu(Half::float16, high, low); }
inline void cvt_rn_relu_bf16x2_f32(uint32_t& to, float high, float low) { to = pack_relu(Half::bfloat16, high, low); }
// Within a unit in the last place or two, as the machine's own.
inline float without_subnormals(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }
inline void ex2_approx_ftz_f32(float& to, float v) { to = without_subnormals(std::exp2(without_subnormals(v))); }
inline void rcp_approx_ftz_f32(float& to, float v) { to = without_subnormals(1 / without_subnormals(v)); }
inline void rcp_approx_ftz_f64(double& to, double v) {  // 20 bits
  const double inverse = 1 / v;
  uint64_t bits;
  std::memcpy(&bits, &inverse, 8);
  bits &= ~uint64_t{0xffffffff};
  std::memcpy(&to, &bits, 8);
}

// ---- products of a warp ----

struct Fragments {
  List<float, 4> d;
  uint32_t a[4], b[2];
  float c[4];
};
inline void multiply_16x8x16(Half type, const List<float, 4>& d, const List<uint32_t, 4>& a, const List<uint32_t, 2>& b,
                             const List<float, 4>& c) {
  Fragments own{d, {*a[0], *a[1], *a[2], *a[3]}, {*b[0], *b[1]}, {*c[0], *c[1], *c[2], *c[3]}};
  meet_in_warp("mma.sync", 0xffffffffu, &own, false, [&](void* const(&lanes)[kWarp]) {
    float left[16][16], right[8][16];
    const auto of = [&](unsigned lane) -> Fragments& { return *static_cast<Fragments*>(lanes[lane]); };
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      for (unsigned i = 0; i < 8; ++i) {
        const unsigned k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        left[lane / 4 + i / 2 % 2 * 8][k] = from_half(type, static_cast<uint16_t>(of(lane).a[i / 2] >> i % 2 * 16));
      }
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned k = lane % 4 * 2 + i % 2 + i / 2 * 8;
        right[lane / 4][k] = from_half(type, static_cast<uint16_t>(of(lane).b[i / 2] >> i % 2 * 16));
      }
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        double sum = of(lane).c[i];
        for (unsigned k = 0; k < 16; ++k) {
          sum += double{left[lane / 4 + i / 2 * 8][k]} * right[lane % 4 * 2 + i % 2][k];
        }
        *of(lane).d[i] = static_cast<float>(sum);
      }
    }
  });
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(const List<float, 4>& d, const List<uint32_t, 4>& a,
                                                              const List<uint32_t, 2>& b, const List<float, 4>& c) {
  multiply_16x8x16(Half::float16, d, a, b, c);
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(const List<float, 4>& d, const List<uint32_t, 4>& a,
                                                                const List<uint32_t, 2>& b, const List<float, 4>& c) {
  multiply_16x8x16(Half::bfloat16, d, a, b, c);
}

struct MatrixRow {
  uint32_t row[4];
  List<uint32_t, 4> to;
};
inline void load_matrices(const List<uint32_t, 4>& to, uint32_t address, bool transposed) {
  MatrixRow own{{}, to};
  load_shared(address, own.row, 16);
  meet_in_warp("ldmatrix.sync", 0xffffffffu, &own, false, [transposed](void* const(&lanes)[kWarp]) {
    const auto value = [&](unsigned matrix, unsigned row, unsigned col) {
      return static_cast<MatrixRow*>(lanes[matrix * 8 + row])->row[col / 2] >> col % 2 * 16 & 0xffff;
    };
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      for (unsigned m = 0; m < 4; ++m) {
        const unsigned k = lane % 4 * 2, row = lane / 4;
        *static_cast<MatrixRow*>(lanes[lane])->to[m] = transposed ? value(m, k, row) | value(m, k + 1, row) << 16
                                                                  : value(m, row, k) | value(m, row, k + 1) << 16;
      }
    }
  });
}

inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(const List<uint32_t, 4>& to, uint32_t address) {
  load_matrices(to, address, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(const List<uint32_t, 4>& to, uint32_t address) {
  load_matrices(to, address, true);
}

struct DoubleFragments {
  List<double, 4> d;
  double a[2], b, c[4];
};
inline void mma_sync_aligned_m16n8k4_row_col_f64_f64_f64_f64(const List<double, 4>& d, const List<double, 2>& a,
                                                             const List<double, 1>& b, const List<double, 4>& c) {
  DoubleFragments own{d, {*a[0], *a[1]}, *b[0], {*c[0], *c[1], *c[2], *c[3]}};
  meet_in_warp("mma.sync", 0xffffffffu, &own, false, [](void* const(&lanes)[kWarp]) {
    const auto of = [&](unsigned lane) -> DoubleFragments& { return *static_cast<DoubleFragments*>(lanes[lane]); };
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        double sum = of(lane).c[i];
        for (unsigned k = 0; k < 4; ++k) {
          const double left = of(lane / 4 * 4 + k).a[i / 2];
          sum = std::fma(left, of((lane % 4 * 2 + i % 2) * 4 + k).b, sum);
        }
        *of(lane).d[i] = sum;
      }
    }
  });
}

// ---- products of a warpgroup ----

inline void wgmma_fence_sync_aligned() {}
inline void wgmma_commit_group_sync_aligned() { product_commit(); }
inline void wgmma_wait_group_sync_aligned(int groups) { product_wait(groups); }
#define FCB_WGMMA_OF(n, name, type, ...)                                                                               \
  inline void wgmma_mma_async_sync_aligned_m64n##n##name(const List<float, n / 2>& d, uint64_t a, uint64_t b, int add, \
                                                         int, int __VA_ARGS__) {                                       \
    product(Factor::type, n, d.data(), a, b, add != 0);                                                                \
  }
#define FCB_WGMMA(n)                                       \
  FCB_WGMMA_OF(n, k16_f32_f16_f16, float16, , int, int)    \
  FCB_WGMMA_OF(n, k16_f32_bf16_bf16, bfloat16, , int, int) \
  FCB_WGMMA_OF(n, k8_f32_tf32_tf32, tf32)
FCB_WGMMA(32)
FCB_WGMMA(64)
FCB_WGMMA(128)
FCB_WGMMA(256)
#undef FCB_WGMMA
#undef FCB_WGMMA_OF

}  // namespace emulated::ptx
