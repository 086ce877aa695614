// The matrix products of a tile: scores Q K^T, weighted sums P V and, backward, X^T W.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/products.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include "kernels/parts.h"
#include "kernels/product_loops.h"
#include "kernels/register_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

template <int MR, int NV, class T>
HWY_NOINLINE void score_block(const T* q, int64_t q_stride, const T* panel, int64_t panel_width,
                              int64_t width, T* s, int64_t s_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> acc[MR][NV];
  for_block<MR, NV>([&](int r, int j) HWY_ATTR { acc[r][j] = hn::Zero(d); });
  add_product<MR, NV, T>(q, q_stride, 1, panel, panel_width, width, acc);
  for_block<MR, NV>([&](int r, int j)
                        HWY_ATTR { hn::StoreU(acc[r][j], d, s + r * s_stride + j * lanes<T>()); });
}

template <class T>
void scores(const void* queries, int64_t rows, const void* keys, int64_t key_count, int64_t width,
            const KeyRange* ranges, Block<T> s, ReadAhead* ahead) {
  constexpr int64_t kLanes = lanes<T>();
  const int64_t q_stride = round_up(width, kLanes);
  for_score_blocks(
      rows, key_count, ranges, 6, kPanelVectors * kLanes, kLanes,
      [&](int64_t r, int64_t start, int64_t panel_width, int64_t first, int64_t columns) {
        const T* q = static_cast<const T*>(queries) + r * q_stride;
        const T* k = static_cast<const T*>(keys) + start * width + first;
        T* out = s.row(r) + start + first;
        with_vectors(columns / kLanes, [&](auto vectors) {
          with_height<6>(rows - r, [&](auto height) {
            advance(ahead, height, columns, width);
            score_block<height, vectors, T>(q, q_stride, k, panel_width, width, out, s.stride);
          });
        });
      });
}

// O[r][columns] = carry[r] O + sum over keys [begin, end) of P V, for one block of rows.
template <int MR, int NV, class T>
HWY_NOINLINE void accumulate_block(const T* p, int64_t p_stride, const T* v, int64_t v_stride,
                                   int64_t keys, const T* carry, T* o, int64_t o_stride) {
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
  add_product<MR, NV, T>(p, p_stride, 1, v, v_stride, keys, acc);
  for_block<MR, NV>([&](int r, int j)
                        HWY_ATTR { hn::StoreU(acc[r][j], d, o + r * o_stride + j * lanes<T>()); });
}

template <class T>
void accumulate(const void* weights, int64_t p_stride, int64_t rows, const void* values,
                int64_t key_count, int64_t width, const KeyRange* ranges, const T* carry,
                Block<T> o, ReadAhead* ahead) {
  const int64_t v_stride = round_up(width, lanes<T>());
  const auto* p = static_cast<const T*>(weights);
  const auto* v = static_cast<const T*>(values);
  for_even_shares(v_stride / lanes<T>(), kPanelVectors, [&](int64_t vector, int64_t count) {
    const int64_t column = vector * lanes<T>();
    with_vectors(count, [&](auto vectors) {
      for_sum_blocks(rows, key_count, ranges, block_rows(vectors), 1,
                     [&](int64_t r, int64_t from, int64_t to) {
                       with_height<block_rows(vectors)>(rows - r, [&](auto height) {
                         advance(ahead, height, vectors * lanes<T>(), to - from);
                         accumulate_block<height, vectors, T>(
                             p + r * p_stride + from, p_stride, v + from * v_stride + column,
                             v_stride, to - from, carry == nullptr ? nullptr : carry + r,
                             o.row(r) + column, o.stride);
                       });
                     });
    });
  });
}

// C[f][keys] += sum over rows of X[row][f] W[row][key], for MR rows f of C.
template <int MR, int NV, class T>
HWY_NOINLINE void column_block(const T* x, int64_t x_stride, const T* w, int64_t w_stride,
                               int64_t rows, T* c, int64_t c_stride) {
  const Full<T> d;
  hn::Vec<Full<T>> acc[MR][NV];
  for_block<MR, NV>([&](int f, int j)
                        HWY_ATTR { acc[f][j] = hn::LoadU(d, c + f * c_stride + j * lanes<T>()); });
  add_product<MR, NV, T>(x, 1, x_stride, w, w_stride, rows, acc);
  for_block<MR, NV>([&](int f, int j)
                        HWY_ATTR { hn::StoreU(acc[f][j], d, c + f * c_stride + j * lanes<T>()); });
}

template <class T>
void accumulate_columns(const void* packed, int64_t rows, int64_t width, const void* weights,
                        int64_t w_stride, int64_t key_count, const KeyRange* ranges, Block<T> c) {
  const int64_t x_stride = round_up(width, lanes<T>());
  const auto* x = static_cast<const T*>(packed);
  const auto* w = static_cast<const T*>(weights);
  // Of a panel all keys meet each row that sees one of them: narrower ones where rows see some of the keys.
  const int64_t panel = (ranges == nullptr ? kPanelVectors : kPanelVectors / 2) * lanes<T>();
  for_column_panels(rows, key_count, ranges, panel,
                    [&](int64_t start, int64_t keys, int64_t from, int64_t to) {
                      with_vectors((keys + lanes<T>() - 1) / lanes<T>(), [&](auto vectors) {
                        for_row_blocks<vectors>(round_up(width, 2), [&](int64_t f, auto block) {
                          column_block<block, vectors, T>(x + from * x_stride + f, x_stride,
                                                          w + from * w_stride + start, w_stride,
                                                          to - from, c.row(f) + start, c.stride);
                        });
                      });
                    });
}

}  // namespace

void add_product_parts(TileKernels<float>& f, TileKernels<double>& d) {
  f.scores = scores<float>;
  f.accumulate = accumulate<float>;
  f.accumulate_columns = accumulate_columns<float>;
  d.scores = scores<double>;
  d.accumulate = accumulate<double>;
  d.accumulate_columns = accumulate_columns<double>;
  f.column_multiple = d.column_multiple = 2;
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_PART(add_product_parts)
}  // namespace heed::kernels
#endif
