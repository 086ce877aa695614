// Weights that become bfloat16 operands, softmax and sigmoid, for processors with AVX-512 of full width:
// half the instructions of weights.cpp. A softmax row keeps the pivot that it found first as long as the
// sums of tiles allow, so hardly any maximum is looked for; what does not fit (a new pivot, scores that are
// NaN or infinite, positions in scores) goes to weights.cpp. Compiled for AVX-512 as a whole, like
// half_avx512.cpp.
#include <immintrin.h>

#include <limits>
#include <type_traits>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/parts.h"

namespace heed::kernels {

namespace {

constexpr int64_t kLanes = 16, kChunk = kHalfDepth;  // two vectors of scores become one of weights
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Sums of a tile up to this: no weight is far above those of other tiles, and nothing overflows.
constexpr float kMostSum = 0x1p20F;

// 2^f for f in [0, 1), highest power first, exact for f = 0 and 1, so that a row with one weight has the sum
// 1: minimax to 2^-18.2 where weights are summed up, to 2^-13.2 where they are only rounded.
constexpr float kQuartic[] = {0.01355575F, 0.05203237F, 0.24137976F, 0.69303212F, 1};
constexpr float kCubic[] = {0.07826797F, 0.22630768F, 0.69542435F, 1};

template <int kTerms>
class Power {
 public:
  explicit Power(const float (&series)[kTerms]) {
    for (int i = 0; i < kTerms; ++i) terms_[i] = _mm512_set1_ps(series[i]);
  }
  /// 2^x; infinite from 128 on, 0 for -infinity.
  __attribute__((always_inline)) __m512 operator()(__m512 x) const {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = terms_[0];
#pragma GCC unroll 4
    for (int i = 1; i < kTerms; ++i) p = _mm512_fmadd_ps(p, f, terms_[i]);
    return _mm512_scalef_ps(p, x);
  }

 private:
  __m512 terms_[kTerms];
};

// Subnormal results and operands count as 0 while it lives: making one takes 150 cycles.
class NoSubnormals {
 public:
  NoSubnormals() { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

// The lanes of keys [m, m + 16) that lie in a range.
inline __mmask16 lanes_in(KeyRange range, int64_t m) {
  const auto up_to = [m](int64_t key) {
    const int64_t count = key - m < 0 ? 0 : key - m > kLanes ? kLanes : key - m;
    return (uint32_t{1} << count) - 1;
  };
  return static_cast<__mmask16>(up_to(range.end) & ~up_to(range.begin));
}

template <int N, bool kPartly>
__attribute__((always_inline)) inline void load_scores(const float* s, int64_t m, KeyRange range,
                                                       __m512 (&x)[N]) {
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j, m += kLanes) {
    if constexpr (kPartly) {
      x[j] = _mm512_mask_loadu_ps(_mm512_set1_ps(kNothing), lanes_in(range, m), s + m);
    } else {
      x[j] = _mm512_loadu_ps(s + m);
    }
  }
}

// Calls body(m, N vectors of scores from key m on) for the chunks of a range; -infinity is what it hides.
template <class Body>
__attribute__((always_inline)) inline void for_chunks(const float* s, KeyRange range, Body&& body) {
  int64_t m = range.begin / kChunk * kChunk;
  const auto edge = [&]() __attribute__((always_inline)) {
    __m512 x[2];
    load_scores<2, true>(s, m, range, x);
    body(m, x);
    m += kChunk;
  };
  if (m < range.begin) edge();
  for (; m + 2 * kChunk <= range.end; m += 2 * kChunk) {
    __m512 x[4];
    load_scores<4, false>(s, m, range, x);
    body(m, x);
  }
  if (m + kChunk <= range.end) {
    __m512 x[2];
    load_scores<2, false>(s, m, range, x);
    body(m, x);
    m += kChunk;
  }
  if (m < range.end) edge();
}

template <int N>
__attribute__((always_inline)) inline void store_pairs(const __m512 (&x)[N], uint16_t* out) {
#pragma GCC unroll 2
  for (int j = 0; j < N; j += 2) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(x[j + 1], x[j]);
    _mm512_storeu_si512(out + j * kLanes, reinterpret_cast<__m512i>(pairs));
  }
}

// The largest scores of a row, lane by lane.
__attribute__((always_inline)) inline __m512 maximum(const float* s, KeyRange range) {
  __m512 most = _mm512_set1_ps(kNothing);
  for_chunks(s, range, [&](int64_t, auto& x) __attribute__((always_inline)) {
    for (const __m512 some : x) most = _mm512_max_ps(most, some);
  });
  return most;
}

// Weights of a row; returns their sum lane by lane.
__attribute__((always_inline)) inline __m512 weigh_row(const Power<5>& power, const float* s,
                                                       KeyRange range, __m512 scale, float pivot,
                                                       uint16_t* out) {
  const __m512 shift = _mm512_set1_ps(pivot);
  __m512 total[2];
  total[0] = total[1] = _mm512_setzero_ps();
  for_chunks(s, range, [&](int64_t m, auto& x) __attribute__((always_inline)) {
    constexpr int kVectors = std::extent_v<std::remove_reference_t<decltype(x)>>;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      x[j] = power(_mm512_fmsub_ps(x[j], scale, shift));
      total[j % 2] = _mm512_add_ps(total[j % 2], x[j]);
    }
    store_pairs(x, out + m);
  });
  return _mm512_add_ps(total[0], total[1]);
}

// What `combine` makes of the lanes of each of 16 rows of 16, in the lane of that row.
template <class Combine>
__attribute__((always_inline)) inline __m512 reduce_rows(const float* rows, Combine combine) {
  // Halves of neighbours are combined until every row is one lane.
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    const __m512 x = _mm512_load_ps(rows + 2 * r * kLanes);
    const __m512 y = _mm512_load_ps(rows + (2 * r + 1) * kLanes);
    a[r] = combine(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    b[r] = combine(_mm512_shuffle_ps(a[2 * r], a[2 * r + 1], 0x44),
                   _mm512_shuffle_ps(a[2 * r], a[2 * r + 1], 0xee));
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    c[r] = combine(_mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0x88),
                   _mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0xdd));
  }
  return combine(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// 1 / (1 + 2^-t) to 2^-13. What is hidden at the edges has -infinity as a score, thus weight 0.
__attribute__((always_inline)) inline void sigmoid_row(const Power<4>& power, const float* s,
                                                       KeyRange range, __m512 scale, __m512 bias,
                                                       uint16_t* out) {
  const __m512 one = _mm512_set1_ps(1);
  for_chunks(s, range, [&](int64_t m, auto& x) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (__m512& some : x) {
      some = power(_mm512_fnmsub_ps(some, scale, bias));
      some = _mm512_rcp14_ps(_mm512_add_ps(some, one));
    }
    store_pairs(x, out + m);
  });
}

using Weigh = std::remove_extent_t<decltype(TileKernels<float>::weights)>;

Weigh general_weights(WeightKind kind) {
  TileKernels<float> table;
  add_half_weight_parts(Isa::avx512, table);
  return table.weights[static_cast<int>(kind)];
}

// A product of a score that is -infinity with the scale is one as well.
bool usual(const WeightShape<float>& shape) {
  return shape.slope == 0 && shape.scale > 0 &&
         shape.scale < std::numeric_limits<float>::infinity();
}

KeyRange range_of(const KeyRange* ranges, int64_t r, int64_t key_count) {
  return ranges != nullptr ? ranges[r] : KeyRange{0, static_cast<int32_t>(key_count)};
}

// Zeros around the chunks of a range.
void clear_outside(uint16_t* row, KeyRange range, int64_t key_count) {
  const auto clear = [row](int64_t from, int64_t to) {
    for (; from < to; from += kChunk) _mm512_storeu_si512(row + from, _mm512_setzero_si512());
  };
  clear(0, range.begin / kChunk * kChunk);
  clear(round_up(range.end, kChunk), round_up(key_count, kChunk));
}

// Where exponents begin in those of 16 rows from r on that are in `rows`: at a row's largest score among its
// first keys, among all if those are hidden.
__m512 find_pivots(Block<float> s, int64_t r, __mmask16 rows, int64_t key_count,
                   const KeyRange* ranges, float scale) {
  alignas(64) float most[kLanes * kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    KeyRange few;
    if ((rows >> i) & 1) few = range_of(ranges, r + i, key_count);
    const int64_t end = few.begin / kChunk * kChunk + 2 * kChunk;
    if (few.end > end) few.end = static_cast<int32_t>(end);
    _mm512_store_ps(most + i * kLanes, maximum(s.row(r + i), few));
  }
  alignas(64) float found[kLanes];
  _mm512_store_ps(found, reduce_rows(most, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); }));
  for (unsigned rest = rows; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    if (found[i] != kNothing) continue;
    found[i] = _mm512_reduce_max_ps(maximum(s.row(r + i), range_of(ranges, r + i, key_count)));
  }
  return _mm512_mul_ps(_mm512_load_ps(found), _mm512_set1_ps(scale));
}

// Gives rows a pivot that have none yet, or one so low that all they have seen counts as nothing beside
// usual scores: returns those.
__mmask16 start_rows(Block<float> s, int64_t r, __mmask16 rows, int64_t key_count,
                     const KeyRange* ranges, float scale, float* pivots, float* sums) {
  const __m512 before = _mm512_maskz_loadu_ps(rows, pivots),
               lowest = _mm512_set1_ps(-kLargePivot<float>);
  const __mmask16 low = _mm512_mask_cmp_ps_mask(rows, before, lowest, _CMP_LE_OQ);
  if (low == 0) return 0;
  const __m512 found = find_pivots(s, r, low, key_count, ranges, scale);
  const __mmask16 fresh =
      _mm512_mask_cmp_ps_mask(low, before, _mm512_set1_ps(kNothing), _CMP_EQ_OQ);
  const __mmask16 raised = _mm512_mask_cmp_ps_mask(low, found, lowest, _CMP_GT_OQ) & ~fresh;
  _mm512_mask_storeu_ps(pivots, fresh | raised, found);
  _mm512_mask_storeu_ps(sums, raised, _mm512_setzero_ps());
  return raised;
}

void softmax_weights(Block<float> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                     const WeightShape<float>& shape, const RowState<float>& state, void* weights,
                     int64_t stride) {
  static const Weigh general = general_weights(WeightKind::softmax);
  if (!usual(shape) || shape.bias != 0) {
    return general(s, rows, key_count, ranges, shape, state, weights, stride);
  }
  const Power<5> power(kQuartic);
  const __m512 scale = _mm512_set1_ps(shape.scale);
  const auto weights_of = [&](int64_t r) { return static_cast<uint16_t*>(weights) + r * stride; };
  alignas(64) float sums[kLanes * kLanes] = {};
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = rows - first < kLanes ? rows - first : kLanes;
    const auto all = static_cast<__mmask16>((1U << count) - 1);
    const __mmask16 raised = start_rows(s, first, all, key_count, ranges, shape.scale,
                                        state.pivot + first, state.sum + first);
    const NoSubnormals mode;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + i;
      const KeyRange range = range_of(ranges, r, key_count);
      const float pivot = state.pivot[r];
      _mm512_store_ps(sums + i * kLanes, weigh_row(power, s.row(r), range, scale,
                                                   pivot == kNothing ? 0 : pivot, weights_of(r)));
      if (ranges != nullptr) clear_outside(weights_of(r), range, key_count);
    }
    const __m512 sum = reduce_rows(sums, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
    const __m512 pivots = _mm512_maskz_loadu_ps(all, state.pivot + first);
    __mmask16 fit = _mm512_mask_cmp_ps_mask(all, sum, _mm512_set1_ps(kMostSum), _CMP_LE_OQ);
    fit &=
        _mm512_cmp_ps_mask(_mm512_abs_ps(pivots), _mm512_set1_ps(kLargePivot<float>), _CMP_LT_OQ) |
        _mm512_cmp_ps_mask(pivots, _mm512_set1_ps(kNothing), _CMP_EQ_OQ);
    const __m512 before = _mm512_maskz_loadu_ps(fit, state.sum + first);
    _mm512_mask_storeu_ps(state.sum + first, fit, _mm512_add_ps(before, sum));
    _mm512_mask_storeu_ps(state.carry + first, all,
                          _mm512_maskz_mov_ps(~raised, _mm512_set1_ps(1)));
    for (unsigned rest = all & ~fit; rest != 0; rest &= rest - 1) {
      const int64_t r = first + __builtin_ctz(rest);
      general({s.row(r), s.stride}, 1, key_count, ranges != nullptr ? ranges + r : nullptr, shape,
              {state.pivot + r, state.sum + r, state.carry + r}, weights_of(r), stride);
      if ((raised >> (r - first)) & 1) state.carry[r] = 0;
    }
  }
}

void sigmoid_weights(Block<float> s, int64_t rows, int64_t key_count, const KeyRange* ranges,
                     const WeightShape<float>& shape, const RowState<float>& state, void* weights,
                     int64_t stride) {
  static const Weigh general = general_weights(WeightKind::sigmoid);
  if (!usual(shape)) return general(s, rows, key_count, ranges, shape, state, weights, stride);
  const Power<4> power(kCubic);
  const NoSubnormals mode;
  const __m512 scale = _mm512_set1_ps(shape.scale), bias = _mm512_set1_ps(shape.bias);
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    auto* out = static_cast<uint16_t*>(weights) + r * stride;
    sigmoid_row(power, s.row(r), range, scale, bias, out);
    if (ranges != nullptr) clear_outside(out, range, key_count);
  }
}

// softmax_chunk; `whole`: a panel of which every row sees every key.
template <bool kWhole>
__attribute__((noinline)) uint32_t weigh_chunk(const WeightChunk& chunk, float scale,
                                               const float* pivots, float* lane_sums) {
  const Power<5> power(kQuartic);
  const __m512 factor = _mm512_set1_ps(scale), most = _mm512_set1_ps(kMostSum);
  const NoSubnormals mode;
  const int64_t lines = chunk.next_bytes / 64 / chunk.rows;
  const auto* next = static_cast<const char*>(chunk.next);
  uint32_t misfits = 0;
  for (int64_t r = 0; r < chunk.rows; ++r, lane_sums += kLanes) {
    for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    uint16_t* out = chunk.weights.row(r);
    const KeyRange range = kWhole ? KeyRange{0, kHalfPanel} : range_of(chunk.ranges, r, chunk.keys);
    const float pivot = !kWhole && pivots[r] == kNothing ? 0 : pivots[r];
    const __m512 sum = weigh_row(power, chunk.scores.row(r), range, factor, pivot, out);
    if constexpr (!kWhole) clear_outside(out, range, kHalfPanel);
    if (_mm512_cmp_ps_mask(sum, most, _CMP_NLE_UQ) != 0) {
      misfits |= uint32_t{1} << r;
    } else {
      _mm512_store_ps(lane_sums, _mm512_add_ps(_mm512_load_ps(lane_sums), sum));
    }
  }
  return misfits;
}

}  // namespace

uint32_t softmax_chunk(const WeightChunk& chunk, float scale, const float* pivots,
                       float* lane_sums) {
  const bool whole = chunk.ranges == nullptr && chunk.keys == kHalfPanel;
  return whole ? weigh_chunk<true>(chunk, scale, pivots, lane_sums)
               : weigh_chunk<false>(chunk, scale, pivots, lane_sums);
}

void find_first_pivots(const WeightChunk& chunk, uint32_t rows, float scale, float* pivots) {
  for (int64_t r = 0; r < chunk.rows; r += kLanes, rows >>= kLanes) {
    const auto some = static_cast<__mmask16>(rows);
    const __mmask16 fresh = _mm512_mask_cmp_ps_mask(some, _mm512_maskz_loadu_ps(some, pivots + r),
                                                    _mm512_set1_ps(kNothing), _CMP_EQ_OQ);
    if (fresh == 0) continue;
    const __m512 found = find_pivots(chunk.scores, r, fresh, chunk.keys, chunk.ranges, scale);
    _mm512_mask_storeu_ps(pivots + r, fresh, found);
  }
}

void take_lane_sums(float* lane_sums, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; r += kLanes, lane_sums += kLanes * kLanes) {
    const auto all = static_cast<__mmask16>((1U << (rows - r < kLanes ? rows - r : kLanes)) - 1);
    const __m512 sum =
        reduce_rows(lane_sums, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
    _mm512_mask_storeu_ps(sums + r, all, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(all, sums + r)));
    for (int64_t i = 0; i < kLanes; ++i) {
      _mm512_store_ps(lane_sums + i * kLanes, _mm512_setzero_ps());
    }
  }
}

void add_avx512_half_softmax(TileKernels<float>& f) {
  f.weights[static_cast<int>(WeightKind::softmax)] = softmax_weights;
}

void add_avx512_half_sigmoid(TileKernels<float>& f) {
  f.weights[static_cast<int>(WeightKind::sigmoid)] = sigmoid_weights;
}

}  // namespace heed::kernels
