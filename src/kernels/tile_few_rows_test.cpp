// The products for few rows against plain loops in double, on every instruction set this machine has and on
// the emulated tile unit.
#include <gtest/gtest.h>

#include "kernels/amx_few_rows.h"
#include "kernels/tile_test.h"

namespace heed::kernels {
namespace {

struct FewRowsCase {
  int64_t rows, width;
  DType type;
  DType query_type;  // queries that are exact in bfloat16 may take another way than others
  int64_t keys = 23;
  double weight_error = 0;  // relative
};

template <class T>
void check_few_rows(const TileKernels<T>& k, const FewRowsCase& n) {
  const int64_t keys = n.keys, width = n.width, padded = round_up(width, k.dim_multiple);
  const int64_t stride = round_up(keys, 8) + 16;
  const Matrix q(n.query_type, n.rows, width, padded, 1), key(n.type, keys, width, width + 1, 2);
  Array queries = Array::zeros(dtype_of<T>, {n.rows, padded});
  copy(q.storage.view().slice(1, 0, width), queries.view().slice(1, 0, width));
  Buffer<T> s(round_up(n.rows, 4), stride, static_cast<T>(kNaN));
  k.dot_rows({queries.as<T>(), padded}, n.rows, key.rows(), s.block());
  Array out = convert(q.storage, dtype_of<T>);
  std::vector<T> carry(static_cast<size_t>(n.rows), T(0.25));
  k.add_rows({s.memory.data(), s.stride}, n.rows, key.rows(), carry.data(), {out.as<T>(), padded});
  const auto about = std::string(k.name) + " " + name_of(n.type) + " width " +
                     std::to_string(width) + " rows " + std::to_string(n.rows) + " keys " +
                     std::to_string(keys);
  for (int64_t r = 0; r < n.rows; ++r) {
    for (int64_t m = 0; m < stride; ++m) {
      if (m >= keys) {
        ASSERT_TRUE(std::isnan(s.block().row(r)[m])) << about;
        continue;
      }
      double want = 0;
      for (int64_t e = 0; e < width; ++e) want += q.at(r, e) * key.at(m, e);
      ASSERT_NEAR(s.block().row(r)[m], want,
                  (sizeof(T) == 8 ? 1e-12 : 1e-5) * (4 + static_cast<double>(width) / 8))
          << about;
    }
    for (int64_t f = 0; f < width; ++f) {
      double want = 0.25 * q.at(r, f), magnitude = 1;
      for (int64_t m = 0; m < keys; ++m) {
        want += double{s.block().row(r)[m]} * key.at(m, f);
        magnitude += std::abs(double{s.block().row(r)[m]} * key.at(m, f));
      }
      ASSERT_NEAR(out.as<T>()[r * padded + f], want,
                  ((sizeof(T) == 8 ? 1e-13 : 1e-6) + n.weight_error) * magnitude)
          << about;
    }
  }
}

template <class T>
void check_all_few_rows(const TileKernels<T>& k) {
  for (int64_t rows : {1, 2, 3, 4, 5, 9, 16, 33}) {
    for (int64_t width : {1, 3, 16, 33, 64, 80, 128, 256, 300}) {
      for (DType type : input_types(k)) {
        check_few_rows<T>(k, {rows, width, type, dtype_of<T>});
        check_few_rows<T>(k, {rows, width, type, type});
      }
    }
  }
}

TEST(FewRows, EveryIsa) {
  for (Isa isa : available_isas()) {
    check_all_few_rows(tile_kernels<float>(isa));
    check_all_few_rows(tile_kernels<double>(isa));
  }
}

template <class T>
void check_spread(const TileKernels<T>& k, int64_t rows, int64_t keys, int64_t width, DType type) {
  const int64_t padded = round_up(width, k.dim_multiple), stride = width + 3;
  const Matrix w(dtype_of<T>, rows, keys, keys + 5, 1);
  Array x = Array::zeros(dtype_of<T>, {std::max<int64_t>(rows, 1), padded});
  const Matrix some(dtype_of<T>, rows, width, padded, 2);
  copy(some.storage.view().slice(1, 0, width), x.view().slice(1, 0, width));
  Array out(type, {keys, stride});
  copy(Matrix(type, keys, stride, stride, 3).storage, out);
  Array want = convert(out, DType::f64), magnitudes = Array::zeros(DType::f64, out.shape());
  for (int64_t m = 0; m < keys; ++m) {
    for (int64_t f = 0; f < width; ++f) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += w.at(r, m) * some.at(r, f);
        magnitudes.as<double>()[m * stride + f] += std::abs(w.at(r, m) * some.at(r, f));
      }
      want.as<double>()[m * stride + f] = -0.5 * sum;
    }
  }
  k.spread_rows({w.storage.as<T>(), keys + 5}, {x.as<T>(), padded}, rows, T(-0.5),
                {out.view().data(), type, stride, keys, width});
  const Array got = convert(out, DType::f64);
  const double half_unit = type == DType::bf16 ? 0x1p-8 : type == DType::f16 ? 0x1p-11 : 0;
  for (int64_t i = 0; i < got.count(); ++i) {
    const double exact = want.as<double>()[i], size = magnitudes.as<double>()[i];
    ASSERT_NEAR(got.as<double>()[i], exact,
                (sizeof(T) == 8 ? 1e-14 : 1e-6) * size + half_unit * std::abs(exact) * 1.01)
        << k.name << " " << name_of(type) << " rows " << rows << " keys " << keys << " width "
        << width << " at " << i;
  }
}

template <class T>
void check_all_spreads(const TileKernels<T>& k) {
  for (int64_t rows : {0, 1, 2, 7, 16, 49}) {
    for (int64_t keys : {1, 3, 6, 23, 64}) {
      for (int64_t width : {1, 3, 16, 33, 64, 80, 128, 200, 256}) {
        for (DType type : input_types(k)) check_spread<T>(k, rows, keys, width, type);
      }
    }
  }
}

TEST(FewRows, SpreadOverKeys) {
  for (Isa isa : available_isas()) {
    check_all_spreads(tile_kernels<float>(isa));
    check_all_spreads(tile_kernels<double>(isa));
  }
}

// On a tile unit weights are two bfloat16 numbers: what is left out is 2^-17 of them.
TEST(FewRows, TileUnit) {
  std::vector<TileKernels<float>> units;
  if (emulated_tile_tables().size() > 1) {  // AVX512-BF16
    units.push_back(tile_kernels<float>(Isa::avx512));
    units.back().name = "emulated tiles";
    use_tile_few_rows<EmulatedTiles>(units.back());
  }
  const auto& isas = available_isas();
  if (std::find(isas.begin(), isas.end(), Isa::amx) != isas.end()) {
    units.push_back(tile_kernels<float>(Isa::amx));
  }
  for (const auto& k : units) {
    with_unit(k, [&] {
      for (int64_t rows : {3, 4, 6, 8, 9, 16, 17}) {
        for (int64_t width : {32, 64, 80, 96, 128, 256}) {
          for (int64_t keys : {31, 64, 131}) {
            for (DType query_type : {DType::bf16, DType::f32}) {
              check_few_rows<float>(k, {rows, width, DType::bf16, query_type, keys, 0x1p-17});
            }
          }
        }
      }
    });
  }
}

// A weight that bfloat16 cannot hold is infinite in both parts together, not NaN.
TEST(FewRows, TileUnitKeepsInfiniteWeightsInTheirRow) {
  const auto& isas = available_isas();
  if (std::find(isas.begin(), isas.end(), Isa::amx) == isas.end()) GTEST_SKIP() << "no tile unit";
  const auto& k = tile_kernels<float>(Isa::amx);
  Array v = Array::zeros(DType::bf16, {64, 64});
  Array one(DType::f32, {1});
  *one.as<float>() = 1;
  copy(one, v.view().select(0, 9).slice(0, 0, 1));
  for (int64_t rows : {4, 12}) {
    Buffer<float> weights(rows, 64, 0.5F), out(rows, 64);
    weights.block().row(2)[9] = kInf;
    const Rows values{v.view().data(), DType::bf16, 64, 64, 64};
    k.add_rows({weights.memory.data(), 64}, rows, values, nullptr, out.block());
    for (int64_t r = 0; r < rows; ++r) {
      EXPECT_EQ(out.block().row(r)[0], r == 2 ? kInf : 0.5F) << "row " << r << " of " << rows;
    }
  }
}

}  // namespace
}  // namespace heed::kernels
