// Compiled for AVX-512 as a whole, like int8_rows_avx512.cpp. Codes, bytes without a sign, meet the three
// bytes of activations (vpdpbusd). A vector has eight columns of each of eight groups, so that four of them,
// with all columns of the groups, are summed in integers before they meet the groups' scales.
#include "kernels/byte_formats_avx512-inl.h"

namespace heed::kernels {

namespace {

// Sums of codes times the bytes of activations.
template <int kDigits>
struct Dots {
  __m512i high, middle, low;

  HEED_INLINE Dots() : high(_mm512_setzero_si512()), middle(high), low(high) {}
  HEED_INLINE void add(__m512i codes, const SplitColumns& x, int v) {
    high = _mm512_dpbusd_epi32(high, codes, load(x.high + 64 * v));
    middle = _mm512_dpbusd_epi32(middle, codes, load(x.middle + 64 * v));
    if constexpr (kDigits == 3) low = _mm512_dpbusd_epi32(low, codes, load(x.low + 64 * v));
  }
  /// In units of steps. 256 high + middle: at most 2^27.
  HEED_INLINE __m512 sum() const {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high, 8), middle);
    if constexpr (kDigits == 2) return _mm512_cvtepi32_ps(upper);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
  }
};

// Lanes 2 g and 2 g + 1 get factor kStep g + kFirst.
template <int kStep, int kFirst>
HEED_INLINE __m512 for_lanes(__m512 factors) {
  constexpr int s = kStep, f = kFirst;
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(f, f, s + f, s + f, 2 * s + f, 2 * s + f, 3 * s + f, 3 * s + f, 4 * s + f,
                        4 * s + f, 5 * s + f, 5 * s + f, 6 * s + f, 6 * s + f, 7 * s + f,
                        7 * s + f),
      factors);
}

template <int kDigits>
struct Avx512 {
  using Sum = __m512;
  static constexpr int kMostRows = 4;

  // Products in lanes 2 g and 2 g + 1, offsets in lane 8 + g; of formats with scales of 16 columns, rows of
  // which are whole chunks, both are in the products.
  struct Terms {
    __m512 products, offsets;
  };

  template <class Format>
  struct Chunk {
    HEED_INLINE explicit Chunk(const uint8_t* b) {
      const Format chunk(b);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) codes[v] = chunk.codes(v);
      factors = chunk.factors();
    }
    __m512i codes[4];
    __m512 factors;
  };

  template <class Format>
  static HEED_INLINE Terms terms(const Chunk<Format>& chunk, const SplitColumns& x) {
    constexpr bool kSixteen = std::is_same_v<Format, Q6_K>;
    const __m512 steps = _mm512_load_ps(x.steps);
    Dots<kDigits> dots[2];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) dots[kSixteen ? v / 2 : 0].add(chunk.codes[v], x, v);
    if constexpr (kSixteen) {
      const __m512 first = _mm512_mul_ps(dots[0].sum(), for_lanes<2, 0>(chunk.factors));
      const __m512 both = _mm512_fmadd_ps(dots[1].sum(), for_lanes<2, 1>(chunk.factors), first);
      const __m512 products = _mm512_mul_ps(both, for_lanes<1, 0>(steps));
      return {_mm512_fmadd_ps(chunk.factors, _mm512_load_ps(x.centres), products),
              _mm512_setzero_ps()};
    } else {
      const __m512 scaled = _mm512_mul_ps(chunk.factors, steps);
      return {_mm512_mul_ps(dots[0].sum(), for_lanes<1, 0>(scaled)), scaled};
    }
  }

  static HEED_INLINE void add(__m512& sum, const Terms& terms, int64_t begin, int64_t end) {
    const auto products = static_cast<__mmask16>((1U << 2 * end) - (1U << 2 * begin));
    const auto offsets = static_cast<__mmask16>((1U << (8 + end)) - (1U << (8 + begin)));
    sum = _mm512_mask_add_ps(sum, products, sum, terms.products);
    sum = _mm512_mask_add_ps(sum, offsets, sum, terms.offsets);
  }
  static HEED_INLINE float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
};

// The largest of |x|, as bits: NaN is above infinity.
HEED_INLINE uint32_t largest_bits(__m512 a, __m512 b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                       _mm512_and_si512(_mm512_castps_si512(b), magnitude))));
}

}  // namespace

void split_columns_avx512(const float* x, int64_t columns, int64_t chunks, int digits,
                          SplitColumns* to) {
  const float *from = x, *end = x + columns;
  for (int64_t c = 0; c < chunks; ++c, ++to) {
    for (int64_t g = 0; g < 8; ++g) {
      const __m512 values[] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
      from = from + 32 == end ? x : from + 32;
      const SplitStep step(largest_bits(values[0], values[1]));
      const __mmask16 kept = step.inverse == 0 ? 0 : 0xffff;
      int sums[2];
      for (int64_t i = 0; i < 2; ++i) {
        const __m512i q =
            _mm512_cvtps_epi32(_mm512_maskz_mul_ps(kept, values[i], _mm512_set1_ps(step.inverse)));
        // Bytes with a sign: what is above 127 counts in the next one.
        const auto byte = [](__m512i all) __attribute__((always_inline)) {
          return _mm512_srai_epi32(_mm512_slli_epi32(all, 24), 24);
        };
        const __m512i low = byte(q), rest = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
        const __m512i middle = byte(rest);
        const auto store = [g, i](int8_t* bytes, __m512i all) __attribute__((always_inline)) {
          const __m128i sixteen = _mm512_cvtepi32_epi8(all);
          int8_t* first = bytes + 128 * i + 8 * g;
          _mm_storel_epi64(reinterpret_cast<__m128i*>(first), sixteen);
          _mm_storel_epi64(reinterpret_cast<__m128i*>(first + 64),
                           _mm_unpackhi_epi64(sixteen, sixteen));
        };
        store(to->high, _mm512_srai_epi32(_mm512_sub_epi32(rest, middle), 8));
        store(to->middle, middle);
        store(to->low, low);
        sums[i] = _mm512_reduce_add_epi32(q);
      }
      step.store(g, sums, digits, *to);
    }
  }
}

void byte_rows_avx512(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride) {
  const auto add = [&](auto vectors) {
    with_format(w.format, [&](auto format) {
      rows_of<decltype(vectors), typename decltype(format)::type>(w, x, y, y_stride);
    });
  };
  x.digits == 2 ? add(Avx512<2>()) : add(Avx512<3>());
}

}  // namespace heed::kernels
