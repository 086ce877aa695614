// What vectors do around the tile unit's products for few query rows (amx_few_rows.h). Compiled for AVX-512
// as a whole, like half_avx512.cpp.
#include <immintrin.h>

#include <cstring>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/parts.h"
#include "kernels/prefetch.h"

namespace heed::kernels {

namespace {

constexpr int64_t kLanes = 16;

// Four rows of four numbers each, from lanes l of 128 bits of x[0..3]: lane l of row r has the numbers that
// lane l of x[0], x[1], ... has at r.
__attribute__((always_inline)) inline void turn_lanes(__m512 (&x)[4]) {
  const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  x[0] = _mm512_shuffle_ps(a, c, 0x44);
  x[1] = _mm512_shuffle_ps(a, c, 0xee);
  x[2] = _mm512_shuffle_ps(b, d, 0x44);
  x[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// Lanes of 128 bits from four places.
__attribute__((always_inline)) inline __m512 four_lanes(const float* p, int64_t step) {
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + step), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * step), 2);
  return _mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * step), 3);
}

// The 16 numbers that 32 bits of a vector's halves are the upper ones of.
inline __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// x less what it was rounded to, 0 if that is infinite.
inline __m512 rest_of(__m512 x, __m512 rounded) {
  const __m512 most = _mm512_set1_ps(3.4028235e38F);
  const __mmask16 infinite = _mm512_cmp_ps_mask(_mm512_abs_ps(rounded), most, _CMP_GT_OQ);
  return _mm512_mask_mov_ps(_mm512_sub_ps(x, rounded), infinite, _mm512_setzero_ps());
}

}  // namespace

bool pack_query_tiles(Block<const float> queries, int64_t rows, int64_t width, uint32_t* to) {
  for (int64_t e = 0; e < width; e += 2 * kLanes, to += kQueryTile) {
    // Columns e to e + 32 of all rows as pairs [row][16], then turned.
    alignas(64) float pairs[kLanes][kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      if (r >= rows) {
        _mm512_store_ps(pairs[r], _mm512_setzero_ps());
        continue;
      }
      const __m512i x = _mm512_loadu_si512(queries.row(r) + e),
                    y = _mm512_loadu_si512(queries.row(r) + e + kLanes);
      if (_mm512_test_epi32_mask(_mm512_or_si512(x, y), _mm512_set1_epi32(0xffff)) != 0) {
        return false;
      }
      const __m512i both = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))),
          _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16)), 1);
      _mm512_store_si512(pairs[r], both);
    }
    // Lane l of what comes of four columns: rows 4 l to 4 l + 3.
    for (int64_t column = 0; column < kLanes; column += 4) {
      __m512 x[4];
      for (int64_t j = 0; j < 4; ++j) x[j] = four_lanes(pairs[j] + column, 4 * kLanes);
      turn_lanes(x);
      for (int64_t j = 0; j < 4; ++j) {
        _mm512_store_ps(reinterpret_cast<float*>(to) + (column + j) * kLanes, x[j]);
      }
    }
  }
  return true;
}

void turn_scores(const float* tile, int64_t rows, float* s, int64_t stride) {
  for (int64_t r = 0; r < rows; r += 4) {
    __m512 x[4];
    for (int64_t j = 0; j < 4; ++j) x[j] = four_lanes(tile + j * kLanes + r, 4 * kLanes);
    turn_lanes(x);
    for (int64_t j = 0; j < 4 && r + j < rows; ++j) _mm512_storeu_ps(s + (r + j) * stride, x[j]);
  }
}

void split_weights(const float* weights, int64_t stride, int64_t rows, uint16_t* to) {
  uint16_t* rest = to + (rows <= kLanes / 2 ? kLanes / 2 : kLanes) * kHalfDepth;
  for (int64_t r = 0; r < rows; ++r, to += kHalfDepth, rest += kHalfDepth) {
    const __m512 x = _mm512_loadu_ps(weights + r * stride),
                 y = _mm512_loadu_ps(weights + r * stride + kLanes);
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
    _mm512_storeu_si512(to, both);
    const __m512 x_rest = rest_of(x, widened(_mm512_castsi512_si256(both))),
                 y_rest = rest_of(y, widened(_mm512_extracti64x4_epi64(both, 1)));
    _mm512_storeu_si512(rest, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y_rest, x_rest)));
  }
}

void pair_values(const uint16_t* v, int64_t stride, int64_t columns, uint32_t* tiles,
                 LinesDue& due) {
  for (int64_t pair = 0; pair < kLanes; ++pair, v += 2 * stride, tiles += kLanes) {
    prefetch_lines(due, 4);
    for (int64_t f = 0; f < columns; f += kHalfDepth) {
      const __m512i even = _mm512_loadu_si512(v + f), odd = _mm512_loadu_si512(v + stride + f);
      uint32_t* to = tiles + f / kLanes * kQueryTile;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(to + kQueryTile, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

void add_split_sums(const float* sums, int64_t width, int64_t rows, const float* carry,
                    Block<float> o) {
  // Lanes of 128 bits of two neighbouring tiles take turns: columns 0-3, 4-7, ...
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                second =
                    _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 factor = _mm512_set1_ps(carry == nullptr ? 1 : carry[r]);
    const float* row = sums + r * width;
    for (int64_t f = 0; f < width; f += 2 * kLanes) {
      __m512 low = _mm512_loadu_ps(row + f), high = _mm512_loadu_ps(row + f + kLanes);
      if (rows <= kLanes / 2) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(row + kLanes / 2 * width + f));
        high = _mm512_add_ps(high, _mm512_loadu_ps(row + kLanes / 2 * width + f + kLanes));
      }
      float* to = o.row(r) + f;
      const __m512 x = _mm512_permutex2var_ps(low, first, high),
                   y = _mm512_permutex2var_ps(low, second, high);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to), x));
      _mm512_storeu_ps(to + kLanes, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to + kLanes), y));
    }
  }
}

}  // namespace heed::kernels
