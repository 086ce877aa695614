// Compiled for AVX-512 as a whole, like int8_rows_avx512.cpp. Codes, bytes without a sign, meet the three
// bytes of activations (vpdpbusd). A vector has eight columns of each of eight groups, so that four of them,
// with all columns of the groups, are summed in integers before they meet the groups' scales.
#include <immintrin.h>

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/byte_rows-inl.h"

namespace heed::kernels {

namespace {

HEED_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
HEED_INLINE __m256i load_32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// [low, high]
HEED_INLINE __m512 joined(__m256 low, __m256 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// Eight float16 scales d: [d, centre * d].
HEED_INLINE __m512 around(__m128i raw, float centre) {
  const __m256 d = _mm256_cvtph_ps(raw);
  return joined(d, _mm256_mul_ps(d, _mm256_set1_ps(centre)));
}

// Those at the start of eight blocks of 32 weights.
template <int64_t kBytes>
HEED_INLINE __m512 scales_around(const uint8_t* b, float centre) {
  return around(eight_scales<kBytes>(b), centre);
}

// Eight blocks that begin with a scale d and a minimum m: [d, m].
template <int64_t kBytes>
HEED_INLINE __m512 scales_and_minima(const uint8_t* b) {
  const __m512 pairs =
      _mm512_cvtph_ps(_mm256_set_m128i(four_words<kBytes>(b + 4 * kBytes), four_words<kBytes>(b)));
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm512_permutexvar_ps(order, pairs);
}

// 16 bytes of each of eight blocks: as [0] the first eight, as [1] the last eight.
struct Halves {
  __m512i of[2];
};
template <int64_t kBytes>
HEED_INLINE Halves halves_of_blocks(const uint8_t* q) {
  const auto four = [](const uint8_t* p) __attribute__((always_inline)) {
    __m512i x = _mm512_broadcast_i32x4(load_16(p));
    x = _mm512_mask_broadcast_i32x4(x, 0x00f0, load_16(p + 2 * kBytes));
    x = _mm512_mask_broadcast_i32x4(x, 0x0f00, load_16(p + 4 * kBytes));
    return _mm512_mask_broadcast_i32x4(x, 0xf000, load_16(p + 6 * kBytes));
  };
  const __m512i even = four(q), odd = four(q + kBytes);
  return {{_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd)}};
}

// Low nibbles are columns 0..15 of a block, high ones 16..31.
HEED_INLINE __m512i nibbles(const Halves& halves, int v) {
  const __m512i bytes = halves.of[v % 2];
  return _mm512_and_si512(v < 2 ? bytes : _mm512_srli_epi64(bytes, 4), _mm512_set1_epi8(15));
}

// Fifth bits of eight blocks, a bit each column from `p` on: word g in qword g.
template <int64_t kBytes>
HEED_INLINE __m512i fifth_words(const uint8_t* p) {
  return _mm512_cvtepu32_epi64(
      _mm256_set_m128i(four_words<kBytes>(p + 4 * kBytes), four_words<kBytes>(p)));
}
// Those of vector v.
HEED_INLINE __mmask64 fifth_bits(__m512i words, int v) {
  const __m512i first = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0);
  const __m512i bytes =
      _mm512_shuffle_epi8(words, _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(v))));
  return _mm512_test_epi8_mask(bytes, _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201)));
}

HEED_INLINE __m512i with_fifth(__m512i codes, __mmask64 set) {
  return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(16));
}

// Formats, as block_formats-inl.h describes them, a chunk at a time. factors(): [scale, offset] of the
// groups of 32 columns; codes(v): eight columns from 8 v on of each of the groups.
template <int64_t kBlockBytes>
struct Blocks {
  static constexpr int64_t kBytes = kBlockBytes, kWeights = 32;
  const uint8_t* b;
};

struct Q8_0 : Blocks<34> {
  static constexpr BlockFormat kFormat = BlockFormat::q8_0;
  HEED_INLINE explicit Q8_0(const uint8_t* p) : Blocks{p} {
    const auto eight = [p](int64_t g, int64_t v) __attribute__((always_inline)) {
      const auto pair = [p](int64_t at) __attribute__((always_inline)) {
        const uint8_t* q = p + at * kBytes + 2;
        return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(q)), load_32(q + kBytes), 1);
      };
      // Columns of v and v + 1 of four blocks.
      const __m512i order =
          _mm512_add_epi64(_mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13), _mm512_set1_epi64(v));
      return _mm512_permutex2var_epi64(pair(g), order, pair(g + 2));
    };
#pragma GCC unroll 2
    for (int64_t v = 0; v < 4; v += 2) {
      const __m512i low = eight(0, v), high = eight(4, v);
      vectors[v] = _mm512_shuffle_i64x2(low, high, 0x44);
      vectors[v + 1] = _mm512_shuffle_i64x2(low, high, 0xee);
    }
  }
  HEED_INLINE __m512 factors() const { return scales_around<kBytes>(b, -128); }
  HEED_INLINE __m512i codes(int v) const {
    return _mm512_xor_si512(vectors[v], _mm512_set1_epi8(-128));
  }
  __m512i vectors[4];
};

struct Q4_0 : Blocks<18> {
  static constexpr BlockFormat kFormat = BlockFormat::q4_0;
  HEED_INLINE explicit Q4_0(const uint8_t* p) : Blocks{p}, q(halves_of_blocks<kBytes>(p + 2)) {}
  HEED_INLINE __m512 factors() const {
    // The scales lie in the first 128 bytes, nine words apart.
    const __m512i words = _mm512_castsi128_si512(_mm_setr_epi16(0, 9, 18, 27, 36, 45, 54, 63));
    const __m512i raw = _mm512_permutex2var_epi16(load(b), words, load(b + 64));
    return around(_mm512_castsi512_si128(raw), -8);
  }
  HEED_INLINE __m512i codes(int v) const { return nibbles(q, v); }
  Halves q;
};

struct Q4_1 : Blocks<20> {
  static constexpr BlockFormat kFormat = BlockFormat::q4_1;
  HEED_INLINE explicit Q4_1(const uint8_t* p) : Blocks{p}, q(halves_of_blocks<kBytes>(p + 4)) {}
  HEED_INLINE __m512 factors() const { return scales_and_minima<kBytes>(b); }
  HEED_INLINE __m512i codes(int v) const { return nibbles(q, v); }
  Halves q;
};

// Scales, then fifth bits, then nibbles.
template <int64_t kBlockBytes, int64_t kFifths>
struct FiveBits : Blocks<kBlockBytes> {
  using Blocks<kBlockBytes>::kBytes;
  HEED_INLINE explicit FiveBits(const uint8_t* p)
      : Blocks<kBlockBytes>{p},
        q(halves_of_blocks<kBytes>(p + kFifths + 4)),
        fifth(fifth_words<kBytes>(p + kFifths)) {}
  HEED_INLINE __m512i codes(int v) const { return with_fifth(nibbles(q, v), fifth_bits(fifth, v)); }
  Halves q;
  __m512i fifth;
};

struct Q5_0 : FiveBits<22, 2> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_0;
  using FiveBits::FiveBits;
  HEED_INLINE __m512 factors() const { return scales_around<kBytes>(b, -16); }
};

struct Q5_1 : FiveBits<24, 4> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_1;
  using FiveBits::FiveBits;
  HEED_INLINE __m512 factors() const { return scales_and_minima<kBytes>(b); }
};

// Four times 32 bytes: low nibbles are one group, high ones the next.
struct GroupNibbles {
  HEED_INLINE explicit GroupNibbles(const uint8_t* q) : first(load(q)), second(load(q + 64)) {}
  HEED_INLINE __m512i codes(int v) const {
    const __m512i order =
        _mm512_add_epi64(_mm512_setr_epi64(0, 0, 4, 4, 8, 8, 12, 12), _mm512_set1_epi64(v));
    const __m512i shifts = _mm512_setr_epi64(0, 4, 0, 4, 0, 4, 0, 4);
    const __m512i bytes = _mm512_permutex2var_epi64(first, order, second);
    return _mm512_and_si512(_mm512_srlv_epi64(bytes, shifts), _mm512_set1_epi8(15));
  }
  __m512i first, second;
};

// d, dmin and the eight 6-bit scales and minima that are packed into 12 bytes: [d scale, -dmin minimum].
HEED_INLINE __m512 group_factors(const uint8_t* b) {
  const __m128i packed = group_scales(b);
  const __m128 pair = group_pair(b);
  const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(packed)),
                       _mm512_permutexvar_ps(which, _mm512_castps128_ps512(pair)));
}

struct Q4_K {
  static constexpr BlockFormat kFormat = BlockFormat::q4_k;
  static constexpr int64_t kBytes = 144, kWeights = 256;
  HEED_INLINE explicit Q4_K(const uint8_t* p) : b(p), q(p + 16) {}
  HEED_INLINE __m512 factors() const { return group_factors(b); }
  HEED_INLINE __m512i codes(int v) const { return q.codes(v); }
  const uint8_t* b;
  GroupNibbles q;
};

struct Q5_K {
  static constexpr BlockFormat kFormat = BlockFormat::q5_k;
  static constexpr int64_t kBytes = 176, kWeights = 256;
  HEED_INLINE explicit Q5_K(const uint8_t* p) : b(p), q(p + 48) {}
  HEED_INLINE __m512 factors() const { return group_factors(b); }
  HEED_INLINE __m512i codes(int v) const {
    int64_t eight;
    std::memcpy(&eight, b + 16 + 8 * v, sizeof eight);
    const __m512i bits =
        _mm512_setr_epi64(0x0101010101010101, 0x0202020202020202, 0x0404040404040404,
                          0x0808080808080808, 0x1010101010101010, 0x2020202020202020,
                          0x4040404040404040, static_cast<int64_t>(0x8080808080808080));
    return with_fifth(q.codes(v), _mm512_test_epi8_mask(_mm512_set1_epi64(eight), bits));
  }
  const uint8_t* b;
  GroupNibbles q;
};

// Scales of 16 columns: factors() are those of all sixteen groups.
struct Q6_K {
  static constexpr BlockFormat kFormat = BlockFormat::q6_k;
  static constexpr int64_t kBytes = 210, kWeights = 256;
  HEED_INLINE explicit Q6_K(const uint8_t* p)
      : b(p), first(load(p)), second(load(p + 64)), high(load(p + 128)) {}
  HEED_INLINE __m512 factors() const {
    const __m512 d = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(read_16(b + 208))));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(b + 192))), d);
  }
  // A half of 128 columns: 32 from low nibbles of 32 bytes, 32 from those of the next 32, then from their
  // high ones; bit pairs of its 32 bytes `high` in this order.
  HEED_INLINE __m512i codes(int v) const {
    const __m512i at = _mm512_set1_epi64(v);
    const __m512i order = _mm512_add_epi64(_mm512_setr_epi64(0, 4, 0, 4, 8, 12, 8, 12), at);
    const __m512i low = _mm512_srlv_epi64(_mm512_permutex2var_epi64(first, order, second),
                                          _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    const __m512i which = _mm512_add_epi64(_mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4), at);
    const __m512i pairs = _mm512_rolv_epi64(_mm512_permutexvar_epi64(which, high),
                                            _mm512_setr_epi64(4, 2, 0, 62, 4, 2, 0, 62));
    constexpr int kAndThenOr = 0xea;
    return _mm512_ternarylogic_epi64(low, _mm512_set1_epi8(0x0f),
                                     _mm512_and_si512(pairs, _mm512_set1_epi8(0x30)), kAndThenOr);
  }
  const uint8_t* b;
  __m512i first, second, high;
};

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
    using Vectors = decltype(vectors);
    rows_by_format<Vectors, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K>(w, x, y, y_stride);
  };
  x.digits == 2 ? add(Avx512<2>()) : add(Avx512<3>());
}

}  // namespace heed::kernels
