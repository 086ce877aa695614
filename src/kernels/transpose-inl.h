// Square blocks of a matrix, transposed in registers, once per Highway target.
#if defined(HEED_KERNELS_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_TRANSPOSE_INL_H_
#undef HEED_KERNELS_TRANSPOSE_INL_H_
#else
#define HEED_KERNELS_TRANSPOSE_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/tile.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 128-bit blocks hold kGroup elements: rows[i], i < kGroup, become columns within their blocks, so that
// block b of result c is column b * kGroup + c of the rows.
template <class T>
HWY_INLINE void transpose_blocks(const hn::Vec<Full<T>>* rows, hn::Vec<Full<T>>* to) {
  const Full<T> d;
  if constexpr (sizeof(T) == 4) {
    const hn::Repartition<double, Full<T>> wide;
    const auto pairs = [&](auto x) HWY_ATTR { return hn::BitCast(wide, x); };
    const auto low01 = pairs(hn::InterleaveLower(d, rows[0], rows[1]));
    const auto low23 = pairs(hn::InterleaveLower(d, rows[2], rows[3]));
    const auto high01 = pairs(hn::InterleaveUpper(d, rows[0], rows[1]));
    const auto high23 = pairs(hn::InterleaveUpper(d, rows[2], rows[3]));
    to[0] = hn::BitCast(d, hn::InterleaveLower(wide, low01, low23));
    to[1] = hn::BitCast(d, hn::InterleaveUpper(wide, low01, low23));
    to[2] = hn::BitCast(d, hn::InterleaveLower(wide, high01, high23));
    to[3] = hn::BitCast(d, hn::InterleaveUpper(wide, high01, high23));
  } else {
    to[0] = hn::InterleaveLower(d, rows[0], rows[1]);
    to[1] = hn::InterleaveUpper(d, rows[0], rows[1]);
  }
}

// Vectors that share what their blocks hold: one, two or four blocks each, from as many vectors.
template <class T>
HWY_INLINE void exchange_blocks(const hn::Vec<Full<T>>* v, hn::Vec<Full<T>>* to) {
  constexpr size_t kBlocks = hn::MaxLanes(Full<T>()) * sizeof(T) / 16;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  const Full<T> d;
  if constexpr (kBlocks == 4) {
    const auto even01 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(v[1]), v[0]);
    const auto even23 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(v[3]), v[2]);
    const auto odd01 = hn::OddEvenBlocks(v[1], hn::SwapAdjacentBlocks(v[0]));
    const auto odd23 = hn::OddEvenBlocks(v[3], hn::SwapAdjacentBlocks(v[2]));
    to[0] = hn::ConcatLowerLower(d, even23, even01);
    to[1] = hn::ConcatLowerLower(d, odd23, odd01);
    to[2] = hn::ConcatUpperUpper(d, even23, even01);
    to[3] = hn::ConcatUpperUpper(d, odd23, odd01);
  } else {
    to[0] = hn::ConcatLowerLower(d, v[1], v[0]);
    to[1] = hn::ConcatUpperUpper(d, v[1], v[0]);
  }
#else
  static_assert(kBlocks == 1);
  to[0] = v[0];
#endif
}

// Columns [e, e + lanes) of rows m, m + 1, ... of one vector each; zeros behind the last row and column.
template <class T, class From>
HWY_INLINE void load_square(const Rows& x, int64_t m, int64_t e, hn::Vec<Full<T>>* rows) {
  const Full<T> d;
  const From* p = static_cast<const From*>(x.data) + e;
  const int64_t columns = x.width - e;
  if (HWY_LIKELY(m + lanes<T>() <= x.count && columns >= lanes<T>())) {
    for (int64_t i = 0; i < lanes<T>(); ++i) rows[i] = Load<T, From>::full(d, p + x.offset(m + i));
    return;
  }
  const auto some = static_cast<size_t>(HWY_MIN(columns, lanes<T>()));
  for (int64_t i = 0; i < lanes<T>(); ++i) {
    rows[i] = m + i < x.count ? Load<T, From>::first(d, p + x.offset(m + i), some) : hn::Zero(d);
  }
}

// As many rows as a vector has lanes; store(c, column c of the rows).
template <class T, class Store>
HWY_INLINE void transpose_square(const hn::Vec<Full<T>>* rows, Store&& store) {
  constexpr int kGroup = 16 / sizeof(T), kLanes = hn::MaxLanes(Full<T>());
  constexpr int kGroups = kLanes / kGroup;
  hn::Vec<Full<T>> parts[kGroups][kGroup];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) transpose_blocks<T>(rows + g * kGroup, parts[g]);
#pragma GCC unroll 4
  for (int c = 0; c < kGroup; ++c) {
    hn::Vec<Full<T>> same[kGroups], column[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) same[g] = parts[g][c];
    exchange_blocks<T>(same, column);
#pragma GCC unroll 4
    for (int b = 0; b < kGroups; ++b) store(b * kGroup + c, column[b]);
  }
}

// Lane i: op over the lanes of row i of a square with rows of one vector.
template <class T, class Op>
HWY_INLINE hn::Vec<Full<T>> reduce_rows(const T* square, Op&& op) {
  constexpr int kGroup = 16 / sizeof(T), kLanes = hn::MaxLanes(Full<T>());
  constexpr int kGroups = kLanes / kGroup;
  hn::Vec<Full<T>> parts[kGroups], blocks[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    hn::Vec<Full<T>> rows[kGroup], columns[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      rows[i] = hn::LoadU(Full<T>(), square + (g * kGroup + i) * kLanes);
    }
    transpose_blocks<T>(rows, columns);
    parts[g] = op(columns[0], columns[1]);
    if constexpr (kGroup == 4) parts[g] = op(parts[g], op(columns[2], columns[3]));
  }
  exchange_blocks<T>(parts, blocks);
#pragma GCC unroll 4
  for (int b = 1; b < kGroups; ++b) blocks[0] = op(blocks[0], blocks[b]);
  return blocks[0];
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
