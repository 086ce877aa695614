// One row of scores inside the range of keys that it sees: how scores are shaped, and loops over the
// row's vectors. Once per Highway target.
#if defined(HEED_KERNELS_ROW_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_ROW_SCORES_INL_H_
#undef HEED_KERNELS_ROW_SCORES_INL_H_
#else
#define HEED_KERNELS_ROW_SCORES_INL_H_
#endif

#include <hwy/highway.h>

#include <cmath>
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

  // N vectors from column m on.
  template <int N>
  HWY_INLINE void load(int64_t m, hn::Vec<Full<T>> (&t)[N]) const {
    const Full<T> d;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const int64_t step = j * lanes<T>();
      t[j] = hn::MulAdd(hn::LoadU(d, s + m + step), hn::Set(d, scale), hn::Set(d, bias));
      if constexpr (kAlibi) {
        const auto first = hn::Set(d, distance - static_cast<T>(m + step));
        const auto steps = hn::Abs(hn::Sub(first, hn::Iota(d, T{0})));
        t[j] = hn::NegMulAdd(hn::Set(d, slope), steps, t[j]);
      }
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

// The lanes that a row sees of a vector of columns: all of them, or a mask.
struct AllLanes {};
template <class V>
HWY_INLINE V seen_or_zero(AllLanes, V x) {
  return x;
}
template <class M, class V>
HWY_INLINE V seen_or_zero(M seen, V x) {
  return hn::IfThenElseZero(seen, x);
}
template <class V>
HWY_INLINE V seen_or(AllLanes, V x, V /*otherwise*/) {
  return x;
}
template <class M, class V>
HWY_INLINE V seen_or(M seen, V x, V otherwise) {
  return hn::IfThenElse(seen, x, otherwise);
}

// Vectors that are worked on together.
inline constexpr int kRowGroup = 4;

// Calls body(m, number of vectors as a constant, lanes) for groups of kRowGroup vectors of columns inside
// the range, then for what remains one by one; only the vectors that straddle its ends have a mask.
template <class T, class Body>
HWY_INLINE void for_visible(KeyRange range, Body&& body) {
  constexpr int64_t kLanes = lanes<T>();
  const std::integral_constant<int, kRowGroup> group;
  const std::integral_constant<int, 1> one;
  int64_t m = range.begin / kLanes * kLanes;
  if (m < range.begin) {
    body(m, one, visible_lanes<T>(m, range));
    m += kLanes;
  }
  for (; m + group * kLanes <= range.end; m += group * kLanes) body(m, group, AllLanes());
  for (; m + kLanes <= range.end; m += kLanes) body(m, one, AllLanes());
  if (m < range.end) body(m, one, visible_lanes<T>(m, range));
}

// The range rounded out to whole vectors.
template <class T>
HWY_INLINE KeyRange whole_vectors(KeyRange range) {
  constexpr auto kLanes = static_cast<int32_t>(lanes<T>());
  if (range.empty()) return {};
  return {range.begin / kLanes * kLanes, (range.end + kLanes - 1) / kLanes * kLanes};
}

// Writes -inf where whole_vectors reaches over the range, so that the row can do without masks.
template <class T>
HWY_INLINE void hide_edges(T* s, KeyRange range) {
  const Full<T> d;
  const auto nothing = hn::Set(d, kMinusInfinity<T>);
  if (range.empty()) return;
  const int64_t first = range.begin / lanes<T>() * lanes<T>();
  const int64_t last = range.end / lanes<T>() * lanes<T>();
  if (first < range.begin) {
    hn::BlendedStore(nothing, hn::FirstN(d, static_cast<size_t>(range.begin - first)), d,
                     s + first);
  }
  if (last < range.end) {
    const auto seen = hn::FirstN(d, static_cast<size_t>(range.end - last));
    hn::BlendedStore(nothing, hn::Not(seen), d, s + last);
  }
}

// A row shaped in place, relative to its pivot in row.bias: what is within `noise` of 0 becomes 0. (By
// value: a row whose address is taken would not stay in registers.)
template <class T, bool kAlibi>
HWY_NOINLINE ShapedRow<T, kAlibi> shaped_in_place(ShapedRow<T, kAlibi> row, KeyRange range, T noise,
                                                  T* s) {
  const Full<T> d;
  const auto zero = hn::Zero(d), bias = hn::Set(d, row.bias);
  row.bias = 0;
  const KeyRange whole = whole_vectors<T>(range);
  for (int64_t m = whole.begin; m < whole.end; m += lanes<T>()) {
    hn::Vec<Full<T>> t[1];
    row.load(m, t);
    const auto x = hn::Add(t[0], bias);
    hn::StoreU(hn::IfThenElse(hn::Ge(x, hn::Set(d, -noise)), zero, x), d, s + m);
  }
  row.scale = 1;
  row.slope = 0;
  return row;
}

// The row as it is, or settled where its pivot is `large`. Elsewhere a product and a sum are rounded
// together, which is nearer to the truth, but as far from a rounded pivot as that is. Here scores are
// rounded before the pivot is taken away, which leaves exactly 0 of the largest; within `error` of the
// pivot's size.
template <class T, bool kAlibi>
HWY_INLINE ShapedRow<T, kAlibi> settled(const ShapedRow<T, kAlibi>& row, KeyRange range, T large,
                                        T error, T* s) {
  const T size = std::abs(row.bias);
  if (!(size >= large)) return row;
  return shaped_in_place(row, range, size * error, s);
}

// Calls body(m, number of vectors as a constant) for groups of kMost whole vectors of a range, then for
// what remains in groups of half the size.
template <class T, int kMost, class Body>
HWY_INLINE void for_whole_vectors(int64_t begin, int64_t end, Body&& body) {
  const std::integral_constant<int, kMost> group;
  for (; begin + group * lanes<T>() <= end; begin += group * lanes<T>()) body(begin, group);
  if constexpr (kMost > 1) for_whole_vectors<T, kMost / 2>(begin, end, body);
}

// Zeros in the columns of one row that for_visible does not pass over.
template <class T, class Element>
HWY_INLINE void clear_outside(Element* out, KeyRange range, int64_t columns) {
  const hn::Rebind<Element, Full<T>> d;
  const auto clear = [&](int64_t from, int64_t to) HWY_ATTR {
    for (int64_t m = from; m < to; m += lanes<T>()) {
      hn::StoreU(hn::Zero(d), d, out + m);
      __asm__ volatile("");  // few vectors: a call of memset takes longer
    }
  };
  const KeyRange seen = whole_vectors<T>(range);
  clear(0, seen.begin);
  clear(seen.end, columns);
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

// Scores that a mask set to -inf. (Highway's Ne is false for NaN on x86.)
template <class T>
HWY_INLINE hn::Mask<Full<T>> masked(const T* s) {
  const Full<T> d;
  return hn::Eq(hn::LoadU(d, s), hn::Set(d, kMinusInfinity<T>));
}

// p = sum over n <= order of t^n / n!
template <class T, int N>
HWY_INLINE void taylor(const hn::Vec<Full<T>> (&t)[N], int order, hn::Vec<Full<T>> (&p)[N]) {
  const Full<T> d;
  const auto one = hn::Set(d, T{1});
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) p[j] = one;
  for (int n = order; n > 0; --n) {
    const auto inverse = hn::Set(d, T{1} / n);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) p[j] = hn::MulAdd(p[j], hn::Mul(t[j], inverse), one);
  }
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
