// Products of bfloat16 pairs with AVX512-BF16 (vdpbf16ps): twice the rate of float32 where the unit is
// full width, as on AMD Zen 4 and 5. Highway 1.0 has no name for the instruction, so this file is
// compiled for AVX-512 as a whole and reached only after the processor has been asked.
#include <immintrin.h>

#include "kernels/parts.h"
#include "kernels/product_loops.h"

namespace heed::kernels {

namespace {

constexpr int kMostVectors = 4;

constexpr int half_block_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }

inline __m512bh as_pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

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

template <int NV>
__attribute__((noinline)) void score_block(const uint32_t* q, int64_t q_stride,
                                           const uint32_t* panel, int64_t panel_width,
                                           int64_t pairs, float* s, int64_t s_stride) {
  __m512 acc[6][NV];
#pragma GCC unroll 6
  for (auto& row : acc) {
#pragma GCC unroll 4
    for (auto& x : row) x = _mm512_setzero_ps();
  }
  multiply_pairs<6, NV>(q, q_stride, panel, panel_width, pairs, acc);
  store_block(acc, s, s_stride);
}

template <int NV>
__attribute__((noinline)) void sum_block(const uint32_t* p, int64_t p_stride, const uint32_t* v,
                                         int64_t v_stride, int64_t pairs, const float* carry,
                                         float* o, int64_t o_stride) {
  constexpr int MR = half_block_rows(NV);
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
            const KeyRange* ranges, Block<float> s) {
  const int64_t depth = round_up(width, kHalfDepth) / 2, pairs = (width + 1) / 2;
  for_score_blocks(rows, key_count, ranges, 6, kHalfPanel, 16,
                   [&](int64_t r, int64_t start, int64_t, int64_t first, int64_t columns) {
                     const int64_t panel_width =
                         std::min(kHalfPanel, round_up(key_count, kHalfDepth) - start);
                     const auto* q = static_cast<const uint32_t*>(queries) + r * depth;
                     const auto* k = static_cast<const uint32_t*>(keys) + start * depth + first;
                     float* out = s.row(r) + start + first;
                     switch (columns / 16) {
                       case 1:
                         return score_block<1>(q, depth, k, panel_width, pairs, out, s.stride);
                       case 2:
                         return score_block<2>(q, depth, k, panel_width, pairs, out, s.stride);
                       case 3:
                         return score_block<3>(q, depth, k, panel_width, pairs, out, s.stride);
                       default:
                         return score_block<4>(q, depth, k, panel_width, pairs, out, s.stride);
                     }
                   });
}

template <int NV>
void sum_columns(const uint16_t* p, int64_t p_stride, int64_t rows, const uint32_t* v,
                 int64_t v_stride, int64_t key_count, const KeyRange* ranges, const float* carry,
                 Block<float> o, int64_t column) {
  constexpr int64_t kRun = 128;  // keys whose pairs of values stay in the first-level cache
  for_sum_blocks(rows, key_count, ranges, half_block_rows(NV), kRun, 2,
                 [&](int64_t r, int64_t from, int64_t to, bool first) {
                   const auto* weights = reinterpret_cast<const uint32_t*>(p + r * p_stride + from);
                   sum_block<NV>(weights, p_stride / 2, v + from / 2 * v_stride + column, v_stride,
                                 (to - from + 1) / 2,
                                 first && carry != nullptr ? carry + r : nullptr, o.row(r) + column,
                                 o.stride);
                 });
}

void accumulate(const void* weights, int64_t p_stride, int64_t rows, const void* values,
                int64_t key_count, int64_t width, const KeyRange* ranges, const float* carry,
                Block<float> o) {
  const int64_t v_stride = round_up(width, kHalfColumns);
  const auto* p = static_cast<const uint16_t*>(weights);
  const auto* v = static_cast<const uint32_t*>(values);
  for_even_shares(v_stride / 16, kMostVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * 16;
    switch (count) {
      case 1:
        return sum_columns<1>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
      case 2:
        return sum_columns<2>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
      case 3:
        return sum_columns<3>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
      default:
        return sum_columns<4>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
    }
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
                      switch ((keys + 15) / 16) {
                        case 1:
                          return panel_columns<1>(x, x_stride, width, w, w_stride, pairs, c, start);
                        case 2:
                          return panel_columns<2>(x, x_stride, width, w, w_stride, pairs, c, start);
                        case 3:
                          return panel_columns<3>(x, x_stride, width, w, w_stride, pairs, c, start);
                        default:
                          return panel_columns<4>(x, x_stride, width, w, w_stride, pairs, c, start);
                      }
                    });
}

}  // namespace

void add_avx512_half_products(TileKernels<float>& f) {
  f.row_multiple = kRowMultiple;
  f.scores = scores;
  f.accumulate = accumulate;
  f.accumulate_columns = accumulate_columns;
  f.column_multiple = 2;
}

}  // namespace heed::kernels
