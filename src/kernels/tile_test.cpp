// Every part of the tile kernels against plain loops in double, on every instruction set this machine
// has, and the matrix-tile loops on an emulated unit wherever there is none.
#include "kernels/tile.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/amx_products.h"
#include "kernels/amx_tiles.h"
#include "kernels/parts.h"

namespace heed::kernels {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Rows of random numbers of any type at a stride, with their exact values.
struct Matrix {
  Matrix(DType type, int64_t rows, int64_t columns, int64_t row_stride, uint32_t seed)
      : storage(type, {std::max<int64_t>(rows, 1), row_stride}),
        stride(row_stride),
        width(columns) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    Array wide(DType::f64, storage.shape());
    for (int64_t i = 0; i < wide.count(); ++i) wide.as<double>()[i] = normal(generator);
    copy(wide, storage);
    copy(storage, wide);
    exact.assign(wide.as<double>(), wide.as<double>() + wide.count());
    count = rows;
  }
  Rows rows() const { return {storage.view().data(), storage.dtype(), stride, count, width}; }
  double at(int64_t r, int64_t c) const { return exact[static_cast<size_t>(r * stride + c)]; }

  Array storage;
  int64_t stride, width, count = 0;
  std::vector<double> exact;
};

template <class T>
struct Buffer {
  Buffer(int64_t rows, int64_t stride_elements, T fill = T{})
      : memory(static_cast<size_t>(rows * stride_elements), fill), stride(stride_elements) {}
  Block<T> block() { return {memory.data(), stride}; }
  std::vector<T> memory;
  int64_t stride;
};

struct Sizes {
  int64_t rows, keys, width, value_width;
};
const Sizes kSizes[] = {{1, 1, 1, 1},      {5, 7, 3, 2},      {24, 64, 64, 64},
                        {23, 63, 65, 33},  {48, 129, 80, 80}, {7, 200, 31, 100},
                        {32, 96, 17, 128}, {13, 40, 256, 255}};

template <class T>
std::vector<const TileKernels<T>*> tables() {
  std::vector<const TileKernels<T>*> all;
  for (Isa isa : available_isas()) {
    if (isa != Isa::amx) all.push_back(&tile_kernels<T>(isa));
    if constexpr (sizeof(T) == 4) {
      if (const auto* half = half_tile_kernels(isa)) all.push_back(half);
    }
  }
  return all;
}

// bfloat16 packing and weights with products on the emulated tile unit.
TileKernels<float> emulated_tile_table() {
  TileKernels<float> table = tile_kernels<float>(Isa::portable);
  table.name = "emulated tiles";
  add_half_pack_parts(Isa::portable, table);
  add_half_weight_parts(Isa::portable, table);
  use_tile_unit<EmulatedTiles>(table);
  return table;
}

std::vector<KeyRange> slanted_ranges(int64_t rows, int64_t keys) {
  std::vector<KeyRange> ranges;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = std::min(keys, r / 2), end = std::min(keys, 3 + 2 * r);
    ranges.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    if (r % 7 == 5) ranges.back() = {0, 0};
  }
  return ranges;
}

bool sees(const std::vector<KeyRange>* ranges, int64_t r, int64_t m) {
  if (ranges == nullptr) return true;
  const KeyRange range = (*ranges)[static_cast<size_t>(r)];
  return m >= range.begin && m < range.end;
}

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
             ranges ? ranges->data() : nullptr, s.block());
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
std::vector<DType> input_types(const TileKernels<T>& k) {
  if (sizeof(T) == 8) return {DType::f64};
  if (k.half_operands) return {DType::bf16};
  return {DType::f32, DType::bf16, DType::f16};
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

TEST(TileScores, Float) {
  for (const auto* k : tables<float>()) check_all_scores(*k);
}
TEST(TileScores, Double) {
  for (const auto* k : tables<double>()) check_all_scores(*k);
}
TEST(TileScores, EmulatedTileUnit) { check_all_scores(emulated_tile_table()); }

// Weights as the second product reads them.
template <class T>
double weight_at(const TileKernels<T>& k, const std::vector<std::byte>& weights, int64_t stride,
                 int64_t r, int64_t m) {
  if (k.half_operands) {
    bfloat16 x;
    std::memcpy(&x, weights.data() + (r * stride + m) * 2, 2);
    return to_float(x);
  }
  T x;
  std::memcpy(&x, weights.data() + (r * stride + m) * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return x;
}

struct Statistics {
  double pivot = -kInf, sum = 0;
};

template <class T>
void check_weights(const TileKernels<T>& k, WeightKind kind, const WeightShape<T>& shape,
                   const std::vector<KeyRange>* ranges, int64_t rows, int64_t keys) {
  const int64_t stride = round_up(keys, 64) + 16, padded = round_up(keys, k.key_multiple);
  const Matrix scores(dtype_of<T>(), rows, keys, stride, 7);
  std::vector<std::byte> weights(static_cast<size_t>(rows * stride) * sizeof(T));
  std::vector<T> pivot(static_cast<size_t>(rows), static_cast<T>(-kInf)), sum(pivot.size(), 0),
      carry(pivot.size(), 9);
  std::vector<Statistics> want(pivot.size());
  const double unit = k.half_operands ? 0x1p-8 : sizeof(T) == 8 ? 1e-13 : 4e-7;
  for (int pass = 0; pass < 2; ++pass) {  // the second pass carries statistics along
    Buffer<T> s(rows, stride);
    for (size_t i = 0; i < s.memory.size(); ++i) {
      s.memory[i] = static_cast<T>(scores.exact[i] * (1 + 3 * pass));
    }
    std::memset(weights.data(), 0xff, weights.size());
    k.weights[static_cast<int>(kind)](s.block(), rows, keys, ranges ? ranges->data() : nullptr,
                                      shape, {pivot.data(), sum.data(), carry.data()},
                                      weights.data(), stride);
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = static_cast<size_t>(r);
      const auto t = [&](int64_t m) {
        return double{s.block().row(r)[m]} * shape.scale + shape.bias -
               shape.slope * std::abs(static_cast<double>(shape.distance + r - m));
      };
      const double before = want[row].pivot;
      bool any = false;
      for (int64_t m = 0; m < keys; ++m) {
        if (!sees(ranges, r, m)) continue;
        want[row].pivot = std::max(want[row].pivot, t(m));
        any = true;
      }
      const double factor = before == -kInf ? 1 : std::exp2(before - want[row].pivot);
      if (kind == WeightKind::softmax) {
        want[row].sum *= factor;
        ASSERT_NEAR(carry[row], any ? factor : 1, 1e-5) << k.name;
      }
      for (int64_t m = 0; m < padded; ++m) {
        const double got = weight_at(k, weights, stride, r, m);
        if (m >= keys || !sees(ranges, r, m)) {
          ASSERT_EQ(got, 0) << k.name << " row " << r << " key " << m;
          continue;
        }
        const double p = kind == WeightKind::softmax ? std::exp2(t(m) - want[row].pivot)
                                                     : 1 / (1 + std::exp2(-t(m)));
        // The exponent is rounded where scores, bias, distances and pivot meet.
        const double magnitude = 4 + std::abs(t(m)) + 2 * std::abs(shape.bias) +
                                 (kind == WeightKind::softmax ? std::abs(want[row].pivot) : 0) +
                                 2 * shape.slope * std::abs(double(shape.distance + r - m));
        ASSERT_NEAR(got, p, unit * p * magnitude + 1e-30) << k.name << " row " << r;
        want[row].sum += p;
      }
      if (kind == WeightKind::softmax) {
        ASSERT_NEAR(sum[row], want[row].sum, 1e-5 * (1 + want[row].sum)) << k.name;
      }
    }
  }
}

template <class T>
void check_all_weights(const TileKernels<T>& k) {
  for (int64_t rows : {1, 7, 30}) {
    for (int64_t keys : {1, 5, 16, 31, 64, 200}) {
      const auto ranges = slanted_ranges(rows, keys);
      for (const auto* mask : {static_cast<const std::vector<KeyRange>*>(nullptr), &ranges}) {
        check_weights<T>(k, WeightKind::softmax, {.scale = T(1.3)}, mask, rows, keys);
        check_weights<T>(k, WeightKind::softmax, {.scale = T(1.3), .slope = T(0.2), .distance = 4},
                         mask, rows, keys);
        check_weights<T>(k, WeightKind::sigmoid, {.scale = T(0.9), .bias = -3}, mask, rows, keys);
        check_weights<T>(k, WeightKind::sigmoid,
                         {.scale = T(0.9), .bias = -3, .slope = T(0.1), .distance = -6}, mask, rows,
                         keys);
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
TEST(TileWeights, HalfPortable) { check_all_weights(emulated_tile_table()); }

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
  for (const auto* k : tables<double>()) check_extreme_weights(*k);
}

template <class T>
void check_sums(const TileKernels<T>& k, const Sizes& n, DType type,
                const std::vector<KeyRange>* ranges) {
  const Matrix v(type, n.keys, n.value_width, n.value_width + 1, 3);
  const int64_t rows = round_up(n.rows, k.row_multiple), stride = round_up(n.keys, 64) + 16;
  const int64_t padded = round_up(n.value_width, k.dim_multiple);
  const Matrix p(k.half_operands ? DType::bf16 : dtype_of<T>(), rows, stride, stride, 4);
  const Matrix o(dtype_of<T>(), rows, padded, padded, 5);
  Array weights = convert(p.storage, p.storage.dtype());
  Array out = convert(o.storage, o.storage.dtype());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < stride; ++m) {
      if (r < n.rows && m < n.keys && sees(ranges, r, m)) continue;
      std::byte* at = weights.view().at({r, m});
      std::memset(at, 0, size_of(weights.dtype()));
    }
  }
  std::vector<T> carry(static_cast<size_t>(rows));
  for (size_t r = 0; r < carry.size(); ++r) carry[r] = static_cast<T>(r % 3 == 0 ? 1 : 0.5);
  std::vector<std::byte> values(static_cast<size_t>(k.value_bytes(n.keys, n.value_width)) + 64);
  EXPECT_TRUE(k.pack_values(v.rows(), values.data())) << k.name;
  k.accumulate(weights.view().data(), stride, n.rows, values.data(), n.keys, n.value_width,
               ranges ? ranges->data() : nullptr, carry.data(), {out.as<T>(), padded});
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
      check_sums<T>(k, n, type, nullptr);
      check_sums<T>(k, n, type, &ranges);
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
void check_few_rows(const TileKernels<T>& k) {
  for (int64_t rows : {1, 2, 3, 4, 5, 9, 16}) {
    for (int64_t width : {1, 3, 16, 33, 64, 80, 128, 256}) {
      for (DType type : input_types(k)) {
        const int64_t keys = 23, padded = round_up(width, k.dim_multiple);
        const Matrix q(dtype_of<T>(), rows, width, padded, 1), key(type, keys, width, width + 1, 2);
        Array queries = Array::zeros(dtype_of<T>(), {rows, padded});
        copy(q.storage.view().slice(1, 0, width), queries.view().slice(1, 0, width));
        Buffer<T> s(round_up(rows, 4), 40, static_cast<T>(kNaN));
        k.dot_rows({queries.as<T>(), padded}, rows, key.rows(), s.block());
        Array out = convert(q.storage, dtype_of<T>());
        std::vector<T> carry(static_cast<size_t>(rows), T(0.25));
        k.add_rows({s.memory.data(), s.stride}, rows, key.rows(), carry.data(),
                   {out.as<T>(), padded});
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t m = 0; m < keys; ++m) {
            double want = 0;
            for (int64_t e = 0; e < width; ++e) want += q.at(r, e) * key.at(m, e);
            ASSERT_NEAR(s.block().row(r)[m], want,
                        (sizeof(T) == 8 ? 1e-12 : 1e-5) * (4 + width / 8))
                << k.name << " " << name_of(type) << " width " << width;
          }
          for (int64_t f = 0; f < width; ++f) {
            double want = 0.25 * q.at(r, f), magnitude = 1;
            for (int64_t m = 0; m < keys; ++m) {
              want += double{s.block().row(r)[m]} * key.at(m, f);
              magnitude += std::abs(double{s.block().row(r)[m]} * key.at(m, f));
            }
            ASSERT_NEAR(out.as<T>()[r * padded + f], want,
                        (sizeof(T) == 8 ? 1e-13 : 1e-6) * magnitude)
                << k.name << " " << name_of(type) << " width " << width << " rows " << rows;
          }
        }
      }
    }
  }
}

TEST(FewRows, EveryIsa) {
  for (Isa isa : available_isas()) {
    check_few_rows(tile_kernels<float>(isa));
    check_few_rows(tile_kernels<double>(isa));
  }
}

template <class T>
void check_finish(const TileKernels<T>& k) {
  const std::vector<DType> types = sizeof(T) == 8
                                       ? std::vector<DType>{DType::f64}
                                       : std::vector<DType>{DType::f32, DType::bf16, DType::f16};
  for (DType type : types) {
    const int64_t rows = 5, width = 37, padded = 48, stride = 41;
    Matrix o(dtype_of<T>(), rows, width, padded, 8);
    std::vector<T> sum{2, 0, 4, T(0.5), static_cast<T>(kNaN)};
    Array out = Array::zeros(type, {rows, stride});
    k.finish({o.storage.as<T>(), padded}, rows, width, sum.data(), out.view().data(), type, stride);
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
          *one.as<double>() = o.at(r, f) / sum[static_cast<size_t>(r)];
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
