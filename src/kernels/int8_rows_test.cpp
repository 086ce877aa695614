#include "kernels/int8_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "heed/error.h"
#include "kernels/int8_layout.h"
#include "kernels/quantized_rows_test.h"

namespace heed {
namespace {

const RunOptions kRun{.threads = 1, .isa = Isa::avx512};

bool can_run() {
  const auto& isas = available_isas();
  return std::find(isas.begin(), isas.end(), Isa::avx512) != isas.end() && has_int8_products(kRun);
}
#define NEEDS_INT8_PRODUCTS \
  if (!can_run()) GTEST_SKIP() << "this processor has no AVX512-VNNI"

// Memory of Int8Rows, first filled with bits that are NaN as floats.
struct Memory {
  explicit Memory(int64_t bytes) : array(DType::f32, {bytes / 4}) {
    std::memset(array.as<void>(), 0xff, static_cast<size_t>(bytes));
  }
  std::byte* data() const { return array.as<std::byte>(); }
  Array array;
};

struct Rows {
  Memory memory;
  Int8Rows view;
  Rows(const std::vector<float>& x, int64_t columns, int bytes = 1, const RunOptions& run = kRun)
      : Rows(x.data(), static_cast<int64_t>(x.size()) / columns, columns, bytes, run) {}
  Rows(const float* x, int64_t rows, int64_t columns, int bytes = 1, const RunOptions& run = kRun)
      : memory(int8_rows_bytes(rows, columns, bytes)), view{memory.data(), rows, columns, bytes} {
    fill_int8_rows(view, run, [&](int64_t first, const Tensor& to) {
      for (int64_t m = 0; m < to.size(0); ++m) {
        std::memcpy(to.at({m}), x + (first + m) * columns,
                    static_cast<size_t>(columns) * sizeof(float));
      }
    });
  }
  const kernels::Int8Outliers& outliers(int64_t m) const {
    return *reinterpret_cast<const kernels::Int8Outliers*>(
        view.data + m / 4 * kernels::int8_block_bytes(view.columns, view.bytes));
  }
  double step(int64_t m, int64_t place) const {
    const auto get = [&](const auto* groups) { return groups[place / 128].steps[m % 4]; };
    return static_cast<double>(view.bytes == 1 ? get(groups<1>(m)) : get(groups<2>(m)));
  }
  /// Columns from `place` 0 on, sums from whole groups of 128 on.
  double rounded(int64_t m, int64_t place) const {
    const auto byte = [&](const auto* groups, int i) {
      return static_cast<int>(groups[place / 128].codes[i][place % 128 / 4][m % 4][place % 4]);
    };
    const int code = view.bytes == 1 ? byte(groups<1>(m), 0) - 128
                                     : 256 * byte(groups<2>(m), 0) + byte(groups<2>(m), 1) - 32768;
    return code * step(m, place);
  }
  double value(int64_t m, int64_t k) const {
    double sum = rounded(m, k);
    for (int64_t i = 0; i < kernels::Int8Outliers::count(view.columns); ++i) {
      if (outliers(m).columns[i][m % 4] != k) continue;
      sum += static_cast<double>(outliers(m).values[i][m % 4]);
    }
    return sum;
  }
  int64_t first_sum() const { return kernels::value_groups(view.columns) * 128; }

 private:
  template <int kBytes>
  const kernels::Int8Group<kBytes>* groups(int64_t m) const {
    return reinterpret_cast<const kernels::Int8Group<kBytes>*>(&outliers(m) + 1);
  }
};

std::vector<float> product(const Rows& x, const std::vector<BlockMatrix>& w,
                           const RunOptions& run = kRun) {
  int64_t rows = 0;
  for (const BlockMatrix& part : w) rows += part.rows;
  std::vector<float> y(static_cast<size_t>(x.view.rows * rows),
                       std::numeric_limits<float>::quiet_NaN());
  int8_product(x.view, w, Tensor(y.data(), DType::f32, {x.view.rows, rows}), false, run);
  return y;
}

// Weights [rows, columns] as they are unpacked: scale times code, and what sums of 32 columns meet.
struct Unpacked {
  std::vector<double> values, offsets, offset_steps;
  explicit Unpacked(const BlockMatrix& w, int bytes = 1) {
    const int64_t groups = w.columns / 32, parts = (groups + 31) / 32;
    std::vector<kernels::PanelGroup> memory(
        static_cast<size_t>(kernels::Panel::most_groups(w.columns)));
    kernels::Panel panel{memory.data()};
    for (int64_t n = 0; n < w.rows; ++n) {
      if (n % 32 == 0) kernels::unpack_panel_avx512(w, n, bytes, panel);
      const auto weight = [&](const kernels::PanelGroup& group, int64_t k) {
        const float scale = group.scales[panel.halves ? k / 16 : 0][n % 32];
        const int8_t code = group.codes[k / 4][n % 32][k % 4];
        return static_cast<double>(scale) * code;
      };
      for (int64_t k = 0; k < w.columns; ++k) values.push_back(weight(memory[k / 32], k % 32));
      for (int64_t g = 0; g < groups; ++g) {
        const kernels::PanelGroup* group = &memory[groups + g / 32];
        offsets.push_back(0);
        offset_steps.push_back(0);
        for (int i = 0; i < panel.offset_parts; ++i, group += parts) {
          offsets.back() += weight(*group, g % 32);
          offset_steps.back() = static_cast<double>(group->scales[0][n % 32]);
        }
      }
    }
  }
};

// Row m of y against a float64 sum of the rounded factors, and against one of the exact ones.
void expect_row(const Matrix& w, const Unpacked& unpacked, const std::vector<float>& x,
                const Rows& rows, int64_t m, const float* y, const std::string& what) {
  const int64_t columns = w.view.columns, groups = columns / 32;
  for (int64_t n = 0; n < w.view.rows; ++n) {
    double needed = 0, exact = 0, size = 0, rounding = 0;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0;
      for (int64_t k = 32 * g; k < 32 * (g + 1); ++k) {
        const auto value = static_cast<double>(x[static_cast<size_t>(m * columns + k)]);
        const auto weight = static_cast<double>(w.values[static_cast<size_t>(n * columns + k)]);
        const double code = unpacked.values[static_cast<size_t>(n * columns + k)];
        needed += code * rows.value(m, k);
        exact += weight * value;
        size += std::abs(code * value) + std::abs(weight * value);
        rounding += std::abs(code) * 0.5000001 * rows.step(m, k);
        sum += value;
      }
      const int64_t place = rows.first_sum() + g;
      const auto at = static_cast<size_t>(n * groups + g);
      const double offset = unpacked.offsets[at], rounded = rows.rounded(m, place);
      needed += offset * rounded;
      size += std::abs(offset * rounded);
      rounding += 0.5000001 * (std::abs(offset) * rows.step(m, place) +
                               unpacked.offset_steps[at] * std::abs(sum));
    }
    // Roundings of a sum for each group, and those of terms.
    const double bound = std::ldexp(3 * static_cast<double>(groups) + 40, -24) * size;
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - needed) <= bound)
        << what << " row " << n << ": " << y[n] << ", " << needed << " of rounded factors, bound "
        << bound;
    ASSERT_TRUE(std::abs(static_cast<double>(y[n]) - exact) <= rounding + bound)
        << what << " row " << n << ": " << y[n] << ", exact " << exact;
  }
}

// Activations [rows, columns] as they are rounded, in the documented way.
std::vector<double> rounded(const std::vector<float>& x, int64_t columns, int bytes) {
  const float largest_code = bytes == 1 ? 127.0f : 32767.0f;
  std::vector<double> values(x.size());
  std::vector<float> rest = x;
  for (size_t first = 0; first < x.size(); first += static_cast<size_t>(columns)) {
    for (int64_t i = 0; i < kernels::Int8Outliers::count(columns); ++i) {
      const auto row = rest.begin() + static_cast<int64_t>(first);
      const auto largest = std::max_element(
          row, row + columns, [](float a, float b) { return std::abs(a) < std::abs(b); });
      values[static_cast<size_t>(largest - rest.begin())] += static_cast<double>(*largest);
      *largest = 0;
    }
  }
  const auto width = static_cast<size_t>(columns);
  for (size_t k = 0, end = 0; k < x.size(); k = end) {
    end = std::min(k + 128 - k % width % 128, (k / width + 1) * width);
    float most = 0;
    for (size_t i = k; i < end; ++i) most = std::max(most, std::abs(rest[i]));
    const float step = most * (1.0f / largest_code);
    const float inverse = most < 1e-36f ? 0.0f : largest_code / most;
    for (size_t i = k; i < end; ++i) {
      const double scaled = static_cast<double>(rest[i]) * static_cast<double>(inverse);
      values[i] += std::nearbyint(scaled) * static_cast<double>(step);
    }
  }
  return values;
}

// Rows of very different size, with groups of zeros and of tiny values.
std::vector<float> activations(int64_t count, int64_t columns, uint32_t seed) {
  std::vector<float> x = normals(count * columns, seed);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t group = i / 32;
    if (group % 7 == 3) x[i] = 0;
    if (group % 7 == 5) x[i] *= 1e-20f;
    if (group % 7 == 6) x[i] *= 1e3f;
  }
  return x;
}

std::vector<Format> formats_with_codes() {
  std::vector<Format> formats;
  for (const Format& format : kFormats) {
    if (has_codes(format.format)) formats.push_back(format);
  }
  return formats;
}

TEST(Int8Rows, RoundsOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    for (int64_t columns : {1, 32, 96, 111, 576, 4224}) {
      for (const auto& [count, bytes] :
           {std::pair{1, 1}, {3, 2}, {4, 1}, {4, 2}, {9, 1}, {70, 1}, {70, 2}}) {
        const std::vector<float> x = activations(count, columns, 3);
        const std::vector<double> needed = rounded(x, columns, bytes);
        const Rows rows(x, columns, bytes, {.threads = 2, .isa = isa});
        for (int64_t m = 0; m < (count + 3) / 4 * 4; ++m) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < columns; ++k) {
            const auto at = static_cast<size_t>(m * columns + k);
            const double found = rows.value(m, k);
            if (bytes == 1 || m >= count) {
              ASSERT_EQ(found, m < count ? needed[at] : 0) << name_of(isa) << " " << m << " " << k;
            } else {  // products with 1 / step may be rounded, and halves of a step go the other way
              ASSERT_TRUE(std::abs(found - static_cast<double>(x[at])) <= 0.51 * rows.step(m, k))
                  << name_of(isa) << " " << m << " " << k << ": " << found << ", " << x[at];
            }
            const double value = m < count ? static_cast<double>(x[at]) : 0;
            sum += value;
            size += std::abs(value);
            if (k % 32 < 31 && k < columns - 1) continue;
            const int64_t place = rows.first_sum() + k / 32;
            ASSERT_TRUE(std::abs(rows.rounded(m, place) - sum) <=
                        0.5000001 * rows.step(m, place) + std::ldexp(size, -22))
                << name_of(isa) << " sum " << m << " " << k / 32;
            sum = size = 0;
          }
        }
      }
    }
  }
}

TEST(Int8Rows, CodesAreThoseOfTheFile) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    for (const auto& [blocks, bytes] : {std::pair{1, 1}, {3, 2}, {9, 1}, {40, 2}}) {
      const int64_t columns = blocks * weights_per_block(format.format), groups = columns / 32;
      const Matrix w(format, 37, columns, 4);
      const Unpacked unpacked(w.view, bytes);
      for (int64_t i = 0; i < 37 * columns; ++i) {
        const auto at = static_cast<size_t>(i);
        const auto group = static_cast<size_t>(i / columns * groups + i % columns / 32);
        const auto needed = static_cast<double>(w.values[at]);
        const double found = unpacked.values[at] + unpacked.offsets[group];
        ASSERT_TRUE(std::abs(found - needed) <=
                    0.5000001 * unpacked.offset_steps[group] + 1e-6 * std::abs(needed) + 1e-9)
            << name_of(format.format) << " " << i << ": " << found << ", " << needed;
      }
    }
  }
}

// Scales and offsets as a quantiser makes them: of offsets that lie within the codes little is left, and where
// some groups have hardly any difference between weights, the others keep theirs.
TEST(Int8Rows, OffsetsAreWithinAThousandthOfAScale) {
  NEEDS_INT8_PRODUCTS;
  const int64_t columns = 2048;
  for (bool flat_groups : {false, true}) {
    Matrix w(kFormats[5], 32, columns, 4);  // Q4_1
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(0.5f, 1.0f);
    for (size_t at = 0; at < w.bytes.size(); at += 20) {
      const bool flat = flat_groups && at / 20 % 50 == 7;
      const float scale = flat ? 1e-5f : uniform(random);
      const float16 pair[] = {to_float16(scale),
                              to_float16(flat ? 40.0f : -15 * scale * uniform(random))};
      std::memcpy(&w.bytes[at], pair, sizeof pair);
    }
    dequantize(w.format.type, w.bytes, w.values.data(), 32 * columns);
    const Unpacked unpacked(w.view);
    for (size_t i = 0; i < w.values.size(); ++i) {
      const double found = unpacked.values[i] + unpacked.offsets[i / 32];
      ASSERT_NEAR(found, static_cast<double>(w.values[i]), 0.002) << i;
    }
  }
}

TEST(Int8Rows, ProductsOfEveryFormat) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    const int64_t block = weights_per_block(format.format);
    for (int64_t columns : {block, 3 * block, 9 * block, 1280L}) {
      for (int64_t rows : {1, 15, 17, 32, 33, 79}) {
        const Matrix w(format, rows, columns, static_cast<uint32_t>(rows * 1000 + columns));
        const Unpacked byte_offsets(w.view, 1), exact_offsets(w.view, 2);
        for (const auto& [count, bytes] :
             {std::pair{1, 1}, {3, 2}, {4, 1}, {5, 1}, {5, 2}, {130, 1}}) {
          const std::vector<float> x = activations(count, columns, 7);
          const Rows packed(x, columns, bytes);
          const std::vector<float> y = product(packed, {w.view});
          for (int64_t m = 0; m < count; ++m) {
            expect_row(w, bytes == 1 ? byte_offsets : exact_offsets, x, packed, m,
                       &y[static_cast<size_t>(m * rows)],
                       std::string(name_of(format.format)) + " [" + std::to_string(rows) + "," +
                           std::to_string(columns) + "], " + std::to_string(count) + " rows of " +
                           std::to_string(bytes) + " bytes");
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(Int8Rows, PartsOfDifferentFormatsStacked) {
  NEEDS_INT8_PRODUCTS;
  const int64_t columns = 512, count = 6;
  const std::vector<float> x = activations(count, columns, 5);
  const Rows rows(x, columns);
  for (const std::vector<size_t>& chosen :
       {std::vector<size_t>{5, 3, 8}, {3, 4}, {8, 10, 3}, {10, 4}}) {
    std::vector<Matrix> parts;
    std::vector<BlockMatrix> views;
    int64_t all = 0;
    for (size_t i : chosen) {
      parts.emplace_back(kFormats[i], 20 + 7 * static_cast<int64_t>(parts.size()), columns, 9);
      all += parts.back().view.rows;
    }
    for (Matrix& part : parts) views.push_back(part.view);
    const std::vector<float> y = product(rows, views);
    int64_t first = 0;
    for (const Matrix& part : parts) {
      const Unpacked unpacked(part.view);
      for (int64_t m = 0; m < count; ++m) {
        expect_row(part, unpacked, x, rows, m, &y[static_cast<size_t>(m * all + first)], "stacked");
        if (HasFatalFailure()) return;
      }
      first += part.view.rows;
    }
  }
}

TEST(Int8Rows, SameBitsForAnyGroupingAndThreadCount) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    const int64_t columns = 768, rows = 131, count = 267;
    const Matrix w(format, rows, columns, 5);
    const std::vector<float> x = normals(count * columns, 6);
    const std::vector<float> together = product(Rows(x, columns), {w.view});
    const RunOptions three{.threads = 3, .isa = Isa::avx512};
    const std::vector<float> threaded = product(Rows(x, columns, 1, three), {w.view}, three);
    EXPECT_EQ(0, std::memcmp(together.data(), threaded.data(), together.size() * sizeof(float)))
        << name_of(format.format);
    for (int64_t m = 0; m < count; m += 1 + m % 5) {
      const int64_t some = std::min(count - m, 1 + m % 5);
      const std::vector<float> part =
          product(Rows(x.data() + m * columns, some, columns), {w.view});
      ASSERT_EQ(0,
                std::memcmp(part.data(), together.data() + m * rows, part.size() * sizeof(float)))
          << name_of(format.format) << " row " << m;
    }
  }
}

TEST(Int8Rows, WritesBfloat16AndAdds) {
  NEEDS_INT8_PRODUCTS;
  const int64_t columns = 64, rows = 41, count = 7, stride = rows + 5;
  const Matrix w(kFormats[5], rows, columns, 5);
  const std::vector<BlockMatrix> weights{w.view};
  std::vector<float> x = normals(count * columns, 6);
  x[static_cast<size_t>(2 * columns)] = std::numeric_limits<float>::quiet_NaN();
  const Rows packed(x, columns);
  const std::vector<float> y = product(packed, weights);
  const bfloat16 untouched = to_bfloat16(-7.0f);
  std::vector<bfloat16> half(static_cast<size_t>(count * stride), untouched);
  std::vector<float> sum(static_cast<size_t>(count * stride), 3.0f);
  int8_product(packed.view, weights, Tensor(half.data(), DType::bf16, {count, rows}, {stride, 1}),
               false, kRun);
  int8_product(packed.view, weights, Tensor(sum.data(), DType::f32, {count, rows}, {stride, 1}),
               true, kRun);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = 0; n < stride; ++n) {
      const auto at = static_cast<size_t>(m * stride + n);
      if (n >= rows) {
        EXPECT_EQ(half[at].bits, untouched.bits);
        EXPECT_EQ(sum[at], 3.0f);
        continue;
      }
      const float needed = y[static_cast<size_t>(m * rows + n)];
      if (m == 2) {
        EXPECT_TRUE(std::isnan(needed) && std::isnan(sum[at]) && std::isnan(to_float(half[at])));
      } else {
        EXPECT_EQ(half[at].bits, to_bfloat16(needed).bits);
        EXPECT_EQ(sum[at], 3.0f + needed);
      }
    }
  }
}

TEST(Int8Rows, WhatIsNotFiniteStaysInItsRow) {
  NEEDS_INT8_PRODUCTS;
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (size_t format : {3u, 5u}) {
      const Matrix w(kFormats[format], 8, 64, 1);
      std::vector<float> x = normals(3 * 64, 2);
      x[64 + 9] = bad;
      const std::vector<float> y = product(Rows(x, 64), {w.view});
      for (size_t n = 0; n < 8; ++n) {
        EXPECT_TRUE(std::isfinite(y[n]));
        EXPECT_FALSE(std::isfinite(y[8 + n]));
        EXPECT_TRUE(std::isfinite(y[16 + n]));
      }
    }
  }
}

TEST(Int8Rows, WhatIsNotFiniteInAFileShows) {
  NEEDS_INT8_PRODUCTS;
  for (const Format& format : formats_with_codes()) {
    const int64_t columns = 2 * weights_per_block(format.format);
    for (int place : format.f16_at) {
      for (uint16_t bits : {0x7e00, 0x7c00, 0xfc00}) {  // NaN, infinities
        Matrix w(format, 8, columns, 1);
        // Scales may be zero, and zero times infinity is NaN; a block past the first.
        std::memcpy(&w.bytes[static_cast<size_t>(7 * bytes_per_block(format.format) + place)],
                    &bits, sizeof bits);
        const std::vector<float> y = product(Rows(normals(columns, 2), columns), {w.view});
        for (size_t n = 0; n < 8; ++n) {
          EXPECT_EQ(std::isfinite(y[n]), n != 3) << name_of(format.format) << " " << place;
        }
      }
    }
  }
}

TEST(Int8Rows, RefusesWhatDoesNotFit) {
  const Matrix w(kFormats[5], 4, 64, 1), other(kFormats[5], 4, 32, 1), plain(kFormats[0], 4, 64, 1);
  const auto nothing = [](int64_t, const Tensor&) {};
  EXPECT_THROW(fill_int8_rows({nullptr, 3, 0}, kRun, nothing), Error);
  std::vector<BlockMatrix> weights{w.view};
  Memory memory(int8_rows_bytes(3, 64, 1));
  std::vector<float> y(64);
  const auto call = [&](int64_t columns, DType type, Dims shape, bool add, const RunOptions& run) {
    int8_product({memory.data(), 3, columns}, weights, Tensor(y.data(), type, shape), add, run);
  };
  EXPECT_THROW(call(64, DType::f32, {3, 4}, false, {.isa = Isa::portable}), Error);
  NEEDS_INT8_PRODUCTS;
  EXPECT_THROW(call(32, DType::f32, {3, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f32, {3, 5}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f32, {2, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::f64, {3, 4}, false, kRun), Error);
  EXPECT_THROW(call(64, DType::bf16, {3, 4}, true, kRun), Error);
  for (const Matrix* bad : {&other, &plain}) {
    weights = {w.view, bad->view};
    EXPECT_THROW(call(64, DType::f32, {3, 8}, false, kRun), Error);
  }
}

}  // namespace
}  // namespace heed
