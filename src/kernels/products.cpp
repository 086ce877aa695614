// The two matrix products of a tile: scores Q K^T and weighted sums P V, as register blocks of
// MR rows x NV vectors. Per vector of B loaded, MR fused multiply-adds; per broadcast of A, NV.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/products.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/parts.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows per register block for NV vectors of columns.
constexpr int block_rows(int vectors) {
  return kPanelVectors == 4 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : 12) : (vectors == 2 ? 6 : 12);
}

// acc[r][j] += sum_i a[r * a_stride + i] * b[i * b_stride + j * lanes], i in [0, depth)
template <int MR, int NV, class T>
HWY_INLINE void multiply(const T* HWY_RESTRICT a, int64_t a_stride, const T* HWY_RESTRICT b,
                         int64_t b_stride, int64_t depth, hn::Vec<Full<T>> (&acc)[MR][NV]) {
  const Full<T> d;
  for (int64_t i = 0; i < depth; ++i) {
    hn::Vec<Full<T>> column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = hn::LoadU(d, b + i * b_stride + j * lanes<T>());
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const auto x = hn::Set(d, a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = hn::MulAdd(x, column[j], acc[r][j]);
    }
  }
}

template <int NV, class T>
HWY_NOINLINE void score_block(const T* q, int64_t q_stride, const T* panel, int64_t panel_width,
                              int64_t width, T* s, int64_t s_stride) {
  constexpr int MR = 6;
  const Full<T> d;
  hn::Vec<Full<T>> acc[MR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = hn::Zero(d);
  }
  multiply<MR, NV, T>(q, q_stride, panel, panel_width, width, acc);
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) hn::StoreU(acc[r][j], d, s + r * s_stride + j * lanes<T>());
  }
}

// What rows [r, r + count) see together.
inline KeyRange joint_range(const KeyRange* ranges, int64_t r, int64_t count, int64_t keys) {
  if (ranges == nullptr) return {0, static_cast<int32_t>(keys)};
  KeyRange joint{static_cast<int32_t>(keys), 0};
  for (int64_t i = r; i < r + count; ++i) {
    if (ranges[i].empty()) continue;
    joint.begin = HWY_MIN(joint.begin, ranges[i].begin);
    joint.end = HWY_MAX(joint.end, ranges[i].end);
  }
  return joint;
}

template <class T>
void scores(const void* queries, int64_t rows, const void* keys, int64_t key_count, int64_t width,
            const KeyRange* ranges, Block<T> s) {
  constexpr int64_t kLanes = lanes<T>(), kPanel = kPanelVectors * kLanes, MR = 6;
  const int64_t q_stride = round_up(width, kLanes), padded_keys = round_up(key_count, kLanes);
  for (int64_t start = 0; start < padded_keys; start += kPanel) {
    const int64_t panel_width = HWY_MIN(kPanel, padded_keys - start);
    const T* panel = static_cast<const T*>(keys) + start * width;
    for (int64_t r = 0; r < rows; r += MR) {
      const KeyRange range = joint_range(ranges, r, HWY_MIN(MR, rows - r), key_count);
      const int64_t first = HWY_MAX(range.begin - start, int64_t{0}) / kLanes;
      const int64_t last = HWY_MIN(round_up(range.end - start, kLanes), panel_width) / kLanes;
      const T* q = static_cast<const T*>(queries) + r * q_stride;
      T* out = s.row(r) + start + first * kLanes;
      const T* columns = panel + first * kLanes;
      switch (last - first) {
        case 1:
          score_block<1, T>(q, q_stride, columns, panel_width, width, out, s.stride);
          break;
        case 2:
          score_block<2, T>(q, q_stride, columns, panel_width, width, out, s.stride);
          break;
        case 3:
          if constexpr (kPanelVectors > 2) {
            score_block<3, T>(q, q_stride, columns, panel_width, width, out, s.stride);
          }
          break;
        case 4:
          if constexpr (kPanelVectors > 2) {
            score_block<4, T>(q, q_stride, columns, panel_width, width, out, s.stride);
          }
          break;
        default:  // nothing visible
          break;
      }
    }
  }
}

// O[r][columns] = carry[r] O + sum over keys [begin, end) of P V, for one block of rows.
template <int NV, class T>
HWY_NOINLINE void accumulate_block(const T* p, int64_t p_stride, const T* v, int64_t v_stride,
                                   int64_t keys, const T* carry, T* o, int64_t o_stride) {
  constexpr int MR = block_rows(NV);
  const Full<T> d;
  hn::Vec<Full<T>> acc[MR][NV];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    const auto c = hn::Set(d, carry == nullptr ? T{1} : carry[r]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = hn::Mul(c, hn::LoadU(d, o + r * o_stride + j * lanes<T>()));
    }
  }
  multiply<MR, NV, T>(p, p_stride, v, v_stride, keys, acc);
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) hn::StoreU(acc[r][j], d, o + r * o_stride + j * lanes<T>());
  }
}

// Keys whose values stay in the first-level cache while all rows pass over them.
template <class T>
constexpr int64_t value_block_keys() {
  return 16 * 1024 / (kPanelVectors * lanes<T>() * static_cast<int64_t>(sizeof(T)));
}

template <int NV, class T>
void accumulate_columns(const T* p, int64_t p_stride, int64_t rows, const T* v, int64_t v_stride,
                        int64_t key_count, const KeyRange* ranges, const T* carry, Block<T> o,
                        int64_t column) {
  constexpr int64_t MR = block_rows(NV), kStep = value_block_keys<T>();
  for (int64_t start = 0; start < key_count; start += kStep) {
    const int64_t end = HWY_MIN(key_count, start + kStep);
    for (int64_t r = 0; r < rows; r += MR) {
      const KeyRange range = joint_range(ranges, r, HWY_MIN(MR, rows - r), key_count);
      const int64_t from = HWY_MAX(start, int64_t{range.begin});
      const int64_t to = HWY_MIN(end, int64_t{range.end});
      if (from >= to && start > 0) continue;  // the first step applies the carry in any case
      accumulate_block<NV, T>(p + r * p_stride + from, p_stride, v + from * v_stride + column,
                              v_stride, HWY_MAX(to - from, int64_t{0}),
                              start == 0 && carry != nullptr ? carry + r : nullptr,
                              o.row(r) + column, o.stride);
    }
  }
}

template <class T>
void accumulate(const void* weights, int64_t p_stride, int64_t rows, const void* values,
                int64_t key_count, int64_t width, const KeyRange* ranges, const T* carry,
                Block<T> o) {
  const int64_t v_stride = round_up(width, lanes<T>());
  const int64_t vectors = v_stride / lanes<T>();
  const int64_t passes = (vectors + kPanelVectors - 1) / kPanelVectors;
  const auto* p = static_cast<const T*>(weights);
  const auto* v = static_cast<const T*>(values);
  for (int64_t pass = 0, done = 0; pass < passes; ++pass) {
    const int64_t take = (vectors - done + passes - pass - 1) / (passes - pass);  // even shares
    const int64_t column = done * lanes<T>();
    switch (take) {
      case 1:
        accumulate_columns<1, T>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
        break;
      case 2:
        accumulate_columns<2, T>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o, column);
        break;
      case 3:
        if constexpr (kPanelVectors > 2) {
          accumulate_columns<3, T>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o,
                                   column);
        }
        break;
      default:
        if constexpr (kPanelVectors > 2) {
          accumulate_columns<4, T>(p, p_stride, rows, v, v_stride, key_count, ranges, carry, o,
                                   column);
        }
        break;
    }
    done += take;
  }
}

void add_product_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.scores = scores<float>;
  f.accumulate = accumulate<float>;
  d.scores = scores<double>;
  d.accumulate = accumulate<double>;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_product_parts)
}  // namespace heed::kernels
#endif
