// The products of a tile on a matrix tile unit: blocks of 2 x 2 tiles, 32 rows x 32 columns, so that
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/parts.h"
#include "kernels/product_loops.h"

namespace heed::kernels {

/// Pairs B of a product, in tiles of 16 pairs x 16 columns.
struct TilePairs {
  const uint32_t* data;
  int64_t stride;       // from pair to pair
  int64_t step;         // to the tile of the next 16 pairs
  int64_t beside = 16;  // to that of the next 16 columns
};

/// Pairs whose rows of columns lie one after the other.
inline TilePairs pair_rows(const uint32_t* data, int64_t stride) {
  return {data, stride, kHalfDepth / 2 * stride};
}

/// Packed values: whole tiles one after the other.
inline TilePairs value_tiles(const uint32_t* data, int64_t width) {
  return {data, 16, kHalfDepth / 2 * width, 16 * 16};
}

/// C (32 rows x 16 or 32 columns, float) from steps of A (32 x 32 bfloat16) and B (pairs).
/// Registers: 0-3 C, 4-5 A, 6-7 B.
template <bool kWide, class Unit>
void multiply_tiles(Unit& unit, const uint16_t* a, int64_t a_stride, const TilePairs& b,
                    int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    const uint32_t* pairs = b.data + step * b.step;
    unit.template load<4>(a + step * kHalfDepth, a_stride * 2);
    unit.template load<6>(pairs, b.stride * 4);
    unit.template multiply<0, 4, 6>();
    unit.template load<5>(a + 16 * a_stride + step * kHalfDepth, a_stride * 2);
    unit.template multiply<2, 5, 6>();
    if constexpr (kWide) {
      unit.template load<7>(pairs + b.beside, b.stride * 4);
      unit.template multiply<1, 4, 7>();
      unit.template multiply<3, 5, 7>();
    }
  }
}

template <bool kWide, class Unit>
void store_tiles(Unit& unit, float* to, int64_t stride) {
  unit.template store<0>(to, stride * 4);
  unit.template store<2>(to + 16 * stride, stride * 4);
  if constexpr (kWide) {
    unit.template store<1>(to + 16, stride * 4);
    unit.template store<3>(to + 16 * stride + 16, stride * 4);
  }
}

// Scores of 32 rows with `columns` keys of a panel, a multiple of 32. Rows of up to 64 numbers stay in
// registers meanwhile.
template <class Unit>
void panel_scores(Unit& unit, const uint16_t* q, int64_t depth, const uint32_t* keys,
                  int64_t panel_width, int64_t columns, float* s, int64_t s_stride) {
  if (depth > 2 * kHalfDepth) {
    for (int64_t c = 0; c < columns; c += 32) {
      unit.template zero<0>();
      unit.template zero<1>();
      unit.template zero<2>();
      unit.template zero<3>();
      multiply_tiles<true>(unit, q, depth, pair_rows(keys + c, panel_width), depth / kHalfDepth);
      store_tiles<true>(unit, s + c, s_stride);
    }
    return;
  }
  unit.template load<4>(q, depth * 2);
  unit.template load<5>(q + 16 * depth, depth * 2);
  const bool two = depth > kHalfDepth;
  if (two) {
    unit.template load<6>(q + kHalfDepth, depth * 2);
    unit.template load<7>(q + 16 * depth + kHalfDepth, depth * 2);
  }
  for (int64_t c = 0; c < columns; c += 16) {
    unit.template zero<0>();
    unit.template zero<1>();
    unit.template load<2>(keys + c, panel_width * 4);
    unit.template multiply<0, 4, 2>();
    unit.template multiply<1, 5, 2>();
    if (two) {
      unit.template load<3>(keys + (kHalfDepth / 2) * panel_width + c, panel_width * 4);
      unit.template multiply<0, 6, 3>();
      unit.template multiply<1, 7, 3>();
    }
    unit.template store<0>(s + c, s_stride * 4);
    unit.template store<1>(s + 16 * s_stride + c, s_stride * 4);
  }
}

template <class Unit>
void tile_scores(const void* queries, int64_t rows, const void* keys, int64_t key_count,
                 int64_t width, const KeyRange* ranges, Block<float> s, ReadAhead* ahead) {
  Unit unit;
  const int64_t depth = round_up(width, kHalfDepth);
  for_score_blocks(
      rows, key_count, ranges, 32, kHalfPanel, 32,
      [&](int64_t r, int64_t start, int64_t panel_width, int64_t first, int64_t columns) {
        advance(ahead, 32, columns, depth);
        const auto* q = static_cast<const uint16_t*>(queries) + r * depth;
        const auto* k = static_cast<const uint32_t*>(keys) + start * depth / 2;
        panel_scores(unit, q, depth, k + first, panel_width, columns, s.row(r) + start + first,
                     s.stride);
      });
}

inline void scale_rows(const float* carry, int64_t rows, int64_t columns, float* o,
                       int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if (carry[r] == 1) continue;
    for (int64_t f = 0; f < columns; ++f) o[r * stride + f] *= carry[r];
  }
}

template <bool kWide, class Unit>
void sum_tiles(Unit& unit, const uint16_t* p, int64_t p_stride, const TilePairs& v, int64_t steps,
               float* o, int64_t o_stride) {
  unit.template load<0>(o, o_stride * 4);
  unit.template load<2>(o + 16 * o_stride, o_stride * 4);
  if constexpr (kWide) {
    unit.template load<1>(o + 16, o_stride * 4);
    unit.template load<3>(o + 16 * o_stride + 16, o_stride * 4);
  }
  multiply_tiles<kWide>(unit, p, p_stride, v, steps);
  store_tiles<kWide>(unit, o, o_stride);
}

template <class Unit>
void tile_accumulate(const void* weights, int64_t p_stride, int64_t rows, const void* values,
                     int64_t key_count, int64_t width, const KeyRange* ranges, const float* carry,
                     Block<float> o, ReadAhead* ahead) {
  Unit unit;
  const int64_t v_stride = round_up(width, kHalfColumns);
  const auto* v = static_cast<const uint32_t*>(values);
  for_sum_blocks(rows, key_count, ranges, 32, kHalfDepth, [&](int64_t r, int64_t from, int64_t to) {
    if (carry != nullptr) scale_rows(carry + r, 32, v_stride, o.row(r), o.stride);
    const int64_t steps = (to - from + kHalfDepth - 1) / kHalfDepth;
    if (steps == 0) return;
    const auto* p = static_cast<const uint16_t*>(weights) + r * p_stride + from;
    const uint32_t* pairs = v + from / 2 * v_stride;
    for (int64_t f = 0; f < v_stride; f += 32) {
      const bool wide = f + 32 <= v_stride;
      advance(ahead, 32, wide ? 32 : 16, to - from);
      const auto sum = wide ? sum_tiles<true, Unit> : sum_tiles<false, Unit>;
      sum(unit, p, p_stride, value_tiles(pairs + 16 * f, v_stride), steps, o.row(r) + f, o.stride);
    }
  });
}

// C (32 rows f x 32 keys) += A (X^T: 32 rows f, steps of 32 tile rows) B (pairs of tile rows). Pairs of
// the last step that do not exist are zero: they are multiplied from `rest`.
template <class Unit>
void column_tiles(Unit& unit, const uint16_t* x, int64_t x_stride, const uint32_t* w,
                  int64_t w_stride, int64_t steps, const uint32_t* rest, float* c,
                  int64_t c_stride) {
  unit.template load<0>(c, c_stride * 4);
  unit.template load<1>(c + 16, c_stride * 4);
  unit.template load<2>(c + 16 * c_stride, c_stride * 4);
  unit.template load<3>(c + 16 * c_stride + 16, c_stride * 4);
  multiply_tiles<true>(unit, x, x_stride, pair_rows(w, w_stride), steps);
  if (rest != nullptr) {
    multiply_tiles<true>(unit, x + steps * kHalfDepth, x_stride, pair_rows(rest, 32), 1);
  }
  store_tiles<true>(unit, c, c_stride);
}

template <class Unit>
void tile_accumulate_columns(const void* packed, int64_t rows, int64_t width, const void* weights,
                             int64_t w_stride, int64_t key_count, const KeyRange* ranges,
                             Block<float> c) {
  Unit unit;
  const int64_t x_stride = round_up(rows, kHalfDepth);
  for_column_panels(
      rows, key_count, ranges, 32, [&](int64_t start, int64_t, int64_t from, int64_t to) {
        const int64_t first = from / kHalfDepth * kHalfDepth, steps = (to - first) / kHalfDepth;
        const auto* x = static_cast<const uint16_t*>(packed) + first;
        const auto* w = static_cast<const uint32_t*>(weights) + first / 2 * w_stride + start;
        const int64_t rest_pairs = (to - first - steps * kHalfDepth + 1) / 2;
        uint32_t rest[16][32] = {};
        for (int64_t i = 0; i < rest_pairs; ++i) {
          std::memcpy(rest[i], w + (steps * 16 + i) * w_stride, sizeof rest[i]);
        }
        for (int64_t f = 0; f < width; f += 32) {
          column_tiles(unit, x + f * x_stride, x_stride, w, w_stride, steps,
                       rest_pairs > 0 ? rest[0] : nullptr, c.row(f) + start, c.stride);
        }
      });
}

template <class Unit>
void use_tile_unit(TileKernels<float>& f) {
  f.row_multiple = 32;
  f.scores = tile_scores<Unit>;
  f.accumulate = tile_accumulate<Unit>;
  f.accumulate_columns = tile_accumulate_columns<Unit>;
  f.column_multiple = 32;
}

}  // namespace heed::kernels
