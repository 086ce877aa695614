// Dropout, factors and sums of a tile, and rows that are finite, on every instruction set.
#include <gtest/gtest.h>

#include "base/philox.h"
#include "kernels/row_maps.h"
#include "kernels/tile_test.h"

namespace heed::kernels {
namespace {

bool is_dropped(const Dropout& which, int64_t r, int64_t m) {
  const int64_t key = which.key + m;
  const auto words =
      philox(which.seed, {static_cast<uint32_t>(key / 4), static_cast<uint32_t>(which.row + r),
                          which.head, which.batch});
  return words[static_cast<size_t>(key % 4)] < which.limit;
}

Array filled(DType type, const Dims& shape, double value) {
  Array wide(DType::f64, shape);
  std::fill_n(wide.as<double>(), wide.count(), value);
  return convert(wide, type);
}

template <class T, class Element>
void check_dropout(const TileKernels<T>& k, const Dropout& which, int64_t rows, int64_t keys,
                   const std::vector<KeyRange>* ranges) {
  const int64_t stride = round_up(keys, 64) + 16;
  Buffer<Element> weights(rows, stride);
  for (size_t i = 0; i < weights.memory.size(); ++i) {
    weights.memory[i] = static_cast<Element>(i % 251 + 1);
  }
  const Buffer<Element> given = weights;
  Buffer<T> factors(rows, stride, T(7));
  k.drop_out(which, rows, keys, data_of(ranges), weights.memory.data(), stride);
  k.dropout_factors(which, rows, keys, data_of(ranges), T(1.25), factors.block());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < keys; ++m) {
      if (!sees(ranges, r, m)) continue;
      const bool dropped = is_dropped(which, r, m);
      const auto at = static_cast<size_t>(r * stride + m);
      ASSERT_EQ(weights.memory[at], dropped ? Element(0) : given.memory[at])
          << k.name << " key " << which.key << " + " << m << " row " << r;
      ASSERT_EQ(factors.memory[at], dropped ? T(0) : T(1.25)) << k.name;
    }
  }
}

template <class T>
void check_all_dropout(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    for (int64_t key : {0, 3, 66, 1 << 20}) {
      const Dropout which{0x123456789abcdef0, 0x60000000, 7, 3, 4093, key};
      if constexpr (sizeof(T) == 4) {
        if (k.half_operands) {
          check_dropout<T, uint16_t>(k, which, rows, keys, ranges);
          continue;
        }
      }
      check_dropout<T, T>(k, which, rows, keys, ranges);
    }
  });
}

TEST(TileFactors, DropoutIsPhiloxOfTheElement) {
  for_all_tables([](const auto& k) { check_all_dropout(k); });
}

template <class T>
void check_long_row(const TileKernels<T>& k) {
  const Dropout which{5, 0x80000000, 1, 2, 9, 514};
  const KeyRange range{301, 1019};
  Buffer<T> factors(1, 1024 + 64);
  k.dropout_factors(which, 1, 1021, &range, T(1), factors.block());
  for (int64_t m = range.begin; m < range.end; ++m) {
    ASSERT_EQ(factors.memory[static_cast<size_t>(m)], is_dropped(which, 0, m) ? T(0) : T(1))
        << k.name << " key " << m;
  }
}

TEST(TileFactors, LongRowsAreDrawnInParts) {
  for_all_tables([](const auto& k) { check_long_row(k); });
}

template <class T>
void check_multiply(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    Buffer<T> x = random_block<T>(rows, keys, ranges, false, 1);
    Buffer<T> factors = random_block<T>(rows, keys, ranges, false, 2);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = r % 3; m < keys; m += 3) (m % 2 == 0 ? x : factors).block().row(r)[m] = 0;
      factors.block().row(r)[keys / 2] = static_cast<T>(kNaN);  // behind a mask it may be anything
      x.block().row(r)[keys / 2] = 0;
    }
    const Buffer<T> given = x;
    Buffer<T> scaled = x;
    k.multiply(x.block(), rows, keys, data_of(ranges), T(0.5),
               {factors.memory.data(), factors.stride});
    k.multiply(scaled.block(), rows, keys, data_of(ranges), T(0.5), {});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = 0; m < keys; ++m) {
        if (!sees(ranges, r, m)) continue;
        const auto at = static_cast<size_t>(r * x.stride + m);
        const bool none = given.memory[at] == 0 || factors.memory[at] == 0;
        const T want = none ? T(0) : given.memory[at] * (T(0.5) * factors.memory[at]);
        ASSERT_EQ(x.memory[at], want) << k.name;
        ASSERT_EQ(scaled.memory[at], given.memory[at] * T(0.5)) << k.name;
      }
    }
  });
}

TEST(TileFactors, ProductsAreZeroWhereEitherIs) {
  for_all_tables([](const auto& k) { check_multiply(k); });
}

template <class T>
void check_sums(const TileKernels<T>& k) {
  for_row_cases([&](int64_t rows, int64_t keys, const std::vector<KeyRange>* ranges) {
    for (int64_t distance : {-300, 2, 5000}) {
      const Buffer<T> x = random_block<T>(rows, keys, ranges, false, 1);
      double sum = 1, weighted = 2, want = 1, want_weighted = 2;
      k.sum_tile({x.memory.data(), x.stride}, rows, keys, data_of(ranges), distance, sum, weighted);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t m = 0; m < keys; ++m) {
          if (!sees(ranges, r, m)) continue;
          const double value = x.memory[static_cast<size_t>(r * x.stride + m)];
          want += value;
          want_weighted += value * std::abs(static_cast<double>(distance + r - m));
        }
      }
      ASSERT_NEAR(sum, want, 1e-10) << k.name;
      ASSERT_NEAR(weighted, want_weighted, 1e-7) << k.name;
    }
  });
}

TEST(TileFactors, SumsAndDistances) {
  for_all_tables([](const auto& k) { check_sums(k); });
}

template <class T>
void check_finite_rows(Isa isa) {
  const auto& k = row_map_kernels<T>(isa);
  for (DType type : sizeof(T) == 8 ? std::vector<DType>{DType::f64}
                                   : std::vector<DType>{DType::f32, DType::bf16, DType::f16}) {
    for (int64_t width : {1, 16, 37}) {
      const int64_t stride = width + 5, offsets[] = {2 * stride, 0};
      Array x = filled(type, {3, stride}, kNaN);  // beside the rows anything may lie
      const auto set = [&](int64_t r, int64_t begin, int64_t end, double value) {
        copy(filled(type, {end - begin}, value), x.view().select(0, r).slice(0, begin, end));
      };
      for (int64_t r = 0; r < 3; ++r) set(r, 0, width, 60000);
      const Rows rows{x.view().data(), type, stride, 3, width},
          some{x.view().data(), type, 0, 2, width, offsets};
      EXPECT_TRUE(k.all_finite(rows)) << name_of(isa) << " " << name_of(type);
      for (double bad : {double{kInf}, -double{kInf}, double{kNaN}}) {
        set(1, width - 1, width, bad);
        EXPECT_FALSE(k.all_finite(rows)) << name_of(isa) << " " << name_of(type);
        EXPECT_TRUE(k.all_finite(some)) << name_of(isa) << " " << name_of(type);
        set(1, width - 1, width, 0);
      }
    }
  }
}

TEST(RowMaps, WhatIsNotFiniteIsFound) {
  for (Isa isa : available_isas()) {
    check_finite_rows<float>(isa);
    check_finite_rows<double>(isa);
  }
}

}  // namespace
}  // namespace heed::kernels
