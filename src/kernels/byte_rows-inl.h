// What the files of byte_rows.h share. They are compiled for different instruction sets, so each has all of
// this to itself.
#include <cstring>
#include <type_traits>

#include "kernels/byte_rows.h"

#define HEED_INLINE __attribute__((always_inline)) inline

namespace heed::kernels {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of weights asked for ahead of their use
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
  HEED_INLINE void store(int64_t group, const int (&sums)[2], SplitColumns& to) const {
    const float halves[] = {step * static_cast<float>(sums[0]), step * static_cast<float>(sums[1])};
    to.steps[group] = step;
    to.sums[group] = halves[0] + halves[1];
    to.centres[2 * group] = -32 * halves[0];
    to.centres[2 * group + 1] = -32 * halves[1];
  }
};

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
#pragma GCC unroll 5
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(b + kAhead + line);
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
  add(std::integral_constant<int, 1>());
}

template <class Vectors, class... Formats>
void rows_by_format(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride) {
  const auto add = [&](auto format) {
    using Format = typename decltype(format)::type;
    if (w.format == Format::kFormat) rows_of<Vectors, Format>(w, x, y, y_stride);
  };
  (add(std::type_identity<Formats>()), ...);
}

}  // namespace
}  // namespace heed::kernels
