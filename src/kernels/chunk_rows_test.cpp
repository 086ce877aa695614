// Kernels of a chunk for rows of any type, row by row, and for operands of bfloat16, against plain loops in double.
#include "kernels/chunk_test.h"

namespace heed::kernels::chunk_tests {
namespace {

template <class T>
class ChunkRows : public testing::Test {};
TYPED_TEST_SUITE(ChunkRows, Types);

TYPED_TEST(ChunkRows, SumsThatRunAlongTheRows) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    constexpr int64_t kWidth = 48;
    for (const auto& [x_tokens, y_tokens] : {std::pair<TokenRange, TokenRange>{{0, 9}, {0, 9}},
                                             {{0, 9}, {4, 9}},
                                             {{3, 12}, {0, 8}},
                                             {{0, 0}, {0, 5}}}) {
      Matrix<T> x(12, kWidth, kWidth, 1), y(12, kWidth, kWidth, 2), start(1, kWidth, kWidth, 3);
      Matrix<T> xf(1, 16, 16, 4), yf(1, 16, 16, 5);
      Matrix<T> sum = start;
      std::vector<T> dots(16, 0);
      k.run_dots(x.read(), x_tokens, y.read(), y_tokens, kWidth, sum.memory.data(), dots.data());
      for (bool reverse : {false, true}) {
        Matrix<T> added = y, run = start;
        k.run_add(x.read(), xf.memory.data(), x_tokens, added.block(), yf.memory.data(), y_tokens,
                  kWidth, reverse, run.memory.data());
        for (int64_t t = y_tokens.first; t < y_tokens.last; ++t) {
          const int64_t r = t - y_tokens.first;
          double dot = 0;
          for (int64_t c = 0; c < kWidth; ++c) {
            double plain = start.at(0, c), weighted = start.at(0, c);
            for (int64_t u = x_tokens.first; u < x_tokens.last; ++u) {
              const double value = x.at(u - x_tokens.first, c);
              if (u <= t) plain += value;
              if (reverse ? u >= t : u <= t)
                weighted += double(xf.at(0, u - x_tokens.first)) * value;
            }
            dot += plain * double(y.at(r, c));
            ASSERT_NEAR(added.at(r, c), double(y.at(r, c)) + double(yf.at(0, r)) * weighted,
                        10 * unit<T>());
          }
          ASSERT_NEAR(dots[static_cast<size_t>(r)], dot, 100 * unit<T>());
        }
      }
    }
  });
}

TYPED_TEST(ChunkRows, RowsOfAnyTypeAsTheyLie) {
  using T = TypeParam;
  const std::vector<DType> types = sizeof(T) == 8
                                       ? std::vector<DType>{DType::f64}
                                       : std::vector<DType>{DType::f32, DType::bf16, DType::f16};
  for_tables<T>([&](const ChunkKernels<T>& k, Isa) {
    constexpr int64_t kRows = 7;
    for (DType type : types) {
      for (int64_t width : {1, 16, 37, 64, 130}) {
        const int64_t stride = width + 3, padded = round_up(width, 16);
        // Behind the rows lies what nobody may add.
        Array x(type, {kRows, stride}), wide(DType::f64, {kRows, stride});
        std::mt19937 generator(static_cast<uint32_t>(width));
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < kRows * stride; ++i) {
          wide.as<double>()[i] =
              i % stride < width ? normal(generator) : std::numeric_limits<double>::quiet_NaN();
        }
        x = convert(wide, type);
        wide = convert(x, DType::f64);
        const Rows rows{x.view().data(), type, stride, kRows, width};
        Matrix<T> b(1, width, padded, 2), factor(1, kRows, 16, 3);
        std::vector<T> dots(kRows, 1), sum(static_cast<size_t>(padded), 7);
        k.row_dots(rows, {b.memory.data(), 0}, dots.data());
        k.sum_rows(rows, factor.memory.data(), sum.data());
        std::vector<double> want(static_cast<size_t>(padded), 0);
        for (int64_t r = 0; r < kRows; ++r) {
          double dot = 1;
          for (int64_t c = 0; c < width; ++c) {
            const double element = wide.as<double>()[r * stride + c];
            dot += element * double(b.at(0, c));
            want[static_cast<size_t>(c)] += element * double(factor.at(0, r));
          }
          ASSERT_NEAR(dots[static_cast<size_t>(r)], dot, 10 * unit<T>()) << name_of(type);
        }
        for (int64_t c = 0; c < width; ++c) {
          ASSERT_NEAR(sum[static_cast<size_t>(c)], want[static_cast<size_t>(c)], 10 * unit<T>())
              << name_of(type) << " " << width;
        }
      }
    }
  });
}

TYPED_TEST(ChunkRows, RowsOneByOne) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    Matrix<T> a(5, 48, 48, 1), b(5, 48, 48, 2), factor(1, 16, 16, 3), scaled = a, sum = a;
    std::vector<T> dots(5, 1), same(5, 0);
    const Rows rows{a.memory.data(), dtype_of<T>, 48, 5, 48};
    k.row_dots(rows, b.read(), dots.data());
    k.row_dots(rows, {b.memory.data(), 0}, same.data());
    k.scale_rows(scaled.block(), 5, 48, factor.memory.data());
    std::vector<T> total(48, 7), weighted(48, 7);
    k.sum_rows(rows, nullptr, total.data());
    k.sum_rows(rows, factor.memory.data(), weighted.data());
    for (int64_t c = 0; c < 48; ++c) {
      double plain = 0, product = 0;
      for (int64_t r = 0; r < 5; ++r) {
        plain += double(a.at(r, c));
        product += double(a.at(r, c)) * double(factor.at(0, r));
      }
      ASSERT_NEAR(total[static_cast<size_t>(c)], plain, 10 * unit<T>());
      ASSERT_NEAR(weighted[static_cast<size_t>(c)], product, 10 * unit<T>());
    }
    k.add_scaled(T(-0.5), b.memory.data(), 5 * 48, sum.memory.data());
    for (int64_t r = 0; r < 5; ++r) {
      double own = 1, first = 0;
      for (int64_t c = 0; c < 48; ++c) {
        own += double(a.at(r, c)) * double(b.at(r, c));
        first += double(a.at(r, c)) * double(b.at(0, c));
        ASSERT_NEAR(scaled.at(r, c), double(a.at(r, c)) * double(factor.at(0, r)), unit<T>());
        ASSERT_NEAR(sum.at(r, c), double(a.at(r, c)) - 0.5 * double(b.at(r, c)), unit<T>());
      }
      ASSERT_NEAR(dots[static_cast<size_t>(r)], own, 20 * unit<T>());
      ASSERT_NEAR(same[static_cast<size_t>(r)], first, 20 * unit<T>());
    }
  });
}

// Tables that are used with products of bfloat16, whose rounding is an instruction there.
template <class Body>
void for_half_tables(Body&& body) {
  for (Isa isa : {Isa::portable, Isa::avx512}) {
    const auto& known = available_isas();
    if (std::find(known.begin(), known.end(), isa) == known.end()) continue;
    if (isa == Isa::avx512 && half_tile_kernels(isa) == nullptr) continue;
    SCOPED_TRACE(name_of(isa));
    body(chunk_kernels<float>(isa));
  }
}

float rounded(float x) { return to_float(to_bfloat16(x)); }

TEST(HalfChunks, RoundedWeightsAndRows) {
  for_half_tables([](const ChunkKernels<float>& k) {
    constexpr int64_t kRows = 23, kColumns = 37, kStride = 64;
    const auto ranges = causal_ranges(kRows, kColumns);
    Matrix<float> s = masked_scores<float>(ranges, kColumns, 1), x(kRows, kColumns, kStride, 2);
    std::vector<uint16_t> w(kRows * kStride, 1), r16(kRows * kStride, 1);
    k.weigh_half(s.block(), kRows, kColumns, ranges.data(), {}, w.data(), kStride);
    k.round_rows(x.read(), kRows, kColumns, r16.data(), kStride);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t m = 0; m < kStride; ++m) {
        const auto i = static_cast<size_t>(r * kStride + m);
        const bool seen = sees(ranges[static_cast<size_t>(r)], m);
        ASSERT_EQ(to_float(bfloat16{w[i]}), seen ? rounded(s.at(r, m)) : 0.0f);
        ASSERT_EQ(to_float(bfloat16{r16[i]}), m < kColumns ? rounded(x.at(r, m)) : 0.0f);
      }
    }
  });
}

TEST(HalfChunks, TransposedRowsWithFactors) {
  for_half_tables([](const ChunkKernels<float>& k) {
    for (const auto& [count, width] :
         {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {33, 19}, {64, 48}}) {
      const int64_t stride = round_up(count, kHalfDepth);
      Matrix<float> x(count, width, width + 3, 1), factor(1, 64, 64, 2);
      std::vector<uint16_t> bits(static_cast<size_t>(count * x.stride + 64));
      for (int64_t i = 0; i < count * x.stride; ++i) {
        bits[static_cast<size_t>(i)] = to_bfloat16(x.memory[static_cast<size_t>(i)]).bits;
      }
      std::vector<uint16_t> to(static_cast<size_t>(width * stride), 1);
      for (const float* factors : {(const float*)nullptr, (const float*)factor.memory.data()}) {
        k.pack_transposed({bits.data(), DType::bf16, x.stride, count, width}, factors, to.data(),
                          stride);
        for (int64_t f = 0; f < width; ++f) {
          for (int64_t r = 0; r < stride; ++r) {
            const float value = r < count ? rounded(x.at(r, f)) : 0;
            const float want =
                factors == nullptr || r >= count ? value : rounded(value * factor.at(0, r));
            ASSERT_EQ(to_float(bfloat16{to[static_cast<size_t>(f * stride + r)]}), want);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace heed::kernels::chunk_tests
