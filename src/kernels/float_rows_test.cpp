#include "kernels/float_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "heed/error.h"
#include "kernels/quantized_rows_test.h"

namespace heed {
namespace {

// A float32 matrix whose rows lie further apart than they are long, in memory of one value.
struct Padded {
  int64_t rows, columns, stride;
  std::vector<float> memory;
  Padded(int64_t m, int64_t n, int64_t gap, float value)
      : rows(m),
        columns(n),
        stride(n + gap),
        memory(static_cast<size_t>((m + 1) * stride), value) {}
  Tensor view() { return Tensor(memory.data(), DType::f32, {rows, columns}, {stride, 1}); }
  float& at(int64_t m, int64_t n) { return memory[static_cast<size_t>(m * stride + n)]; }
};

struct Case {
  std::vector<Matrix> weights;
  Padded x, y;
  std::vector<BlockMatrix> views;

  Case(const std::vector<Format>& formats, const std::vector<int64_t>& rows, int64_t columns,
       int64_t count, float before)
      : x(count, columns, 3, std::numeric_limits<float>::quiet_NaN()), y(count, 0, 0, 0) {
    int64_t total = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      weights.emplace_back(formats[i % formats.size()], rows[i], columns,
                           static_cast<uint32_t>(17 + i));
      total += rows[i];
    }
    for (const Matrix& w : weights) views.push_back(w.view);
    const std::vector<float> values = normals(count * columns, 4);
    for (int64_t i = 0; i < count * columns; ++i) {
      x.at(i / columns, i % columns) = values[static_cast<size_t>(i)];
    }
    y = Padded(count, total, 5, before);
  }

  // What lies around y stays; y itself is near sums in float64.
  void expect_right(float before, bool add, const std::string& what) {
    int64_t column = 0;
    for (const Matrix& w : weights) {
      for (int64_t n = 0; n < w.view.rows; ++n, ++column) {
        for (int64_t m = 0; m < y.rows; ++m) {
          double sum = add ? before : 0, size = std::abs(sum);
          for (int64_t k = 0; k < x.columns; ++k) {
            const double product =
                static_cast<double>(x.at(m, k)) * w.values[static_cast<size_t>(n * x.columns + k)];
            sum += product;
            size += std::abs(product);
          }
          ASSERT_NEAR(y.at(m, column), sum, 1e-6 * size)
              << what << ", row " << m << ", column " << column;
        }
      }
    }
    for (int64_t i = 0; i < static_cast<int64_t>(y.memory.size()); ++i) {
      if (i / y.stride < y.rows && i % y.stride < y.columns) continue;
      ASSERT_EQ(y.memory[static_cast<size_t>(i)], before) << what << ", outside y at " << i;
    }
  }
};

TEST(FloatRows, ProductsOfEveryFormat) {
  for (const Isa isa : available_isas()) {
    for (const Format& format : kFormats) {
      for (const bool add : {false, true}) {
        const int64_t columns = weights_per_block(format.format) == 1 ? 45 : 512;
        Case c({format}, {64, 70, 5}, columns, 67, 0.5f);
        float_product(c.x.view(), c.views, c.y.view(), add, {.isa = isa});
        c.expect_right(
            0.5f, add,
            std::string(name_of(isa)) + " " + name_of(format.format) + (add ? ", added" : ""));
      }
    }
  }
}

TEST(FloatRows, MixedFormatsOfAnySize) {
  for (const Isa isa : available_isas()) {
    for (const int64_t count : {0, 1, 2, 13, 64, 130}) {
      Case c({kFormats[3], kFormats[1], kFormats[0]}, {1, 16, 63, 0, 129}, 96, count, 2.0f);
      float_product(c.x.view(), c.views, c.y.view(), false, {.isa = isa});
      c.expect_right(2.0f, false, std::string(name_of(isa)) + ", " + std::to_string(count));
    }
  }
}

TEST(FloatRows, RowsDoNotDependOnOthersNorOnThreads) {
  for (const Isa isa : available_isas()) {
    Case c({kFormats[5]}, {100, 64}, 1024, 300, 0);
    float_product(c.x.view(), c.views, c.y.view(), false, {.threads = 1, .isa = isa});
    const std::vector<float> all = c.y.memory;
    float_product(c.x.view(), c.views, c.y.view(), false, {.threads = 3, .isa = isa});
    EXPECT_EQ(all, c.y.memory) << name_of(isa);
    const Tensor x = c.x.view(), y = c.y.view();
    c.y.memory.assign(c.y.memory.size(), 0);
    for (int64_t m = 0; m < 300; m += 7) {
      const int64_t end = std::min<int64_t>(300, m + 7);
      float_product(x.slice(0, m, end), c.views, y.slice(0, m, end), false, {.isa = isa});
    }
    EXPECT_EQ(all, c.y.memory) << name_of(isa);
  }
}

TEST(FloatRows, NaNStaysInItsRow) {
  for (const Isa isa : available_isas()) {
    Case c({kFormats[3]}, {40}, 64, 9, 0);
    c.x.at(4, 33) = std::numeric_limits<float>::quiet_NaN();
    float_product(c.x.view(), c.views, c.y.view(), false, {.isa = isa});
    for (int64_t m = 0; m < 9; ++m) {
      for (int64_t n = 0; n < 40; ++n) EXPECT_EQ(std::isnan(c.y.at(m, n)), m == 4);
    }
  }
}

TEST(FloatRows, RefusesWhatDoesNotFit) {
  Case c({kFormats[3]}, {40}, 64, 9, 0);
  const Tensor x = c.x.view(), y = c.y.view();
  EXPECT_THROW(float_product(x.slice(0, 0, 8), c.views, y), Error);
  EXPECT_THROW(float_product(x, c.views, y.slice(1, 0, 39)), Error);
  EXPECT_THROW(float_product(x.slice(1, 0, 32), c.views, y), Error);
  EXPECT_THROW(float_product(x, c.views, Tensor(y.data(), DType::bf16, y.shape())), Error);
  EXPECT_THROW(float_product(Tensor(x.data(), DType::f32, x.shape(), {1, 9}), c.views, y), Error);
}

}  // namespace
}  // namespace heed
