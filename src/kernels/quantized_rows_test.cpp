#include "kernels/quantized_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "heed/error.h"
#include "heed/tensor.h"
#include "llm/ggml_types.h"

namespace heed {
namespace {

struct Format {
  BlockFormat format;
  GgmlType type;
  std::vector<int> f16_at;  // bytes of a block that hold float16 scales
};

const std::vector<Format> kFormats{
    {BlockFormat::f32, GgmlType::kF32, {}},       {BlockFormat::f16, GgmlType::kF16, {0}},
    {BlockFormat::bf16, GgmlType::kBF16, {}},     {BlockFormat::q8_0, GgmlType::kQ8_0, {0}},
    {BlockFormat::q4_0, GgmlType::kQ4_0, {0}},    {BlockFormat::q4_1, GgmlType::kQ4_1, {0, 2}},
    {BlockFormat::q5_0, GgmlType::kQ5_0, {0}},    {BlockFormat::q5_1, GgmlType::kQ5_1, {0, 2}},
    {BlockFormat::q4_k, GgmlType::kQ4_K, {0, 2}}, {BlockFormat::q5_k, GgmlType::kQ5_K, {0, 2}},
    {BlockFormat::q6_k, GgmlType::kQ6_K, {208}}};

// A matrix of random bits, with scales of ordinary size, zero and subnormal now and then.
struct Matrix {
  Format format;
  std::vector<std::byte> bytes;
  BlockMatrix view;
  std::vector<float> values;  // [rows, columns]

  Matrix(const Format& f, int64_t rows, int64_t columns, uint32_t seed) : format(f) {
    std::mt19937 random(seed);
    view = {f.format, nullptr, rows, columns};
    bytes.resize(static_cast<size_t>(rows * view.row_bytes()));
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    std::normal_distribution<float> normal;
    const int64_t block = bytes_per_block(f.format);
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(block)) {
      for (int offset : f.f16_at) {
        const uint32_t kind = random() % 16;
        const float16 scale = kind == 0   ? float16{0}
                              : kind == 1 ? float16{0x8123}
                                          : to_float16(normal(random));
        std::memcpy(&bytes[at + static_cast<size_t>(offset)], &scale, 2);
      }
      if (f.format == BlockFormat::f32) {
        const float value = normal(random);
        std::memcpy(&bytes[at], &value, 4);
      } else if (f.format == BlockFormat::bf16) {
        const bfloat16 value = to_bfloat16(normal(random));
        std::memcpy(&bytes[at], &value, 2);
      }
    }
    values.resize(static_cast<size_t>(rows * columns));
    dequantize(f.type, bytes, values.data(), rows * columns);
    view.data = bytes.data();
  }
};

std::vector<float> normals(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(random);
  return values;
}

// |y - exact| against the rounding of a float32 sum in four chains or more.
void expect_product(const Matrix& w, const float* x, const float* y, const std::string& what) {
  const int64_t columns = w.view.columns;
  for (int64_t n = 0; n < w.view.rows; ++n) {
    double exact = 0, largest = 0, x_sum = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const double weight = w.values[static_cast<size_t>(n * columns + k)];
      exact += weight * static_cast<double>(x[k]);
      largest = std::max(largest, std::abs(weight));
      x_sum += std::abs(static_cast<double>(x[k]));
    }
    const double bound = std::ldexp(static_cast<double>(columns) / 8 + 16, -24) * largest * x_sum;
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - exact) <= bound)
        << what << " row " << n << ": " << y[n] << ", exact " << exact << ", bound " << bound;
  }
}

TEST(QuantizedRows, EqualsDequantizedProductsOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    for (const Format& format : kFormats) {
      const int64_t block = weights_per_block(format.format);
      const std::vector<int64_t> widths = block > 1
                                              ? std::vector<int64_t>{block, 3 * block, 37 * block}
                                              : std::vector<int64_t>{1, 5, 31, 32, 33, 172, 576};
      for (int64_t columns : widths) {
        for (int64_t rows : {1, 3, 4, 7, 33}) {
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
            quantized_rows({&product, 1}, x.data(), x_stride, count, {.isa = isa});
            for (int64_t m = 0; m < count; ++m) {
              expect_product(w, &x[static_cast<size_t>(m * x_stride)],
                             &y[static_cast<size_t>(m * y_stride)],
                             std::string(name_of(isa)) + " " + name_of(format.format) + " [" +
                                 std::to_string(rows) + "," + std::to_string(columns) + "], row " +
                                 std::to_string(m) + " of " + std::to_string(count));
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

TEST(QuantizedRows, SameBitsForAnyGroupingAndThreadCount) {
  for (const Format& format : kFormats) {
    const int64_t columns = 768, rows = 131, count = 7;
    const Matrix w(format, rows, columns, 5);
    const std::vector<float> x = normals(count * columns, 6);
    const size_t size = static_cast<size_t>(count * rows);
    std::vector<float> together(size), one_by_one(size), threaded(size);
    RowProduct product{w.view, together.data(), rows};
    quantized_rows({&product, 1}, x.data(), columns, count, {.threads = 1});
    product.y = threaded.data();
    quantized_rows({&product, 1}, x.data(), columns, count, {.threads = 3});
    for (int64_t m = 0; m < count; ++m) {
      product.y = one_by_one.data() + m * rows;
      quantized_rows({&product, 1}, x.data() + m * columns, columns, 1, {.threads = 1});
    }
    EXPECT_EQ(0, std::memcmp(together.data(), threaded.data(), size * sizeof(float)))
        << name_of(format.format);
    EXPECT_EQ(0, std::memcmp(together.data(), one_by_one.data(), size * sizeof(float)))
        << name_of(format.format);
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
}

}  // namespace
}  // namespace heed
