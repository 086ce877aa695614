// Register blocks of products: MR rows x NV vectors of sums. Per vector of B loaded, MR fused
// multiply-adds; per broadcast of A, NV.
#if defined(HEED_KERNELS_REGISTER_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_KERNELS_REGISTER_BLOCKS_INL_H_
#undef HEED_KERNELS_REGISTER_BLOCKS_INL_H_
#else
#define HEED_KERNELS_REGISTER_BLOCKS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <type_traits>

#include "kernels/prefetch.h"
#include "kernels/read_ahead.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The most rows that registers hold beside NV vectors of columns.
constexpr int block_rows(int vectors) {
  return kPanelVectors == 4 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : 12) : (vectors == 2 ? 6 : 12);
}

// Calls body with the number of vectors as a constant, 1 to kPanelVectors.
template <class Body>
HWY_INLINE void with_vectors(int64_t vectors, Body&& body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>());
  if (vectors == 2) return body(std::integral_constant<int, 2>());
  if constexpr (kPanelVectors > 2) {
    if (vectors == 3) return body(std::integral_constant<int, 3>());
    return body(std::integral_constant<int, 4>());
  }
}

// Calls body(first row, height as a constant) for all rows in blocks beside NV vectors: as tall as
// registers allow, then the remainder.
template <int NV, class Body>
HWY_INLINE void for_row_blocks(int64_t rows, Body&& body) {
  int64_t r = 0;
  const auto blocks = [&](auto height) {
    for (; r + height <= rows; r += height) body(r, height);
  };
  blocks(std::integral_constant<int, block_rows(NV)>());
  if constexpr (block_rows(NV) > 8) blocks(std::integral_constant<int, 8>());
  blocks(std::integral_constant<int, 4>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// sum[r][j] += sum_i a[r * a_row + i * a_depth] * b[i * b_stride + j * lanes], i in [0, depth)
template <int MR, int NV, class T>
HWY_INLINE void add_product(const T* HWY_RESTRICT a, int64_t a_row, int64_t a_depth,
                            const T* HWY_RESTRICT b, int64_t b_stride, int64_t depth,
                            hn::Vec<Full<T>> (&sum)[MR][NV]) {
  const Full<T> d;
  for (int64_t i = 0; i < depth; ++i) {
    hn::Vec<Full<T>> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = hn::LoadU(d, b + i * b_stride + j * lanes<T>());
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const auto x = hn::Set(d, a[r * a_row + i * a_depth]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = hn::MulAdd(x, row[j], sum[r][j]);
    }
  }
}

// The same, asking on the way for the lines that are due, if any.
template <int MR, int NV, class T>
HWY_INLINE void add_product(const T* a, int64_t a_row, int64_t a_depth, const T* b,
                            int64_t b_stride, int64_t depth, hn::Vec<Full<T>> (&sum)[MR][NV],
                            LinesDue* due) {
  if (due == nullptr || depth == 0) {
    return add_product<MR, NV, T>(a, a_row, a_depth, b, b_stride, depth, sum);
  }
  constexpr int64_t kSteps = 8;
  const int64_t share = ceil_div(due->count, ceil_div(depth, kSteps));
  for (int64_t i = 0; i < depth; i += kSteps) {
    prefetch_lines(*due, share);
    add_product<MR, NV, T>(a + i * a_depth, a_row, a_depth, b + i * b_stride, b_stride,
                           HWY_MIN(kSteps, depth - i), sum);
  }
  prefetch_rest(due);
}

// body(r, j) for every vector of a block, unrolled.
template <int MR, int NV, class Body>
HWY_INLINE void for_block(Body&& body) {
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) body(r, j);
  }
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
