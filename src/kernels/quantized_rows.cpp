#include "kernels/quantized_rows.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>

#include "base/parallel.h"
#include "heed/error.h"
#include "kernels/by_isa.h"
#include "kernels/byte_rows.h"
#include "kernels/prefetch.h"
#include "kernels/simd.h"
#include "kernels/transformer_rows.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantized_rows.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/block_formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Sums of M activation rows with one weight row. Two accumulators per sum hide the latency of the
// multiply-add; their number is the same for every M and R below, so results do not depend on those.
template <int M>
struct Sums {
  V even[M], odd[M];
  const float* x;
  int64_t x_stride;

  HWY_INLINE Sums() {}  // an implicit one has no target
  HWY_INLINE void clear() {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) even[m] = odd[m] = hn::Zero(D());
  }
  HWY_INLINE void add(V w0, int64_t k0, V w1, int64_t k1) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* row = x + m * x_stride;
      even[m] = hn::MulAdd(w0, hn::LoadU(D(), row + k0), even[m]);
      odd[m] = hn::MulAdd(w1, hn::LoadU(D(), row + k1), odd[m]);
    }
  }
};

constexpr int64_t kPrefetchBytes = 2048, kFarBytes = 6144;
// From so many columns on, a row of activations does not stay in the first-level cache while weights pass.
constexpr int64_t kLongRow = 4096;

// R weight rows at once, so that R independent chains of multiply-adds are under way.
template <class Format, int M, int R>
HWY_INLINE void row_group(const uint8_t* weights, int64_t row_bytes, int64_t columns,
                          const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  Sums<M> sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sums[r].x_stride = x_stride;
    sums[r].clear();
  }
  const int64_t blocks = columns / Format::kWeights;
  constexpr int64_t kStep = kScaledBlocks;
  HWY_ALIGN float scales[R][Format::kPairs ? 2 * kStep : 1];
  for (int64_t first = 0; first < blocks; first += kStep) {
    const int64_t some = HWY_MIN(kStep, blocks - first);
    if constexpr (Format::kPairs) {
      for (int r = 0; r < R; ++r) {
        load_pairs(weights + r * row_bytes + first * Format::kBytes, Format::kBytes, some,
                   scales[r]);
      }
    }
    for (int64_t b = first; b < first + some; ++b) {
      // Rows are too short for the processor to see R streams in them, so name the lines needed soon, in the
      // order of memory.
      const int64_t ahead = b * R * Format::kBytes;
#pragma GCC unroll 16
      for (int64_t line = ahead; line < ahead + R * Format::kBytes; line += 64) {
        if constexpr (Format::kPlain) {
          prefetch_far(weights, line + (R == 1 ? kFarBytes : R * row_bytes));
        } else {
          hwy::Prefetch(weights + line + kPrefetchBytes);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r].x = x + b * Format::kWeights;
        Format::decode(weights + r * row_bytes + b * Format::kBytes,
                       scales[r] + (Format::kPairs ? 2 * (b - first) : 0), sums[r]);
      }
    }
  }
  // Plain formats have columns of any number: the rest goes through the same code, padded with zeros.
  const int64_t rest = Format::kPlain ? columns % Format::kWeights : 0;
  if (rest != 0) {
    constexpr int64_t kValueBytes = Format::kBytes / Format::kWeights;
    uint8_t block[Format::kBytes];
    float padded[M * Format::kWeights] = {};
    for (int m = 0; m < M; ++m) {
      std::memcpy(padded + m * Format::kWeights, x + m * x_stride + columns - rest,
                  static_cast<size_t>(rest) * sizeof(float));
    }
    for (int r = 0; r < R; ++r) {
      std::memset(block, 0, sizeof block);
      std::memcpy(block, weights + r * row_bytes + blocks * Format::kBytes,
                  static_cast<size_t>(rest * kValueBytes));
      sums[r].x = padded;
      sums[r].x_stride = Format::kWeights;
      Format::decode(block, nullptr, sums[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      y[m * y_stride + r] =
          hn::GetLane(hn::SumOfLanes(D(), hn::Add(sums[r].even[m], sums[r].odd[m])));
    }
  }
}

template <class Format, int M, int R>
void row_loop(const uint8_t* weights, int64_t row_bytes, int64_t columns, const float* x,
              int64_t x_stride, float* y, int64_t y_stride, int64_t rows) {
  int64_t n = 0;
  for (; n + R <= rows; n += R) {
    row_group<Format, M, R>(weights + n * row_bytes, row_bytes, columns, x, x_stride, y + n,
                            y_stride);
  }
  for (; n < rows; ++n) {
    row_group<Format, M, 1>(weights + n * row_bytes, row_bytes, columns, x, x_stride, y + n,
                            y_stride);
  }
}

template <class Format>
void rows_of(const uint8_t* weights, int64_t row_bytes, int64_t columns, const float* x,
             int64_t x_stride, int64_t count, float* y, int64_t y_stride, int64_t rows) {
  int64_t m = 0;
  auto call = [&](auto loop, int64_t step) {
    for (; m + step <= count; m += step) {
      loop(weights, row_bytes, columns, x + m * x_stride, x_stride, y + m * y_stride, y_stride,
           rows);
    }
  };
  // Plain values take no time to decode, and one stream comes from memory faster than several, unless
  // activations then come from the second-level cache for every row.
  constexpr int kRowsAtOnce = Format::kPlain ? 1 : Format::kWeights > 32 ? 2 : 4;
  call(row_loop<Format, 4, 1>, 4);
  call(row_loop<Format, 2, 2>, 2);
  if (Format::kPlain && columns >= kLongRow) call(row_loop<Format, 1, 4>, 1);
  call(row_loop<Format, 1, kRowsAtOnce>, 1);
}

struct Values {
  float* values;
  HWY_INLINE void add(V a, int64_t k0, V b, int64_t k1) {
    hn::StoreU(a, D(), values + k0);
    hn::StoreU(b, D(), values + k1);
  }
};

// The weights of a row.
template <class Format>
void read_row(const uint8_t* row, int64_t columns, float* weights) {
  HWY_ALIGN float pairs[2 * kScaledBlocks] = {};
  const int64_t blocks = columns / Format::kWeights;
  for (int64_t b = 0; b < blocks; ++b, row += Format::kBytes) {
    const int64_t place = b % kScaledBlocks;
    if (Format::kPairs && place == 0) {
      load_pairs(row, Format::kBytes, HWY_MIN(kScaledBlocks, blocks - b), pairs);
    }
    Values to{weights + b * Format::kWeights};
    Format::decode(row, pairs + 2 * place, to);
  }
  const int64_t rest = Format::kPlain ? columns % Format::kWeights : 0;
  if (rest == 0) return;
  uint8_t block[Format::kBytes] = {};
  float values[Format::kWeights];
  std::memcpy(block, row, static_cast<size_t>(rest * Format::kBytes / Format::kWeights));
  Values to{values};
  Format::decode(block, nullptr, to);
  std::memcpy(weights + columns - rest, values, static_cast<size_t>(rest) * sizeof(float));
}

}  // namespace

auto row_readers() {
  return std::array{read_row<F32>,  read_row<F16>,  read_row<BF16>, read_row<Q8_0>,
                    read_row<Q4_0>, read_row<Q4_1>, read_row<Q5_0>, read_row<Q5_1>,
                    read_row<Q4_K>, read_row<Q5_K>, read_row<Q6_K>};
}

auto row_kernels() {
  return std::array{rows_of<F32>,  rows_of<F16>,  rows_of<BF16>, rows_of<Q8_0>,
                    rows_of<Q4_0>, rows_of<Q4_1>, rows_of<Q5_0>, rows_of<Q5_1>,
                    rows_of<Q4_K>, rows_of<Q5_K>, rows_of<Q6_K>};
}

}  // namespace heed::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed {
namespace kernels {
namespace {
using RowKernels = std::array<void (*)(const uint8_t*, int64_t, int64_t, const float*, int64_t,
                                       int64_t, float*, int64_t, int64_t),
                              kBlockFormats>;
HEED_TABLE(RowKernels, row_kernels_of, row_kernels)
using RowReaders = std::array<void (*)(const uint8_t*, int64_t, float*), kBlockFormats>;
HEED_TABLE(RowReaders, row_readers_of, row_readers)
}  // namespace
}  // namespace kernels

namespace {

void check_blocks(const char* op, const BlockMatrix& w) {
  const auto fail = [op](const std::string& text) { throw Error(op + (": " + text)); };
  if (w.rows < 0 || w.columns < 1 || w.data == nullptr) {
    fail("weights are [" + std::to_string(w.rows) + "," + std::to_string(w.columns) +
         "], at least one column and memory are needed");
  }
  if (w.columns % weights_per_block(w.format) != 0) {
    fail(std::string("weights in ") + name_of(w.format) + " have " + std::to_string(w.columns) +
         " columns, a multiple of " + std::to_string(weights_per_block(w.format)) + " is needed");
  }
}

void check(std::span<const RowProduct> products, int64_t x_stride, int64_t count) {
  auto fail = [](const std::string& text) { throw Error("quantized_rows: " + text); };
  if (count < 0) fail("count is " + std::to_string(count) + ", at least 0 is needed");
  for (const RowProduct& p : products) {
    const BlockMatrix& w = p.weights;
    check_blocks("quantized_rows", w);
    if (w.columns != products[0].weights.columns) {
      fail("weights have " + std::to_string(w.columns) + " columns beside others with " +
           std::to_string(products[0].weights.columns) + ", one number is needed");
    }
    if (count > 1 && (x_stride < w.columns || p.y_stride < w.rows)) {
      fail("x_stride is " + std::to_string(x_stride) + " and y_stride " +
           std::to_string(p.y_stride) + ", at least " + std::to_string(w.columns) + " and " +
           std::to_string(w.rows) + " are needed");
    }
  }
}

bool weights_in_codes(std::span<const RowProduct> products) {
  return std::any_of(products.begin(), products.end(),
                     [](const RowProduct& p) { return has_codes(p.weights.format); });
}

// Activations as products of bytes read them.
class SplitActivations {
 public:
  SplitActivations(const kernels::ByteRowKernels& kernels, const float* x, int64_t x_stride,
                   int64_t count, int64_t columns, int digits, const RunOptions& run)
      : stride_(columns / std::gcd(columns, kernels::kSplitColumns)),
        scratch_(static_cast<size_t>(count * stride_) * sizeof(kernels::SplitColumns)),
        rows_{nullptr, count, stride_, digits} {
    auto* to = scratch_.take<kernels::SplitColumns>(count * stride_);
    rows_.data = to;
    parallel_for(count, threads_for(run, count / 4), [&](int64_t m, int) {
      kernels.split(x + m * x_stride, columns, stride_, digits, to + m * stride_);
    });
  }
  const kernels::SplitRows& rows() const { return rows_; }

 private:
  int64_t stride_;
  Scratch scratch_;
  kernels::SplitRows rows_;
};

}  // namespace

const kernels::ByteRowKernels* kernels::byte_row_kernels(Isa isa) {
  static constexpr ByteRowKernels kAvx512{split_columns_avx512, byte_rows_avx512};
  static constexpr ByteRowKernels kAvx2{split_columns_avx2, byte_rows_avx2};
  if (isa == Isa::portable) return nullptr;
  return isa >= Isa::avx512 && cpu_info().has("avx512_vnni") ? &kAvx512 : &kAvx2;
}

int64_t BlockMatrix::row_bytes() const {
  return columns / weights_per_block(format) * bytes_per_block(format);
}

void quantized_rows(std::span<const RowProduct> products, const float* x, int64_t x_stride,
                    int64_t count, const RunOptions& run, RowActivations activations) {
  check(products, x_stride, count);
  if (count == 0) return;
  // Work items of about 32 KB of weights: they stay in the L1 or L2 cache while the rows of x pass.
  constexpr int64_t kItemBytes = 32 << 10;
  auto rows_per_item = [](const BlockMatrix& w) {
    return std::max<int64_t>(8, kItemBytes / w.row_bytes() / 8 * 8);
  };
  int64_t items = 0;
  for (const RowProduct& p : products) {
    int64_t step = rows_per_item(p.weights);
    items += (p.weights.rows + step - 1) / step;
  }
  const Isa isa = chosen_isa(run);
  const auto& row_kernels = kernels::row_kernels_of(isa);
  const kernels::ByteRowKernels* bytes =
      weights_in_codes(products) ? kernels::byte_row_kernels(isa) : nullptr;
  std::optional<SplitActivations> split;
  if (bytes != nullptr) {
    split.emplace(*bytes, x, x_stride, count, products[0].weights.columns,
                  activations == RowActivations::int16 ? 2 : 3, run);
  }
  parallel_for_shares(items, threads_for(run, items), [&](int64_t item, int) {
    for (const RowProduct& p : products) {
      const BlockMatrix& w = p.weights;
      int64_t step = rows_per_item(w), own = (w.rows + step - 1) / step;
      if (item >= own) {
        item -= own;
        continue;
      }
      int64_t begin = item * step, rows = std::min(step, w.rows - begin);
      if (split && has_codes(w.format)) {
        bytes->multiply({w.format, w.data + begin * w.row_bytes(), rows, w.columns}, split->rows(),
                        p.y + begin, p.y_stride);
        return;
      }
      row_kernels[static_cast<size_t>(w.format)](
          reinterpret_cast<const uint8_t*>(w.data) + begin * w.row_bytes(), w.row_bytes(),
          w.columns, x, x_stride, count, p.y + begin, p.y_stride, rows);
      return;
    }
  });
}

void read_rows(const BlockMatrix& w, const Tensor& to, const RunOptions& run) {
  check_blocks("read_rows", w);
  if ((to.dtype() != DType::f32 && to.dtype() != DType::bf16) || to.rank() != 2 ||
      to.size(0) != w.rows || to.size(1) != w.columns || (w.columns > 1 && to.stride(1) != 1)) {
    throw Error("read_rows: " + describe("to", to) + " is given, float32 or bfloat16 [" +
                std::to_string(w.rows) + "," + std::to_string(w.columns) +
                "] with unit stride in its columns is needed");
  }
  RunOptions alone = run;
  alone.threads = 1;
  const auto read = kernels::row_readers_of(chosen_isa(run))[static_cast<size_t>(w.format)];
  constexpr int64_t kRows = 16;
  const int64_t items = (w.rows + kRows - 1) / kRows;
  parallel_for(items, threads_for(run, items), [&](int64_t item, int) {
    const int64_t begin = item * kRows, end = std::min(w.rows, begin + kRows);
    const Tensor rows = to.slice(0, begin, end);
    const auto read_to = [&](const Tensor& values) {
      for (int64_t n = begin; n < end; ++n) {
        read(reinterpret_cast<const uint8_t*>(w.data) + n * w.row_bytes(), w.columns,
             reinterpret_cast<float*>(values.at({n - begin})));
      }
    };
    if (to.dtype() == DType::f32) return read_to(rows);
    const int64_t count = (end - begin) * w.columns;
    Scratch scratch(static_cast<size_t>(count) * sizeof(float));
    const Tensor values(scratch.take<float>(count), DType::f32, rows.shape());
    read_to(values);
    convert_rows(values, rows, alone);
  });
}

}  // namespace heed
#endif  // HWY_ONCE
