#include "kernels/read_ahead.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/tile.h"

namespace heed::kernels {
namespace {

TEST(ReadAhead, CountsCacheLines) {
  const std::vector<float> x(4096);
  const std::vector<int64_t> offsets{0, 512, 1024};
  const Rows together{x.data(), DType::f32, 40, 3, 40}, apart{x.data(), DType::f32, 100, 3, 40},
      at_offsets{x.data(), DType::f32, 0, 3, 16, offsets.data()};
  EXPECT_EQ(ReadAhead{together}.lines(), 8);  // 480 bytes without gaps
  EXPECT_EQ(ReadAhead{apart}.lines(), 9);     // 3 rows of 160 bytes
  EXPECT_EQ(ReadAhead{at_offsets}.lines(), 3);
  EXPECT_EQ((ReadAhead{together, {}, at_offsets}.lines()), 11);
  EXPECT_EQ((ReadAhead{{x.data(), DType::f32, 40, 0, 40}}.lines()), 0);
}

TEST(ReadAhead, AsksEvenlyWithTheWork) {
  const std::vector<float> x(64 * 16);
  for (const auto& [part, count] :
       {std::pair<int64_t, int64_t>{1, 16}, {7, 16}, {64, 3}, {1000, 1}, {5000, 15}}) {
    ReadAhead ahead{{x.data(), DType::f32, 64, count, 64}};
    constexpr int64_t kWork = 6400;
    ahead.spread(kWork);
    const int64_t lines = ahead.lines();
    for (int64_t done = 0; done < kWork; done += part) {
      const auto left = static_cast<double>(lines) * (1 - static_cast<double>(done) / kWork);
      EXPECT_NEAR(static_cast<double>(ahead.lines()), left, 9) << part << " at " << done;
      ahead.advance(part);
    }
    EXPECT_EQ(ahead.lines(), 0) << part;
    ahead.advance(part);
    EXPECT_EQ(ahead.lines(), 0) << part;
  }
}

// Every line of all rows once, none for long after its turn.
TEST(ReadAhead, LeavesEveryLineToAProduct) {
  const std::vector<float> x(1 << 16);
  const std::vector<int64_t> offsets{0, 4096, 1024};
  const auto* base = reinterpret_cast<const std::byte*>(x.data());
  for (const int64_t part : {1, 7, 64, 1000, 5000}) {
    ReadAhead ahead{{x.data(), DType::f32, 32, 50, 32},
                    {x.data() + 8192, DType::f32, 100, 30, 40},
                    {x.data() + 16384, DType::f32, 0, 3, 16, offsets.data()}};
    constexpr int64_t kWork = 6400;
    ahead.spread(kWork);
    const int64_t lines = ahead.lines();
    std::vector<int64_t> met;
    for (int64_t done = 0; done < kWork + 4 * part; done += part) {
      const LinesDue* due = ahead.due(part);
      for (int64_t i = 0; due != nullptr && i <= due->behind; ++i) {
        for (int64_t line = due[i].at; line < due[i].at + due[i].count; ++line) {
          const int64_t row = line / due[i].row_lines, in_row = line % due[i].row_lines;
          met.push_back(due[i].row - base + row * due[i].stride + in_row * LinesDue::kLine);
        }
      }
      EXPECT_EQ(static_cast<int64_t>(met.size()) + ahead.lines(), lines);
      const int64_t turn = lines * std::min(done + part, kWork) / kWork;
      if (part < 1000) {
        EXPECT_NEAR(static_cast<double>(met.size()), static_cast<double>(turn), 9);
      }
    }
    std::vector<int64_t> all;
    for (int64_t i = 0; i < 100; ++i) all.push_back(i * 64);
    for (int64_t r = 0; r < 30; ++r) {
      for (int64_t i = 0; i < 3; ++i) all.push_back(4 * (8192 + 100 * r) + i * 64);
    }
    for (const int64_t offset : offsets) all.push_back(4 * (16384 + offset));
    EXPECT_EQ(met, all) << part;
  }
}

TEST(ReadAhead, AsksForNothingUnlessTold) {
  const std::vector<float> x(64);
  ReadAhead ahead{Rows{x.data(), DType::f32, 64, 1, 64}}, nothing;
  ahead.advance(1'000'000);
  EXPECT_EQ(ahead.lines(), 4);
  nothing.spread(100);
  nothing.advance(1000);
  EXPECT_EQ(nothing.lines(), 0);
}

}  // namespace
}  // namespace heed::kernels
