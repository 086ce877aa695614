#include "kernels/quantized_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "heed/error.h"
#include "kernels/quantized_rows_test.h"

namespace heed {
namespace {

constexpr RowActivations kActivations[] = {RowActivations::f32, RowActivations::int16};

// Sum of what rounding to 16 bits of the largest of each 32 may change.
double rounding_to_16_bits(const float* x, int64_t columns) {
  double sum = 0;
  for (int64_t k = 0; k < columns; k += 32) {
    const int64_t count = std::min<int64_t>(32, columns - k);
    float largest = 0;
    for (int64_t i = k; i < k + count; ++i) largest = std::max(largest, std::abs(x[i]));
    sum += static_cast<double>(count) * static_cast<double>(largest) / (127 * 256) / 2;
  }
  return sum;
}

// |y - exact| against the rounding of a float32 sum in four chains or more. Codes times scales, which meet
// rounded activations, are up to twice the weights.
void expect_product(const Matrix& w, const float* x, const float* y, const std::string& what,
                    RowActivations activations = RowActivations::f32) {
  const int64_t columns = w.view.columns;
  const bool rounds = activations == RowActivations::int16 && has_codes(w.view.format);
  const double rounding = rounds ? 2 * rounding_to_16_bits(x, columns) : 0;
  for (int64_t n = 0; n < w.view.rows; ++n) {
    double exact = 0, largest = 0, x_sum = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const double weight = w.values[static_cast<size_t>(n * columns + k)];
      exact += weight * static_cast<double>(x[k]);
      largest = std::max(largest, std::abs(weight));
      x_sum += std::abs(static_cast<double>(x[k]));
    }
    const double bound =
        largest * (std::ldexp(static_cast<double>(columns) / 8 + 16, -24) * x_sum + rounding);
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - exact) <= bound)
        << what << " row " << n << ": " << y[n] << ", exact " << exact << ", bound " << bound;
  }
}

TEST(QuantizedRows, EqualsDequantizedProductsOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    for (const Format& format : kFormats) {
      const int64_t block = weights_per_block(format.format);
      const std::vector<int64_t> widths =
          block > 1 ? std::vector<int64_t>{block, 3 * block, 37 * block, 8192}
                    : std::vector<int64_t>{1, 5, 31, 32, 33, 172, 576, 4101};
      for (int64_t columns : widths) {
        for (int64_t rows : {1, 3, 4, 7, 33}) {
          if (columns > 4000 && block < 256 && rows != 7) continue;
          const Matrix w(format, rows, columns, static_cast<uint32_t>(rows * 1000 + columns));
          for (int64_t count : {1, 2, 3, 4, 5, 9}) {
            const int64_t x_stride = columns + 3, y_stride = rows + 2;
            const float nan = std::numeric_limits<float>::quiet_NaN();
            std::vector<float> x(static_cast<size_t>(count * x_stride), nan);
            std::vector<float> y(static_cast<size_t>(count * y_stride), nan);
            const std::vector<float> values = normals(count * columns, 7);
            for (int64_t m = 0; m < count; ++m) {
              std::copy_n(values.begin() + m * columns, columns, x.begin() + m * x_stride);
            }
            const RowProduct product{w.view, y.data(), y_stride};
            for (RowActivations activations : kActivations) {
              std::fill(y.begin(), y.end(), nan);
              quantized_rows({&product, 1}, x.data(), x_stride, count, {.isa = isa}, activations);
              for (int64_t m = 0; m < count; ++m) {
                expect_product(w, &x[static_cast<size_t>(m * x_stride)],
                               &y[static_cast<size_t>(m * y_stride)],
                               std::string(name_of(isa)) + " " + name_of(format.format) + " [" +
                                   std::to_string(rows) + "," + std::to_string(columns) +
                                   "], row " + std::to_string(m) + " of " + std::to_string(count),
                               activations);
                if (HasFatalFailure()) return;
                ASSERT_TRUE(std::isnan(y[static_cast<size_t>(m * y_stride + rows)]))
                    << "wrote past the rows";
              }
            }
          }
        }
      }
    }
  }
}

TEST(QuantizedRows, ReadsWeightsOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    for (const Format& format : kFormats) {
      const int64_t block = weights_per_block(format.format);
      const std::vector<int64_t> widths = block > 1 ? std::vector<int64_t>{block, 37 * block}
                                                    : std::vector<int64_t>{1, 31, 32, 33, 172};
      for (int64_t columns : widths) {
        const int64_t rows = 19, stride = columns + 3;
        const Matrix w(format, rows, columns, 3);
        std::vector<float> values(static_cast<size_t>(rows * stride), -7.0f);
        std::vector<bfloat16> half(static_cast<size_t>(rows * stride), to_bfloat16(-7.0f));
        const RunOptions run{.threads = 2, .isa = isa};
        read_rows(w.view, Tensor(values.data(), DType::f32, {rows, columns}, {stride, 1}), run);
        read_rows(w.view, Tensor(half.data(), DType::bf16, {rows, columns}, {stride, 1}), run);
        for (int64_t n = 0; n < rows; ++n) {
          for (int64_t k = 0; k < stride; ++k) {
            const auto at = static_cast<size_t>(n * stride + k);
            const float needed =
                k < columns ? w.values[static_cast<size_t>(n * columns + k)] : -7.0f;
            // Products are exact, so that one rounding is the same as two; a zero may have either sign.
            ASSERT_EQ(values[at], needed)
                << name_of(isa) << " " << name_of(format.format) << " " << n << " " << k;
            ASSERT_EQ(half[at].bits, to_bfloat16(values[at]).bits);
          }
        }
      }
    }
  }
}

TEST(QuantizedRows, SeveralMatricesOfDifferentFormatsInOneCall) {
  const Matrix a(kFormats[5], 300, 256, 1), b(kFormats[3], 17, 256, 2), c(kFormats[10], 5, 256, 3);
  const std::vector<float> x = normals(2 * 256, 4);
  std::vector<float> y(2 * 322, std::numeric_limits<float>::quiet_NaN());
  const RowProduct products[] = {
      {a.view, y.data(), 322}, {b.view, y.data() + 300, 322}, {c.view, y.data() + 317, 322}};
  quantized_rows(products, x.data(), 256, 2, {.threads = 2});
  for (size_t m = 0; m < 2; ++m) {
    expect_product(a, &x[m * 256], &y[m * 322], "first");
    expect_product(b, &x[m * 256], &y[m * 322 + 300], "second");
    expect_product(c, &x[m * 256], &y[m * 322 + 317], "third");
  }
}

// Rows whose activations are rounded together differ by as much as float32 allows.
TEST(QuantizedRows, ActivationsOfAnySize) {
  constexpr int64_t kColumns = 512, kRows = 9;
  const auto fill = [](const std::function<float(int64_t)>& value) {
    std::vector<float> x(kColumns);
    for (int64_t k = 0; k < kColumns; ++k) x[static_cast<size_t>(k)] = value(k);
    return x;
  };
  const std::vector<float> some = normals(kColumns, 8);
  const auto normal = [&](int64_t k) { return some[static_cast<size_t>(k)]; };
  const std::pair<const char*, std::vector<float>> cases[] = {
      {"zeros", fill([](int64_t) { return 0.0F; })},
      {"equal", fill([](int64_t) { return -1.7F; })},
      {"one", fill([](int64_t k) { return k == 77 ? 3.0F : 0.0F; })},
      {"one far above", fill([&](int64_t k) { return k == 300 ? 1e6F : normal(k); })},
      {"groups far apart", fill([&](int64_t k) { return std::ldexp(normal(k), k / 32 * 8 - 64); })},
      {"small", fill([&](int64_t k) { return std::ldexp(normal(k), -95); })},
      {"large", fill([&](int64_t k) { return normal(k) * 1e32F; })}};
  for (Isa isa : available_isas()) {
    for (const Format& format : kFormats) {
      const Matrix w(format, kRows, kColumns, 9);
      for (const auto& [what, x] : cases) {
        for (RowActivations activations : kActivations) {
          std::vector<float> y(kRows, std::numeric_limits<float>::quiet_NaN());
          const RowProduct product{w.view, y.data(), kRows};
          quantized_rows({&product, 1}, x.data(), kColumns, 1, {.isa = isa}, activations);
          expect_product(w, x.data(), y.data(),
                         std::string(name_of(isa)) + " " + name_of(format.format) + ", " + what,
                         activations);
          if (HasFatalFailure()) return;
        }
      }
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        std::vector<float> x = some, y(kRows);
        x[200] = bad;
        const RowProduct product{w.view, y.data(), kRows};
        for (RowActivations activations : kActivations) {
          quantized_rows({&product, 1}, x.data(), kColumns, 1, {.isa = isa}, activations);
          for (int64_t n = 0; n < kRows; ++n) {
            if (w.values[static_cast<size_t>(n * kColumns + 200)] == 0) continue;
            EXPECT_FALSE(std::isfinite(y[static_cast<size_t>(n)]))
                << name_of(isa) << " " << name_of(format.format) << " row " << n;
          }
        }
      }
    }
  }
}

TEST(QuantizedRows, SameBitsForAnyGroupingAndThreadCount) {
  for (const auto& [format, columns] : [] {
         std::vector<std::pair<Format, int64_t>> pairs;
         for (const Format& f : kFormats) {
           pairs.emplace_back(f, 768);
           pairs.emplace_back(f, 8192);
           if (weights_per_block(f.format) <= 32) pairs.emplace_back(f, 96);
         }
         return pairs;
       }()) {
    const int64_t rows = columns > 1000 ? 43 : 2051, count = 7;
    const Matrix w(format, rows, columns, 5);
    const std::vector<float> x = normals(count * columns, 6);
    const size_t size = static_cast<size_t>(count * rows);
    for (RowActivations activations : kActivations) {
      std::vector<float> together(size), one_by_one(size), threaded(size);
      RowProduct product{w.view, together.data(), rows};
      quantized_rows({&product, 1}, x.data(), columns, count, {.threads = 1}, activations);
      product.y = threaded.data();
      quantized_rows({&product, 1}, x.data(), columns, count, {.threads = 3}, activations);
      for (int64_t m = 0; m < count; ++m) {
        product.y = one_by_one.data() + m * rows;
        quantized_rows({&product, 1}, x.data() + m * columns, columns, 1, {.threads = 1},
                       activations);
      }
      EXPECT_EQ(0, std::memcmp(together.data(), threaded.data(), size * sizeof(float)))
          << name_of(format.format);
      EXPECT_EQ(0, std::memcmp(together.data(), one_by_one.data(), size * sizeof(float)))
          << name_of(format.format);
    }
  }
}

TEST(QuantizedRows, NanInOneRowStaysThere) {
  const Matrix w(kFormats[5], 8, 64, 1);
  std::vector<float> x = normals(3 * 64, 2), y(3 * 8);
  x[64 + 9] = std::numeric_limits<float>::quiet_NaN();
  const RowProduct product{w.view, y.data(), 8};
  quantized_rows({&product, 1}, x.data(), 64, 3);
  for (size_t n = 0; n < 8; ++n) {
    EXPECT_TRUE(std::isfinite(y[n]));
    EXPECT_TRUE(std::isnan(y[8 + n]));
    EXPECT_TRUE(std::isfinite(y[16 + n]));
  }
}

TEST(QuantizedRows, RefusesWhatDoesNotFit) {
  const Matrix w(kFormats[5], 4, 64, 1), other(kFormats[5], 4, 32, 1);
  const std::vector<float> x = normals(128, 2);
  std::vector<float> y(8);
  const auto call = [&](BlockMatrix m, int64_t x_stride, int64_t y_stride, int64_t count) {
    const RowProduct product{m, y.data(), y_stride};
    quantized_rows({&product, 1}, x.data(), x_stride, count);
  };
  BlockMatrix ragged = w.view;
  ragged.columns = 40;
  EXPECT_THROW(call(ragged, 64, 4, 1), Error);
  EXPECT_THROW(call(w.view, 63, 4, 2), Error);
  EXPECT_THROW(call(w.view, 64, 3, 2), Error);
  EXPECT_THROW(call(w.view, 64, 4, -1), Error);
  EXPECT_THROW(call({BlockFormat::q4_1, nullptr, 4, 64}, 64, 4, 1), Error);
  const RowProduct two[] = {{w.view, y.data(), 4}, {other.view, y.data() + 4, 4}};
  EXPECT_THROW(quantized_rows(two, x.data(), 64, 1), Error);
  EXPECT_NO_THROW(call(w.view, 64, 4, 0));

  std::vector<double> to(256);
  const auto read = [&](const BlockMatrix& m, DType type, Dims shape, Dims strides) {
    read_rows(m, Tensor(to.data(), type, shape, strides));
  };
  EXPECT_THROW(read(ragged, DType::f32, {4, 40}, {40, 1}), Error);
  EXPECT_THROW(read(w.view, DType::f64, {4, 64}, {64, 1}), Error);
  EXPECT_THROW(read(w.view, DType::f32, {3, 64}, {64, 1}), Error);
  EXPECT_THROW(read(w.view, DType::f32, {4, 64}, {64, 2}), Error);
  EXPECT_NO_THROW(read(w.view, DType::f32, {4, 64}, {64, 1}));
}

}  // namespace
}  // namespace heed
