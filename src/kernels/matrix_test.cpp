// Products, conversions and transforms on every instruction set, at sizes around vectors and blocks.
#include "kernels/matrix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "kernels/fft.h"

namespace heed::kernels {
namespace {

template <class T>
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<T> values;
  Matrix(const MatrixKernels<T>& kernels, int64_t r, int64_t c, uint32_t seed)
      : rows(r),
        columns(c),
        stride(row_stride(kernels, c)),
        values(static_cast<size_t>(r * stride + 64)) {
    std::mt19937 generator(seed);
    // Small multiples of 1/64: sums are exact in float, whatever their order.
    std::uniform_int_distribution<int> numbers(-64, 64);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) at(i, j) = static_cast<T>(numbers(generator)) / 64;
    }
  }
  T& at(int64_t i, int64_t j) { return values[static_cast<size_t>(i * stride + j)]; }
  Block<T> block() { return {values.data(), stride}; }
  Block<const T> readable() { return {values.data(), stride}; }
};

template <class T>
void check_products(Isa isa) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>(isa);
  for (int64_t rows : {1, 5, 13}) {
    for (int64_t columns : {1, 15, 64, 83}) {
      for (int64_t depth : {0, 1, 31, 300}) {
        Matrix<T> a(kernels, rows, depth, 1), b(kernels, depth, columns, 2),
            c(kernels, rows, columns, 3);
        Matrix<T> transposed(kernels, depth, rows, 4);
        kernels.transpose(a.readable(), rows, depth, transposed.block());
        Matrix<T> sum = c, product = c, other = c;
        kernels.multiply({a.values.data(), a.stride, 1}, b.readable(), depth, sum.block(), rows,
                         columns, true);
        kernels.multiply({a.values.data(), a.stride, 1}, b.readable(), depth, product.block(), rows,
                         columns, false);
        kernels.multiply({transposed.values.data(), 1, transposed.stride}, b.readable(), depth,
                         other.block(), rows, columns, false);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            T want = 0;
            for (int64_t k = 0; k < depth; ++k) want += a.at(i, k) * b.at(k, j);
            ASSERT_EQ(product.at(i, j), want)
                << name_of(isa) << rows << " " << columns << " " << depth;
            ASSERT_EQ(other.at(i, j), want);
            ASSERT_EQ(sum.at(i, j), want + c.at(i, j));
          }
        }
      }
    }
  }
}

TEST(Matrix, ProductsAreExactOnSmallNumbers) {
  for (Isa isa : available_isas()) {
    check_products<float>(isa);
    check_products<double>(isa);
  }
}

template <class T>
void check_rows(Isa isa) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>(isa);
  for (DType type : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t width : {1, 7, 16, 37}) {
      Matrix<T> x(kernels, 3, width, 5);
      x.at(1, 0) = std::numeric_limits<T>::quiet_NaN();
      x.at(2, width - 1) = std::numeric_limits<T>::infinity();
      const Array memory = Array::zeros(type, {3, width + 2});
      const Tensor rows = memory.view().slice(1, 0, width);
      kernels.store_rows(x.readable(), {rows.data(), type, width + 2, 3, width});
      Matrix<T> back(kernels, 3, width, 6);
      std::fill(back.values.begin(), back.values.end(), T{9});
      kernels.load_rows({rows.data(), type, width + 2, 3, width}, back.block());
      for (int64_t i = 0; i < 3; ++i) {
        for (int64_t j = 0; j < width; ++j) {  // multiples of 1/64 up to 1 fit into 8 bits
          const T want = x.at(i, j), got = back.at(i, j);
          ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
              << name_of(isa) << name_of(type);
        }
        for (int64_t j = width; j % kernels.lanes != 0; ++j) ASSERT_EQ(back.at(i, j), 0);
      }
      const Array all = convert(memory, DType::f64);
      for (int64_t i = 0; i < 3; ++i) {  // nothing behind a row is written
        ASSERT_EQ(all.as<double>()[i * (width + 2) + width], 0);
        ASSERT_EQ(all.as<double>()[i * (width + 2) + width + 1], 0);
      }
    }
  }
}

TEST(Matrix, RowsComeBackFromEveryType) {
  for (Isa isa : available_isas()) {
    check_rows<float>(isa);
    check_rows<double>(isa);
  }
}

template <class T>
void check_elementwise(Isa isa) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>(isa);
  for (int64_t n : {0, 1, 16, 45}) {
    std::vector<T> x(46, 2), y(46, 3), z(46, T{0.5});
    kernels.add(x.data(), y.data(), n);
    kernels.scale(x.data(), y.data(), n);
    kernels.add_products(x.data(), y.data(), z.data(), n);
    for (int64_t i = 0; i < 46; ++i) ASSERT_EQ(x[static_cast<size_t>(i)], i < n ? T{16.5} : T{2});
    ASSERT_EQ(kernels.dot(y.data(), z.data(), n), T{1.5} * static_cast<T>(n));
  }
}

TEST(Matrix, ElementwiseStopsAtTheEnd) {
  for (Isa isa : available_isas()) {
    check_elementwise<float>(isa);
    check_elementwise<double>(isa);
  }
}

TEST(Matrix, RowStridesAreWholeVectorsAndNoPages) {
  for (Isa isa : available_isas()) {
    const auto& kernels = matrix_kernels<float>(isa);
    for (int64_t columns : {1, 64, 1000, 1024, 4096}) {
      const int64_t stride = row_stride(kernels, columns);
      EXPECT_GE(stride, columns);
      EXPECT_EQ(stride % kernels.lanes, 0);
      EXPECT_NE(stride * 4 % 4096, 0);
    }
  }
}

template <class Real>
void check_transform(int64_t length) {
  const Fft<Real> fft(length);
  const int64_t n = fft.length();
  ASSERT_GE(n, length);
  ASSERT_GE(n, 2);  // kissfft writes outside its scratch for one number
  std::vector<std::complex<Real>> x(static_cast<size_t>(n)), spectrum(x.size()), back(x.size());
  std::mt19937 generator(7);
  std::normal_distribution<double> normal;
  for (auto& value : x)
    value = {static_cast<Real>(normal(generator)), static_cast<Real>(normal(generator))};
  fft.forward(x.data(), spectrum.data());
  fft.inverse(spectrum.data(), back.data());
  const Real small = 64 * std::numeric_limits<Real>::epsilon();
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_LT(std::abs(back[i] / static_cast<Real>(n) - x[i]), small);
  }
  for (int64_t k : {int64_t{0}, n / 3, n - 1}) {  // against the definition
    std::complex<Real> want = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Real angle =
          -2 * std::numbers::pi_v<Real> * static_cast<Real>(i * k % n) / static_cast<Real>(n);
      want += x[static_cast<size_t>(i)] * std::complex<Real>(std::cos(angle), std::sin(angle));
    }
    EXPECT_LT(std::abs(spectrum[static_cast<size_t>(k)] - want),
              small * std::sqrt(static_cast<Real>(n)) * 4);
  }
}

TEST(Fft, TransformsAndComesBack) {
  for (int64_t length : {1, 2, 3, 7, 60, 121, 1000}) {
    check_transform<double>(length);
    check_transform<long double>(length);
  }
}

TEST(Fft, GoodLengthsHaveSmallFactors) {
  for (int64_t n = 1; n < 3000; n += 7) {
    int64_t rest = good_fft_length(n);
    EXPECT_GE(rest, n);
    EXPECT_LT(rest, n + n / 3 + 1);
    for (int64_t prime : {2, 3, 5}) {
      while (rest % prime == 0) rest /= prime;
    }
    EXPECT_EQ(rest, 1);
  }
}

}  // namespace
}  // namespace heed::kernels
