// Every part of the tile kernels against plain loops in double, on every instruction set this machine
// has, and the matrix-tile loops on an emulated unit wherever there is none.
#include "kernels/tile_test.h"

#include <gtest/gtest.h>

namespace heed::kernels {
namespace {

template <class T>
void check_scores(const TileKernels<T>& k, const Sizes& n, DType type,
                  const std::vector<KeyRange>* ranges) {
  const Matrix q(type, n.rows, n.width, n.width + 3, 1), key(type, n.keys, n.width, n.width + 5, 2);
  const int64_t rows = round_up(n.rows, k.row_multiple);
  std::vector<std::byte> queries(static_cast<size_t>(k.query_bytes(rows, n.width)) + 64);
  std::vector<std::byte> keys(static_cast<size_t>(k.key_bytes(n.keys, n.width)) + 64);
  Buffer<T> s(rows, round_up(n.keys, 64) + 16, static_cast<T>(kNaN));
  for (bool negate : {false, true}) {
    k.pack_queries(q.rows(), negate, queries.data());
    k.pack_keys(key.rows(), keys.data());
    k.scores(queries.data(), n.rows, keys.data(), n.keys, n.width,
             ranges ? ranges->data() : nullptr, s.block(), nullptr);
    const double unit = sizeof(T) == 8 ? 1e-15 : 2e-7;
    for (int64_t r = 0; r < n.rows; ++r) {
      for (int64_t m = 0; m < n.keys; ++m) {
        if (!sees(ranges, r, m)) continue;
        double want = 0, magnitude = 0;
        for (int64_t e = 0; e < n.width; ++e) {
          want += q.at(r, e) * key.at(m, e);
          magnitude += std::abs(q.at(r, e) * key.at(m, e));
        }
        ASSERT_NEAR(s.block().row(r)[m], negate ? -want : want, unit * (2 + magnitude) * 4)
            << k.name << " row " << r << " key " << m << " of " << n.rows << "x" << n.keys << "x"
            << n.width;
      }
    }
  }
}

template <class T>
void check_all_scores(const TileKernels<T>& k) {
  for (const Sizes& n : kSizes) {
    const auto ranges = slanted_ranges(n.rows, n.keys);
    for (DType type : input_types(k)) {
      check_scores<T>(k, n, type, nullptr);
      check_scores<T>(k, n, type, &ranges);
    }
  }
}

// Rows at offsets of their own are packed like the same rows in order.
template <class T>
void check_scattered_rows(const TileKernels<T>& k, DType type) {
  constexpr int64_t kRows = 70, kWidth = 37, kStride = 41;
  const Matrix x(type, kRows, kWidth, kStride, 4);
  std::vector<int64_t> offsets;
  Array in_order(type, {kRows, kStride});
  for (int64_t r = 0; r < kRows; ++r) {
    offsets.push_back((r * 29 + 3) % kRows * kStride);
    std::memcpy(in_order.view().at({r}), x.storage.view().at({offsets.back() / kStride}),
                static_cast<size_t>(kStride) * size_of(type));
  }
  Rows scattered = x.rows();
  scattered.offsets = offsets.data();
  const Rows ordered{in_order.view().data(), type, kStride, kRows, kWidth};
  const auto same = [&](int64_t bytes, const auto& pack) {
    std::vector<std::byte> a(static_cast<size_t>(bytes)), b(a.size());
    pack(scattered, a.data());
    pack(ordered, b.data());
    EXPECT_EQ(a, b) << k.name << " " << name_of(type);
  };
  same(k.query_bytes(kRows, kWidth),
       [&](const Rows& rows, void* to) { k.pack_queries(rows, true, to); });
  same(k.key_bytes(kRows, kWidth), [&](const Rows& rows, void* to) { k.pack_keys(rows, to); });
  same(k.value_bytes(kRows, kWidth), [&](const Rows& rows, void* to) { k.pack_values(rows, to); });
  same(k.column_bytes(kRows, kWidth),
       [&](const Rows& rows, void* to) { k.pack_columns(rows, false, to); });
}

TEST(TilePacking, ScatteredRows) {
  for_all_tables([](const auto& k) {
    for (DType type : input_types(k)) check_scattered_rows(k, type);
  });
}

TEST(TileScores, Float) {
  for (const auto* k : tables<float>()) check_all_scores(*k);
}
TEST(TileScores, Double) {
  for (const auto* k : tables<double>()) check_all_scores(*k);
}
TEST(TileScores, EmulatedTileUnit) { check_all_scores(emulated_tile_table()); }

struct Statistics {
  double most = -kInf, pivot = -kInf, sum = 0, carry = 1;
};

struct WeightCase {
  WeightKind kind;
  bool masked;  // some scores are -inf, row 3 as a whole
  int64_t rows, keys;
};

// A softmax row's pivot is its largest score so far or, with half operands, one that is not much less.
constexpr double kMostBelow = 20;

// One row's weights and statistics in double; `row` are those of the tiles so far, `found` the pivot that
// they shall be relative to.
template <class T>
std::vector<double> expected_weights(WeightKind kind, const WeightShape<T>& shape, const T* s,
                                     int64_t r, const std::vector<bool>& seen, Statistics& row,
                                     double found) {
  std::vector<double> t(seen.size(), -kInf), p(seen.size(), 0);
  const double before = row.pivot;
  for (size_t m = 0; m < t.size(); ++m) {
    if (seen[m]) t[m] = shaped(shape, s, r, static_cast<int64_t>(m));
    row.most = std::max(row.most, t[m]);
  }
  row.pivot = found;
  row.carry = 1;
  if (kind == WeightKind::softmax && before != -kInf) row.carry = std::exp2(before - row.pivot);
  row.sum *= row.carry;
  for (size_t m = 0; m < t.size(); ++m) {
    if (t[m] != -kInf) p[m] = weight_of(kind, shape.order, t[m], row.pivot);
    row.sum += p[m];
  }
  return p;
}

template <class T>
void check_weights(const TileKernels<T>& k, const WeightCase& n, const WeightShape<T>& shape,
                   const std::vector<KeyRange>* ranges) {
  const int64_t stride = round_up(n.keys, 64) + 16, padded = round_up(n.keys, k.key_multiple);
  const Matrix scores(dtype_of<T>, n.rows, n.keys, stride, 7);
  std::vector<std::byte> weights(static_cast<size_t>(n.rows * stride) * sizeof(T));
  std::vector<T> pivot(static_cast<size_t>(n.rows), static_cast<T>(-kInf)), sum(pivot.size(), 0),
      carry(pivot.size(), 9);
  std::vector<Statistics> want(pivot.size());
  const double unit = k.half_operands ? 0x1p-8 : sizeof(T) == 8 ? 1e-13 : 4e-7;
  for (double growth : {1, 4, 100}) {  // later tiles carry statistics along
    if (n.kind == WeightKind::polynomial && growth > 4) continue;  // it would cancel
    Buffer<T> s(n.rows, stride), given(n.rows, stride);
    for (int64_t r = 0; r < n.rows; ++r) {
      for (int64_t m = 0; m < stride; ++m) {
        s.block().row(r)[m] = static_cast<T>(
            n.masked && is_masked(r, m) ? -kInf : scores.exact[r * stride + m] * growth);
      }
    }
    given.memory = s.memory;
    std::memset(weights.data(), 0xff, weights.size());
    k.weights[static_cast<int>(n.kind)](
        s.block(), n.rows, n.keys, ranges ? ranges->data() : nullptr, shape,
        {pivot.data(), sum.data(), carry.data()}, weights.data(), stride);
    for (int64_t r = 0; r < n.rows; ++r) {
      const auto row = static_cast<size_t>(r);
      std::vector<bool> seen(static_cast<size_t>(n.keys));
      for (int64_t m = 0; m < n.keys; ++m) seen[static_cast<size_t>(m)] = sees(ranges, r, m);
      const double found = pivot[row];
      const auto p =
          expected_weights<T>(n.kind, shape, given.block().row(r), r, seen, want[row], found);
      for (int64_t m = 0; m < padded; ++m) {
        const double got = weight_at(k, weights, stride, r, m);
        const double expected = m < n.keys ? p[static_cast<size_t>(m)] : 0;
        const double bound = expected == 0
                                 ? 0
                                 : unit * weight_magnitude(n.kind, shape, given.block().row(r), r,
                                                           m, expected, want[row].pivot) +
                                       double{std::numeric_limits<T>::min()};  // subnormals are 0
        ASSERT_NEAR(got, expected, bound) << k.name << " row " << r << " key " << m;
      }
      if (n.kind == WeightKind::sigmoid) continue;
      if (n.kind == WeightKind::softmax) {
        const double below = want[row].most - found;
        ASSERT_TRUE(found == want[row].most ||
                    (below > -1e-4 && below < (k.half_operands ? kMostBelow : 1e-4)))
            << k.name << " row " << r << ": " << found << ", " << want[row].most;
      }
      ASSERT_NEAR(carry[row], want[row].carry, 1e-5) << k.name << " row " << r;
      ASSERT_NEAR(sum[row], want[row].sum, 1e-5 * (1 + std::abs(want[row].sum))) << k.name;
    }
  }
}

template <class T>
void check_all_weights(const TileKernels<T>& k) {
  const WeightShape<T> softmax[] = {
      {.scale = T(1.3)}, {.scale = T(1.3), .slope = T(0.2), .distance = 4}, {.scale = 0}};
  const WeightShape<T> sigmoid[] = {{.scale = T(0.9), .bias = -3},
                                    {.scale = T(0.9), .bias = -3, .slope = T(0.1), .distance = -6},
                                    {.scale = 0, .bias = -3}};
  const WeightShape<T> polynomial[] = {{.scale = T(0.4), .order = 3},
                                       {.scale = T(0.4), .order = 2, .slope = T(0.1)},
                                       {.scale = T(0.4), .order = 1},
                                       {.scale = T(0.4), .order = 0},
                                       {.scale = 0, .order = 2}};
  for (int64_t rows : {1, 7, 30}) {
    for (int64_t keys : {1, 5, 16, 31, 64, 200}) {
      const auto ranges = slanted_ranges(rows, keys);
      for (const auto* range : {static_cast<const std::vector<KeyRange>*>(nullptr), &ranges}) {
        for (bool masked : {false, true}) {
          WeightCase n{WeightKind::softmax, masked, rows, keys};
          for (const auto& shape : softmax) check_weights<T>(k, n, shape, range);
          n.kind = WeightKind::sigmoid;
          for (const auto& shape : sigmoid) check_weights<T>(k, n, shape, range);
          n.kind = WeightKind::polynomial;
          for (const auto& shape : polynomial) check_weights<T>(k, n, shape, range);
        }
      }
    }
  }
}

TEST(TileWeights, Float) {
  for (const auto* k : tables<float>()) check_all_weights(*k);
}
TEST(TileWeights, Double) {
  for (const auto* k : tables<double>()) check_all_weights(*k);
}
TEST(TileWeights, Half) {
  for (const auto& k : emulated_tile_tables()) check_all_weights(k);
}

template <class T>
void check_extreme_weights(const TileKernels<T>& k) {
  const float values[] = {1e4f, -1e4f, kNaN, kInf, -kInf, 0, -130, 88};
  for (WeightKind kind : {WeightKind::softmax, WeightKind::sigmoid}) {
    for (float extreme : values) {
      for (int64_t at : {0, 17, 36}) {
        Buffer<T> s(1, 96);
        for (auto& x : s.memory) x = T(0.5);
        s.memory[static_cast<size_t>(at)] = static_cast<T>(extreme);
        T pivot = static_cast<T>(-kInf), sum = 0, carry = 1;
        std::vector<std::byte> weights(96 * sizeof(T));
        k.weights[static_cast<int>(kind)](s.block(), 1, 37, nullptr, {}, {&pivot, &sum, &carry},
                                          weights.data(), 96);
        const double got = weight_at(k, weights, 96, 0, at);
        double want;
        if (kind == WeightKind::sigmoid) {
          want = 1 / (1 + std::exp2(-double{extreme}));
        } else {
          const double top = std::fmax(0.5, extreme);
          want = std::exp2(extreme - top);
        }
        if (std::isnan(want)) {
          EXPECT_TRUE(std::isnan(got)) << k.name << " " << extreme;
        } else {
          EXPECT_NEAR(got, want, 1e-2 * want + 1e-30) << k.name << " " << extreme;
        }
      }
    }
  }
}

TEST(TileWeights, ExtremesStayDefinedAndNaNIsNotHidden) {
  for (const auto* k : tables<float>()) check_extreme_weights(*k);
  for (const auto& k : emulated_tile_tables()) check_extreme_weights(k);
  for (const auto* k : tables<double>()) check_extreme_weights(*k);
}

// A NaN that a row sees is in the row's sum, wherever it lies and whatever lies beside it.
template <class T>
void check_nan_rows(const TileKernels<T>& k) {
  const int64_t keys = 75;
  for (double beside : {0.5, -double{kInf}, double{kInf}}) {
    for (int64_t at : {0, 3, 16, 37, 64, 74}) {
      for (T slope : {T(0), T(0.1)}) {
        Buffer<T> s(2, 96, static_cast<T>(beside));
        s.block().row(0)[at] = static_cast<T>(kNaN);
        std::vector<T> pivot(2, static_cast<T>(-kInf)), sum(2, 0), carry(2, 1);
        std::vector<std::byte> weights(2 * 96 * sizeof(T));
        for (int kind = 0; kind < kWeightKinds; ++kind) {
          k.weights[kind](s.block(), 2, keys, nullptr, {.order = 2, .slope = slope},
                          {pivot.data(), sum.data(), carry.data()}, weights.data(), 96);
          EXPECT_TRUE(std::isnan(weight_at(k, weights, 96, 0, at))) << k.name << " kind " << kind;
          if (kind != 0) continue;
          EXPECT_TRUE(std::isnan(sum[0])) << k.name << " at " << at << " beside " << beside;
          EXPECT_EQ(std::isnan(sum[1]), beside == double{kInf}) << k.name;
        }
      }
    }
  }
}

TEST(TileWeights, NaNReachesTheSumOfItsRow) {
  for (const auto* k : tables<float>()) check_nan_rows(*k);
  for (const auto& k : emulated_tile_tables()) check_nan_rows(k);
  for (const auto* k : tables<double>()) check_nan_rows(*k);
}

template <class T>
void check_sums(const TileKernels<T>& k, const Sizes& n, DType type,
                const std::vector<KeyRange>* ranges, bool carried) {
  const Matrix v(type, n.keys, n.value_width, n.value_width + 1, 3);
  const int64_t rows = round_up(n.rows, k.row_multiple), stride = round_up(n.keys, 64) + 16;
  const int64_t padded = round_up(n.value_width, k.dim_multiple);
  const Matrix p(k.half_operands ? DType::bf16 : dtype_of<T>, rows, stride, stride, 4);
  const Matrix o(dtype_of<T>, rows, padded, padded, 5);
  Array weights = convert(p.storage, p.storage.dtype());
  Array out = convert(o.storage, o.storage.dtype());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < stride; ++m) {
      if (r < n.rows && m < n.keys && sees(ranges, r, m)) continue;
      std::byte* at = weights.view().at({r, m});
      std::memset(at, 0, size_of(weights.dtype()));
    }
  }
  std::vector<T> carry(static_cast<size_t>(rows), 1);
  for (size_t r = 0; carried && r < carry.size(); ++r) carry[r] = static_cast<T>(r % 3 ? 0.5 : 1);
  std::vector<std::byte> values(static_cast<size_t>(k.value_bytes(n.keys, n.value_width)) + 64);
  EXPECT_TRUE(k.pack_values(v.rows(), values.data())) << k.name;
  k.accumulate(weights.view().data(), stride, n.rows, values.data(), n.keys, n.value_width,
               ranges ? ranges->data() : nullptr, carried ? carry.data() : nullptr,
               {out.as<T>(), padded}, nullptr);
  const double unit = sizeof(T) == 8 ? 1e-14 : 1e-6;
  for (int64_t r = 0; r < n.rows; ++r) {
    for (int64_t f = 0; f < n.value_width; ++f) {
      double want = carry[static_cast<size_t>(r)] * o.at(r, f), magnitude = std::abs(want);
      for (int64_t m = 0; m < n.keys; ++m) {
        if (!sees(ranges, r, m)) continue;
        want += p.at(r, m) * v.at(m, f);
        magnitude += std::abs(p.at(r, m) * v.at(m, f));
      }
      ASSERT_NEAR(out.as<T>()[r * padded + f], want, unit * (1 + magnitude))
          << k.name << " row " << r << " column " << f << " of " << n.rows << "x" << n.keys << "x"
          << n.value_width;
    }
  }
}

template <class T>
void check_all_sums(const TileKernels<T>& k) {
  for (const Sizes& n : kSizes) {
    const auto ranges = slanted_ranges(n.rows, n.keys);
    for (DType type : input_types(k)) {
      for (bool carried : {true, false}) {
        check_sums<T>(k, n, type, nullptr, carried);
        check_sums<T>(k, n, type, &ranges, carried);
      }
    }
  }
}

TEST(TileSums, Float) {
  for (const auto* k : tables<float>()) check_all_sums(*k);
}
TEST(TileSums, Double) {
  for (const auto* k : tables<double>()) check_all_sums(*k);
}
TEST(TileSums, EmulatedTileUnit) { check_all_sums(emulated_tile_table()); }

// And nothing but the rows and columns that exist is written.
void check_product(const TileKernels<float>& k, const Sizes& n, bool with_factor, bool with_row) {
  const int64_t rows = round_up(n.rows, k.row_multiple), depth = round_up(n.keys, k.key_multiple);
  const int64_t padded = round_up(n.value_width, k.dim_multiple), stride = n.value_width + 5;
  const Matrix p(DType::bf16, rows, n.keys, depth, 4);
  const Matrix v(DType::bf16, n.keys, n.value_width, n.value_width + 1, 3);
  std::vector<std::byte> weights(static_cast<size_t>(k.query_bytes(rows, n.keys)) + 64);
  std::vector<std::byte> values(static_cast<size_t>(k.value_bytes(n.keys, n.value_width)) + 64);
  k.pack_queries(p.rows(), false, weights.data());
  k.pack_values(v.rows(), values.data());
  std::vector<float> factor(static_cast<size_t>(rows));
  for (size_t r = 0; r < factor.size(); ++r) factor[r] = r % 5 == 4 ? NAN : r % 3 ? -0.3f : 1e-39f;
  const float* factors = with_factor ? factor.data() : nullptr;
  const Matrix added(DType::f32, 1, padded, padded, 5), added_factor(DType::f32, 1, rows, rows, 6);
  RowEnds<float> ends{factors};
  if (with_row) ends = {factors, added.storage.as<float>(), added_factor.storage.as<float>()};
  std::vector<float> sums(static_cast<size_t>(rows * padded), 0.0f);
  k.accumulate(weights.data(), depth, n.rows, values.data(), n.keys, n.value_width, nullptr,
               nullptr, {sums.data(), padded}, nullptr);
  std::vector<uint16_t> want(static_cast<size_t>(n.rows * stride), 0x4321), found = want;
  for (int64_t r = 0; with_row && r < n.rows; ++r) {
    for (int64_t c = 0; c < padded; ++c) {
      float& x = sums[static_cast<size_t>(r * padded + c)];
      x = std::fma(ends.added_factor[r], ends.added[c], (with_factor ? factors[r] : 1.0f) * x);
    }
  }
  k.finish({sums.data(), padded}, n.rows, n.value_width, with_row ? nullptr : factors, want.data(),
           DType::bf16, stride);
  k.product(weights.data(), depth, values.data(), n.keys, ends,
            {found.data(), DType::bf16, stride, n.rows, n.value_width}, nullptr);
  EXPECT_EQ(found, want) << k.name << " " << n.rows << "x" << n.keys << "x" << n.value_width;
}

TEST(TileSums, ProductsInOneHaveTheBitsOfTheirSteps) {
  int64_t tables_with_it = 0;
  for (const auto* k : tables<float>()) {
    if (k->product == nullptr) continue;
    ++tables_with_it;
    for (const Sizes& n : kSizes) {
      for (bool with_factor : {false, true}) {
        for (bool with_row : {false, true}) check_product(*k, n, with_factor, with_row);
      }
    }
  }
  if (tables_with_it == 0) GTEST_SKIP() << "no products of bfloat16 in vectors here";
}

template <class T>
void check_finite_flag(const TileKernels<T>& k) {
  for (DType type : input_types(k)) {
    for (float bad : {kNaN, kInf, -kInf}) {
      for (int64_t row : {0, 8}) {
        for (int64_t column : {0, 16, 20}) {
          Matrix v(type, 9, 21, 21, 1);
          Array one(DType::f32, {1});
          *one.as<float>() = bad;
          copy(one, v.storage.view().select(0, row).slice(0, column, column + 1));
          std::vector<std::byte> values(static_cast<size_t>(k.value_bytes(9, 21)) + 64);
          EXPECT_FALSE(k.pack_values(v.rows(), values.data()))
              << k.name << " " << name_of(type) << " " << bad << " at " << row << "," << column;
        }
      }
    }
  }
}

TEST(TilePack, ReportsNonFiniteValues) {
  for (const auto* k : tables<float>()) check_finite_flag(*k);
  for (const auto* k : tables<double>()) check_finite_flag(*k);
  check_finite_flag(emulated_tile_table());
}

template <class T>
void check_finish(const TileKernels<T>& k) {
  const std::vector<DType> types = sizeof(T) == 8
                                       ? std::vector<DType>{DType::f64}
                                       : std::vector<DType>{DType::f32, DType::bf16, DType::f16};
  for (DType type : types) {
    const int64_t rows = 5, width = 37, padded = 48, stride = 41;
    Matrix o(dtype_of<T>, rows, width, padded, 8);
    std::vector<T> factor{2, 0, 4, T(0.5), static_cast<T>(kNaN)};
    Array out = Array::zeros(type, {rows, stride});
    k.finish({o.storage.as<T>(), padded}, rows, width, factor.data(), out.view().data(), type,
             stride);
    Array got = convert(out, DType::f64);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t f = 0; f < stride; ++f) {
        const double x = got.as<double>()[r * stride + f];
        if (f >= width || r == 1) {
          ASSERT_EQ(x, 0) << k.name << " " << name_of(type);
        } else if (r == 4) {
          ASSERT_TRUE(std::isnan(x)) << k.name << " " << name_of(type);
        } else {
          Array one(DType::f64, {1});
          *one.as<double>() = o.at(r, f) * factor[static_cast<size_t>(r)];
          // Exactly the rounding of the type: the factors are powers of two.
          ASSERT_EQ(x, *convert(convert(one, type), DType::f64).as<double>())
              << k.name << " " << name_of(type);
        }
      }
    }
  }
}

TEST(Finish, DividesAndRoundsToNearestEven) {
  for (Isa isa : available_isas()) {
    check_finish(tile_kernels<float>(isa));
    check_finish(tile_kernels<double>(isa));
  }
}

}  // namespace
}  // namespace heed::kernels
