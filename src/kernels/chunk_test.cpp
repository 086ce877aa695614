// Products, weights and sums of a chunk against plain loops in double, on every instruction set this machine has.
#include "kernels/chunk_test.h"

namespace heed::kernels::chunk_tests {
namespace {

template <class T>
class Chunks : public testing::Test {};
TYPED_TEST_SUITE(Chunks, Types);

TYPED_TEST(Chunks, OuterProductsWithEveryDecay) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    for (const auto& [depth, rows, columns] :
         {std::tuple<int64_t, int64_t, int64_t>{0, 3, 16}, {1, 1, 16}, {7, 13, 48}, {65, 40, 80}}) {
      Matrix<T> x(depth, rows, rows + 3, 1), y(depth, columns, columns, 2),
          s(rows, columns, columns, 3);
      struct Case {
        Decay<T> decay;
        bool in_place, from_zero;
      };
      for (const Case& at : {Case{{1, false}, true, false}, Case{{T(0.25), false}, false, false},
                             Case{{T(-0.125), true}, false, false},
                             Case{{T(-0.125), true}, true, false}, Case{{1, false}, false, true}}) {
        Matrix<T> found = s, before = s;
        const kernels::Block<const T> from = at.from_zero  ? kernels::Block<const T>{}
                                             : at.in_place ? found.read()
                                                           : before.read();
        k.outer(x.read(), y.read(), depth, rows, columns, at.decay, from, found.block(), nullptr);
        const double factor = at.from_zero ? 0 : double(at.decay.factor) + (at.decay.keep ? 1 : 0);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            double want = factor * double(s.at(r, c));
            for (int64_t i = 0; i < depth; ++i) want += double(x.at(i, r)) * double(y.at(i, c));
            ASSERT_NEAR(found.at(r, c), want, unit<T>() * std::sqrt(double(depth + 1)));
          }
        }
      }
    }
  });
}

TYPED_TEST(Chunks, RowsReadFromAState) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    for (const auto& [rows, depth, columns] :
         {std::tuple<int64_t, int64_t, int64_t>{3, 0, 16}, {1, 1, 16}, {13, 7, 48}, {40, 65, 80}}) {
      // What lies behind the last row is not read.
      Matrix<T> x(rows, depth, depth + 3, 1), s(depth, columns, columns, 2),
          o(rows, columns, columns + 16, 3), added(1, columns, columns, 4), factor(1, 64, 64, 5),
          added_factor(1, 64, 64, 6);
      const T guard = o.at(rows - 1, columns);
      const Rows x_ahead{x.memory.data(), DType::f32, x.stride, rows, depth};
      const RowEnds<T> all{factor.memory.data(), added.memory.data(), added_factor.memory.data()};
      for (const RowEnds<T>& ends : {RowEnds<T>{}, RowEnds<T>{all.factor, nullptr, nullptr}, all}) {
        ReadAhead ahead{x_ahead, x_ahead};
        ahead.spread(rows * columns * depth);
        k.read(x.read(), s.read(), rows, depth, columns, ends, o.block(), &ahead);
        EXPECT_EQ(ahead.lines(), 0);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            double want = 0;
            for (int64_t i = 0; i < depth; ++i) want += double(x.at(r, i)) * double(s.at(i, c));
            if (ends.factor != nullptr) want *= double(factor.at(0, r));
            if (ends.added != nullptr)
              want += double(added_factor.at(0, r)) * double(added.at(0, c));
            ASSERT_NEAR(o.at(r, c), want, 4 * unit<T>() * std::sqrt(double(depth + 1)));
          }
        }
        EXPECT_EQ(o.at(rows - 1, columns), guard);
      }
    }
  });
}

TYPED_TEST(Chunks, OuterInParts) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    Matrix<T> x(9, 5, 8, 1), y(9, 32, 32, 2), s(5, 32, 32, 3), sum(5, 32, 32, 4);
    for (const Decay<T>& decay :
         {Decay<T>{1, false}, Decay<T>{T(0.3), false}, Decay<T>{T(-0.1), true}}) {
      Matrix<T> together = s, apart = s;
      k.outer(x.read(), y.read(), 9, 5, 32, decay, s.read(), together.block(), nullptr);
      k.outer(x.read(), y.read(), 9, 5, 32, decay, {}, sum.block(), nullptr);
      k.advance(s.memory.data(), sum.memory.data(), 5 * 32, decay, apart.memory.data());
      for (int64_t r = 0; r < 5; ++r) {
        for (int64_t c = 0; c < 32; ++c) {
          ASSERT_EQ(apart.at(r, c), together.at(r, c));  // every schedule has the same bits
        }
      }
    }
  });
}

TYPED_TEST(Chunks, StepsOfAnyWidth) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    for (int64_t columns : {1, 5, 16, 17, 64, 128, 131, 200}) {
      const int64_t features = 9, stride = columns + 2;
      Matrix<T> q(1, features, 16, 1), key(1, features, 16, 2), v(1, columns, columns, 3);
      Matrix<T> s(features, columns, stride, 4), to(features, stride, stride, 5),
          o(1, columns, columns, 6);
      const T guard = to.at(0, columns);
      const Decay<T> decay{T(-0.25), true};
      k.step(q.memory.data(), key.memory.data(), v.memory.data(), features, columns, decay,
             s.read(), to.block(), o.memory.data());
      EXPECT_EQ(to.at(0, columns), guard);
      Matrix<T> in_place = s, other(1, columns, columns, 7);
      k.step(q.memory.data(), key.memory.data(), v.memory.data(), features, columns, decay,
             in_place.read(), in_place.block(), other.memory.data());
      Matrix<T> not_stored(1, columns, columns, 8);
      k.step(q.memory.data(), key.memory.data(), v.memory.data(), features, columns, decay,
             s.read(), {}, not_stored.memory.data());
      for (int64_t c = 0; c < columns; ++c) {
        double out = 0;
        for (int64_t f = 0; f < features; ++f) {
          const double want = 0.75 * double(s.at(f, c)) + double(key.at(0, f)) * double(v.at(0, c));
          ASSERT_NEAR(to.at(f, c), want, unit<T>());
          ASSERT_EQ(in_place.at(f, c), to.at(f, c));
          out += double(q.at(0, f)) * want;
        }
        ASSERT_NEAR(o.at(0, c), out, 10 * unit<T>());
        ASSERT_EQ(other.at(0, c), o.at(0, c));
        ASSERT_EQ(not_stored.at(0, c), o.at(0, c));
      }
    }
  });
}

TYPED_TEST(Chunks, PackedRowsOfEveryTypeWithFactors) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    for (DType type : sizeof(T) == 8 ? std::vector<DType>{DType::f64}
                                     : std::vector<DType>{DType::f32, DType::bf16, DType::f16}) {
      Matrix<double> exact(7, 21, 25, 1);
      Array stored(type, {7, 25}), back(DType::f64, {7, 25});
      copy(Tensor(exact.memory.data(), DType::f64, {7, 25}), stored);
      copy(stored, back);
      Matrix<T> factor(1, 7, 16, 2), to(7, 32, 32, 3);
      for (const T* factors : {(const T*)nullptr, (const T*)factor.memory.data()}) {
        k.pack_rows({stored.view().data(), type, 25, 7, 21}, factors, to.block());
        for (int64_t r = 0; r < 7; ++r) {
          for (int64_t c = 0; c < 32; ++c) {
            const double x = c < 21 ? back.as<double>()[r * 25 + c] : 0;
            ASSERT_NEAR(to.at(r, c), factors == nullptr ? x : x * double(factor.at(0, r)),
                        unit<T>());
          }
        }
      }
    }
  });
}

TYPED_TEST(Chunks, WeightsAreExactlyZeroOutsideTheRanges) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    constexpr int64_t kRows = 23, kColumns = 37;
    const auto ranges = causal_ranges(kRows, kColumns);
    Matrix<T> table(1, 256, 256, 3), column(1, 64, 64, 4);
    const T* decay = table.memory.data() + 100;
    for (const WeightFactors<T>& factors :
         {WeightFactors<T>{},
          {.decay = decay},
          {.decay = decay, .column = column.memory.data()},
          {.less_of_row = column.memory.data() + 1},
          {.column = column.memory.data(), .less_of_column = column.memory.data() + 2}}) {
      Matrix<T> s = masked_scores<T>(ranges, kColumns, 1), w = s;
      k.weigh(w.block(), kRows, kColumns, ranges.data(), factors, w.memory.data(), w.stride);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t m = 0; m < kColumns; ++m) {
          if (!sees(ranges[static_cast<size_t>(r)], m)) {
            ASSERT_EQ(w.at(r, m), 0);
            continue;
          }
          double want = s.at(r, m);
          if (factors.less_of_row != nullptr) want -= double(factors.less_of_row[r]);
          if (factors.less_of_column != nullptr) want -= double(factors.less_of_column[m]);
          if (factors.decay != nullptr) want *= double(decay[m - r]);
          if (factors.column != nullptr) want *= double(factors.column[m]);
          ASSERT_NEAR(w.at(r, m), want, unit<T>());
        }
      }
    }
  });
}

TYPED_TEST(Chunks, PolynomialsTheirDerivativesAndSums) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    constexpr int64_t kRows = 17, kColumns = 21;
    const auto ranges = causal_ranges(kRows, kColumns);
    const double scale = -0.7;
    for (int order = 0; order <= 4; ++order) {
      Matrix<T> s = masked_scores<T>(ranges, kColumns, 1), d = s, p = s,
                g = masked_scores<T>(ranges, kColumns, 2);
      k.polynomial(d.block(), p.block(), kRows, kColumns, ranges.data(), T(scale), order);
      std::vector<T> sums(kRows, 0), dots(kRows, 0);
      k.range_sums(p.read(), {}, kRows, ranges.data(), sums.data());
      k.range_sums(p.read(), g.read(), kRows, ranges.data(), dots.data());
      Matrix<T> factor(1, 64, 64, 5), added(1, 64, 64, 6), rows = d, columns = d;
      k.chain(rows.block(), g.read(), kRows, kColumns, ranges.data(), factor.memory.data(),
              added.memory.data(), false);
      k.chain(columns.block(), g.read(), kRows, kColumns, ranges.data(), factor.memory.data(),
              added.memory.data(), true);
      for (int64_t r = 0; r < kRows; ++r) {
        double sum = 0, dot = 0;
        for (int64_t m = 0; m < kColumns; ++m) {
          if (!sees(ranges[static_cast<size_t>(r)], m)) {
            ASSERT_EQ(p.at(r, m), 0);
            ASSERT_EQ(d.at(r, m), 0);
            ASSERT_EQ(rows.at(r, m), 0);
            continue;
          }
          double term = 1, value = 0, below = 0;
          for (int n = 0; n <= order; ++n) {
            value += term;
            if (n < order) below += term;
            term *= scale * double(s.at(r, m)) / (n + 1);
          }
          const double slope = below * scale;
          ASSERT_NEAR(p.at(r, m), value, 10 * unit<T>());
          ASSERT_NEAR(d.at(r, m), slope, 10 * unit<T>());
          const double x = g.at(r, m);
          ASSERT_NEAR(rows.at(r, m), slope * (double(factor.at(0, r)) * x + double(added.at(0, r))),
                      60 * unit<T>());
          ASSERT_NEAR(columns.at(r, m),
                      slope * (double(factor.at(0, m)) * x + double(added.at(0, m))),
                      60 * unit<T>());
          sum += value;
          dot += value * x;
        }
        ASSERT_NEAR(sums[static_cast<size_t>(r)], sum, 100 * unit<T>());
        ASSERT_NEAR(dots[static_cast<size_t>(r)], dot, 100 * unit<T>());
      }
    }
  });
}

TYPED_TEST(Chunks, DistanceSums) {
  using T = TypeParam;
  for_tables<T>([](const ChunkKernels<T>& k, Isa) {
    constexpr int64_t kRows = 19, kColumns = 25;
    const auto ranges = causal_ranges(kRows, kColumns);
    Matrix<T> a = masked_scores<T>(ranges, kColumns, 1), b = masked_scores<T>(ranges, kColumns, 2),
              table(1, 256, 256, 3);
    const T* decay = table.memory.data() + 100;
    double want = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t m = 0; m < kColumns; ++m) {
        if (!sees(ranges[static_cast<size_t>(r)], m)) continue;
        want += double(4 + r - m) * double(decay[m - r]) * double(a.at(r, m)) * double(b.at(r, m));
      }
    }
    EXPECT_NEAR(k.distance_sum(a.read(), b.read(), kRows, ranges.data(), 4, decay), want,
                1e4 * unit<T>());
  });
}

}  // namespace
}  // namespace heed::kernels::chunk_tests
