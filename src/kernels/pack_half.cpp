// Packing of bfloat16 operands into pairs (layouts in parts.h): bits are moved, only weights are rounded.
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/pack_half.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <cstring>

#include "kernels/parts.h"
#include "kernels/prefetch.h"
#include "kernels/transpose-inl.h"
#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

void pack_half_queries(const Rows& q, bool negate, void* packed) {
  const int64_t stride = round_up(q.width, kHalfDepth);
  const uint16_t flip = negate ? 0x8000 : 0;
  for (int64_t r = 0; r < q.count; ++r) {
    const auto* from = static_cast<const uint16_t*>(q.data) + q.offset(r);
    auto* to = static_cast<uint16_t*>(packed) + r * stride;
    for (int64_t e = 0; e < q.width; ++e) to[e] = from[e] ^ flip;
    std::memset(to + q.width, 0, static_cast<size_t>(stride - q.width) * sizeof(uint16_t));
  }
}

// Pairs (e, e+1) of one key, as float lanes that are only moved; zeros at and behind `width`.
HWY_INLINE hn::Vec<Full<float>> load_pairs(const uint16_t* row, int64_t e, int64_t width) {
  const Full<float> d;
  constexpr int64_t kBoth = 2 * lanes<float>();
  if (e + kBoth <= width) return hn::LoadU(d, reinterpret_cast<const float*>(row + e));
  const hn::Repartition<uint16_t, decltype(d)> halves;
  const int64_t count = HWY_MAX(width - e, int64_t{0});
  return hn::BitCast(d, load_first(halves, row + e, static_cast<size_t>(count)));
}

void pack_half_keys(const Rows& k, void* packed) {
  const Full<float> d;
  constexpr int64_t kKeys = lanes<float>();
  const int64_t depth = round_up(k.width, kHalfDepth), keys = round_up(k.count, kHalfDepth);
  for (int64_t start = 0; start < keys; start += kHalfPanel) {
    const int64_t width = HWY_MIN(kHalfPanel, keys - start);
    float* to = static_cast<float*>(packed) + start * depth / 2;
    for (int64_t key = 0; key < width; key += kKeys) {
      for (int64_t e = 0; e < depth; e += 2 * lanes<float>()) {
        prefetch_share(k, start + key + kKeys, kKeys, e, 2 * lanes<float>());
        hn::Vec<Full<float>> rows[hn::MaxLanes(Full<float>())];
        const auto* data = static_cast<const uint16_t*>(k.data);
        const auto row = [&](int64_t i) { return data + k.offset(start + key + i); };
        const int64_t count = k.count - start - key;
        if (HWY_LIKELY(count >= kKeys && e + 2 * lanes<float>() <= k.width)) {
          for (int64_t i = 0; i < kKeys; ++i) rows[i] = load_pairs(row(i), e, depth);
        } else {
          for (int64_t i = 0; i < kKeys; ++i) {
            rows[i] = i < count ? load_pairs(row(i), e, k.width) : hn::Zero(d);
          }
        }
        transpose_square<float>(rows, [&](int64_t c, auto column) HWY_ATTR {
          hn::StoreU(column, d, to + (e / 2 + c) * width + key);
        });
      }
    }
  }
}

// Values of two keys side by side in 32-bit lanes.
HWY_INLINE hn::Vec<Full<uint32_t>> load_words(const uint16_t* row, int64_t f, int64_t width) {
  const Full<uint32_t> d;
  const hn::Rebind<uint16_t, decltype(d)> half;
  if (row == nullptr) return hn::Zero(d);
  if (f + lanes<uint32_t>() <= width) return hn::PromoteTo(d, hn::LoadU(half, row + f));
  const int64_t count = HWY_MAX(width - f, int64_t{0});
  return hn::PromoteTo(d, load_first(half, row + f, static_cast<size_t>(count)));
}

// Row r, null behind the last.
HWY_INLINE const uint16_t* half_row(const Rows& x, int64_t r) {
  return r < x.count ? static_cast<const uint16_t*>(x.data) + x.offset(r) : nullptr;
}

template <bool kTiles>
bool pack_half_values(const Rows& v, void* packed) {
  const Full<uint32_t> d;
  const Full<float> df;
  const int64_t stride = round_up(v.width, kHalfColumns), keys = round_up(v.count, kHalfDepth);
  auto bad = hn::Zero(df);
  for (int64_t m = 0; m < keys; m += 2) {
    const uint16_t *even = half_row(v, m), *odd = half_row(v, m + 1);
    auto* to = static_cast<uint32_t*>(packed);
    to += kTiles ? m / kHalfDepth * (kHalfDepth / 2) * stride + m % kHalfDepth / 2 * kHalfColumns
                 : m / 2 * stride;
    for (int64_t f = 0; f < stride; f += lanes<uint32_t>()) {
      constexpr int64_t kTile = kHalfDepth / 2 * kHalfColumns;
      const int64_t column = kTiles ? f / kHalfColumns * kTile + f % kHalfColumns : f;
      const auto low = load_words(even, f, v.width);
      const auto high = hn::ShiftLeft<16>(load_words(odd, f, v.width));
      hn::StoreU(hn::Or(low, high), d, to + column);
      const auto x = hn::BitCast(df, hn::ShiftLeft<16>(low)), y = hn::BitCast(df, high);
      bad = hn::Or(bad, hn::Or(hn::Sub(x, x), hn::Sub(y, y)));  // 0 if finite, else NaN
    }
  }
  return hn::AllTrue(df, hn::Eq(bad, bad));
}

// Rows r and r + 1 side by side in 32-bit lanes, those at and behind `count` as zeros.
HWY_INLINE hn::Vec<Full<uint32_t>> load_row_pair(const Rows& x, int64_t r, int64_t f) {
  const auto low = load_words(half_row(x, r), f, x.width);
  const auto high = load_words(half_row(x, r + 1), f, x.width);
  return hn::Or(low, hn::ShiftLeft<16>(high));
}

// X^T [width padded][rows padded], so that neighbours along the rows are pairs.
void pack_half_columns(const Rows& x, bool negate, void* packed) {
  const Full<float> df;
  const Full<uint32_t> d;
  const int64_t width = round_up(x.width, kHalfDepth), stride = round_up(x.count, kHalfDepth);
  const auto flip = hn::Set(d, negate ? 0x80008000u : 0u);
  auto* to = static_cast<uint16_t*>(packed);
  for (int64_t r = 0; r < stride; r += 8) {
    for (int64_t f = 0; f < width; f += lanes<uint32_t>()) {
      hn::Vec<Full<float>> rows[4];
      for (int64_t i = 0; i < 4; ++i) {
        rows[i] = hn::BitCast(df, hn::Xor(load_row_pair(x, r + 2 * i, f), flip));
      }
      transpose_group<float>(rows, [&](int64_t c, const float* group) HWY_ATTR {
        hwy::CopyBytes<16>(group, to + (f + c) * stride + r);
      });
    }
  }
}

// Columns [m, m + lanes) of a row as operands, zeros from `count` on.
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, Full<float>>> rounded_columns(const float* row, int64_t m,
                                                                      int64_t count) {
  return half_operands(load_elements<float>(row + m, count - m));
}

void round_weights(Block<const float> from, int64_t rows, int64_t key_count, void* to,
                   int64_t to_stride) {
  const hn::Rebind<uint16_t, Full<float>> half;
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = static_cast<uint16_t*>(to) + r * to_stride;
    for (int64_t m = 0; m < round_up(key_count, kHalfDepth); m += lanes<float>()) {
      hn::StoreU(rounded_columns(from.row(r), m, key_count), half, out + m);
    }
  }
}

void pair_weights(Block<const float> from, int64_t rows, int64_t key_count, void* to,
                  int64_t to_stride) {
  const Full<uint32_t> d;
  for (int64_t r = 0; r < rows; r += 2) {
    auto* out = static_cast<uint32_t*>(to) + r / 2 * to_stride;
    const float* odd = from.row(HWY_MIN(r + 1, rows - 1));
    const int64_t odd_count = r + 1 < rows ? key_count : 0;
    for (int64_t m = 0; m < round_up(key_count, kHalfDepth); m += lanes<float>()) {
      const auto low = hn::PromoteTo(d, rounded_columns(from.row(r), m, key_count));
      const auto high = hn::PromoteTo(d, rounded_columns(odd, m, odd_count));
      hn::StoreU(hn::Or(low, hn::ShiftLeft<16>(high)), d, out + m);
    }
  }
}

}  // namespace

void add_half_pack_parts(TileKernels<float>& f) {
  f.half_operands = true;
  f.key_multiple = kHalfDepth;
  f.dim_multiple = kHalfColumns;
  f.query_bytes = [](int64_t rows, int64_t width) {
    return rows * round_up(width, kHalfDepth) * 2;
  };
  f.key_bytes = [](int64_t keys, int64_t width) {
    return round_up(keys, kHalfDepth) * round_up(width, kHalfDepth) * 2;
  };
  f.value_bytes = [](int64_t keys, int64_t width) {
    return round_up(keys, kHalfDepth) * round_up(width, kHalfColumns) * 2;
  };
  f.pack_queries = pack_half_queries;
  f.pack_keys = pack_half_keys;
  f.pack_values = pack_half_values<false>;
  f.column_bytes = [](int64_t rows, int64_t width) {
    return round_up(rows, kHalfDepth) * round_up(width, kHalfDepth) * 2;
  };
  f.pack_columns = pack_half_columns;
  f.round_weights = round_weights;
  f.pair_weights = pair_weights;
}

void add_tile_value_parts(TileKernels<float>& f) { f.pack_values = pack_half_values<true>; }

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::kernels {
HEED_SELECT_HALF_PART(add_half_pack_parts)
HEED_SELECT_HALF_PART(add_tile_value_parts)
}  // namespace heed::kernels
#endif
