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

// AddRows<Format, M>::run for M rows of activations at once, up to kMost (2 or 4).
template <template <class, int> class AddRows, int kMost, class Format>
void rows_of(const BlockMatrix& w, SplitRows x, float* y, int64_t y_stride) {
  const auto add = [&](auto rows) {
    for (; x.count >= rows.value; x.count -= rows.value) {
      AddRows<Format, rows.value>::run(w, x, y, y_stride);
      x.data += rows.value * x.stride;
      y += rows.value * y_stride;
    }
  };
  if constexpr (kMost == 4) add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 2>());
  add(std::integral_constant<int, 1>());
}

template <template <class, int> class AddRows, int kMost, class... Formats>
void rows_by_format(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride) {
  const auto add = [&](auto format) {
    using Format = typename decltype(format)::type;
    if (w.format == Format::kFormat) rows_of<AddRows, kMost, Format>(w, x, y, y_stride);
  };
  (add(std::type_identity<Formats>()), ...);
}

}  // namespace
}  // namespace heed::kernels
