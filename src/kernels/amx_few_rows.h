// The two products for a few query rows on a matrix tile unit, straight from unpacked keys and values:
//
//   S^T[16 keys, 16 rows] = K Q^T    keys are tiles as they lie
//   O[16 rows, f]        += P V      weights in two parts, values paired 32 keys at a time
//
// do is in few_rows_avx512.cpp.
#pragma once
#include <algorithm>

#include "kernels/amx_products.h"
#include "kernels/prefetch.h"

namespace heed::kernels {

inline constexpr int64_t kMostTileRows = 16, kMostTileWidth = 256;

/// The functions of few rows that take what a tile unit does not: rows, types, ends.
inline const TileKernels<float>& few_row_vectors() { return tile_kernels<float>(Isa::avx512); }

inline bool fits_tiles(int64_t rows, const Rows& x) {
  return x.dtype == DType::bf16 && rows >= 4 && rows <= kMostTileRows &&
         x.width % kHalfDepth == 0 && x.width > 0 && x.width <= kMostTileWidth;
}

/// Rows [first, count) of x.
inline Rows rows_behind(const Rows& x, int64_t first) {
  Rows rest = x;
  rest.data = static_cast<const uint16_t*>(x.data) + first * x.stride;
  rest.count = x.count - first;
  return rest;
}

template <class Unit>
void tile_dot_rows(Block<const float> queries, int64_t rows, const Rows& k, Block<float> s) {
  alignas(64) uint32_t packed[kMostTileWidth / kHalfDepth * kQueryTile];
  if (!fits_tiles(rows, k) || !pack_query_tiles(queries, rows, k.width, packed)) {
    return few_row_vectors().dot_rows(queries, rows, k, s);
  }
  Unit unit;
  alignas(64) float tiles[2][16 * 16];
  const int64_t ahead = bytes_ahead(k) / (2 * std::max<int64_t>(1, std::abs(k.stride)));
  int64_t m = 0;
  for (; m + 32 <= k.count; m += 32) {
    const auto* keys = static_cast<const uint16_t*>(k.data) + m * k.stride;
    unit.template zero<0>();
    unit.template zero<1>();
    for (int64_t e = 0; e < k.width; e += kHalfDepth) {
      prefetch_share(k, m + ahead, 32, e, kHalfDepth);
      unit.template load<4>(packed + e / kHalfDepth * kQueryTile, 64);
      unit.template load<5>(keys + e, k.stride * 2);
      unit.template multiply<0, 5, 4>();
      unit.template load<6>(keys + 16 * k.stride + e, k.stride * 2);
      unit.template multiply<1, 6, 4>();
    }
    unit.template store<0>(tiles[0], 64);
    unit.template store<1>(tiles[1], 64);
    turn_scores(tiles[0], rows, s.data + m, s.stride);
    turn_scores(tiles[1], rows, s.data + m + 16, s.stride);
  }
  if (m < k.count) {
    few_row_vectors().dot_rows(queries, rows, rows_behind(k, m), {s.data + m, s.stride});
  }
}

// C [16 rows x up to 64 columns] += P V for steps of 32 keys; P of each step in one tile, or in two.
template <class Unit, bool kWide>
void add_tiles(Unit& unit, const uint16_t* weights, int64_t parts, const uint32_t* values) {
  for (int64_t part = 0; part < parts; ++part) {
    unit.template load<4>(weights + part * 16 * kHalfDepth, 64);
    unit.template load<5>(values, 64);
    unit.template multiply<0, 4, 5>();
    unit.template load<6>(values + kQueryTile, 64);
    unit.template multiply<1, 4, 6>();
    if constexpr (kWide) {
      unit.template load<5>(values + 2 * kQueryTile, 64);
      unit.template multiply<2, 4, 5>();
      unit.template load<6>(values + 3 * kQueryTile, 64);
      unit.template multiply<3, 4, 6>();
    }
  }
}

template <class Unit, bool kWide>
void add_columns(Unit& unit, const uint16_t* weights, int64_t parts, const uint16_t* v,
                 int64_t v_stride, LinesDue& due, float* sums, int64_t width) {
  alignas(64) uint32_t values[4 * kQueryTile];
  unit.template load<0>(sums, width * 4);
  unit.template load<1>(sums + 16, width * 4);
  if constexpr (kWide) {
    unit.template load<2>(sums + 32, width * 4);
    unit.template load<3>(sums + 48, width * 4);
  }
  for (int64_t step = 0; step < 2; ++step) {
    pair_values(v + step * kHalfDepth * v_stride, v_stride, kWide ? 64 : 32, values, due);
    add_tiles<Unit, kWide>(unit, weights + step * parts * 16 * kHalfDepth, parts, values);
  }
  unit.template store<0>(sums, width * 4);
  unit.template store<1>(sums + 16, width * 4);
  if constexpr (kWide) {
    unit.template store<2>(sums + 32, width * 4);
    unit.template store<3>(sums + 48, width * 4);
  }
}

template <class Unit>
void tile_add_rows(Block<const float> weights, int64_t rows, const Rows& v, const float* carry,
                   Block<float> o) {
  constexpr int64_t kKeys = 64;
  if (!fits_tiles(rows, v) || v.count < kKeys) {
    return few_row_vectors().add_rows(weights, rows, v, carry, o);
  }
  Unit unit;
  alignas(64) float sums[kMostTileRows * kMostTileWidth] = {};
  alignas(64) uint16_t parts_of[kKeys / kHalfDepth * 2 * 16 * kHalfDepth] = {};
  const int64_t parts = rows <= 8 ? 1 : 2;
  int64_t m = 0;
  for (; m + kKeys <= v.count; m += kKeys) {
    for (int64_t step = 0; step < 2; ++step) {
      split_weights(weights.data + m + step * kHalfDepth, weights.stride, rows,
                    parts_of + step * parts * 16 * kHalfDepth);
    }
    const auto* from = static_cast<const uint16_t*>(v.data) + m * v.stride;
    // The keys behind these, in the order of memory. They need not exist.
    LinesDue due{reinterpret_cast<const std::byte*>(from + kKeys * v.stride), v.stride * 2,
                 v.width * 2 / LinesDue::kLine, 0, kKeys * v.width * 2 / LinesDue::kLine};
    for (int64_t f = 0; f < v.width; f += 64) {
      const auto add = f + 64 <= v.width ? add_columns<Unit, true> : add_columns<Unit, false>;
      add(unit, parts_of, parts, from + f, v.stride, due, sums + f, v.width);
    }
  }
  add_split_sums(sums, v.width, rows, carry, o);
  if (m < v.count) {
    few_row_vectors().add_rows({weights.data + m, weights.stride}, rows, rows_behind(v, m), nullptr,
                               o);
  }
}

template <class Unit>
void use_tile_few_rows(TileKernels<float>& f) {
  f.dot_rows = tile_dot_rows<Unit>;
  f.add_rows = tile_add_rows<Unit>;
}

}  // namespace heed::kernels
