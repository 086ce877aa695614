// `attend` of every table that has it, and of the emulated tile unit, against plain loops in double.
#include <gtest/gtest.h>

#include "kernels/amx_attention.h"
#include "kernels/tile_test.h"

namespace heed::kernels {
namespace {

std::vector<TileKernels<float>> attending_tables() {
  std::vector<TileKernels<float>> all;
  for (auto& table : emulated_tile_tables()) {
    if (table.weights[0] == emulated_tile_table().weights[0]) continue;  // no AVX512-BF16
    use_tile_attention<EmulatedTiles>(table);
    all.push_back(table);
  }
  for (const auto* table : tables<float>()) {
    if (table->attend[0] != nullptr) all.push_back(*table);
  }
  return all;
}

struct AttendCase {
  Sizes sizes;
  WeightKind kind;
  float scale;
  int tiles;  // that the keys come in, one after the other
};

// Rows, pivots and sums as an engine keeps them.
struct Attended {
  explicit Attended(int64_t rows, int64_t padded)
      : out(rows, padded),
        pivot(static_cast<size_t>(rows), -kInf),
        sum(pivot.size(), 0),
        carry(pivot.size(), 1) {}
  Buffer<float> out;
  std::vector<float> pivot, sum, carry;
};

// Keys [first, first + count) of all rows.
void attend(const TileKernels<float>& k, const AttendCase& c, const Matrix& q, const Matrix& key,
            const Matrix& v, int64_t first, int64_t count, const KeyRange* ranges, Attended& to) {
  const Sizes& n = c.sizes;
  const auto part = [&](const Matrix& x) {
    Rows rows = x.rows();
    rows.data = static_cast<const uint16_t*>(rows.data) + first * x.stride;
    rows.count = count;
    return rows;
  };
  const int64_t rows = round_up(n.rows, k.row_multiple);
  std::vector<std::byte> queries(static_cast<size_t>(k.query_bytes(rows, n.width)) + 64);
  std::vector<std::byte> keys(static_cast<size_t>(k.key_bytes(count, n.width)) + 64);
  std::vector<std::byte> values(static_cast<size_t>(k.value_bytes(count, n.value_width)) + 64);
  k.pack_queries(q.rows(), false, queries.data());
  k.pack_keys(part(key), keys.data());
  ASSERT_TRUE(k.pack_values(part(v), values.data()));
  const WeightShape<float> shape{.scale = c.scale,
                                 .bias = c.kind == WeightKind::sigmoid ? -2.0F : 0.0F};
  k.attend[static_cast<int>(c.kind)](
      {queries.data(), keys.data(), values.data(), n.rows, count, n.width, n.value_width, ranges},
      shape, {to.pivot.data(), to.sum.data(), to.carry.data()}, to.out.block(), nullptr);
}

void check_attend(const TileKernels<float>& k, const AttendCase& c,
                  const std::vector<KeyRange>* ranges) {
  const Sizes& n = c.sizes;
  const Matrix q(DType::bf16, n.rows, n.width, n.width, 1);
  const Matrix key(DType::bf16, n.keys, n.width, n.width + 3, 2);
  const Matrix v(DType::bf16, n.keys, n.value_width, n.value_width + 1, 3);
  Attended got(round_up(n.rows, k.row_multiple), round_up(n.value_width, k.dim_multiple));
  const int64_t tile = round_up(ceil_div(n.keys, c.tiles), 64);
  for (int64_t first = 0; first < n.keys; first += tile) {
    const int64_t count = std::min(tile, n.keys - first);
    std::vector<KeyRange> here;
    for (int64_t r = 0; ranges != nullptr && r < n.rows; ++r) {
      const KeyRange all = (*ranges)[static_cast<size_t>(r)];
      const auto inside = [&](int64_t at) {
        return static_cast<int32_t>(std::clamp<int64_t>(at - first, 0, count));
      };
      here.push_back({inside(all.begin), inside(all.end)});
    }
    attend(k, c, q, key, v, first, count, ranges == nullptr ? nullptr : here.data(), got);
  }
  const bool softmax = c.kind == WeightKind::softmax;
  for (int64_t r = 0; r < n.rows; ++r) {
    const auto row = static_cast<size_t>(r);
    std::vector<double> t(static_cast<size_t>(n.keys), -kInf);
    double most = -kInf;
    for (int64_t m = 0; m < n.keys; ++m) {
      if (!sees(ranges, r, m)) continue;
      double score = 0;
      for (int64_t e = 0; e < n.width; ++e) score += q.at(r, e) * key.at(m, e);
      t[static_cast<size_t>(m)] = score * c.scale + (softmax ? 0 : -2);
      most = std::max(most, t[static_cast<size_t>(m)]);
    }
    const auto about = [&] {
      return std::string(k.name) + " row " + std::to_string(r) + " of " + std::to_string(n.rows) +
             "x" + std::to_string(n.keys) + "x" + std::to_string(n.width) + " scale " +
             std::to_string(c.scale);
    };
    const double pivot = softmax ? most : 0;
    double sum = 0;
    for (const double x : t) {
      if (x != -kInf) sum += weight_of(c.kind, 0, x, pivot);
    }
    double divisor = 1;
    if (softmax) {
      if (most == -kInf) {
        ASSERT_EQ(got.sum[row], 0) << about();
      } else {
        const double lse = got.pivot[row] + std::log2(double{got.sum[row]});
        ASSERT_NEAR(lse, most + std::log2(sum), 2e-5 * (1 + std::abs(most))) << about();
        divisor = got.sum[row];
      }
    }
    for (int64_t f = 0; f < n.value_width; ++f) {
      double want = 0, magnitude = 0;
      for (int64_t m = 0; m < n.keys; ++m) {
        const double x = t[static_cast<size_t>(m)];
        if (x == -kInf) continue;
        const double p = weight_of(c.kind, 0, x, pivot) / (softmax ? sum : 1);
        want += p * v.at(m, f);
        magnitude += std::abs(p * v.at(m, f)) * (1 + std::abs(x) / 64);
      }
      ASSERT_NEAR(got.out.block().row(r)[f] / divisor, want, 0x1p-8 * magnitude) << about();
    }
  }
}

constexpr Sizes kAttendSizes[] = {{1, 1, 1, 1},      {5, 7, 3, 2},        {32, 64, 64, 64},
                                  {31, 129, 33, 48}, {64, 640, 64, 64},   {70, 97, 65, 33},
                                  {40, 700, 80, 80}, {33, 520, 128, 128}, {21, 130, 520, 300}};

std::vector<KeyRange> window_ranges(int64_t rows, int64_t keys) {
  std::vector<KeyRange> ranges;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = std::min(keys, 3 * r), end = std::min(keys, 3 * r + 130);
    ranges.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end)});
  }
  return ranges;
}

TEST(TileAttend, AgreesWithLoops) {
  for (const auto& k : attending_tables()) {
    for (const Sizes& n : kAttendSizes) {
      const auto slanted = slanted_ranges(n.rows, n.keys), window = window_ranges(n.rows, n.keys);
      for (const auto* ranges : {kNoRanges, &slanted, &window}) {
        for (int tiles : {1, 3}) {
          // The largest scale lets later keys rise above the first pivots by hundreds of powers of two.
          for (float scale : {0.2F, 3.0F, 40.0F}) {
            check_attend(k, {n, WeightKind::softmax, scale, tiles}, ranges);
          }
          check_attend(k, {n, WeightKind::sigmoid, 0.2F, tiles}, ranges);
        }
      }
    }
  }
}

// What is infinite or NaN in one row's scores leaves the others alone.
TEST(TileAttend, ExtremeScoresStayInTheirRow) {
  constexpr Sizes kSize{40, 320, 64, 64};
  for (const auto& k : attending_tables()) {
    for (const float extreme : {kNaN, kInf, 3e38F, -3e38F}) {
      for (int64_t at : {0, 70, 300}) {
        Matrix q(DType::bf16, kSize.rows, kSize.width, kSize.width, 1);
        Matrix key(DType::bf16, kSize.keys, kSize.width, kSize.width, 2);
        const Matrix v(DType::bf16, kSize.keys, kSize.value_width, kSize.value_width, 3);
        const AttendCase c{kSize, WeightKind::softmax, 1, 1};
        const auto set = [](Matrix& x, int64_t r, int64_t e, float value) {
          const auto bits = to_bfloat16(value);
          std::memcpy(x.storage.view().at({r, e}), &bits, sizeof bits);
        };
        // Only row 7 has a number in the column in which one key is extreme.
        for (int64_t r = 0; r < kSize.rows; ++r) set(q, r, 5, 0);
        for (int64_t m = 0; m < kSize.keys; ++m) set(key, m, 5, 0);
        Attended plain(64, 64), got(64, 64);
        attend(k, c, q, key, v, 0, kSize.keys, nullptr, plain);
        set(q, 7, 5, 2);
        set(key, at, 5, std::isfinite(extreme) ? extreme : 1);
        if (!std::isfinite(extreme)) set(q, 7, 5, extreme);
        attend(k, c, q, key, v, 0, kSize.keys, nullptr, got);
        const bool finite = std::isfinite(extreme) && extreme < 0;
        EXPECT_EQ(std::isfinite(got.out.block().row(7)[3] / got.sum[7]), finite)
            << k.name << " " << extreme << " at " << at;
        for (int64_t r = 0; r < kSize.rows; ++r) {
          if (r == 7) continue;
          for (int64_t f = 0; f < kSize.value_width; ++f) {
            ASSERT_EQ(got.out.block().row(r)[f], plain.out.block().row(r)[f])
                << k.name << " row " << r << " beside " << extreme << " at " << at;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace heed::kernels
