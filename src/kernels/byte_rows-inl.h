// What the files of byte_rows.h share. They are compiled for different instruction sets, so each has all of
// this to itself.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels/byte_rows.h"

#define HEED_INLINE __attribute__((always_inline)) inline

namespace heed::kernels {
namespace {

constexpr int64_t kAhead = 6144;  // bytes of weights asked for ahead of their use
constexpr int64_t kChunk = kSplitColumns;

HEED_INLINE int read_16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
HEED_INLINE int read_32(const uint8_t* p) {
  int value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

HEED_INLINE __m128i load_16(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Numbers of 16 bits at the start of eight blocks.
template <int64_t kBytes>
HEED_INLINE __m128i eight_scales(const uint8_t* b) {
  __m128i raw = _mm_cvtsi32_si128(read_16(b));
  raw = _mm_insert_epi16(raw, read_16(b + 1 * kBytes), 1);
  raw = _mm_insert_epi16(raw, read_16(b + 2 * kBytes), 2);
  raw = _mm_insert_epi16(raw, read_16(b + 3 * kBytes), 3);
  raw = _mm_insert_epi16(raw, read_16(b + 4 * kBytes), 4);
  raw = _mm_insert_epi16(raw, read_16(b + 5 * kBytes), 5);
  raw = _mm_insert_epi16(raw, read_16(b + 6 * kBytes), 6);
  return _mm_insert_epi16(raw, read_16(b + 7 * kBytes), 7);
}

// Words of 32 bits, kBytes apart.
template <int64_t kBytes>
HEED_INLINE __m128i four_words(const uint8_t* p) {
  __m128i raw = _mm_cvtsi32_si128(read_32(p));
  raw = _mm_insert_epi32(raw, read_32(p + 1 * kBytes), 1);
  raw = _mm_insert_epi32(raw, read_32(p + 2 * kBytes), 2);
  return _mm_insert_epi32(raw, read_32(p + 3 * kBytes), 3);
}

// Of a block of Q4_K or Q5_K, the eight 6-bit scales and minima that are packed into 12 bytes.
HEED_INLINE __m128i group_scales(const uint8_t* b) {
  const __m128i x =
      load_16(b);  // d and dmin, scales, minima, upper halves of the last four of both
  // Scales 0..3, scales 4..7, minima 0..3, minima 4..7.
  const __m128i own =
      _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(x, 0xa5), _mm_setr_epi32(0, 2, 0, 2)),
                    _mm_setr_epi32(0x3f3f3f3f, 0x30303030, 0x3f3f3f3f, 0x30303030));
  const __m128i lent =
      _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(x, 0xff), _mm_setr_epi32(0, 0, 0, 4)),
                    _mm_setr_epi32(0, 0x0f0f0f0f, 0, 0x0f0f0f0f));
  return _mm_or_si128(own, lent);
}
// d and -dmin.
HEED_INLINE __m128 group_pair(const uint8_t* b) {
  return _mm_xor_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(read_32(b))), _mm_setr_ps(0.0F, -0.0F, 0, 0));
}

// Of 32 activations, the largest of which in magnitude has these bits.
struct SplitStep {
  float step = 0, inverse = 0;  // inverse 0: all bytes are 0

  HEED_INLINE explicit SplitStep(uint32_t largest_bits) {
    constexpr uint32_t kInfinity = 0x7f800000, kSmallest = 0x0c000000;  // 2^-103
    constexpr float kMost = 127 * 65536;
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    if (largest_bits >= kInfinity) {
      step = __builtin_nanf("");
    } else if (largest_bits >= kSmallest) {
      step = largest * (1 / kMost);
      inverse = kMost / largest;
    }
  }
  /// Given the sums of both halves in steps.
  HEED_INLINE void store(int64_t group, const int (&sums)[2], int digits, SplitColumns& to) const {
    const float halves[] = {step * static_cast<float>(sums[0]), step * static_cast<float>(sums[1])};
    to.steps[group] = digits == 2 ? 256 * step : step;
    to.sums[group] = halves[0] + halves[1];
    to.centres[2 * group] = -32 * halves[0];
    to.centres[2 * group + 1] = -32 * halves[1];
  }
};

// Into the second-level cache: the first has room for weights that come in time, or for activations.
template <int64_t kBytes>
HEED_INLINE void prefetch(const uint8_t* p) {
#pragma GCC unroll 5
  for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// Vectors says how one instruction set does it:
//   Sum, Terms, kMostRows         a row's sum, what a chunk adds to it, rows of activations at once (2 or 4)
//   Chunk<Format>(bytes)          the weights of a chunk
//   terms(chunk, activations)     what its groups add
//   add(sum, terms, begin, end)   adds those of groups [begin, end)
//   total(sum)
//
// Rows are read as one stream of groups, so that a chunk may hold the end of one and the beginning of the
// next: copies of short rows, to fill chunks, would be read before they have reached the cache.
template <class Vectors, class Format, int M>
void add_rows(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride) {
  constexpr int64_t kBytes = kChunk / Format::kWeights * Format::kBytes;
  const int64_t groups = w.columns / 32, all = w.rows * groups;
  const auto* b = reinterpret_cast<const uint8_t*>(w.data);
  typename Vectors::Sum sums[M] = {};
  int64_t left = groups;  // of the row
  const SplitColumns *columns = x.data, *end = x.data + x.stride;
  for (int64_t at = 0; at < all; at += 8, b += kBytes) {
    prefetch<kBytes>(b + kAhead);
    const int64_t count = all - at < 8 ? all - at : 8;
    alignas(64) uint8_t last[kBytes];
    if (count < 8) {
      std::memset(last, 0, kBytes);
      std::memcpy(last, b, static_cast<size_t>(count * Format::kBytes));
    }
    const typename Vectors::template Chunk<Format> chunk(count < 8 ? last : b);
    typename Vectors::Terms terms[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) terms[m] = Vectors::terms(chunk, columns[m * x.stride]);
    if (++columns == end) columns = x.data;
    for (int64_t begin = 0; begin < count;) {
      const int64_t stop = left < count - begin ? begin + left : count;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) Vectors::add(sums[m], terms[m], begin, stop);
      left -= stop - begin;
      begin = stop;
      if (left > 0) continue;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        y[m * y_stride] = Vectors::total(sums[m]);
        sums[m] = typename Vectors::Sum{};
      }
      ++y;
      left = groups;
    }
  }
}

// R rows of whole chunks, which read one row of activations together.
template <class Vectors, class Format, int R>
void add_whole_rows(const uint8_t* b, int64_t chunks, const SplitColumns* x, float* y) {
  constexpr int64_t kBytes = kChunk / Format::kWeights * Format::kBytes;
  const int64_t row = chunks * kBytes;
  // In the order of memory, which hardware follows: two streams at once are half as fast.
  const uint8_t* ahead = b + (R == 1 ? kAhead : R * row);
  typename Vectors::Sum sums[R] = {};
  for (int64_t c = 0; c < chunks; ++c, b += kBytes, ++x) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, ahead += kBytes) {
      prefetch<kBytes>(ahead);
      const typename Vectors::template Chunk<Format> chunk(b + r * row);
      Vectors::add(sums[r], Vectors::terms(chunk, *x), 0, 8);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) y[r] = Vectors::total(sums[r]);
}

template <class Vectors, class Format>
void add_row(const BlockMatrix& w, const SplitRows& x, float* y) {
  if (w.columns % kChunk != 0) return add_rows<Vectors, Format, 1>(w, x, y, 0);
  // From so many on, activations do not stay in the first-level cache while weights pass.
  constexpr int64_t kManyChunks = 32;
  const auto* b = reinterpret_cast<const uint8_t*>(w.data);
  const int64_t chunks = w.columns / kChunk;
  int64_t n = 0;
  const auto add = [&](auto rows) {
    for (; n + rows.value <= w.rows; n += rows.value) {
      add_whole_rows<Vectors, Format, rows.value>(b + n * w.row_bytes(), chunks, x.data, y + n);
    }
  };
  if (chunks >= kManyChunks) add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 1>());
}

template <class Vectors, class Format>
void rows_of(const BlockMatrix& w, SplitRows x, float* y, int64_t y_stride) {
  const auto add = [&](auto rows) {
    for (; x.count >= rows.value; x.count -= rows.value) {
      add_rows<Vectors, Format, rows.value>(w, x, y, y_stride);
      x.data += rows.value * x.stride;
      y += rows.value * y_stride;
    }
  };
  if constexpr (Vectors::kMostRows == 4) add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 2>());
  if (x.count > 0) add_row<Vectors, Format>(w, x, y);
}

// Calls call(std::type_identity<Format>()) for the one of the structs that is for the format.
template <class... Formats, class Call>
void for_format(BlockFormat format, const Call& call) {
  const auto call_if = [&](auto candidate) {
    if (format == decltype(candidate)::type::kFormat) call(candidate);
  };
  (call_if(std::type_identity<Formats>()), ...);
}

}  // namespace
}  // namespace heed::kernels
