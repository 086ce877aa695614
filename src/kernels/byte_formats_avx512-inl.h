// Blocks of GGUF weights, 256 columns at a time: bytes without a sign (block_formats-inl.h describes the
// formats). For files that are compiled for AVX-512 as a whole; each has all of this to itself.
#pragma once
#include "kernels/byte_rows-inl.h"

// GCC 12 takes the unused operand of its own intrinsics for a variable (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

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

// A weight is scale * code + offset, with an offset of -kCentre * scale where kCentre is not 0. factors():
// [scale, offset] of the groups of 32 columns; codes(v): eight columns from 8 v on of each of the groups.
template <int64_t kBlockBytes, int kCodesCentre, int64_t kBlockWeights = 32>
struct Blocks {
  static constexpr int64_t kBytes = kBlockBytes, kWeights = kBlockWeights;
  static constexpr int kCentre = kCodesCentre;
  const uint8_t* b;
};

struct Q8_0 : Blocks<34, 128> {
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
  HEED_INLINE __m512 factors() const { return scales_around<kBytes>(b, -kCentre); }
  HEED_INLINE __m512i codes(int v) const {
    return _mm512_xor_si512(vectors[v], _mm512_set1_epi8(-128));
  }
  __m512i vectors[4];
};

struct Q4_0 : Blocks<18, 8> {
  static constexpr BlockFormat kFormat = BlockFormat::q4_0;
  HEED_INLINE explicit Q4_0(const uint8_t* p) : Blocks{p}, q(halves_of_blocks<kBytes>(p + 2)) {}
  HEED_INLINE __m512 factors() const {
    // The scales lie in the first 128 bytes, nine words apart.
    const __m512i words = _mm512_castsi128_si512(_mm_setr_epi16(0, 9, 18, 27, 36, 45, 54, 63));
    const __m512i raw = _mm512_permutex2var_epi16(load(b), words, load(b + 64));
    return around(_mm512_castsi512_si128(raw), -kCentre);
  }
  HEED_INLINE __m512i codes(int v) const { return nibbles(q, v); }
  Halves q;
};

struct Q4_1 : Blocks<20, 0> {
  static constexpr BlockFormat kFormat = BlockFormat::q4_1;
  HEED_INLINE explicit Q4_1(const uint8_t* p) : Blocks{p}, q(halves_of_blocks<kBytes>(p + 4)) {}
  HEED_INLINE __m512 factors() const { return scales_and_minima<kBytes>(b); }
  HEED_INLINE __m512i codes(int v) const { return nibbles(q, v); }
  Halves q;
};

// Scales, then fifth bits, then nibbles.
template <int64_t kBlockBytes, int kCodesCentre, int64_t kFifths>
struct FiveBits : Blocks<kBlockBytes, kCodesCentre> {
  using Blocks<kBlockBytes, kCodesCentre>::kBytes;
  HEED_INLINE explicit FiveBits(const uint8_t* p)
      : Blocks<kBlockBytes, kCodesCentre>{p},
        q(halves_of_blocks<kBytes>(p + kFifths + 4)),
        fifth(fifth_words<kBytes>(p + kFifths)) {}
  HEED_INLINE __m512i codes(int v) const { return with_fifth(nibbles(q, v), fifth_bits(fifth, v)); }
  Halves q;
  __m512i fifth;
};

struct Q5_0 : FiveBits<22, 16, 2> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_0;
  using FiveBits::FiveBits;
  HEED_INLINE __m512 factors() const { return scales_around<kBytes>(b, -kCentre); }
};

struct Q5_1 : FiveBits<24, 0, 4> {
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

// Blocks that begin with them and end with nibbles.
template <int64_t kBlockBytes>
struct GroupBlocks : Blocks<kBlockBytes, 0, 256> {
  HEED_INLINE explicit GroupBlocks(const uint8_t* p)
      : Blocks<kBlockBytes, 0, 256>{p}, q(p + kBlockBytes - 128) {}
  HEED_INLINE __m512 factors() const { return group_factors(this->b); }
  GroupNibbles q;
};

struct Q4_K : GroupBlocks<144> {
  static constexpr BlockFormat kFormat = BlockFormat::q4_k;
  using GroupBlocks::GroupBlocks;
  HEED_INLINE __m512i codes(int v) const { return q.codes(v); }
};

struct Q5_K : GroupBlocks<176> {
  static constexpr BlockFormat kFormat = BlockFormat::q5_k;
  using GroupBlocks::GroupBlocks;
  HEED_INLINE __m512i codes(int v) const {
    int64_t eight;
    std::memcpy(&eight, b + 16 + 8 * v, sizeof eight);
    const __m512i bits =
        _mm512_setr_epi64(0x0101010101010101, 0x0202020202020202, 0x0404040404040404,
                          0x0808080808080808, 0x1010101010101010, 0x2020202020202020,
                          0x4040404040404040, static_cast<int64_t>(0x8080808080808080));
    return with_fifth(q.codes(v), _mm512_test_epi8_mask(_mm512_set1_epi64(eight), bits));
  }
};

// Scales of 16 columns: factors() are those of all sixteen groups, without offsets.
struct Q6_K : Blocks<210, 32, 256> {
  static constexpr BlockFormat kFormat = BlockFormat::q6_k;
  HEED_INLINE explicit Q6_K(const uint8_t* p)
      : Blocks{p}, first(load(p)), second(load(p + 64)), high(load(p + 128)) {}
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
  __m512i first, second, high;
};

// Calls call(std::type_identity<Format>()) for the struct of a format.
template <class Call>
void with_format(BlockFormat format, const Call& call) {
  for_format<Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K>(format, call);
}

}  // namespace
}  // namespace heed::kernels
