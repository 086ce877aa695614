// Products of bfloat16 pairs with AVX512-BF16 (vdpbf16ps): twice the rate of float32 where the unit is
// full width, as on AMD Zen 4 and 5. Highway 1.0 has no name for the instruction, so this file is
// compiled for AVX-512 as a whole and reached only after the processor has been asked.
#include <immintrin.h>

#include <cstring>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/parts.h"
#include "kernels/prefetch.h"
#include "kernels/product_loops.h"

namespace heed::kernels {

namespace {

constexpr int kMostVectors = 4;

constexpr int half_block_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }

// Calls body with the number of vectors as a constant, 1 to kMostVectors.
template <class Body>
__attribute__((always_inline)) inline void with_columns(int64_t vectors, Body&& body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>());
  if (vectors == 2) return body(std::integral_constant<int, 2>());
  if (vectors == 3) return body(std::integral_constant<int, 3>());
  body(std::integral_constant<int, kMostVectors>());
}

inline __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

template <int MR, int NV>
inline void clear(__m512 (&acc)[MR][NV]) {
#pragma GCC unroll 12
  for (auto& row : acc) {
#pragma GCC unroll 4
    for (auto& x : row) x = _mm512_setzero_ps();
  }
}

// acc[r][j] += sum_i a[r][i] . b[i][j]: pairs i of row r at a + r * a_stride, 16 columns a vector.
template <int MR, int NV>
inline void multiply_pairs(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                           int64_t pairs, __m512 (&acc)[MR][NV]) {
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = _mm512_loadu_si512(b + i * b_stride + j * 16);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r * a_stride + i]));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        acc[r][j] = _mm512_dpbf16_ps(acc[r][j], as_pairs(x), as_pairs(column[j]));
      }
    }
  }
}

template <int MR, int NV>
inline void store_block(const __m512 (&acc)[MR][NV], float* to, int64_t stride) {
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(to + r * stride + j * 16, acc[r][j]);
  }
}

// Rounded to bfloat16 as all results are, numbers too small to be normal included.
inline __m256i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
}

// Of MR rows those that exist, of their columns the first `width`.
template <int MR, int NV>
inline void store_rounded(const __m512 (&acc)[MR][NV], const RowEnds<float>& ends, int64_t rows,
                          int64_t width, uint16_t* to, int64_t stride) {
  __m512 added[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    added[j] = ends.added == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(ends.added + j * 16);
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    if (r >= rows) return;
    const __m512 f = _mm512_set1_ps(ends.factor == nullptr ? 1.0f : ends.factor[r]);
    const __m512 a = _mm512_set1_ps(ends.added_factor == nullptr ? 1.0f : ends.added_factor[r]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int64_t left = width - j * 16;
      const int mask = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
      __m512 x = _mm512_mul_ps(f, acc[r][j]);
      if (ends.added != nullptr) x = _mm512_fmadd_ps(a, added[j], x);
      _mm256_mask_storeu_epi16(to + r * stride + j * 16, static_cast<__mmask16>(mask), rounded(x));
    }
  }
}

template <int MR, int NV>
__attribute__((noinline)) void score_block(const uint32_t* q, int64_t q_stride,
                                           const uint32_t* panel, int64_t panel_width,
                                           int64_t pairs, float* s, int64_t s_stride) {
  __m512 acc[MR][NV];
  clear(acc);
  multiply_pairs<MR, NV>(q, q_stride, panel, panel_width, pairs, acc);
  store_block(acc, s, s_stride);
}

template <int MR, int NV>
__attribute__((noinline)) void sum_block(const uint32_t* p, int64_t p_stride, const uint32_t* v,
                                         int64_t v_stride, int64_t pairs, const float* carry,
                                         float* o, int64_t o_stride) {
  __m512 acc[MR][NV];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    const __m512 c = _mm512_set1_ps(carry == nullptr ? 1.0f : carry[r]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = _mm512_mul_ps(c, _mm512_loadu_ps(o + r * o_stride + j * 16));
    }
  }
  multiply_pairs<MR, NV>(p, p_stride, v, v_stride, pairs, acc);
  store_block(acc, o, o_stride);
}

void scores(const void* queries, int64_t rows, const void* keys, int64_t key_count, int64_t width,
            const KeyRange* ranges, Block<float> s, ReadAhead* ahead) {
  const int64_t depth = round_up(width, kHalfDepth) / 2, pairs = (width + 1) / 2;
  for_score_blocks(
      rows, key_count, ranges, 6, kHalfPanel, 16,
      [&](int64_t r, int64_t start, int64_t, int64_t first, int64_t columns) {
        const int64_t panel_width = std::min(kHalfPanel, round_up(key_count, kHalfDepth) - start);
        const auto* q = static_cast<const uint32_t*>(queries) + r * depth;
        const auto* k = static_cast<const uint32_t*>(keys) + start * depth + first;
        float* out = s.row(r) + start + first;
        with_height<6>(rows - r, [&](auto height) {
          advance(ahead, height, columns, width);
          with_columns(columns / 16, [&](auto vectors) {
            score_block<height, vectors>(q, depth, k, panel_width, pairs, out, s.stride);
          });
        });
      });
}

template <int NV>
void sum_columns(const uint16_t* p, int64_t p_stride, int64_t rows, const uint32_t* v,
                 int64_t v_stride, int64_t key_count, const KeyRange* ranges, const float* carry,
                 Block<float> o, int64_t column, ReadAhead* ahead) {
  for_sum_blocks(
      rows, key_count, ranges, half_block_rows(NV), 2, [&](int64_t r, int64_t from, int64_t to) {
        const auto* weights = reinterpret_cast<const uint32_t*>(p + r * p_stride + from);
        with_height<half_block_rows(NV)>(rows - r, [&](auto height) {
          advance(ahead, height, NV * 16, to - from);
          sum_block<height, NV>(weights, p_stride / 2, v + from / 2 * v_stride + column, v_stride,
                                (to - from + 1) / 2, carry == nullptr ? nullptr : carry + r,
                                o.row(r) + column, o.stride);
        });
      });
}

void accumulate(const void* weights, int64_t p_stride, int64_t rows, const void* values,
                int64_t key_count, int64_t width, const KeyRange* ranges, const float* carry,
                Block<float> o, ReadAhead* ahead) {
  const int64_t v_stride = round_up(width, kHalfColumns);
  const auto* p = static_cast<const uint16_t*>(weights);
  const auto* v = static_cast<const uint32_t*>(values);
  for_even_shares(v_stride / 16, kMostVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * 16;
    with_columns(count, [&](auto vectors) {
      sum_columns<vectors>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column,
                           ahead);
    });
  });
}

template <int MR, int NV>
__attribute__((noinline)) void product_block(const uint32_t* p, int64_t p_stride, const uint32_t* v,
                                             int64_t v_stride, int64_t pairs,
                                             const RowEnds<float>& ends, int64_t rows,
                                             int64_t width, uint16_t* out, int64_t out_stride) {
  __m512 acc[MR][NV];
  clear(acc);
  multiply_pairs<MR, NV>(p, p_stride, v, v_stride, pairs, acc);
  store_rounded(acc, ends, rows, width, out, out_stride);
}

void product(const void* weights, int64_t p_stride, const void* values, int64_t key_count,
             const RowEnds<float>& ends, const RowsOut& out, ReadAhead* ahead) {
  const int64_t v_stride = round_up(out.width, kHalfColumns), pairs = (key_count + 1) / 2;
  const auto* p = static_cast<const uint32_t*>(weights);
  for_even_shares(v_stride / 16, kMostVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * 16;
    const auto* v = static_cast<const uint32_t*>(values) + column;
    auto* to = static_cast<uint16_t*>(out.data) + column;
    const auto from = [](const float* x, int64_t i) { return x == nullptr ? nullptr : x + i; };
    with_columns(count, [&](auto vectors) {
      constexpr int kRows = half_block_rows(vectors);
      for (int64_t r = 0; r < out.count; r += kRows) {
        with_height<kRows>(out.count - r, [&](auto height) {
          advance(ahead, height, vectors * 16, key_count);
          product_block<height, vectors>(
              p + r * (p_stride / 2), p_stride / 2, v, v_stride, pairs,
              {from(ends.factor, r), from(ends.added, column), from(ends.added_factor, r)},
              out.count - r, out.width - column, to + r * out.stride, out.stride);
        });
      }
    });
  });
}

// C[f][keys] += sum over pairs of rows of X^T[f][pair] . W[pair][key], for MR rows f of C.
template <int MR, int NV>
__attribute__((noinline)) void column_block(const uint32_t* x, int64_t x_stride, const uint32_t* w,
                                            int64_t w_stride, int64_t pairs, float* c,
                                            int64_t c_stride) {
  __m512 acc[MR][NV];
#pragma GCC unroll 6
  for (int f = 0; f < MR; ++f) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[f][j] = _mm512_loadu_ps(c + f * c_stride + j * 16);
  }
  multiply_pairs<MR, NV>(x, x_stride, w, w_stride, pairs, acc);
  store_block(acc, c, c_stride);
}

// Calls body(first, size as a constant) for `count` rows of C (a multiple of 2) in blocks of 6, 4 and 2.
template <class Body>
void for_column_blocks(int64_t count, Body&& body) {
  int64_t f = 0;
  for (; f + 6 <= count; f += 6) body(f, std::integral_constant<int, 6>());
  if (f + 4 <= count) {
    body(f, std::integral_constant<int, 4>());
    f += 4;
  }
  if (f < count) body(f, std::integral_constant<int, 2>());
}

template <int NV>
void panel_columns(const uint32_t* x, int64_t x_stride, int64_t width, const uint32_t* w,
                   int64_t w_stride, int64_t pairs, Block<float> c, int64_t start) {
  for_column_blocks(round_up(width, 2), [&](int64_t f, auto block) {
    column_block<block, NV>(x + f * x_stride, x_stride, w, w_stride, pairs, c.row(f) + start,
                            c.stride);
  });
}

void accumulate_columns(const void* packed, int64_t rows, int64_t width, const void* weights,
                        int64_t w_stride, int64_t key_count, const KeyRange* ranges,
                        Block<float> c) {
  const int64_t x_stride = round_up(rows, kHalfDepth) / 2;
  for_column_panels(rows, key_count, ranges, kHalfPanel,
                    [&](int64_t start, int64_t keys, int64_t from, int64_t to) {
                      const int64_t first = from / 2, pairs = (to + 1) / 2 - first;
                      const auto* x = static_cast<const uint32_t*>(packed) + first;
                      const auto* w =
                          static_cast<const uint32_t*>(weights) + first * w_stride + start;
                      with_columns((keys + 15) / 16, [&](auto vectors) {
                        panel_columns<vectors>(x, x_stride, width, w, w_stride, pairs, c, start);
                      });
                    });
}

// Queries of a few rows as bfloat16; false if that would change one of them.
constexpr int64_t kMostRows = 32, kMostWidth = 256;
struct alignas(64) HalfQueries {
  uint16_t bits[kMostRows][kMostWidth];
};

bool round_queries(Block<const float> queries, int64_t rows, int64_t width, HalfQueries& to) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = queries.row(r);
    for (int64_t e = 0; e < width; e += 16) {
      const auto some = static_cast<__mmask16>(width - e >= 16 ? 0xffff : (1 << (width - e)) - 1);
      const __m512i x = _mm512_castps_si512(_mm512_maskz_loadu_ps(some, row + e));
      if (_mm512_test_epi32_mask(x, _mm512_set1_epi32(0xffff)) != 0) return false;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to.bits[r] + e),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
    }
  }
  return true;
}

// Lane i is the sum of the lanes of v[i].
inline __m512 lane_sums(const __m512 (&v)[16]) {
  __m512 pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// Scores of R query rows against K keys, of which `count` exist: R * K = 16 sums.
template <int R, int K>
inline void dot_block(const uint16_t (*q)[kMostWidth], const uint16_t* const (&keys)[K],
                      int64_t width, int64_t ahead, float* s, int64_t s_stride, int64_t rows,
                      int64_t count) {
  // Four keys at a time: more at once would break up the stream from memory.
  constexpr int kFour = 4;
  __m512 acc[16];
#pragma GCC unroll 16
  for (auto& x : acc) x = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int first = 0; first < K; first += kFour) {
    const auto step = [&](int64_t e, __mmask32 some) __attribute__((always_inline)) {
      __m512i query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = _mm512_maskz_loadu_epi16(some, q[r] + e);
#pragma GCC unroll 4
      for (int j = first; j < first + kFour; ++j) {
        const __m512i key = _mm512_maskz_loadu_epi16(some, keys[j] + e);
        prefetch_far(keys[j] + e, ahead);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r * K + j] = _mm512_dpbf16_ps(acc[r * K + j], as_pairs(query[r]), as_pairs(key));
        }
      }
    };
    int64_t e = 0;
    for (; e + 32 <= width; e += 32) step(e, ~__mmask32{0});
    if (e < width) step(e, (__mmask32{1} << (width - e)) - 1);
  }
  alignas(64) float sums[16];
  _mm512_store_ps(sums, lane_sums(acc));
  for (int64_t r = 0; r < rows; ++r) {
    float* to = s + r * s_stride;
    if (count >= K) {
      std::memcpy(to, sums + r * K, K * sizeof(float));
    } else {
      for (int64_t j = 0; j < K; ++j) {
        if (j < count) to[j] = sums[r * K + j];
      }
    }
  }
}

// Scores of up to R query rows against keys [first, end).
template <int R>
__attribute__((noinline)) void dot_keys(const uint16_t (*q)[kMostWidth], int64_t rows,
                                        const Rows& k, int64_t ahead, int64_t first, int64_t end,
                                        float* s, int64_t s_stride) {
  constexpr int K = 16 / R;
  const auto* data = static_cast<const uint16_t*>(k.data);
  for (int64_t m = first; m < end; m += K) {
    const uint16_t* keys[K];
#pragma GCC unroll 16
    for (int64_t j = 0, last = end - 1 - m; j < K; ++j) {
      keys[j] = data + (m + std::min(j, last)) * k.stride;
    }
    dot_block<R, K>(q, keys, k.width, ahead, s + m, s_stride, rows, std::min<int64_t>(K, end - m));
  }
}

}  // namespace

bool half_dot_rows(Block<const float> queries, int64_t rows, const Rows& k, Block<float> s) {
  if (k.dtype != DType::bf16 || rows > kMostRows || k.width > kMostWidth) return false;
  HalfQueries q;
  for (int64_t r = rows; r < round_up(rows, 4); ++r) {
    std::memset(q.bits[r], 0, static_cast<size_t>(k.width) * sizeof(uint16_t));
  }
  if (!round_queries(queries, rows, k.width, q)) return false;
  const int64_t ahead = bytes_ahead(k);
  for (int64_t m = 0; m < k.count; m += kKeyBlock) {
    const int64_t end = std::min(m + kKeyBlock, k.count);
    for (int64_t r = 0; r < rows; r += 4) {
      const int64_t some = std::min<int64_t>(4, rows - r);
      const auto dot = some == 1 ? dot_keys<1> : some == 2 ? dot_keys<2> : dot_keys<4>;
      dot(q.bits + r, some, k, r == 0 ? ahead : 0, m, end, s.row(r), s.stride);
    }
  }
  return true;
}

void add_avx512_half_products(TileKernels<float>& f) {
  f.row_multiple = kRowMultiple;
  f.scores = scores;
  f.accumulate = accumulate;
  f.product = product;
  f.accumulate_columns = accumulate_columns;
  f.column_multiple = 2;
}

}  // namespace heed::kernels
