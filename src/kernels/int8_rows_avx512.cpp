// Products of bytes with AVX512-VNNI (vpdpbusd): four products and their sum per 32-bit lane, four times the
// rate of float32. Highway 1.0 has no name for the instruction, so this file is compiled for AVX-512 as a
// whole and reached only after the processor has been asked.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/byte_formats_avx512-inl.h"
#include "kernels/int8_layout.h"

namespace heed::kernels {

namespace {

constexpr int kRows = static_cast<int>(kInt8Rows), kVectors = static_cast<int>(kPanelRows) / 16;
constexpr int kQuads = static_cast<int>(kPanelColumns) / 4;

// Rows of 16 lanes become columns.
HEED_INLINE void transpose(__m512i (&x)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i low0 = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    const __m512i high0 = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i low1 = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const __m512i high1 = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    t[i] = _mm512_unpacklo_epi64(low0, low1);
    t[i + 1] = _mm512_unpackhi_epi64(low0, low1);
    t[i + 2] = _mm512_unpacklo_epi64(high0, high1);
    t[i + 3] = _mm512_unpackhi_epi64(high0, high1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even0 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

// A chunk of columns of 16 rows as formats give it, row by row.
struct alignas(64) ChunkRows {
  static constexpr int kVectorsOfCodes = 4;
  uint8_t codes[kVectorsOfCodes][16][64];
  float factors[16][16];
};

template <class Format>
HEED_INLINE void read_chunk(const uint8_t* b, int row, ChunkRows& to) {
  const Format chunk(b);
#pragma GCC unroll 4
  for (int v = 0; v < ChunkRows::kVectorsOfCodes; ++v) {
    _mm512_store_si512(to.codes[v][row], chunk.codes(v));
  }
  _mm512_store_ps(to.factors[row], chunk.factors());
}

// Takes multiples of the scales from offsets and returns them, for each byte of codes: little is left. Those
// of a hundred scales are of groups with hardly any difference between weights, and stay.
HEED_INLINE __m512i settle(__m512 scales, __m512& offsets, Panel& panel) {
  const __m512 most = _mm512_set1_ps(96);
  const __m512 ratios = _mm512_roundscale_ps(_mm512_div_ps(offsets, scales), 0);
  const __mmask16 few = _mm512_cmp_ps_mask(_mm512_abs_ps(ratios), most, _CMP_LE_OQ);
  const __mmask16 any = _mm512_cmp_ps_mask(offsets, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  if ((any & ~few) != 0) panel.offset_parts = 2;
  const __m512 multiples = _mm512_maskz_mov_ps(few, ratios);
  offsets = _mm512_fnmadd_ps(multiples, scales, offsets);
  return _mm512_shuffle_epi8(
      _mm512_cvtps_epi32(multiples),
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
}

// The factors of 16 rows of the panel, from row `lanes` and group `first` on: scales, and as second ones for
// write_offsets offsets. `more`: what is to be added to their codes.
template <class Format>
HEED_INLINE void write_factors(const ChunkRows& rows, int64_t first, int64_t count, int lanes,
                               Panel& panel, __m512i (&more)[8]) {
  PanelGroup* to = panel.groups + first;
  constexpr bool kHalves = std::is_same_v<Format, Q6_K>;
  __m512i x[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(rows.factors[r]);
  transpose(x);
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    const __m512 scales = _mm512_castsi512_ps(x[kHalves ? 2 * g : g]);
    __m512 second = _mm512_castsi512_ps(x[kHalves ? 2 * g + 1 : 8 + g]);
    more[g] = Format::kCentre > 0 ? _mm512_set1_epi8(static_cast<char>(-Format::kCentre))
                                  : settle(scales, second, panel);
    if (g >= count) continue;
    _mm512_store_ps(to[g].scales[0] + lanes, scales);
    if (kHalves || Format::kCentre == 0) _mm512_store_ps(to[g].scales[1] + lanes, second);
  }
}

HEED_INLINE void write_codes(const ChunkRows& rows, int64_t count, const __m512i (&more)[8],
                             int lanes, PanelGroup* to) {
#pragma GCC unroll 4
  for (int v = 0; v < ChunkRows::kVectorsOfCodes; ++v) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(rows.codes[v][r]);
    transpose(x);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      if (g >= count) break;
      _mm512_store_si512(to[g].codes[2 * v][lanes], _mm512_add_epi8(x[2 * g], more[g]));
      _mm512_store_si512(to[g].codes[2 * v + 1][lanes], _mm512_add_epi8(x[2 * g + 1], more[g]));
    }
  }
}

template <bool kHalves>
HEED_INLINE void write_starts(PanelGroup& group, int lanes) {
  const __m512i factor = _mm512_set1_epi8(-128);  // as a byte without a sign, 128
  constexpr int kParts = kHalves ? 2 : 1, kPart = kQuads / kParts;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int q = part * kPart; q < (part + 1) * kPart; ++q) {
      sum = _mm512_dpbusd_epi32(sum, factor, _mm512_load_si512(group.codes[q][lanes]));
    }
    _mm512_store_si512(group.starts[part] + lanes, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
  }
}

// The group `to` from the offsets of `count` groups, a column each: 8 bits of the largest. What they do not hold
// is left of the offsets.
HEED_INLINE void write_offsets(PanelGroup* from, int64_t count, int lanes, PanelGroup& to) {
  __m512i bits = _mm512_setzero_si512();  // of the largest: NaN is above infinity
  for (int64_t k = 0; k < count; ++k) {
    const __m512 offset = _mm512_abs_ps(_mm512_load_ps(from[k].scales[1] + lanes));
    bits = _mm512_max_epi32(bits, _mm512_castps_si512(offset));
  }
  const __m512 most = _mm512_castsi512_ps(bits);
  constexpr float kSmallest = 1e-36F;  // has a reciprocal
  const __mmask16 any = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kSmallest), _CMP_GE_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(any, _mm512_set1_ps(127), most);
  const __m512 scale = _mm512_mul_ps(most, _mm512_set1_ps(1.0F / 127));
  _mm512_store_ps(to.scales[0] + lanes, scale);
  for (int64_t q = 0; q < kQuads; ++q) {
    __m512i four = _mm512_setzero_si512();
    for (int64_t i = 3; i >= 0; --i) {
      four = _mm512_slli_epi32(four, 8);
      if (4 * q + i >= count) continue;
      float* place = from[4 * q + i].scales[1] + lanes;
      const __m512 offset = _mm512_load_ps(place);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(offset, inverse));
      _mm512_store_ps(place, _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), scale, offset));
      four = _mm512_or_si512(four, _mm512_and_si512(code, _mm512_set1_epi32(255)));
    }
    _mm512_store_si512(to.codes[q][lanes], four);
  }
  write_starts<false>(to, lanes);
}

template <class Format>
void unpack(const BlockMatrix& w, int64_t first, int bytes, Panel& panel) {
  constexpr int64_t kBytes = kChunk / Format::kWeights * Format::kBytes;
  constexpr bool kHalves = std::is_same_v<Format, Q6_K>;
  panel.halves = kHalves;
  panel.offset_parts = Format::kCentre == 0 ? bytes : 0;
  const auto* data = reinterpret_cast<const uint8_t*>(w.data);
  const int64_t groups = w.columns / kPanelColumns, row_bytes = w.row_bytes();
  const uint8_t* data_end = data + w.rows * row_bytes;
  ChunkRows rows;
  for (int lanes = 0; lanes < kPanelRows; lanes += 16) {
    for (int64_t g = 0; g < groups; g += 8) {
      const int64_t count = std::min<int64_t>(8, groups - g);
      for (int r = 0; r < 16; ++r) {
        const int64_t row = std::min(first + lanes + r, w.rows - 1);
        const uint8_t* b = data + row * row_bytes + g / 8 * kBytes;
        alignas(64) uint8_t last[kBytes];
        if (data_end - b < kBytes) {  // else a short chunk reads on into the next row
          std::memset(last, 0, kBytes);
          std::memcpy(last, b, static_cast<size_t>(count * Format::kBytes));
          b = last;
        }
        read_chunk<Format>(b, r, rows);
      }
      __m512i more[8];
      write_factors<Format>(rows, g, count, lanes, panel, more);
      write_codes(rows, count, more, lanes, panel.groups + g);
      for (int64_t i = g; i < g + count; ++i) write_starts<kHalves>(panel.groups[i], lanes);
    }
  }
  PanelGroup* to = panel.groups + groups;
  for (int part = 0; part < panel.offset_parts; ++part) {
    for (int64_t g = 0; g < groups; g += kPanelColumns, ++to) {
      for (int lanes = 0; lanes < kPanelRows; lanes += 16) {
        write_offsets(panel.groups + g, std::min(kPanelColumns, groups - g), lanes, *to);
      }
    }
  }
}

struct alignas(64) Tile {
  float sums[kRows][kPanelRows];
};

using Sums = __m512[kRows][kVectors];

HEED_INLINE void clear(Sums& sums) {
#pragma GCC unroll 4
  for (auto& row : sums) {
#pragma GCC unroll 2
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
}

// The codes of an outlier's column are picked out of their fours by a product with one 1.
template <bool kHalves>
HEED_INLINE void add_outliers(const Int8Outliers& outliers, int64_t count,
                              const PanelGroup* weights, Sums& sums) {
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t k = outliers.columns[i][r], column = k % kPanelColumns;
      const PanelGroup& w = weights[k / kPanelColumns];
      const float* scales = w.scales[kHalves ? column / (kPanelColumns / 2) : 0];
      const int8_t* codes = w.codes[column / 4][0];
      const __m512i one = _mm512_set1_epi32(1 << (8 * (k % 4)));
      const __m512 value = _mm512_set1_ps(outliers.values[i][r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i code =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, _mm512_load_si512(codes + 64 * v));
        const __m512 weight =
            _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_load_ps(scales + 16 * v));
        sums[r][v] = _mm512_fmadd_ps(weight, value, sums[r][v]);
      }
    }
  }
}

// Adds scales times the products of quads [kBegin, kEnd) of a group of weights with those of x from `quad` on,
// in steps.
template <int kBegin, int kEnd, int kBytes>
HEED_INLINE void add_quads(const Int8Group<kBytes>& x, int64_t quad, const PanelGroup& w,
                           const int32_t* starts, const float* scales, Sums& sums) {
  __m512i dots[kRows][kVectors];
#pragma GCC unroll 4
  for (auto& row : dots) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = _mm512_load_si512(starts + 16 * v);
  }
#pragma GCC unroll 2
  for (int byte = 0; byte < kBytes; ++byte) {
    if (byte > 0) {  // what was added are upper bytes
#pragma GCC unroll 4
      for (auto& row : dots) {
#pragma GCC unroll 2
        for (auto& dot : row) dot = _mm512_slli_epi32(dot, 8);
      }
    }
#pragma GCC unroll 8
    for (int q = kBegin; q < kEnd; ++q) {
      __m512i codes[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) codes[v] = _mm512_load_si512(w.codes[q][16 * v]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i values = _mm512_set1_epi32(read_32(x.codes[byte][quad + q][r]));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], values, codes[v]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512 scale = _mm512_load_ps(scales + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][v]), scale, sums[r][v]);
    }
  }
}

// Adds the products of `count` groups of weights with activations from x on.
template <bool kHalves, int kBytes>
HEED_INLINE void add_groups(const Int8Group<kBytes>* x, const PanelGroup* w, int64_t count,
                            Sums& sums) {
  constexpr int64_t kGroups = kInt8Columns / kPanelColumns;
  for (const PanelGroup* end = w + count; w < end; ++x) {
    Sums steps;  // in units of them
    clear(steps);
    const PanelGroup* last = std::min(w + kGroups, end);
    for (int64_t quad = 0; w < last; ++w, quad += kQuads) {
      if constexpr (kHalves) {
        add_quads<0, kQuads / 2>(*x, quad, *w, w->starts[0], w->scales[0], steps);
        add_quads<kQuads / 2, kQuads>(*x, quad, *w, w->starts[1], w->scales[1], steps);
      } else {
        add_quads<0, kQuads>(*x, quad, *w, w->starts[0], w->scales[0], steps);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512 step = _mm512_set1_ps(x->steps[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_fmadd_ps(steps[r][v], step, sums[r][v]);
      }
    }
  }
}

// Sums of four rows of activations with a panel of weights. A group costs 64 products of integers for a byte,
// then conversion and scale of 8 sums (twice for halves), for four groups steps of 8; an outlier costs 6 for
// its row.
template <bool kHalves, int kBytes>
__attribute__((noinline)) void sum_panel(const std::byte* block, int64_t columns,
                                         const Panel& panel, Tile& tile) {
  const auto* outliers = reinterpret_cast<const Int8Outliers*>(block);
  const auto* x = reinterpret_cast<const Int8Group<kBytes>*>(outliers + 1);
  const int64_t groups = panel_groups(columns);
  Sums sums;
  clear(sums);
  add_groups<kHalves>(x, panel.groups, groups, sums);
  const PanelGroup* offsets = panel.groups + groups;
  for (int part = 0; part < panel.offset_parts; ++part) {
    add_groups<kHalves>(x + value_groups(columns), offsets, panel_groups(groups), sums);
    offsets += panel_groups(groups);
  }
  add_outliers<kHalves>(*outliers, Int8Outliers::count(columns), panel.groups, sums);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(tile.sums[r] + 16 * v, sums[r][v]);
  }
}

// Round to nearest even; NaN stays NaN.
inline __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1 << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// The tile's rows and columns that exist.
template <class T, bool kAdd>
inline void store(const Tile& tile, T* y, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask16 lanes[kVectors] = {first_lanes(columns), first_lanes(columns - 16)};
  for (int64_t r = 0; r < rows; ++r, y += stride) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __m512 x = _mm512_load_ps(tile.sums[r] + 16 * v);
      if constexpr (kAdd) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes[v], y + 16 * v));
      if constexpr (std::is_same_v<T, float>) {
        _mm512_mask_storeu_ps(y + 16 * v, lanes[v], x);
      } else {
        _mm256_mask_storeu_epi16(y + 16 * v, lanes[v], to_bfloat16(x));
      }
    }
  }
}

template <class T, bool kAdd>
void panel_rows(const Int8Rows& x, const Panel& panel, const Tensor& y, int64_t first,
                int64_t end) {
  const auto sum = x.bytes == 1   ? panel.halves ? sum_panel<true, 1> : sum_panel<false, 1>
                     : panel.halves ? sum_panel<true, 2>
                                  : sum_panel<false, 2>;
  Tile tile;
  for (int64_t m = first; m < end; m += kInt8Rows) {
    const int64_t rows = std::min(kInt8Rows, end - m);
    T* to = y.as<T>() + m * y.stride(0);
    // Rows of y are too far apart for the processor to see them coming.
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < kPanelRows; c += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(to + r * y.stride(0) + c, 1);
      }
    }
    sum(x.data + m / kInt8Rows * int8_block_bytes(x.columns, x.bytes), x.columns, panel, tile);
    store<T, kAdd>(tile, to, y.stride(0), rows, panel.rows);
  }
}

}  // namespace

void unpack_panel_avx512(const BlockMatrix& w, int64_t first, int bytes, Panel& panel) {
  panel.rows = std::min(kPanelRows, w.rows - first);
  with_format(w.format, [&](auto format) {
    unpack<typename decltype(format)::type>(w, first, bytes, panel);
  });
}

void int8_panel_avx512(const Int8Rows& x, const Panel& panel, const Tensor& y, bool add,
                       int64_t first, int64_t end) {
  const auto rows = y.dtype() == DType::bf16 ? panel_rows<bfloat16, false>
                    : add                    ? panel_rows<float, true>
                                             : panel_rows<float, false>;
  rows(x, panel, y, first, end);
}

}  // namespace heed::kernels
