#include "kernels/transformer_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "heed/error.h"

namespace heed {
namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();

// A matrix whose rows are further apart than they are wide; what lies between must stay NaN.
struct Matrix {
  DType dtype;
  int64_t rows, columns, stride;
  std::vector<float> wide;
  std::vector<bfloat16> half;

  Matrix(DType type, int64_t r, int64_t c) : dtype(type), rows(r), columns(c), stride(c + 5) {
    wide.assign(static_cast<size_t>(rows * stride), kNan);
    half.assign(static_cast<size_t>(rows * stride), to_bfloat16(kNan));
  }
  static Matrix random(DType type, int64_t r, int64_t c, uint32_t seed, float size = 1.0f) {
    Matrix m(type, r, c);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, size);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) m.set(i, j, normal(random));
    }
    return m;
  }
  size_t at(int64_t i, int64_t j) const { return static_cast<size_t>(i * stride + j); }
  void set(int64_t i, int64_t j, float value) {
    wide[at(i, j)] = value;
    half[at(i, j)] = to_bfloat16(value);
  }
  float get(int64_t i, int64_t j) const {
    return dtype == DType::f32 ? wide[at(i, j)] : to_float(half[at(i, j)]);
  }
  Tensor view() {
    void* data = dtype == DType::f32 ? static_cast<void*>(wide.data()) : half.data();
    return Tensor(data, dtype, {rows, columns}, {stride, 1});
  }
};

// Each value within a few roundings, relative to |exact| + size, of what `exact` says; size is that of
// terms that may cancel.
void expect_values(const Matrix& m, const std::function<double(int64_t, int64_t)>& exact,
                   const std::string& what, double size = 1e-2) {
  const double unit = m.dtype == DType::f32 ? 1e-6 : 0x1p-8;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      const double needed = exact(i, j), found = static_cast<double>(m.get(i, j));
      ASSERT_TRUE(std::abs(found - needed) <= unit * (std::abs(needed) + size))
          << what << " at " << i << "," << j << ": " << found << ", exact " << needed;
    }
    for (int64_t j = m.columns; j < m.stride; ++j) {
      ASSERT_TRUE(std::isnan(m.get(i, j))) << what << " wrote between the rows";
    }
  }
}

using Case =
    std::function<void(Isa isa, DType type, int64_t rows, int64_t columns, std::string what)>;

void for_cases(const Case& body) {
  for (Isa isa : available_isas()) {
    for (DType type : {DType::f32, DType::bf16}) {
      for (int64_t rows : {1, 3, 300}) {
        for (int64_t columns : {1, 5, 15, 16, 17, 64, 100}) {
          body(isa, type, rows, columns,
               std::string(name_of(isa)) + " " + name_of(type) + " [" + std::to_string(rows) + "," +
                   std::to_string(columns) + "]");
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(TransformerRows, RmsNorm) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    for (DType from : {DType::f32, DType::bf16}) {
      Matrix x = Matrix::random(from, rows, columns, 1, 3.0f), out(type, rows, columns);
      std::vector<float> weight(static_cast<size_t>(columns));
      for (size_t c = 0; c < weight.size(); ++c) weight[c] = 0.5f + 0.01f * static_cast<float>(c);
      const float eps = 1e-5f;
      rms_norm(x.view(), Tensor(weight.data(), DType::f32, {columns}), eps, out.view(),
               {.threads = 2, .isa = isa});
      expect_values(
          out,
          [&](int64_t i, int64_t j) {
            double sum = 0;
            for (int64_t c = 0; c < columns; ++c)
              sum += std::pow(static_cast<double>(x.get(i, c)), 2);
            return static_cast<double>(x.get(i, j)) *
                   static_cast<double>(weight[static_cast<size_t>(j)]) /
                   std::sqrt(sum / static_cast<double>(columns) + static_cast<double>(eps));
          },
          what);
    }
  });
}

// Squares of such values are past float32 or nothing in it.
TEST(TransformerRows, RmsNormOfHugeAndTinyRows) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    const std::vector<float> ones(static_cast<size_t>(columns), 1.0f);
    const Tensor weight(ones.data(), DType::f32, {columns});
    for (float size : {1e20f, 1e37f, 1e-17f, 1e-25f, 1e-38f}) {
      Matrix x = Matrix::random(type, rows, columns, 1);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; ++c) x.set(i, c, x.get(i, c) * size);
      }
      const Matrix before = x;
      const RunOptions run{.threads = 2, .isa = isa};
      rms_norm(x.view(), weight, 0.0f, x.view(), run);
      const auto exact = [&](int64_t i, int64_t j) {
        double sum = 0;
        for (int64_t c = 0; c < columns; ++c)
          sum += std::pow(static_cast<double>(before.get(i, c)), 2);
        return static_cast<double>(before.get(i, j)) /
               std::sqrt(sum / static_cast<double>(columns));
      };
      expect_values(x, exact, what + " of " + std::to_string(size));
      Matrix heads = before;
      rms_norm_heads(heads.view(), {{1, weight}}, 0.0f, run);
      expect_values(heads, exact, what + " as heads");
    }
  });
}

TEST(TransformerRows, RmsNormShowsWhatIsNotFinite) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    const std::vector<float> ones(static_cast<size_t>(columns), 1.0f);
    const Tensor weight(ones.data(), DType::f32, {columns});
    for (float value : {kNan, std::numeric_limits<float>::infinity()}) {
      Matrix x = Matrix::random(type, rows, columns, 1), out(type, rows, columns);
      x.set(rows - 1, columns - 1, value);
      rms_norm(x.view(), weight, 1e-5f, out.view(), {.threads = 2, .isa = isa});
      ASSERT_TRUE(std::isnan(out.get(rows - 1, columns - 1))) << what;
      ASSERT_TRUE(rows == 1 || std::isfinite(out.get(0, 0))) << what;
    }
  });
}

TEST(TransformerRows, RmsNormOfHeadsIsThatOfRows) {
  constexpr int64_t kHeads = 3;  // two with one weight, the third with another
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    std::vector<float> values(static_cast<size_t>(2 * columns));
    for (size_t c = 0; c < values.size(); ++c) values[c] = 0.5f + 0.01f * static_cast<float>(c);
    const Tensor first(values.data(), DType::f32, {columns});
    const Tensor second(values.data() + columns, DType::f32, {columns});
    Matrix all = Matrix::random(type, rows, kHeads * columns, 1, 3.0f);
    for (int64_t head = 0; head < kHeads; ++head) {
      Matrix one(type, rows, columns);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; ++c) one.set(i, c, all.get(i, head * columns + c));
      }
      rms_norm(one.view(), head < 2 ? first : second, 1e-5f, one.view(),
               {.threads = 1, .isa = isa});
      Matrix normed = all;
      rms_norm_heads(normed.view(), {{2, first}, {1, second}}, 1e-5f, {.threads = 3, .isa = isa});
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; ++c)
          ASSERT_EQ(normed.get(i, head * columns + c), one.get(i, c)) << what;
      }
    }
  });
}

TEST(TransformerRows, Swiglu) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    Matrix in = Matrix::random(type, rows, 2 * columns, 2, 20.0f), out(type, rows, columns);
    in.set(0, 0, -3000.0f);
    swiglu(in.view(), out.view(), {.threads = 2, .isa = isa});
    expect_values(
        out,
        [&](int64_t i, int64_t j) {
          const double g = static_cast<double>(in.get(i, j));
          return g / (1 + std::exp(-g)) * static_cast<double>(in.get(i, columns + j));
        },
        what);
    in.set(0, 0, kNan);
    swiglu(in.view(), out.view(), {.isa = isa});
    ASSERT_TRUE(std::isnan(out.get(0, 0))) << what;
  });
}

// Rows for an int8 product are those of float32 results, rounded.
TEST(TransformerRows, ResultsRoundedToInt8) {
  const int64_t rows = 70, columns = 96;
  std::vector<float> weight(static_cast<size_t>(columns), 0.7f);
  const Tensor norm(weight.data(), DType::f32, {columns});
  const size_t bytes = static_cast<size_t>(int8_rows_bytes(rows, columns, 1));
  for (Isa isa : available_isas()) {
    const RunOptions run{.threads = 2, .isa = isa};
    for (DType type : {DType::f32, DType::bf16}) {
      Matrix x = Matrix::random(type, rows, columns, 1);
      Matrix gate_up = Matrix::random(type, rows, 2 * columns, 2);
      const auto expect_rounded = [&](const auto& op, const char* what) {
        Array wide(DType::f32, {rows, columns}),
            found(DType::f32, {static_cast<int64_t>(bytes / 4)}),
            needed(DType::f32, {static_cast<int64_t>(bytes / 4)});
        op(wide.view());
        op(Int8Rows{found.as<std::byte>(), rows, columns});
        fill_int8_rows({needed.as<std::byte>(), rows, columns}, run,
                       [&](int64_t first, const Tensor& to) {
                         for (int64_t m = 0; m < to.size(0); ++m) {
                           std::memcpy(to.at({m}), wide.view().at({first + m}),
                                       static_cast<size_t>(columns) * sizeof(float));
                         }
                       });
        EXPECT_EQ(0, std::memcmp(found.as<void>(), needed.as<void>(), bytes))
            << what << " " << name_of(isa) << " " << name_of(type);
      };
      expect_rounded([&](const auto& to) { rms_norm(x.view(), norm, 1e-5f, to, run); }, "rms_norm");
      expect_rounded([&](const auto& to) { convert_rows(x.view(), to, run); }, "convert_rows");
      if (type == DType::f32) {
        expect_rounded([&](const auto& to) { swiglu(gate_up.view(), to, run); }, "swiglu");
      }
    }
  }
  Matrix narrow(DType::f32, rows, 64);
  Array memory(DType::f32, {static_cast<int64_t>(bytes / 4)});
  const Int8Rows to{memory.as<std::byte>(), rows, columns};
  EXPECT_THROW(convert_rows(narrow.view(), to), Error);
  EXPECT_THROW(rms_norm(narrow.view(), norm, 1e-5f, to), Error);
  EXPECT_THROW(swiglu(narrow.view(), to), Error);
}

TEST(TransformerRows, RotateBothPairings) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t pairs, const std::string& what) {
    for (bool interleaved : {false, true}) {
      const int64_t head = 2 * pairs + 3, stride = rotation_stride(pairs);
      Matrix x = Matrix::random(type, rows, 3 * head, 3);
      const Matrix before = x;
      std::vector<float> cos(static_cast<size_t>(rows * stride)), sin(cos.size());
      for (size_t i = 0; i < cos.size(); ++i) {
        cos[i] = std::cos(0.37f * static_cast<float>(i));
        sin[i] = std::sin(0.37f * static_cast<float>(i));
      }
      rotate(x.view(), {head, pairs, interleaved, cos.data(), sin.data(), stride},
             {.threads = 2, .isa = isa});
      expect_values(
          x,
          [&](int64_t i, int64_t j) {
            const int64_t start = j / head * head, column = j % head;
            if (column >= 2 * pairs) return static_cast<double>(before.get(i, j));
            const int64_t pair = interleaved ? column / 2 : column % pairs;
            const bool second = interleaved ? column % 2 == 1 : column >= pairs;
            const double a = before.get(i, start + (interleaved ? 2 * pair : pair));
            const double b = before.get(i, start + (interleaved ? 2 * pair + 1 : pair + pairs));
            const double c = cos[static_cast<size_t>(i * stride + pair)];
            const double s = sin[static_cast<size_t>(i * stride + pair)];
            return second ? a * s + b * c : a * c - b * s;
          },
          what + (interleaved ? " interleaved" : " halves"), 1.0);
    }
  });
}

TEST(TransformerRows, ConvertAndAdd) {
  for_cases([](Isa isa, DType type, int64_t rows, int64_t columns, const std::string& what) {
    const RunOptions run{.threads = 2, .isa = isa};
    for (DType from : {DType::f32, DType::bf16}) {
      Matrix a = Matrix::random(from, rows, columns, 4), b(type, rows, columns);
      a.set(0, 0, std::numeric_limits<float>::infinity());
      a.set(rows - 1, columns - 1, kNan);
      convert_rows(a.view(), b.view(), run);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const float value = a.get(i, j);
          const float needed = type == DType::f32 ? value : to_float(to_bfloat16(value));
          const float found = b.get(i, j);
          ASSERT_TRUE(std::isnan(needed) ? std::isnan(found) : found == needed) << what;
        }
      }
      Matrix c = Matrix::random(from, rows, columns, 5),
             sum = Matrix::random(type, rows, columns, 6);
      const Matrix before = sum;
      add_rows(c.view(), sum.view(), run);
      expect_values(
          sum,
          [&](int64_t i, int64_t j) {
            return static_cast<double>(before.get(i, j)) + static_cast<double>(c.get(i, j));
          },
          what + " add_rows");
      std::vector<float> bias(static_cast<size_t>(columns), 0.75f);
      Matrix biased = before;
      add_bias(Tensor(bias.data(), DType::f32, {columns}), biased.view(), run);
      expect_values(
          biased,
          [&](int64_t i, int64_t j) { return static_cast<double>(before.get(i, j)) + 0.75; },
          what + " add_bias");
    }
  });
}

TEST(TransformerRows, LogSumExp) {
  for (Isa isa : available_isas()) {
    const RunOptions run{.isa = isa};
    for (int64_t n : {1, 5, 16, 1023, 5000}) {
      Matrix x = Matrix::random(DType::f32, 1, n, 7, 30.0f);
      double largest = -1e300, sum = 0;
      for (int64_t j = 0; j < n; ++j) largest = std::max(largest, static_cast<double>(x.get(0, j)));
      for (int64_t j = 0; j < n; ++j) sum += std::exp(static_cast<double>(x.get(0, j)) - largest);
      EXPECT_NEAR(log_sum_exp(x.wide.data(), n, run), largest + std::log(sum),
                  1e-6 * std::abs(largest));
      x.set(0, n - 1, kNan);
      EXPECT_TRUE(std::isnan(log_sum_exp(x.wide.data(), n, run)));
    }
    EXPECT_EQ(log_sum_exp(nullptr, 0, run), -std::numeric_limits<double>::infinity());
  }
}

TEST(TransformerRows, RefusesWhatDoesNotFit) {
  Matrix x(DType::f32, 2, 6), small(DType::f32, 2, 5);
  std::vector<float> weight(6), table(32);
  const Tensor w(weight.data(), DType::f32, {6}), short_w(weight.data(), DType::f32, {5});
  EXPECT_THROW(rms_norm(x.view(), short_w, 1e-5f, x.view()), Error);
  const Tensor third(weight.data(), DType::f32, {2}), square(weight.data(), DType::f32, {2, 3});
  EXPECT_NO_THROW(rms_norm_heads(x.view(), {{3, third}}, 1e-5f));
  EXPECT_THROW(rms_norm_heads(x.view(), {{1, third}, {1, third}}, 1e-5f), Error);
  EXPECT_THROW(rms_norm_heads(x.view(), {{2, square}}, 1e-5f), Error);
  EXPECT_THROW(rms_norm(x.view(), w, 1e-5f, small.view()), Error);
  EXPECT_THROW(rms_norm(Tensor(x.wide.data(), DType::f32, {2, 6}, {1, 2}), w, 1e-5f, x.view()),
               Error);
  EXPECT_THROW(rms_norm(Tensor(x.wide.data(), DType::f16, {2, 6}), w, 1e-5f, x.view()), Error);
  EXPECT_THROW(swiglu(x.view(), small.view()), Error);
  EXPECT_THROW(convert_rows(x.view(), small.view()), Error);
  EXPECT_THROW(add_rows(x.view(), small.view()), Error);
  EXPECT_THROW(add_bias(short_w, x.view()), Error);
  const Rotation rotation{4, 2, false, table.data(), table.data(), 16};
  EXPECT_THROW(rotate(x.view(), rotation), Error);  // heads of 4 do not fill 6 columns
  EXPECT_THROW(rotate(x.view(), {6, 4, false, table.data(), table.data(), 16}), Error);
  EXPECT_THROW(rotate(x.view(), {6, 3, false, table.data(), table.data(), 15}), Error);
}

}  // namespace
}  // namespace heed
