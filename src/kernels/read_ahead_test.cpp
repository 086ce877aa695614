#include "kernels/read_ahead.h"

#include <gtest/gtest.h>

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
