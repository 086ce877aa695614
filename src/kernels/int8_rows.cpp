#include "kernels/int8_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/by_isa.h"
#include "kernels/int8_layout.h"
#include "kernels/panels.h"

#ifndef HEED_INT8_GROUPS_
#define HEED_INT8_GROUPS_
namespace heed {
namespace {
// Groups of columns, rounded up to a multiple of the lanes of any vector.
constexpr int64_t padded_groups(int64_t columns) {
  return round_up(kernels::int8_groups(columns), 16);
}
}  // namespace
}  // namespace heed
#endif

#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/int8_rows.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <hwy/highway.h>

#include "kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D = Full<float>;
using DI = hn::RebindToSigned<D>;
using V = hn::Vec<D>;
using VI = hn::Vec<DI>;
constexpr int kLanes = static_cast<int>(lanes<float>());

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

constexpr int kVectors = static_cast<int>(kInt8Columns) / kLanes;  // of a group

// Lane r of the result is the greatest |x| of row r in a group of columns of float32 rows `stride` apart:
// NaN if any is, since its bits are the greatest.
HWY_INLINE V largest_of_rows(const float* x, int64_t stride) {
  V most[kInt8Rows];
#pragma GCC unroll 4
  for (int r = 0; r < kInt8Rows; ++r) {
    const float* row = x + r * stride;
    most[r] = hn::Abs(hn::LoadU(D(), row));
#pragma GCC unroll 16
    for (int i = 1; i < kVectors; ++i) {
      most[r] = larger(most[r], hn::Abs(hn::LoadU(D(), row + i * kLanes)));
    }
  }
  return join_lanes(most, larger);
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
#pragma GCC unroll 16
  for (int i = 1; i < kVectors; ++i) most = larger(most, hn::Abs(hn::LoadU(D(), x + i * kLanes)));
  return hn::GetLane(hn::BitCast(D(), hn::MaxOfLanes(DI(), hn::BitCast(DI(), most))));
}

// Takes outlier i out of row r, x. `largest` holds the greatest |x| of each of its groups, then zeros.
HWY_INLINE void take_outlier(float* x, float* largest, int64_t padded, int64_t i, int64_t r,
                             Int8Outliers& to) {
  const int64_t group = place_of_largest(largest, padded);
  float* values = x + group * kInt8Columns;
  const int64_t k = place_of_largest(values, kInt8Columns);
  to.columns[i][r] = static_cast<int32_t>(group * kInt8Columns + k);
  to.values[i][r] = values[k];
  values[k] = 0.0f;
  largest[group] = largest_of_group(values);
}

template <int kBytes>
HWY_INLINE void round_group(const float* x, int64_t row_stride, const float* largest,
                            int64_t stride, Int8Group<kBytes>& to) {
  constexpr float kMost = kBytes == 1 ? 127.0f : 32767.0f;
  float inverse[kInt8Rows];
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    const float most = largest[r * stride];
    to.steps[r] = most * (1.0f / kMost);
    inverse[r] = most < kSmallest ? 0.0f : kMost / most;
  }
  // Bytes of four columns of each row side by side, in every 16 bytes of a vector: the lower ones.
  constexpr uint8_t o = 0x80;  // gives zero
  alignas(16) static constexpr uint8_t kLowBytes[kInt8Rows][16] = {
      {0, 4, 8, 12, o, o, o, o, o, o, o, o, o, o, o, o},
      {o, o, o, o, 0, 4, 8, 12, o, o, o, o, o, o, o, o},
      {o, o, o, o, o, o, o, o, 0, 4, 8, 12, o, o, o, o},
      {o, o, o, o, o, o, o, o, o, o, o, o, 0, 4, 8, 12}};
  const hn::Repartition<uint8_t, D> bytes;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    auto upper = hn::Set(bytes, 0x80), lower = hn::Zero(bytes);  // of bytes with a sign: plus 128
#pragma GCC unroll 4
    for (int r = 0; r < kInt8Rows; ++r) {
      // Rounded to an integer, which is in the low bits.
      const V shifted = hn::MulAdd(hn::LoadU(D(), x + r * row_stride + i * kLanes),
                                   hn::Set(D(), inverse[r]), hn::Set(D(), 0x1.8p23f));
      const auto place = hn::LoadDup128(bytes, kLowBytes[r]);
      const auto low = hn::TableLookupBytesOr0(hn::BitCast(bytes, shifted), place);
      if constexpr (kBytes == 1) {
        upper = hn::Xor(upper, low);
      } else {
        lower = hn::Or(lower, low);
        const auto high = hn::BitCast(bytes, hn::ShiftRight<8>(hn::BitCast(DI(), shifted)));
        upper = hn::Xor(upper, hn::TableLookupBytesOr0(high, place));
      }
    }
    hn::StoreU(upper, bytes, to.codes[0][i * kLanes / 4][0]);
    if constexpr (kBytes == 2) hn::StoreU(lower, bytes, to.codes[1][i * kLanes / 4][0]);
  }
}

HWY_INLINE V add(V a, V b) { return hn::Add(a, b); }

// Sums of kPanelColumns columns of rows `stride` apart, to sums[r * stride].
HWY_INLINE void sum_columns(const float* x, int64_t stride, float* sums) {
  V sum[kInt8Rows];
#pragma GCC unroll 4
  for (int r = 0; r < kInt8Rows; ++r) {
    sum[r] = hn::LoadU(D(), x + r * stride);
#pragma GCC unroll 8
    for (int64_t k = kLanes; k < kPanelColumns; k += kLanes) {
      sum[r] = hn::Add(sum[r], hn::LoadU(D(), x + r * stride + k));
    }
  }
  HWY_ALIGN float of_rows[kLanes];
  hn::Store(join_lanes(sum, add), D(), of_rows);
  for (int64_t r = 0; r < kInt8Rows; ++r) sums[r * stride] = of_rows[r];
}

// Rounds float32 [kInt8Rows, int8_groups * kInt8Columns] without gaps, whose outliers become zero and whose
// sums are made. `largest` is room for kInt8Rows * padded_groups(columns) numbers.
template <int kBytes>
void round_rows(float* x, int64_t columns, float* largest, std::byte* block) {
  auto& outliers = *reinterpret_cast<Int8Outliers*>(block);
  outliers = {};
  auto* groups = reinterpret_cast<Int8Group<kBytes>*>(&outliers + 1);
  const int64_t values = value_groups(columns), count = int8_groups(columns);
  const int64_t row_stride = count * kInt8Columns, stride = padded_groups(columns);
  for (int64_t g = 0; g < panel_groups(columns); ++g) {
    sum_columns(x + g * kPanelColumns, row_stride, x + values * kInt8Columns + g);
  }
  const auto find_largest = [&](int64_t g) HWY_ATTR {
    HWY_ALIGN float of_rows[kLanes];
    hn::Store(largest_of_rows(x + g * kInt8Columns, row_stride), D(), of_rows);
    for (int64_t r = 0; r < kInt8Rows; ++r) largest[r * stride + g] = of_rows[r];
  };
  for (int64_t g = 0; g < values; ++g) find_largest(g);
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    std::fill(largest + r * stride + values, largest + (r + 1) * stride, 0.0f);
  }
  for (int64_t i = 0; i < Int8Outliers::count(columns); ++i) {
    // Rows inside: one waits for memory it has just written while the others go on.
    for (int64_t r = 0; r < kInt8Rows; ++r) {
      take_outlier(x + r * row_stride, largest + r * stride, stride, i, r, outliers);
    }
  }
  for (int64_t g = values; g < count; ++g) find_largest(g);
  for (int64_t g = 0; g < count; ++g) {
    round_group(x + g * kInt8Columns, row_stride, largest + g, stride, groups[g]);
  }
}

}  // namespace

auto int8_rounding() { return std::array{round_rows<1>, round_rows<2>}; }

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed {
namespace kernels {
namespace {
using RoundRows = std::array<void (*)(float*, int64_t, float*, std::byte*), 2>;
HEED_TABLE(RoundRows, int8_rounding_of, int8_rounding)
}  // namespace
}  // namespace kernels

namespace {

using kernels::kInt8Columns;
using kernels::kInt8Rows;

[[noreturn]] void fail(const char* op, const std::string& text) {
  throw Error(std::string(op) + ": " + text);
}

void check_columns(const char* op, int64_t columns) {
  if (columns < 1) fail(op, "columns are " + std::to_string(columns) + ", 1 is the least");
}

void check_bytes(const char* op, int bytes) {
  if (bytes != 1 && bytes != 2)
    fail(op, "bytes is " + std::to_string(bytes) + ", 1 or 2 is needed");
}

void check_weights(std::span<const BlockMatrix> weights, int64_t columns) {
  for (const BlockMatrix& w : weights) {
    if (!has_codes(w.format)) {
      fail("int8_product", std::string("weights in ") + name_of(w.format) +
                               " are given, a format with codes is needed");
    }
  }
  kernels::check_columns("int8_product", weights, columns);
}

}  // namespace

bool has_int8_products(const RunOptions& run) {
  return chosen_isa(run) >= Isa::avx512 && cpu_info().has("avx512_vnni");
}

int64_t int8_rows_bytes(int64_t rows, int64_t columns, int bytes) {
  return ceil_div(rows, kInt8Rows) * kernels::int8_block_bytes(columns, bytes);
}

void fill_int8_rows(const Int8Rows& to, const RunOptions& run,
                    const std::function<void(int64_t first, const Tensor& x)>& make) {
  check_columns("fill_int8_rows", to.columns);
  check_bytes("fill_int8_rows", to.bytes);
  constexpr int64_t kValuesPerItem = int64_t{1} << 14;
  const int64_t rows_per_item = round_up(1 + kValuesPerItem / to.columns, kInt8Rows);
  const int64_t items = (to.rows + rows_per_item - 1) / rows_per_item;
  const int64_t stride = kernels::int8_groups(to.columns) * kInt8Columns;
  const int64_t values = kInt8Rows * stride, largest = kInt8Rows * padded_groups(to.columns);
  const auto round = kernels::int8_rounding_of(chosen_isa(run))[static_cast<size_t>(to.bytes - 1)];
  parallel_for_shares(items, threads_for(run, items), [&](int64_t item, int) {
    Scratch scratch(static_cast<size_t>(values + largest) * sizeof(float));
    auto* x = scratch.take<float>(values);
    auto* of_groups = scratch.take<float>(largest);
    std::fill(x, x + values, 0.0f);  // columns past the last stay so
    const int64_t end = std::min(to.rows, (item + 1) * rows_per_item);
    for (int64_t m = item * rows_per_item; m < end; m += kInt8Rows) {
      const int64_t count = std::min(kInt8Rows, end - m);
      std::fill(x + count * stride, x + values, 0.0f);
      make(m, Tensor(x, DType::f32, {count, to.columns}, {stride, 1}));
      round(x, to.columns, of_groups,
            to.data + m / kInt8Rows * kernels::int8_block_bytes(to.columns, to.bytes));
    }
  });
}

void int8_product(const Int8Rows& x, std::span<const BlockMatrix> w, const Tensor& y, bool add,
                  const RunOptions& run) {
  check_columns("int8_product", x.columns);
  check_bytes("int8_product", x.bytes);
  if (!has_int8_products(run)) fail("int8_product", "this needs AVX512-VNNI");
  check_weights(w, x.columns);
  const int64_t rows = kernels::total_rows(w);
  const bool f32 = y.dtype() == DType::f32;
  if (y.rank() != 2 || !(f32 || (y.dtype() == DType::bf16 && !add)) || y.size(0) != x.rows ||
      y.size(1) != rows || (rows > 1 && y.stride(1) != 1)) {
    fail("int8_product", describe("y", y) + (add ? " to add to" : "") + " is given for x [" +
                             std::to_string(x.rows) + "," + std::to_string(x.columns) +
                             "] and w [" + std::to_string(rows) + "," + std::to_string(x.columns) +
                             "]");
  }
#if HWY_ARCH_X86
  kernels::for_panels(w, kernels::kPanelRows, x.rows, kInt8Rows, run,
                      [&](const kernels::PanelPlace& at, int64_t begin, int64_t end) {
                        const int64_t groups = kernels::Panel::most_groups(x.columns);
                        Scratch scratch(static_cast<size_t>(groups) * sizeof(kernels::PanelGroup));
                        kernels::Panel panel{scratch.take<kernels::PanelGroup>(groups)};
                        kernels::unpack_panel_avx512(*at.weights, at.first, x.bytes, panel);
                        kernels::int8_panel_avx512(
                            x, panel, y.slice(1, at.column, at.column + at.rows), add, begin, end);
                      });
#endif
}

}  // namespace heed
#endif  // HWY_ONCE
