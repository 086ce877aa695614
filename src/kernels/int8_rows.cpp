#include "kernels/int8_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/by_isa.h"
#include "kernels/int8_layout.h"

#ifndef HEED_INT8_KERNELS_
#define HEED_INT8_KERNELS_
namespace heed {
namespace {
// Groups of columns, rounded up to a multiple of the lanes of any vector.
constexpr int64_t padded_groups(int64_t columns) {
  return round_up(kernels::int8_groups(columns), 16);
}

// One instruction set's functions.
struct Int8Kernels {
  // Rounds float32 [kInt8Rows, whole groups] without gaps, whose outliers become zero. `largest` is room
  // for kInt8Rows * padded_groups(columns) numbers.
  void (*round)(float* x, int64_t columns, float* largest, std::byte* block);
  // The float32 weights of a row.
  std::array<void (*)(const uint8_t* row, int64_t columns, float* weights), kBlockFormats> read;
  // Codes of weights in whole groups; the scale of each group.
  void (*round_weights)(const float* weights, int64_t groups, int8_t* codes, float* scales);
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
  float* values = x + group * kInt8Group;
  const int64_t k = place_of_largest(values, kInt8Group);
  to.columns[i][r] = static_cast<int32_t>(group * kInt8Group + k);
  to.values[i][r] = values[k];
  values[k] = 0.0f;
  largest[group] = largest_of_group(values);
}

HWY_INLINE void round_group(const float* x, int64_t row_stride, const float* largest,
                            int64_t stride, Int8Group& to) {
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
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    auto codes = hn::Set(bytes, 0x80);  // of signed bytes: plus 128
#pragma GCC unroll 4
    for (int r = 0; r < kInt8Rows; ++r) {
      // Rounded to an integer, which is in the low bits.
      const V shifted = hn::MulAdd(hn::LoadU(D(), x + r * row_stride + i * kLanes),
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
  const int64_t count = int8_groups(columns), stride = padded_groups(columns);
  const int64_t row_stride = count * kInt8Group;
  HWY_ALIGN float of_rows[kLanes];
  for (int64_t g = 0; g < count; ++g) {
    hn::Store(largest_of_rows(x + g * kInt8Group, row_stride), D(), of_rows);
    for (int64_t r = 0; r < kInt8Rows; ++r) largest[r * stride + g] = of_rows[r];
  }
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    std::fill(largest + r * stride + count, largest + (r + 1) * stride, 0.0f);
  }
  for (int64_t i = 0; i < Int8Outliers::kCount; ++i) {
    // Rows inside: one waits for memory it has just written while the others go on.
    for (int64_t r = 0; r < kInt8Rows; ++r) {
      take_outlier(x + r * row_stride, largest + r * stride, stride, i, r, outliers);
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    round_group(x + g * kInt8Group, row_stride, largest + g, stride, groups[g]);
  }
}

struct Values {
  float* values;
  HWY_INLINE void add(V a, int64_t k0, V b, int64_t k1) {
    hn::StoreU(a, D(), values + k0);
    hn::StoreU(b, D(), values + k1);
  }
};

template <class Format>
void read_row(const uint8_t* row, int64_t columns, float* weights) {
  HWY_ALIGN float pairs[2 * kScaledBlocks] = {};
  const int64_t blocks = columns / Format::kWeights;
  for (int64_t b = 0; b < blocks; ++b, row += Format::kBytes) {
    const int64_t place = b % kScaledBlocks;
    if (Format::kPairs && place == 0) {
      load_pairs(row, Format::kBytes, std::min(kScaledBlocks, blocks - b), pairs);
    }
    Values to{weights + b * Format::kWeights};
    Format::decode(row, pairs + 2 * place, to);
  }
}

// The scale of least squared error of some whose largest code is between 82 and 127, a lane each.
// Quantised weights lie on lattices, and a scale that meets them rounds less: with the finest alone the
// divergence from float32 in docs/real-model.md was 0.0021.
HWY_INLINE float best_scale(const float* weights, float largest) {
  constexpr int kScales = 16, kParts = kScales / kLanes, kChains = 4;
  const auto largest_codes = [](int part) HWY_ATTR {
    const V lane = hn::Iota(D(), static_cast<float>(part * kLanes));
    return hn::NegMulAdd(lane, hn::Set(D(), 3.0f), hn::Set(D(), 127.0f));
  };
  V factors[kParts], errors[kParts][kChains];
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) {
    factors[p] = hn::Mul(largest_codes(p), hn::Set(D(), 1.0f / largest));
#pragma GCC unroll 4
    for (V& sum : errors[p]) sum = hn::Zero(D());
  }
  for (int64_t k = 0; k < kInt8Group; k += kChains) {
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const V code = hn::Mul(hn::Set(D(), weights[k + i]), factors[p]);
        const V error = hn::Sub(code, hn::Round(code));
        errors[p][i] = hn::MulAdd(error, error, errors[p][i]);
      }
    }
  }
  HWY_ALIGN float squares[kScales], codes[kScales];
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) {
    const V c = largest_codes(p);
    hn::Store(c, D(), codes + p * kLanes);
    V sum = errors[p][0];
#pragma GCC unroll 4
    for (int i = 1; i < kChains; ++i) sum = hn::Add(sum, errors[p][i]);
    hn::Store(hn::Div(sum, hn::Mul(c, c)), D(), squares + p * kLanes);
  }
  return largest / codes[std::min_element(squares, squares + kScales) - squares];
}

void round_weights(const float* weights, int64_t groups, int8_t* codes, float* scales) {
  const hn::Rebind<int8_t, DI> bytes;
  for (int64_t g = 0; g < groups; ++g, weights += kInt8Group, codes += kInt8Group) {
    const float largest = largest_of_group(weights);
    const bool zero = largest < kSmallest;
    scales[g] = zero ? 0.0f : best_scale(weights, largest);
    const V inverse = hn::Set(D(), zero ? 0.0f : 1.0f / scales[g]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const VI code = hn::NearestInt(hn::Mul(hn::LoadU(D(), weights + v * kLanes), inverse));
      hn::StoreU(hn::DemoteTo(bytes, code), bytes, codes + v * kLanes);
    }
  }
}

}  // namespace

Int8Kernels int8_kernels() {
  return {round_rows,
          {nullptr, nullptr, nullptr, read_row<Q8_0>, read_row<Q4_0>, read_row<Q4_1>,
           read_row<Q5_0>, read_row<Q5_1>, read_row<Q4_K>, read_row<Q5_K>, read_row<Q6_K>},
          round_weights};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed {
namespace kernels {
namespace {
HEED_TABLE(Int8Kernels, int8_kernels_of, int8_kernels)
}  // namespace
}  // namespace kernels

namespace {

using kernels::kInt8Group;
using kernels::kInt8Panel;
using kernels::kInt8Rows;
using kernels::WeightGroup;

const Int8Kernels& kernels_for(const RunOptions& run) {
  return kernels::int8_kernels_of(chosen_isa(run));
}

[[noreturn]] void fail(const char* op, const std::string& text) {
  throw Error(std::string(op) + ": " + text);
}

void check_columns(const char* op, int64_t columns) {
  if (columns < 1) fail(op, "columns are " + std::to_string(columns) + ", 1 is the least");
}

// codes [panel, groups * kInt8Group] and scales [panel, groups] as the product reads them.
void write_panel(const int8_t* codes, const float* scales, int64_t groups, WeightGroup* to) {
  for (int64_t g = 0; g < groups; ++g, ++to) {
    for (int64_t n = 0; n < kInt8Panel; ++n) {
      const int8_t* row = codes + (n * groups + g) * kInt8Group;
      to->starts[n] = -128 * std::accumulate(row, row + kInt8Group, 0);
      to->scales[n] = scales[n * groups + g];
      for (int64_t q = 0; q < kInt8Group / 4; ++q) std::memcpy(to->codes[q][n], row + 4 * q, 4);
    }
  }
}

}  // namespace

bool has_int8_products(const RunOptions& run) {
  return chosen_isa(run) == Isa::avx512 && cpu_info().has("avx512_vnni");
}

int64_t int8_rows_bytes(int64_t rows, int64_t columns) {
  return ceil_div(rows, kInt8Rows) * kernels::int8_block_bytes(columns);
}

void fill_int8_rows(const Int8Rows& to, const RunOptions& run,
                    const std::function<void(int64_t first, const Tensor& x)>& make) {
  check_columns("fill_int8_rows", to.columns);
  constexpr int64_t kValuesPerItem = int64_t{1} << 14;
  const int64_t rows_per_item = round_up(1 + kValuesPerItem / to.columns, kInt8Rows);
  const int64_t items = (to.rows + rows_per_item - 1) / rows_per_item;
  const int64_t stride = kernels::int8_groups(to.columns) * kInt8Group;
  const int64_t values = kInt8Rows * stride, largest = kInt8Rows * padded_groups(to.columns);
  const auto round = kernels_for(run).round;
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
            to.data + m / kInt8Rows * kernels::int8_block_bytes(to.columns));
    }
  });
}

int64_t Int8Matrix::bytes() const {
  return ceil_div(rows, kInt8Panel) * kernels::int8_groups(columns) *
         static_cast<int64_t>(sizeof(WeightGroup));
}

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
  }
  check_columns("int8_matrix", w.columns);
  return w;
}

void pack_int8(std::span<const BlockMatrix> parts, const Int8Matrix& to, const RunOptions& run) {
  const Int8Kernels& kernels = kernels_for(run);
  const int64_t groups = kernels::int8_groups(to.columns), columns = groups * kInt8Group;
  const int64_t panels = ceil_div(to.rows, kInt8Panel);
  parallel_for(panels, threads_for(run, panels), [&](int64_t panel, int) {
    Scratch scratch(static_cast<size_t>(kInt8Panel * (columns + 4 * groups) + 4 * columns) + 256);
    auto* codes = scratch.take<int8_t>(kInt8Panel * columns);
    auto* scales = scratch.take<float>(kInt8Panel * groups);
    auto* row = scratch.take<float>(columns);
    std::fill(row, row + columns, 0.0f);
    int64_t first = 0, filled = 0;  // of the part; of the panel
    const int64_t begin = panel * kInt8Panel;
    for (const BlockMatrix& part : parts) {
      const int64_t from = std::max(first, begin) - first;
      const int64_t end = std::min(first + part.rows, begin + kInt8Panel) - first;
      const auto* data = reinterpret_cast<const uint8_t*>(part.data);
      for (int64_t n = from; n < end; ++n, ++filled) {
        kernels.read[static_cast<size_t>(part.format)](data + n * part.row_bytes(), to.columns,
                                                       row);
        kernels.round_weights(row, groups, codes + filled * columns, scales + filled * groups);
      }
      first += part.rows;
    }
    std::fill(codes + filled * columns, codes + kInt8Panel * columns, int8_t{0});
    std::fill(scales + filled * groups, scales + kInt8Panel * groups, 0.0f);
    write_panel(codes, scales, groups, reinterpret_cast<WeightGroup*>(to.data) + panel * groups);
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
  const int64_t panels = ceil_div(w.rows, kInt8Panel);
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
