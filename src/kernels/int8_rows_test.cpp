#include "kernels/int8_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "heed/error.h"
#include "kernels/int8_layout.h"
#include "kernels/quantized_rows_test.h"

namespace heed {
namespace {

const RunOptions kRun{.threads = 1, .isa = Isa::avx512};

bool can_run() {
  const auto& isas = available_isas();
  return std::find(isas.begin(), isas.end(), Isa::avx512) != isas.end() && has_int8_products(kRun);
}
#define NEEDS_INT8_PRODUCTS \
  if (!can_run()) GTEST_SKIP() << "this processor has no AVX512-VNNI"

// Memory of Int8Rows and Int8Matrix, first filled with bits that are NaN as floats.
struct Memory {
  explicit Memory(int64_t bytes) : array(DType::f32, {bytes / 4}) {
    std::memset(array.as<void>(), 0xff, static_cast<size_t>(bytes));
  }
  std::byte* data() const { return array.as<std::byte>(); }
  Array array;
};

struct Rows {
  Memory memory;
  Int8Rows view;
  Rows(const std::vector<float>& x, int64_t columns, const RunOptions& run = kRun)
      : Rows(x.data(), static_cast<int64_t>(x.size()) / columns, columns, run) {}
  Rows(const float* x, int64_t rows, int64_t columns, const RunOptions& run = kRun)
      : memory(int8_rows_bytes(rows, columns)), view{memory.data(), rows, columns} {
    fill_int8_rows(view, run, [&](int64_t first, const Tensor& to) {
      for (int64_t m = 0; m < to.size(0); ++m) {
        std::memcpy(to.at({m}), x + (first + m) * columns,
                    static_cast<size_t>(columns) * sizeof(float));
      }
    });
  }
};

Int8Matrix with_memory(Int8Matrix w, const Memory& memory) {
  w.data = memory.data();
  return w;
}

struct Weights {
  Int8Matrix layout;
  Memory memory;
  Int8Matrix view;
  explicit Weights(const std::vector<BlockMatrix>& parts, const RunOptions& run = kRun)
      : layout(int8_matrix(parts)), memory(layout.bytes()), view(with_memory(layout, memory)) {
    pack_int8(parts, view, run);
  }
};

std::vector<float> product(const Rows& x, const Int8Matrix& w, const RunOptions& run = kRun) {
  std::vector<float> y(static_cast<size_t>(x.view.rows * w.rows),
                       std::numeric_limits<float>::quiet_NaN());
  int8_product(x.view, w, Tensor(y.data(), DType::f32, {x.view.rows, w.rows}), false, run);
  return y;
}

// Weights [rows, columns] as they were packed.
struct Packed {
  std::vector<double> values;
  std::vector<double> half_scales;  // of each value
  explicit Packed(const Int8Matrix& w) {
    const auto* groups = reinterpret_cast<const kernels::WeightGroup*>(w.data);
    for (int64_t n = 0; n < w.rows; ++n) {
      for (int64_t k = 0; k < w.columns; ++k) {
        const auto& group = groups[n / 32 * kernels::int8_groups(w.columns) + k / 64];
        const auto scale = static_cast<double>(group.scales[n % 32]);
        const int8_t code = group.codes[k % 64 / 4][n % 32][k % 4];
        values.push_back(scale * code);
        half_scales.push_back(scale / 2);
      }
    }
  }
};

// Activations [rows, columns] as they are rounded, in the documented way.
struct Rounded {
  std::vector<double> values;
  std::vector<double> half_steps;  // of each value
  Rounded(const std::vector<float>& x, int64_t columns) : values(x.size()), half_steps(x.size()) {
    std::vector<float> rest = x;
    for (size_t first = 0; first < x.size(); first += static_cast<size_t>(columns)) {
      for (int i = 0; i < 4; ++i) {
        const auto row = rest.begin() + static_cast<int64_t>(first);
        const auto largest = std::max_element(
            row, row + columns, [](float a, float b) { return std::abs(a) < std::abs(b); });
        values[static_cast<size_t>(largest - rest.begin())] += static_cast<double>(*largest);
        *largest = 0;
      }
    }
    const auto width = static_cast<size_t>(columns);
    for (size_t k = 0, end = 0; k < x.size(); k = end) {
      end = std::min(k + 64, (k / width + 1) * width);
      float most = 0;
      for (size_t i = k; i < end; ++i) most = std::max(most, std::abs(rest[i]));
      const float step = most * (1.0f / 127.0f), inverse = most < 1e-36f ? 0.0f : 127.0f / most;
      for (size_t i = k; i < end; ++i) {
        const double scaled = static_cast<double>(rest[i]) * static_cast<double>(inverse);
        values[i] += std::nearbyint(scaled) * static_cast<double>(step);
        half_steps[i] = 0.5000001 * static_cast<double>(step);
      }
    }
  }
};

// y of one row against a float64 sum of the rounded factors, and against one of the exact ones.
void expect_row(const std::vector<float>& weights, const Packed& packed, const float* x,
                const Rounded& rounded, size_t row, size_t columns, const float* y,
                const std::string& what) {
  for (size_t n = 0; n < weights.size() / columns; ++n) {
    double needed = 0, exact = 0, size = 0, rounding = 0;
    for (size_t k = 0; k < columns; ++k) {
      const auto value = static_cast<double>(x[k]);
      const auto weight = static_cast<double>(weights[n * columns + k]);
      const double q = rounded.values[row * columns + k], w = packed.values[n * columns + k];
      needed += w * q;
      exact += weight * value;
      size += std::abs(w * q) + std::abs(weight * value);
      rounding += std::abs(weight) * rounded.half_steps[row * columns + k] +
                  1.0001 * packed.half_scales[n * columns + k] * std::abs(q);
    }
    // Three roundings of a sum for each group, and those of terms.
    const double bound = std::ldexp(3 * static_cast<double>(columns) / 64 + 40, -24) * size;
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - needed) <= bound)
        << what << " row " << n << ": " << y[n] << ", " << needed << " of rounded factors, bound "
        << bound;
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - exact) <= rounding + bound)
        << what << " row " << n << ": " << y[n] << ", exact " << exact;
  }
}

// Rows of very different size, with groups of zeros and of tiny values.
std::vector<float> activations(int64_t count, int64_t columns, uint32_t seed) {
  std::vector<float> x = normals(count * columns, seed);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t group = i / 32;
    if (group % 7 == 3) x[i] = 0;
    if (group % 7 == 5) x[i] *= 1e-20f;
    if (group % 7 == 6) x[i] *= 1e3f;
  }
  return x;
}

std::vector<Format> formats_with_codes() {
  std::vector<Format> formats;
  for (const Format& format : kFormats) {
    if (has_codes(format.format)) formats.push_back(format);
  }
  return formats;
}

TEST(Int8Rows, RoundsOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    for (int64_t columns : {1, 32, 96, 111, 576}) {
      for (int64_t count : {1, 3, 4, 9, 70}) {
        const std::vector<float> x = activations(count, columns, 3);
        const Rounded needed(x, columns);
        const Rows rows(x, columns, {.threads = 2, .isa = isa});
        for (int64_t m = 0; m < (count + 3) / 4 * 4; ++m) {
          const auto* outliers = reinterpret_cast<const kernels::Int8Outliers*>(
              rows.view.data + m / 4 * kernels::int8_block_bytes(columns));
          for (int64_t k = 0; k < columns; ++k) {
            const auto& group = reinterpret_cast<const kernels::Int8Group*>(outliers + 1)[k / 64];
            const int code = group.codes[k % 64 / 4][m % 4][k % 4] - 128;
            double found = code * static_cast<double>(group.steps[m % 4]);
            for (size_t i = 0; i < 4; ++i) {
              if (outliers->columns[i][m % 4] == k) {
                found += static_cast<double>(outliers->values[i][m % 4]);
              }
            }
            const auto at = static_cast<size_t>(m * columns + k);
            ASSERT_EQ(found, m < count ? needed.values[at] : 0)
                << name_of(isa) << " " << m << " " << k;
          }
        }
      }
    }
  }
}

// Sum of squared errors of some weights rounded to multiples of a scale.
double rounding_error(std::span<const float> weights, double scale) {
  double sum = 0;
  for (float weight : weights) {
    const double code = static_cast<double>(weight) / scale;
    sum += std::pow(scale * (code - std::nearbyint(code)), 2);
  }
  return sum;
}

TEST(Int8Rows, WeightsAreRoundedWithTheBestScaleOnEveryInstructionSet) {
  for (const Format& format : formats_with_codes()) {
    const int64_t columns = weights_per_block(format.format) * 3;
    const Matrix w(format, 37, columns, 4);
    for (Isa isa : available_isas()) {
      const Packed packed(Weights({w.view}, {.threads = 3, .isa = isa}).view);
      for (size_t at = 0, end = 0; at < w.values.size(); at = end) {
        const size_t row_end =
            (at / static_cast<size_t>(columns) + 1) * static_cast<size_t>(columns);
        end = std::min(at + 64, row_end);
        const std::span<const float> weights(&w.values[at], end - at);
        double largest = 0;
        for (float weight : weights) {
          largest = std::max(largest, std::abs(static_cast<double>(weight)));
        }
        double least = largest < 1e-36 ? 0 : std::numeric_limits<double>::infinity(), found = 0;
        for (int codes = 127; codes >= 82 && largest >= 1e-36; codes -= 3) {
          least = std::min(least, rounding_error(weights, largest / codes));
        }
        for (size_t i = at; i < end; ++i) {
          const double error = packed.values[i] - static_cast<double>(w.values[i]);
          ASSERT_TRUE(std::abs(error) <= 1.0001 * packed.half_scales[i] + 1e-36);
          found += error * error;
        }
        ASSERT_TRUE(found <= 1.001 * least + 1e-9 * largest * largest)
            << name_of(isa) << " " << name_of(format.format) << " " << at << ": " << found << ", "
            << least << " is possible";
      }
    }
  }
}

TEST(Int8Rows, ProductsOfEveryFormat) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    const int64_t block = weights_per_block(format.format);
    for (int64_t columns : {block, 3 * block, 9 * block}) {
      for (int64_t rows : {1, 15, 17, 32, 33, 79}) {
        const Matrix w(format, rows, columns, static_cast<uint32_t>(rows * 1000 + columns));
        const Weights weights({w.view});
        const Packed packed(weights.view);
        for (int64_t count : {1, 3, 4, 5, 130}) {
          const std::vector<float> x = activations(count, columns, 7);
          const std::vector<float> y = product(Rows(x, columns), weights.view);
          const Rounded rounded(x, columns);
          for (size_t m = 0; m < static_cast<size_t>(count); ++m) {
            expect_row(w.values, packed, &x[m * static_cast<size_t>(columns)], rounded, m,
                       static_cast<size_t>(columns), &y[m * static_cast<size_t>(rows)],
                       std::string(name_of(format.format)) + " [" + std::to_string(rows) + "," +
                           std::to_string(columns) + "], " + std::to_string(count) + " rows");
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(Int8Rows, PartsOfDifferentFormatsStacked) {
  NEEDS_INT8_PRODUCTS;
  const int64_t columns = 512, count = 6;
  const std::vector<float> x = activations(count, columns, 5);
  const Rows rows(x, columns);
  const Rounded rounded(x, columns);
  for (const std::vector<size_t>& chosen :
       {std::vector<size_t>{5, 3, 8}, {3, 4}, {8, 10, 3}, {10, 4}}) {
    std::vector<Matrix> parts;
    std::vector<BlockMatrix> views;
    for (size_t i : chosen) {
      parts.emplace_back(kFormats[i], 20 + 7 * static_cast<int64_t>(parts.size()), columns, 9);
    }
    for (Matrix& part : parts) views.push_back(part.view);
    const Weights weights(views);
    const Packed packed(weights.view);
    std::vector<float> values;
    for (const Matrix& part : parts) {
      values.insert(values.end(), part.values.begin(), part.values.end());
    }
    const std::vector<float> y = product(rows, weights.view);
    for (size_t m = 0; m < static_cast<size_t>(count); ++m) {
      expect_row(values, packed, &x[m * static_cast<size_t>(columns)], rounded, m,
                 static_cast<size_t>(columns), &y[m * static_cast<size_t>(weights.view.rows)],
                 "stacked");
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Int8Rows, SameBitsForAnyGroupingAndThreadCount) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    const int64_t columns = 768, rows = 131, count = 267;
    const Matrix w(format, rows, columns, 5);
    const Weights weights({w.view});
    const std::vector<float> x = normals(count * columns, 6);
    const std::vector<float> together = product(Rows(x, columns), weights.view);
    const RunOptions three{.threads = 3, .isa = Isa::avx512};
    const std::vector<float> threaded = product(Rows(x, columns, three), weights.view, three);
    EXPECT_EQ(0, std::memcmp(together.data(), threaded.data(), together.size() * sizeof(float)))
        << name_of(format.format);
    for (int64_t m = 0; m < count; m += 1 + m % 5) {
      const int64_t some = std::min(count - m, 1 + m % 5);
      const std::vector<float> part =
          product(Rows(x.data() + m * columns, some, columns), weights.view);
      ASSERT_EQ(0,
                std::memcmp(part.data(), together.data() + m * rows, part.size() * sizeof(float)))
          << name_of(format.format) << " row " << m;
    }
  }
}

TEST(Int8Rows, WritesBfloat16AndAdds) {
  NEEDS_INT8_PRODUCTS;
  const int64_t columns = 64, rows = 41, count = 7, stride = rows + 5;
  const Matrix w(kFormats[5], rows, columns, 5);
  const Weights weights({w.view});
  std::vector<float> x = normals(count * columns, 6);
  x[static_cast<size_t>(2 * columns)] = std::numeric_limits<float>::quiet_NaN();
  const Rows packed(x, columns);
  const std::vector<float> y = product(packed, weights.view);
  const bfloat16 untouched = to_bfloat16(-7.0f);
  std::vector<bfloat16> half(static_cast<size_t>(count * stride), untouched);
  std::vector<float> sum(static_cast<size_t>(count * stride), 3.0f);
  int8_product(packed.view, weights.view,
               Tensor(half.data(), DType::bf16, {count, rows}, {stride, 1}), false, kRun);
  int8_product(packed.view, weights.view,
               Tensor(sum.data(), DType::f32, {count, rows}, {stride, 1}), true, kRun);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = 0; n < stride; ++n) {
      const auto at = static_cast<size_t>(m * stride + n);
      if (n >= rows) {
        EXPECT_EQ(half[at].bits, untouched.bits);
        EXPECT_EQ(sum[at], 3.0f);
        continue;
      }
      const float needed = y[static_cast<size_t>(m * rows + n)];
      if (m == 2) {
        EXPECT_TRUE(std::isnan(needed) && std::isnan(sum[at]) && std::isnan(to_float(half[at])));
      } else {
        EXPECT_EQ(half[at].bits, to_bfloat16(needed).bits);
        EXPECT_EQ(sum[at], 3.0f + needed);
      }
    }
  }
}

TEST(Int8Rows, WhatIsNotFiniteStaysInItsRow) {
  NEEDS_INT8_PRODUCTS;
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (size_t format : {3u, 5u}) {
      const Matrix w(kFormats[format], 8, 64, 1);
      std::vector<float> x = normals(3 * 64, 2);
      x[64 + 9] = bad;
      const std::vector<float> y = product(Rows(x, 64), Weights({w.view}).view);
      for (size_t n = 0; n < 8; ++n) {
        EXPECT_TRUE(std::isfinite(y[n]));
        EXPECT_FALSE(std::isfinite(y[8 + n]));
        EXPECT_TRUE(std::isfinite(y[16 + n]));
      }
    }
  }
}

TEST(Int8Rows, RefusesWhatDoesNotFit) {
  const Matrix w(kFormats[5], 4, 64, 1), other(kFormats[5], 4, 32, 1), plain(kFormats[0], 4, 64, 1);
  EXPECT_THROW(int8_matrix(std::vector<BlockMatrix>{w.view, other.view}), Error);
  EXPECT_THROW(int8_matrix(std::vector<BlockMatrix>{w.view, plain.view}), Error);
  EXPECT_THROW(int8_matrix(std::vector<BlockMatrix>{}), Error);
  const auto nothing = [](int64_t, const Tensor&) {};
  EXPECT_THROW(fill_int8_rows({nullptr, 3, 0}, kRun, nothing), Error);
  const Weights weights({w.view}, {.isa = Isa::portable});
  Memory memory(int8_rows_bytes(3, 64));
  std::vector<float> y(64);
  const auto call = [&](int64_t columns, DType type, Dims shape, bool add, const RunOptions& run) {
    int8_product({memory.data(), 3, columns}, weights.view, Tensor(y.data(), type, shape), add,
                 run);
  };
  EXPECT_THROW(call(64, DType::f32, {3, 4}, false, {.isa = Isa::portable}), Error);
  NEEDS_INT8_PRODUCTS;
  EXPECT_THROW(call(32, DType::f32, {3, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f32, {3, 5}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f32, {2, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f64, {3, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::bf16, {3, 4}, true, kRun), Error);
}

}  // namespace
}  // namespace heed
