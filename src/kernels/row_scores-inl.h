// One row of scores inside the range of keys that it sees: how scores are shaped, and loops over the
// row's vectors. Once per Highway target.
#if defined(HEED_KERNELS_ROW_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_ROW_SCORES_INL_H_
#undef HEED_KERNELS_ROW_SCORES_INL_H_
#else
#define HEED_KERNELS_ROW_SCORES_INL_H_
#endif

#include <hwy/highway.h>

#include <limits>
#include <type_traits>

#include "kernels/tile.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
inline constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// The scores of one row, shaped: s * scale + bias - slope * |distance|.
template <class T, bool kAlibi>
struct ShapedRow {
  const T* s;
  T scale, bias, slope, distance;  // distance: from key 0 to the query

  ShapedRow(const Block<T>& block, int64_t r, const WeightShape<T>& shape)
      : s(block.row(r)),
        scale(shape.scale),
        bias(shape.bias),
        slope(shape.slope),
        distance(static_cast<T>(shape.distance + r)) {}

  HWY_INLINE hn::Vec<Full<T>> at(int64_t m) const { return shape(hn::LoadU(Full<T>(), s + m), m); }
  HWY_INLINE hn::Vec<Full<T>> shape(hn::Vec<Full<T>> score, int64_t m) const {
    const Full<T> d;
    const auto t = hn::MulAdd(score, hn::Set(d, scale), hn::Set(d, bias));
    if constexpr (kAlibi) {
      const auto steps = hn::Abs(hn::Sub(hn::Set(d, distance), hn::Iota(d, static_cast<T>(m))));
      return hn::NegMulAdd(hn::Set(d, slope), steps, t);
    } else {
      return t;
    }
  }
};

HWY_INLINE KeyRange range_of(const KeyRange* ranges, int64_t r, int64_t key_count) {
  return ranges == nullptr ? KeyRange{0, static_cast<int32_t>(key_count)} : ranges[r];
}

template <class T>
HWY_INLINE hn::Mask<Full<T>> visible_lanes(int64_t m, KeyRange range) {
  const Full<T> d;
  const auto from = hn::FirstN(d, static_cast<size_t>(HWY_MAX(range.begin - m, int64_t{0})));
  const auto to = hn::FirstN(d, static_cast<size_t>(HWY_MIN(range.end - m, lanes<T>())));
  return hn::AndNot(from, to);
}

// Calls whole(m, parity) for vectors of columns inside the range and edge(m, mask) for those that
// straddle its ends. `parity` alternates, for two independent accumulators.
template <class T, class Whole, class Edge>
HWY_INLINE void for_visible(KeyRange range, Whole&& whole, Edge&& edge) {
  constexpr int64_t kLanes = lanes<T>();
  int64_t m = range.begin / kLanes * kLanes;
  if (m < range.begin) {
    edge(m, visible_lanes<T>(m, range));
    m += kLanes;
  }
  for (; m + 2 * kLanes <= range.end; m += 2 * kLanes) {
    whole(m, std::integral_constant<int, 0>());
    whole(m + kLanes, std::integral_constant<int, 1>());
  }
  if (m + kLanes <= range.end) {
    whole(m, std::integral_constant<int, 0>());
    m += kLanes;
  }
  if (m < range.end) edge(m, visible_lanes<T>(m, range));
}

// Zeros in the columns of one row that for_visible does not pass over.
template <class T, class Element>
HWY_INLINE void clear_outside(Element* out, KeyRange range, int64_t columns) {
  const auto clear = [out](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) out[m] = Element{0};
  };
  if (range.empty()) return clear(0, columns);
  clear(0, range.begin / lanes<T>() * lanes<T>());
  clear((range.end + lanes<T>() - 1) / lanes<T>() * lanes<T>(), columns);
}

// A scale of 0 would make NaN of a score that a mask set to -inf: applied beforehand, leaving a scale
// of 1.
template <class T>
HWY_INLINE WeightShape<T> without_zero_scale(Block<T> s, int64_t rows, int64_t key_count,
                                             const KeyRange* ranges, WeightShape<T> shape) {
  if (shape.scale != 0) return shape;
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange range = range_of(ranges, r, key_count);
    for (int64_t m = range.begin; m < range.end; ++m) {
      T& x = s.row(r)[m];
      if (x != kMinusInfinity<T>) x *= 0;
    }
  }
  shape.scale = 1;
  return shape;
}

// sum over n <= order of t^n / n!
template <class T, class V>
HWY_INLINE V taylor(Full<T> d, V t, int order) {
  const V one = hn::Set(d, T{1});
  V sum = one;
  for (int n = order; n > 0; --n) sum = hn::MulAdd(sum, hn::Mul(t, hn::Set(d, T{1} / n)), one);
  return sum;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
