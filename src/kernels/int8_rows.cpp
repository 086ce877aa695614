#include "kernels/int8_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/int8_layout.h"

#ifndef HEED_INT8_KERNELS_
#define HEED_INT8_KERNELS_
namespace heed {
namespace {
// Groups of columns, rounded up to a multiple of the lanes of any vector.
constexpr int64_t padded_groups(int64_t columns) {
  return round_up(columns / kernels::kInt8Group, 16);
}

// One instruction set's functions.
struct Int8Kernels {
  // Rounds float32 [kInt8Rows, columns] without gaps, whose outliers become zero. `largest` is room for
  // kInt8Rows * padded_groups(columns) numbers.
  void (*round)(float* x, int64_t columns, float* largest, std::byte* block);
  // The codes of a row of weights around zero; scale and minimum of every 16 columns.
  std::array<void (*)(const uint8_t* row, int64_t columns, int8_t* codes, float* scales,
                      float* minima),
             kBlockFormats>
      read_codes;
};
}  // namespace
}  // namespace heed
#endif

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/int8_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <hwy/highway.h>

#include "kernels/block_formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Below this the reciprocal of a step would not be finite; such values become zero.
constexpr float kSmallest = 1e-36f;

// Lane r of the result, r < 4, is all lanes of rows[r] joined by op.
template <class Op>
HWY_INLINE V join_lanes(const V (&rows)[kInt8Rows], Op op) {
  static_assert(kInt8Rows == 4);
  const hn::Repartition<double, D> wide;
  const V pairs0 =
      op(hn::InterleaveLower(D(), rows[0], rows[1]), hn::InterleaveUpper(D(), rows[0], rows[1]));
  const V pairs1 =
      op(hn::InterleaveLower(D(), rows[2], rows[3]), hn::InterleaveUpper(D(), rows[2], rows[3]));
  const auto a = hn::BitCast(wide, pairs0), b = hn::BitCast(wide, pairs1);
  V all = op(hn::BitCast(D(), hn::InterleaveLower(wide, a, b)),
             hn::BitCast(D(), hn::InterleaveUpper(wide, a, b)));
  if constexpr (kLanes > 4) all = op(all, hn::SwapAdjacentBlocks(all));
  if constexpr (kLanes > 8) all = op(all, hn::ReverseBlocks(D(), all));
  return all;
}

HWY_INLINE V larger(V a, V b) {
  return hn::BitCast(D(), hn::Max(hn::BitCast(DI(), a), hn::BitCast(DI(), b)));
}

constexpr int kVectors = static_cast<int>(kInt8Group) / kLanes;  // of a group

// Lane r of `largest` is the greatest |x| of row r in a group of columns of float32 rows `columns` apart:
// NaN if any is, since its bits are the greatest. Lane r of `sums` is their sum.
HWY_INLINE void measure_group(const float* x, int64_t columns, V& largest, V& sums) {
  V most[kInt8Rows], sum[kInt8Rows];
#pragma GCC unroll 4
  for (int r = 0; r < kInt8Rows; ++r) {
    const float* row = x + r * columns;
    sum[r] = hn::LoadU(D(), row);
    most[r] = hn::Abs(sum[r]);
#pragma GCC unroll 8
    for (int i = 1; i < kVectors; ++i) {
      const V v = hn::LoadU(D(), row + i * kLanes);
      most[r] = larger(most[r], hn::Abs(v));
      sum[r] = hn::Add(sum[r], v);
    }
  }
  largest = join_lanes(most, larger);
  sums = join_lanes(sum, [](V a, V b) HWY_ATTR { return hn::Add(a, b); });
}

// Where the greatest bits of n values are, a multiple of the lanes: the first of them.
HWY_INLINE int64_t place_of_largest(const float* values, int64_t n) {
  V most = hn::Abs(hn::LoadU(D(), values));
  for (int64_t i = kLanes; i < n; i += kLanes) {
    most = larger(most, hn::Abs(hn::LoadU(D(), values + i)));
  }
  const VI bits = hn::MaxOfLanes(DI(), hn::BitCast(DI(), most));
  for (int64_t i = 0;; i += kLanes) {
    const V v = hn::Abs(hn::LoadU(D(), values + i));
    const intptr_t found = hn::FindFirstTrue(DI(), hn::Eq(hn::BitCast(DI(), v), bits));
    if (found >= 0) return i + found;
  }
}

HWY_INLINE float largest_of_group(const float* x) {
  V most = hn::Abs(hn::LoadU(D(), x));
#pragma GCC unroll 8
  for (int i = 1; i < kVectors; ++i) most = larger(most, hn::Abs(hn::LoadU(D(), x + i * kLanes)));
  return hn::GetLane(hn::BitCast(D(), hn::MaxOfLanes(DI(), hn::BitCast(DI(), most))));
}

// Takes outlier i out of row r, x. `largest` holds the greatest |x| of each of its groups, then zeros.
HWY_INLINE void take_outlier(float* x, float* largest, int64_t padded, int64_t i, int64_t r,
                             Int8Outliers& to) {
  const int64_t group = place_of_largest(largest, padded);
  float* values = x + group * kInt8Group;
  const int64_t k = place_of_largest(values, kInt8Group);
  to.columns[i][r] = static_cast<int32_t>(group * kInt8Group + k);
  to.values[i][r] = values[k];
  values[k] = 0.0f;
  largest[group] = largest_of_group(values);
}

HWY_INLINE void round_group(const float* x, int64_t columns, const float* largest, int64_t stride,
                            Int8Group& to) {
  float inverse[kInt8Rows];
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    const float most = largest[r * stride];
    to.steps[r] = most * (1.0f / 127.0f);
    inverse[r] = most < kSmallest ? 0.0f : 127.0f / most;
  }
  // Bytes of four columns of each row side by side, in every 16 bytes of a vector.
  constexpr uint8_t o = 0x80;  // gives zero
  alignas(16) static constexpr uint8_t kLowBytes[kInt8Rows][16] = {
      {0, 4, 8, 12, o, o, o, o, o, o, o, o, o, o, o, o},
      {o, o, o, o, 0, 4, 8, 12, o, o, o, o, o, o, o, o},
      {o, o, o, o, o, o, o, o, 0, 4, 8, 12, o, o, o, o},
      {o, o, o, o, o, o, o, o, o, o, o, o, 0, 4, 8, 12}};
  const hn::Repartition<uint8_t, D> bytes;
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    auto codes = hn::Set(bytes, 0x80);  // of signed bytes: plus 128
#pragma GCC unroll 4
    for (int r = 0; r < kInt8Rows; ++r) {
      // Rounded to an integer, which is in the low bits.
      const V shifted = hn::MulAdd(hn::LoadU(D(), x + r * columns + i * kLanes),
                                   hn::Set(D(), inverse[r]), hn::Set(D(), 0x1.8p23f));
      codes = hn::Xor(codes, hn::TableLookupBytesOr0(hn::BitCast(bytes, shifted),
                                                     hn::LoadDup128(bytes, kLowBytes[r])));
    }
    hn::StoreU(codes, bytes, to.codes[i * kLanes / 4][0]);
  }
}

// `largest`: room for kInt8Rows rows of padded_groups.
void round_rows(float* x, int64_t columns, float* largest, std::byte* block) {
  auto& outliers = *reinterpret_cast<Int8Outliers*>(block);
  auto* groups = reinterpret_cast<Int8Group*>(&outliers + 1);
  const int64_t count = columns / kInt8Group, stride = padded_groups(columns);
  HWY_ALIGN float of_rows[kLanes];
  for (int64_t g = 0; g < count; ++g) {
    V most, sums;
    measure_group(x + g * kInt8Group, columns, most, sums);
    hn::Store(sums, D(), of_rows);
    std::memcpy(groups[g].sums, of_rows, sizeof groups[g].sums);
    hn::Store(most, D(), of_rows);
    for (int64_t r = 0; r < kInt8Rows; ++r) largest[r * stride + g] = of_rows[r];
  }
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    std::fill(largest + r * stride + count, largest + (r + 1) * stride, 0.0f);
  }
  for (int64_t i = 0; i < Int8Outliers::kCount; ++i) {
    // Rows inside: one waits for memory it has just written while the others go on.
    for (int64_t r = 0; r < kInt8Rows; ++r) {
      take_outlier(x + r * columns, largest + r * stride, stride, i, r, outliers);
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    round_group(x + g * kInt8Group, columns, largest + g, stride, groups[g]);
  }
}

struct Coded {
  VI code;
  float scale, minimum;
};

// Codes around zero: half the products of a rounding error with them.
template <int kBits>
struct CodeMap {
  static constexpr int kCentre = kBits == 8 ? 0 : 1 << (kBits - 1);
  float scale, minimum;
  HWY_INLINE Coded operator()(VI q) const {
    return {hn::Sub(q, hn::Set(DI(), kCentre)), scale, minimum};
  }
};

// What a block is decoded to.
struct Codes {
  int8_t* codes;
  float* scales;  // of every 16 columns
  float* minima;

  template <int kBits>
  static HWY_INLINE CodeMap<kBits> map(float scale, float offset) {
    return {scale, std::fma(static_cast<float>(CodeMap<kBits>::kCentre), scale, offset)};
  }
  HWY_INLINE void put(const Coded& x, int64_t k) {
    const hn::Rebind<int8_t, DI> bytes;
    hn::StoreU(hn::DemoteTo(bytes, x.code), bytes, codes + k);
    scales[k / 16] = x.scale;
    minima[k / 16] = x.minimum;
  }
  HWY_INLINE void add(const Coded& a, int64_t k0, const Coded& b, int64_t k1) {
    put(a, k0);
    put(b, k1);
  }
};

template <class Format>
void read_codes(const uint8_t* row, int64_t columns, int8_t* codes, float* scales, float* minima) {
  HWY_ALIGN float pair[2 * kScaledBlocks] = {};
  for (int64_t k = 0; k < columns; k += Format::kWeights, row += Format::kBytes) {
    if constexpr (Format::kPairs) load_pairs(row, Format::kBytes, 1, pair);
    Codes to{codes + k, scales + k / 16, minima + k / 16};
    Format::decode(row, pair, to);
  }
}

}  // namespace

Int8Kernels int8_kernels() {
  return {
      round_rows,
      {nullptr, nullptr, nullptr, read_codes<Q8_0>, read_codes<Q4_0>, read_codes<Q4_1>,
       read_codes<Q5_0>, read_codes<Q5_1>, read_codes<Q4_K>, read_codes<Q5_K>, read_codes<Q6_K>}};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed {
namespace {

using kernels::kInt8Group;
using kernels::kInt8Panel;
using kernels::kInt8Rows;
using kernels::WeightGroup;

const Int8Kernels& kernels_for(const RunOptions& run) {
  const Isa isa = chosen_isa(run);
#if HWY_ARCH_X86
  static const Int8Kernels avx512 = kernels::N_AVX3::int8_kernels();
  static const Int8Kernels avx2 = kernels::N_AVX2::int8_kernels();
  if (isa >= Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  static const Int8Kernels portable = kernels::HWY_STATIC_DISPATCH(int8_kernels)();
  return portable;
}

[[noreturn]] void fail(const char* op, const std::string& text) {
  throw Error(std::string(op) + ": " + text);
}

void check_columns(const char* op, int64_t columns) {
  if (columns < 1 || columns % kInt8Group != 0) {
    fail(op, "columns are " + std::to_string(columns) + ", a multiple of " +
                 std::to_string(kInt8Group) + " is needed");
  }
}

bool has_minima(BlockFormat format) {
  return format == BlockFormat::q4_1 || format == BlockFormat::q5_1 ||
         format == BlockFormat::q4_k || format == BlockFormat::q5_k;
}

// Rows of one panel as they are read from the file.
struct CodeRows {
  int8_t* codes;  // [panel, columns]
  float* scales;  // [panel, columns / 16]
  float* minima;
  int64_t columns;
};

void write_panel(const CodeRows& rows, const Int8Matrix& w, std::byte* to) {
  const WeightGroup at(w.half_groups, w.minima);
  const int64_t scales = w.half_groups ? 2 : 1, span = kInt8Group / scales;
  for (int64_t k = 0; k < rows.columns; k += kInt8Group, to += at.bytes) {
    auto* starts = reinterpret_cast<int32_t*>(to);
    auto* factors = reinterpret_cast<float*>(to + at.scales);
    auto* minima = reinterpret_cast<float*>(to + at.minima);
    for (int64_t n = 0; n < kInt8Panel; ++n) {
      const int8_t* codes = rows.codes + n * rows.columns + k;
      const int64_t half = n * (rows.columns / 16) + k / 16;
      for (int64_t s = 0; s < scales; ++s) {
        int32_t sum = 0;
        for (int64_t i = s * span; i < (s + 1) * span; ++i) sum += codes[i];
        starts[s * kInt8Panel + n] = -128 * sum;
        factors[s * kInt8Panel + n] = rows.scales[half + s];
      }
      if (w.minima) minima[n] = rows.minima[half];
      for (int64_t q = 0; q < kInt8Group / 4; ++q) {
        std::memcpy(to + at.codes + (q * kInt8Panel + n) * 4, codes + 4 * q, 4);
      }
    }
  }
}

}  // namespace

bool has_int8_products(const RunOptions& run) {
  const auto& features = cpu_info().features;
  return chosen_isa(run) == Isa::avx512 &&
         std::find(features.begin(), features.end(), "avx512_vnni") != features.end();
}

int64_t int8_rows_bytes(int64_t rows, int64_t columns) {
  return (rows + kInt8Rows - 1) / kInt8Rows * kernels::int8_block_bytes(columns);
}

void fill_int8_rows(const Int8Rows& to, const RunOptions& run,
                    const std::function<void(int64_t first, const Tensor& x)>& make) {
  check_columns("fill_int8_rows", to.columns);
  constexpr int64_t kValuesPerItem = int64_t{1} << 14;
  const int64_t rows_per_item = round_up(1 + kValuesPerItem / to.columns, kInt8Rows);
  const int64_t items = (to.rows + rows_per_item - 1) / rows_per_item;
  const int64_t values = kInt8Rows * to.columns, largest = kInt8Rows * padded_groups(to.columns);
  const auto round = kernels_for(run).round;
  parallel_for_shares(items, threads_for(run, items), [&](int64_t item, int) {
    Scratch scratch(static_cast<size_t>(values + largest) * sizeof(float));
    auto* x = scratch.take<float>(values);
    auto* of_groups = scratch.take<float>(largest);
    const int64_t end = std::min(to.rows, (item + 1) * rows_per_item);
    for (int64_t m = item * rows_per_item; m < end; m += kInt8Rows) {
      const int64_t count = std::min(kInt8Rows, end - m);
      make(m, Tensor(x, DType::f32, {count, to.columns}));
      std::fill(x + count * to.columns, x + values, 0.0f);
      round(x, to.columns, of_groups,
            to.data + m / kInt8Rows * kernels::int8_block_bytes(to.columns));
    }
  });
}

int64_t Int8Matrix::bytes() const {
  return (rows + kInt8Panel - 1) / kInt8Panel * (columns / kInt8Group) *
         WeightGroup(half_groups, minima).bytes;
}

bool has_codes(BlockFormat format) { return weights_per_block(format) > 1; }

Int8Matrix int8_matrix(std::span<const BlockMatrix> parts) {
  Int8Matrix w;
  for (const BlockMatrix& part : parts) {
    if (!has_codes(part.format)) {
      fail("int8_matrix", std::string("weights in ") + name_of(part.format) +
                              " are given, a format with codes is needed");
    }
    if (part.columns != parts[0].columns) {
      fail("int8_matrix", "weights have " + std::to_string(part.columns) +
                              " columns beside others with " + std::to_string(parts[0].columns) +
                              ", one number is needed");
    }
    w.rows += part.rows;
    w.columns = part.columns;
    w.minima |= has_minima(part.format);
    w.half_groups |= part.format == BlockFormat::q6_k;
  }
  check_columns("int8_matrix", w.columns);
  return w;
}

void pack_int8(std::span<const BlockMatrix> parts, const Int8Matrix& to, const RunOptions& run) {
  const Int8Kernels& kernels = kernels_for(run);
  const int64_t columns = to.columns, panels = (to.rows + kInt8Panel - 1) / kInt8Panel;
  parallel_for(panels, threads_for(run, panels), [&](int64_t panel, int) {
    const int64_t halves = columns / 16;
    Scratch scratch(static_cast<size_t>(kInt8Panel * (columns + 8 * halves)) + 128);
    CodeRows rows{scratch.take<int8_t>(kInt8Panel * columns),
                  scratch.take<float>(kInt8Panel * halves),
                  scratch.take<float>(kInt8Panel * halves), columns};
    int64_t first = 0, filled = 0;  // of the part; of the panel
    const int64_t begin = panel * kInt8Panel;
    for (const BlockMatrix& part : parts) {
      const int64_t from = std::max(first, begin) - first;
      const int64_t end = std::min(first + part.rows, begin + kInt8Panel) - first;
      const auto* data = reinterpret_cast<const uint8_t*>(part.data);
      for (int64_t n = from; n < end; ++n, ++filled) {
        kernels.read_codes[static_cast<size_t>(part.format)](
            data + n * part.row_bytes(), columns, rows.codes + filled * columns,
            rows.scales + filled * halves, rows.minima + filled * halves);
      }
      first += part.rows;
    }
    const auto clear = [&](auto* values, int64_t each) {
      std::fill(values + filled * each, values + kInt8Panel * each, 0);
    };
    clear(rows.codes, columns);
    clear(rows.scales, halves);
    clear(rows.minima, halves);
    write_panel(
        rows, to,
        to.data + panel * (columns / kInt8Group) * WeightGroup(to.half_groups, to.minima).bytes);
  });
}

void int8_product(const Int8Rows& x, const Int8Matrix& w, const Tensor& y, bool add,
                  const RunOptions& run) {
  check_columns("int8_product", x.columns);
  if (!has_int8_products(run)) fail("int8_product", "this needs AVX512-VNNI");
  const bool f32 = y.dtype() == DType::f32;
  if (y.rank() != 2 || !(f32 || (y.dtype() == DType::bf16 && !add)) || y.size(0) != x.rows ||
      y.size(1) != w.rows || x.columns != w.columns || (w.rows > 1 && y.stride(1) != 1)) {
    fail("int8_product", describe("y", y) + (add ? " to add to" : "") + " is given for x [" +
                             std::to_string(x.rows) + "," + std::to_string(x.columns) +
                             "] and w [" + std::to_string(w.rows) + "," +
                             std::to_string(w.columns) + "]");
  }
#if HWY_ARCH_X86
  constexpr int64_t kRowsPerItem = 128;
  const int64_t panels = (w.rows + kInt8Panel - 1) / kInt8Panel;
  const int64_t parts = (x.rows + kRowsPerItem - 1) / kRowsPerItem, items = panels * parts;
  const int threads = threads_for(run, items);
  // Rows of y stay with one thread. Among its rows, a panel of weights stays in the first two caches.
  const int64_t own = (parts + threads - 1) / threads;
  parallel_for_shares(items, threads, [&](int64_t item, int) {
    const int64_t begin = item / (own * panels) * own, count = std::min(own, parts - begin);
    const int64_t place = item - begin * panels;
    const int64_t first = (begin + place % count) * kRowsPerItem;
    kernels::int8_panel_avx512(x, w, y, add, place / count, first,
                               std::min(x.rows, first + kRowsPerItem));
  });
#endif
}

}  // namespace heed
#endif  // HWY_ONCE
