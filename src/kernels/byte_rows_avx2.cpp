// byte_rows.h with AVX2, compiled for it as a whole. A vector has eight columns of each of four groups. Sums
// of two products of bytes are words (vpmaddubsw); all columns of a group, or its halves where those have
// scales, are added in words: 31 times 128 in eight products, or 63 times 128 in four, is below 2^15.
#include <immintrin.h>

#include "kernels/byte_rows-inl.h"

namespace heed::kernels {

namespace {

HEED_INLINE __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// Numbers of the eight groups of 32 columns in a chunk.
struct Factors {
  __m256 scales, offsets;
};

// Eight blocks of 32 weights that begin with a float16 scale d: weights are d (code + centre).
template <int64_t kBytes>
HEED_INLINE Factors scales_around(const uint8_t* b, float centre) {
  const __m256 d = _mm256_cvtph_ps(eight_scales<kBytes>(b));
  return {d, _mm256_mul_ps(d, _mm256_set1_ps(centre))};
}

// Eight blocks that begin with a scale d and a minimum m: weights are d code + m.
template <int64_t kBytes>
HEED_INLINE Factors scales_and_minima(const uint8_t* b) {
  const __m256 first = _mm256_cvtph_ps(four_words<kBytes>(b));
  const __m256 second = _mm256_cvtph_ps(four_words<kBytes>(b + 4 * kBytes));
  const auto in_order = [](__m256 x) __attribute__((always_inline)) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  };
  return {in_order(_mm256_shuffle_ps(first, second, 0x88)),
          in_order(_mm256_shuffle_ps(first, second, 0xdd))};
}

// d, dmin and the eight 6-bit scales and minima that are packed into 12 bytes.
HEED_INLINE Factors group_factors(const uint8_t* b) {
  const __m128i packed = group_scales(b);
  const __m128 pair = group_pair(b);
  const auto eight = [](__m128i bytes, __m128 scale) __attribute__((always_inline)) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                         _mm256_broadcastss_ps(scale));
  };
  return {eight(packed, pair),
          eight(_mm_unpackhi_epi64(packed, packed), _mm_shuffle_ps(pair, pair, 0x55))};
}

// Codes of four groups: of [v], columns 8 v to 8 v + 7 of each.
struct Codes {
  __m256i of[4];
};

HEED_INLINE __m256i low_nibbles(__m256i bytes) {
  return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}
HEED_INLINE __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

// From 32 columns of each of four groups.
HEED_INLINE Codes turned(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab_even = _mm256_unpacklo_epi64(a, b), ab_odd = _mm256_unpackhi_epi64(a, b);
  const __m256i cd_even = _mm256_unpacklo_epi64(c, d), cd_odd = _mm256_unpackhi_epi64(c, d);
  return {{_mm256_permute2x128_si256(ab_even, cd_even, 0x20),
           _mm256_permute2x128_si256(ab_odd, cd_odd, 0x20),
           _mm256_permute2x128_si256(ab_even, cd_even, 0x31),
           _mm256_permute2x128_si256(ab_odd, cd_odd, 0x31)}};
}

// Four blocks of 16 bytes each: low nibbles are columns 0..15, high ones 16..31.
template <int64_t kBytes>
HEED_INLINE Codes block_nibbles(const uint8_t* q) {
  const __m256i even = _mm256_set_m128i(load_16(q + 2 * kBytes), load_16(q));
  const __m256i odd = _mm256_set_m128i(load_16(q + 3 * kBytes), load_16(q + kBytes));
  const __m256i first = _mm256_unpacklo_epi64(even, odd), last = _mm256_unpackhi_epi64(even, odd);
  return {{low_nibbles(first), low_nibbles(last), high_nibbles(first), high_nibbles(last)}};
}

HEED_INLINE __m256i with_fifth(__m256i codes, __m256i bytes, __m256i bits) {
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
  return _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}

// Fifth bits of four blocks, a bit each column from `p` on.
template <int64_t kBytes>
HEED_INLINE Codes with_block_fifths(Codes codes, const uint8_t* p) {
  const __m256i words = _mm256_broadcastsi128_si256(four_words<kBytes>(p));
  const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i first =
      _mm256_setr_epi64x(0, 0x0404040404040404, 0x0808080808080808, 0x0c0c0c0c0c0c0c0c);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m256i which = _mm256_add_epi8(first, _mm256_set1_epi8(static_cast<char>(v)));
    codes.of[v] = with_fifth(codes.of[v], _mm256_shuffle_epi8(words, which), bits);
  }
  return codes;
}

// 64 bytes: low nibbles of 32 are one group, high ones the next.
HEED_INLINE Codes group_nibbles(const uint8_t* q) {
  const __m256i first = load(q), second = load(q + 32);
  return turned(low_nibbles(first), high_nibbles(first), low_nibbles(second), high_nibbles(second));
}

// Formats, as block_formats-inl.h describes them, a chunk at a time. codes(b, h): of groups 4 h to 4 h + 3.
struct Q8_0 {
  static constexpr BlockFormat kFormat = BlockFormat::q8_0;
  static constexpr int64_t kBytes = 34, kWeights = 32;
  static HEED_INLINE Factors factors(const uint8_t* b) { return scales_around<kBytes>(b, -128); }
  // Code + 128; words would not hold their products, so nibbles are multiplied.
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    const uint8_t* q = b + 4 * h * kBytes + 2;
    const __m256i sign = _mm256_set1_epi8(-128);
    Codes all = turned(load(q), load(q + kBytes), load(q + 2 * kBytes), load(q + 3 * kBytes));
#pragma GCC unroll 4
    for (auto& codes : all.of) codes = _mm256_xor_si256(codes, sign);
    return all;
  }
};

struct Q4_0 {
  static constexpr BlockFormat kFormat = BlockFormat::q4_0;
  static constexpr int64_t kBytes = 18, kWeights = 32;
  static HEED_INLINE Factors factors(const uint8_t* b) { return scales_around<kBytes>(b, -8); }
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    return block_nibbles<kBytes>(b + 4 * h * kBytes + 2);
  }
};

struct Q4_1 {
  static constexpr BlockFormat kFormat = BlockFormat::q4_1;
  static constexpr int64_t kBytes = 20, kWeights = 32;
  static HEED_INLINE Factors factors(const uint8_t* b) { return scales_and_minima<kBytes>(b); }
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    return block_nibbles<kBytes>(b + 4 * h * kBytes + 4);
  }
};

// Scales, then fifth bits, then nibbles.
template <int64_t kBlockBytes, int64_t kFifths>
struct FiveBits {
  static constexpr int64_t kBytes = kBlockBytes, kWeights = 32;
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    const uint8_t* fifth = b + 4 * h * kBytes + kFifths;
    return with_block_fifths<kBytes>(block_nibbles<kBytes>(fifth + 4), fifth);
  }
};

struct Q5_0 : FiveBits<22, 2> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_0;
  static HEED_INLINE Factors factors(const uint8_t* b) { return scales_around<kBytes>(b, -16); }
};

struct Q5_1 : FiveBits<24, 4> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_1;
  static HEED_INLINE Factors factors(const uint8_t* b) { return scales_and_minima<kBytes>(b); }
};

struct Q4_K {
  static constexpr BlockFormat kFormat = BlockFormat::q4_k;
  static constexpr int64_t kBytes = 144, kWeights = 256;
  static HEED_INLINE Factors factors(const uint8_t* b) { return group_factors(b); }
  static HEED_INLINE Codes codes(const uint8_t* b, int h) { return group_nibbles(b + 16 + 64 * h); }
};

struct Q5_K {
  static constexpr BlockFormat kFormat = BlockFormat::q5_k;
  static constexpr int64_t kBytes = 176, kWeights = 256;
  static HEED_INLINE Factors factors(const uint8_t* b) { return group_factors(b); }
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    Codes all = group_nibbles(b + 48 + 64 * h);
    const __m256i bits =
        _mm256_slli_epi16(_mm256_setr_epi64x(0x0101010101010101, 0x0202020202020202,
                                             0x0404040404040404, 0x0808080808080808),
                          4 * h);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      int64_t eight;
      std::memcpy(&eight, b + 16 + 8 * v, sizeof eight);
      all.of[v] = with_fifth(all.of[v], _mm256_set1_epi64x(eight), bits);
    }
    return all;
  }
};

// Scales of 16 columns: factors() are those of the first and the last eight groups of so many.
struct Q6_K {
  static constexpr BlockFormat kFormat = BlockFormat::q6_k;
  static constexpr int64_t kBytes = 210, kWeights = 256;
  static HEED_INLINE Factors factors(const uint8_t* b) {
    const __m256 d = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(read_16(b + 208))));
    const __m128i all = load_16(b + 192);
    const auto eight = [d](__m128i bytes) __attribute__((always_inline)) {
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d);
    };
    return {eight(all), eight(_mm_unpackhi_epi64(all, all))};
  }
  // Low nibbles of 32 bytes, of the next 32, their high ones; bit pairs of 32 bytes in this order.
  static HEED_INLINE Codes codes(const uint8_t* b, int h) {
    const __m256i first = load(b + 64 * h), second = load(b + 64 * h + 32);
    const __m256i pairs = load(b + 128 + 32 * h), kept = _mm256_set1_epi8(0x30);
    const auto joined = [kept](__m256i nibbles, __m256i above) __attribute__((always_inline)) {
      return _mm256_or_si256(nibbles, _mm256_and_si256(above, kept));
    };
    return turned(joined(low_nibbles(first), _mm256_slli_epi16(pairs, 4)),
                  joined(low_nibbles(second), _mm256_slli_epi16(pairs, 2)),
                  joined(high_nibbles(first), pairs),
                  joined(high_nibbles(second), _mm256_srli_epi16(pairs, 2)));
  }
};

// Sums of codes [first, end) of each group times the bytes of activations, from `x` on.
template <int kDigits>
struct Dots {
  __m256i high, middle, low;

  HEED_INLINE Dots(const Codes& codes, const SplitColumns& x, int h, int first, int end)
      : high(words(codes, x.high + 32 * h, first, end)),
        middle(words(codes, x.middle + 32 * h, first, end)),
        low(kDigits == 3 ? words(codes, x.low + 32 * h, first, end) : middle) {}
  HEED_INLINE Dots(const Dots& low_nibbles, const Dots& high_nibbles)
      : high(with_high(low_nibbles.high, high_nibbles.high)),
        middle(with_high(low_nibbles.middle, high_nibbles.middle)),
        low(with_high(low_nibbles.low, high_nibbles.low)) {}
  /// In units of steps.
  HEED_INLINE __m256 sum() const {
    const __m256i upper = _mm256_add_epi32(_mm256_slli_epi32(high, 8), middle);
    if constexpr (kDigits == 2) return _mm256_cvtepi32_ps(upper);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(upper), _mm256_set1_ps(256), _mm256_cvtepi32_ps(low));
  }

 private:
  static HEED_INLINE __m256i words(const Codes& codes, const int8_t* x, int first, int end) {
    __m256i sum = _mm256_maddubs_epi16(codes.of[first], load(x + 64 * first));
#pragma GCC unroll 4
    for (int v = first + 1; v < end; ++v) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes.of[v], load(x + 64 * v)));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
  static HEED_INLINE __m256i with_high(__m256i low, __m256i high) {
    return _mm256_add_epi32(low, _mm256_slli_epi32(high, 4));
  }
};

HEED_INLINE __m256 chosen(__m256 x, int a, int b, int c, int d) {
  return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(a, a, b, b, c, c, d, d));
}

// x in lanes [begin, end), else 0.
HEED_INLINE __m256 lanes_of(__m256 x, int64_t begin, int64_t end) {
  static constexpr int32_t kFrom[] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  static constexpr int32_t kTo[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  const auto held = [](int64_t lane) __attribute__((always_inline)) {
    return lane < 0 ? 0 : lane > 8 ? 8 : lane;
  };
  const __m256i mask = _mm256_and_si256(load(kFrom + 8 - held(begin)), load(kTo + 8 - held(end)));
  return _mm256_and_ps(x, _mm256_castsi256_ps(mask));
}

template <int kDigits>
struct Avx2 {
  using Sum = __m256;
  static constexpr int kMostRows = 2;

  // Products of groups 4 h + g in lanes 2 g and 2 g + 1 of [h], offsets in the lanes of their groups (with
  // scales of 16 columns, in any: rows are whole chunks).
  struct Terms {
    __m256 products[2], offsets;
  };

  template <class Format>
  struct Chunk {
    HEED_INLINE explicit Chunk(const uint8_t* b)
        : codes{Format::codes(b, 0), Format::codes(b, 1)}, factors(Format::factors(b)) {}
    Codes codes[2];
    Factors factors;
  };

  template <class Format>
  static HEED_INLINE Terms terms(const Chunk<Format>& chunk, const SplitColumns& x) {
    const __m256 steps = _mm256_load_ps(x.steps);
    Terms terms;
    if constexpr (std::is_same_v<Format, Q6_K>) {
      const __m256 of_halves[] = {chunk.factors.scales, chunk.factors.offsets};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 even = chosen(of_halves[h], 0, 2, 4, 6),
                     odd = chosen(of_halves[h], 1, 3, 5, 7);
        const __m256 both =
            _mm256_fmadd_ps(Dots<kDigits>(chunk.codes[h], x, h, 2, 4).sum(), odd,
                            _mm256_mul_ps(Dots<kDigits>(chunk.codes[h], x, h, 0, 2).sum(), even));
        terms.products[h] =
            _mm256_mul_ps(both, chosen(steps, 4 * h, 4 * h + 1, 4 * h + 2, 4 * h + 3));
      }
      terms.offsets = _mm256_fmadd_ps(of_halves[0], _mm256_load_ps(x.centres),
                                      _mm256_mul_ps(of_halves[1], _mm256_load_ps(x.centres + 8)));
    } else {
      const __m256 scaled = _mm256_mul_ps(chunk.factors.scales, steps);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        terms.products[h] = _mm256_mul_ps(sum_of<Format>(chunk.codes[h], x, h),
                                          chosen(scaled, 4 * h, 4 * h + 1, 4 * h + 2, 4 * h + 3));
      }
      terms.offsets = _mm256_mul_ps(chunk.factors.offsets, _mm256_load_ps(x.sums));
    }
    return terms;
  }

  static HEED_INLINE void add(__m256& sum, const Terms& t, int64_t begin, int64_t end) {
    if (end - begin == 8) {
      const __m256 products = _mm256_add_ps(t.products[0], t.products[1]);
      sum = _mm256_add_ps(sum, _mm256_add_ps(products, t.offsets));
      return;
    }
    sum = _mm256_add_ps(sum, lanes_of(t.products[0], 2 * begin, 2 * end));
    sum = _mm256_add_ps(sum, lanes_of(t.products[1], 2 * begin - 8, 2 * end - 8));
    sum = _mm256_add_ps(sum, lanes_of(t.offsets, begin, end));
  }

  static HEED_INLINE float total(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

 private:
  template <class Format>
  static HEED_INLINE __m256 sum_of(const Codes& codes, const SplitColumns& x, int h) {
    if constexpr (std::is_same_v<Format, Q8_0>) {
      Codes low, high;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        low.of[v] = low_nibbles(codes.of[v]);
        high.of[v] = high_nibbles(codes.of[v]);
      }
      return Dots<kDigits>({low, x, h, 0, 4}, {high, x, h, 0, 4}).sum();
    } else {
      return Dots<kDigits>(codes, x, h, 0, 4).sum();
    }
  }
};

HEED_INLINE int sum_of_eight(__m256i x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// The largest of |x|, as bits: NaN is above infinity.
HEED_INLINE uint32_t largest_bits(const __m256 (&x)[4]) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const auto bits = [magnitude](__m256 v) __attribute__((always_inline)) {
    return _mm256_and_si256(_mm256_castps_si256(v), magnitude);
  };
  const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(bits(x[0]), bits(x[1])),
                                         _mm256_max_epi32(bits(x[2]), bits(x[3])));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(
      _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}

// Eight numbers of a byte each.
HEED_INLINE void store_bytes(__m256i x, int8_t* to) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

}  // namespace

void split_columns_avx2(const float* x, int64_t columns, int64_t chunks, int digits,
                        SplitColumns* to) {
  const float *from = x, *end = x + columns;
  for (int64_t c = 0; c < chunks; ++c, ++to) {
    for (int64_t g = 0; g < 8; ++g) {
      const __m256 values[] = {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8),
                               _mm256_loadu_ps(from + 16), _mm256_loadu_ps(from + 24)};
      from = from + 32 == end ? x : from + 32;
      const SplitStep step(largest_bits(values));
      const __m256 inverse = _mm256_set1_ps(step.inverse);
      int sums[2] = {0, 0};
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v) {
        // What is not finite has the inverse 0, and NaN would become the least number.
        const __m256i q = step.inverse == 0 ? _mm256_setzero_si256()
                                            : _mm256_cvtps_epi32(_mm256_mul_ps(values[v], inverse));
        // Bytes with a sign: what is above 127 counts in the next one.
        const auto byte = [](__m256i all) __attribute__((always_inline)) {
          return _mm256_srai_epi32(_mm256_slli_epi32(all, 24), 24);
        };
        const __m256i low = byte(q), rest = _mm256_srai_epi32(_mm256_sub_epi32(q, low), 8);
        const __m256i middle = byte(rest);
        const int64_t at = 64 * v + 8 * g;
        store_bytes(_mm256_srai_epi32(_mm256_sub_epi32(rest, middle), 8), to->high + at);
        store_bytes(middle, to->middle + at);
        store_bytes(low, to->low + at);
        sums[v / 2] += sum_of_eight(q);
      }
      step.store(g, sums, digits, *to);
    }
  }
}

void byte_rows_avx2(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride) {
  const auto add = [&](auto vectors) {
    for_format<Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K>(w.format, [&](auto format) {
      rows_of<decltype(vectors), typename decltype(format)::type>(w, x, y, y_stride);
    });
  };
  x.digits == 2 ? add(Avx2<2>()) : add(Avx2<3>());
}

}  // namespace heed::kernels
