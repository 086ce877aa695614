// Products of bytes with AVX512-VNNI (vpdpbusd): four products and their sum per 32-bit lane, four times the
// rate of float32. Highway 1.0 has no name for the instruction, so this file is compiled for AVX-512 as a
// whole and reached only after the processor has been asked.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/int8_layout.h"

namespace heed::kernels {

namespace {

constexpr int kRows = static_cast<int>(kInt8Rows), kVectors = static_cast<int>(kInt8Panel) / 16;
constexpr int kQuads = static_cast<int>(kInt8Group) / 4;

struct alignas(64) Tile {
  float sums[kRows][kInt8Panel];
};

using Sums = __m512[kRows][kVectors];

// The codes of an outlier's column are picked out of their fours by a product with one 1.
inline __attribute__((always_inline)) void add_outliers(const Int8Outliers& outliers,
                                                        const WeightGroup* weights, Sums& sums) {
  for (int64_t i = 0; i < Int8Outliers::kCount; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t k = outliers.columns[i][r];
      const WeightGroup& w = weights[k / kInt8Group];
      const int8_t* codes = w.codes[k % kInt8Group / 4][0];
      const __m512i one = _mm512_set1_epi32(1 << (8 * (k % 4)));
      const __m512 value = _mm512_set1_ps(outliers.values[i][r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i code =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, _mm512_load_si512(codes + 64 * v));
        const __m512 weight =
            _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_load_ps(w.scales + 16 * v));
        sums[r][v] = _mm512_fmadd_ps(weight, value, sums[r][v]);
      }
    }
  }
}

// Sums of four rows of activations with a panel of weights. A group costs 16 steps of integers, then
// conversion, scale and step once: 128 + 16 multiply-adds of 16 lanes; an outlier costs 6 for its row.
__attribute__((noinline)) void sum_panel(const std::byte* block, const WeightGroup* weights,
                                         int64_t groups, Tile& tile) {
  const auto* outliers = reinterpret_cast<const Int8Outliers*>(block);
  const auto* x = reinterpret_cast<const Int8Group*>(outliers + 1);
  const WeightGroup* w = weights;
  Sums sums;
#pragma GCC unroll 4
  for (auto& row : sums) {
#pragma GCC unroll 2
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g, ++x, ++w) {
    __m512i dots[kRows][kVectors];
#pragma GCC unroll 4
    for (auto& row : dots) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) row[v] = _mm512_load_si512(w->starts + 16 * v);
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQuads; ++q) {
      __m512i codes[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) codes[v] = _mm512_load_si512(w->codes[q][16 * v]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int four;
        std::memcpy(&four, x->codes[q][r], sizeof four);
        const __m512i values = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], values, codes[v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 step = _mm512_set1_ps(x->steps[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512 scale = _mm512_load_ps(w->scales + 16 * v);
        sums[r][v] =
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][v]), scale), step, sums[r][v]);
      }
    }
  }
  add_outliers(*outliers, weights, sums);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(tile.sums[r] + 16 * v, sums[r][v]);
  }
}

// Round to nearest even; NaN stays NaN.
inline __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1 << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// The tile's rows and columns that exist.
template <class T, bool kAdd>
inline void store(const Tile& tile, T* y, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask16 lanes[kVectors] = {first_lanes(columns), first_lanes(columns - 16)};
  for (int64_t r = 0; r < rows; ++r, y += stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __m512 x = _mm512_load_ps(tile.sums[r] + 16 * v);
      if constexpr (kAdd) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes[v], y + 16 * v));
      if constexpr (std::is_same_v<T, float>) {
        _mm512_mask_storeu_ps(y + 16 * v, lanes[v], x);
      } else {
        _mm256_mask_storeu_epi16(y + 16 * v, lanes[v], to_bfloat16(x));
      }
    }
  }
}

template <class T, bool kAdd>
void panel_rows(const Int8Rows& x, const Int8Matrix& w, const Tensor& y, int64_t panel,
                int64_t first, int64_t end) {
  const int64_t groups = int8_groups(x.columns), column = panel * kInt8Panel;
  const auto* weights = reinterpret_cast<const WeightGroup*>(w.data) + panel * groups;
  Tile tile;
  for (int64_t m = first; m < end; m += kInt8Rows) {
    const int64_t rows = std::min(kInt8Rows, end - m);
    T* to = y.as<T>() + m * y.stride(0) + column;
    // Rows of y are too far apart for the processor to see them coming.
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < kInt8Panel; c += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(to + r * y.stride(0) + c, 1);
      }
    }
    sum_panel(x.data + m / kInt8Rows * int8_block_bytes(x.columns), weights, groups, tile);
    store<T, kAdd>(tile, to, y.stride(0), rows, w.rows - column);
  }
}

}  // namespace

void int8_panel_avx512(const Int8Rows& x, const Int8Matrix& w, const Tensor& y, bool add,
                       int64_t panel, int64_t first, int64_t end) {
  const auto rows = y.dtype() == DType::bf16 ? panel_rows<bfloat16, false>
                    : add                    ? panel_rows<float, true>
                                             : panel_rows<float, false>;
  rows(x, w, y, panel, first, end);
}

}  // namespace heed::kernels
