#include "mechanisms/compare.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace heed {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Difference run(std::vector<double> got, std::vector<double> want, Bound bound) {
  const auto n = static_cast<int64_t>(got.size());
  return compare({{n}, std::move(got)}, {{n}, std::move(want)}, bound);
}

TEST(Compare, RatioIsErrorOverBound) {
  // 0.5 / (0.1 * 10 + 0.25) = 0.4 against 0.275 / (0.1 * 0.25 + 0.25) = 1
  const Difference d = run({1.0, 10.5, -0.025}, {1.0, 10.0, 0.25}, {0.1, 0.25});
  EXPECT_DOUBLE_EQ(d.ratio, 1.0);
  EXPECT_DOUBLE_EQ(d.error, 0.275);
  EXPECT_DOUBLE_EQ(d.bound, 0.275);
  EXPECT_FALSE(run({1.1}, {1.0}, {0.05, 0}).ok());
  EXPECT_TRUE(run({1.1}, {1.0}, {0.11, 0}).ok());
}

TEST(Compare, NamesTheWorstElement) {
  const cascade::NdArray want{{2, 3}, {0, 0, 0, 0, 0, 0}};
  cascade::NdArray got = want;
  got.values[4] = 3;
  got.values[1] = 2;
  const Difference d = compare(got, want, {0, 1});
  EXPECT_EQ(d.ratio, 3);
  EXPECT_EQ(d.error, 3);
  EXPECT_EQ(d.bound, 1);
  EXPECT_EQ(d.where, "[1,1] got 3 want 0");
  EXPECT_FALSE(d.ok());
}

TEST(Compare, NanAgainstNumberFails) {
  EXPECT_FALSE(run({kNan}, {1}, {1, 100}).ok());
  EXPECT_FALSE(run({1}, {kNan}, {1, 100}).ok());
  EXPECT_FALSE(run({0, kNan, 0}, {0, 0, 0}, {1, 100}).ok());
  EXPECT_FALSE(run({kNan, 5}, {0, 0}, {1, 100}).ok());
  EXPECT_TRUE(run({kNan}, {kNan}, {0, 0}).ok());
}

TEST(Compare, InfinitiesMustBeEqual) {
  EXPECT_TRUE(run({-kInf, kInf}, {-kInf, kInf}, {0, 0}).ok());
  EXPECT_FALSE(run({kInf}, {-kInf}, {1, 100}).ok());
  EXPECT_FALSE(run({kInf}, {1e300}, {1, kInf}).ok());
  EXPECT_FALSE(run({1e300}, {kInf}, {1, 1}).ok());
  EXPECT_FALSE(run({kInf}, {kNan}, {1, 1}).ok());
}

TEST(Compare, OverflowOfTheResultIsRight) {
  const Bound half{1e-3, 0, 65504};
  EXPECT_TRUE(run({kInf, -kInf, kInf}, {365312, -1e6, 65500}, half).ok());
  EXPECT_FALSE(run({kInf}, {-365312}, half).ok());
  EXPECT_FALSE(run({kInf}, {60000}, half).ok());
  EXPECT_FALSE(run({65504}, {365312}, half).ok());
  EXPECT_FALSE(run({kNan}, {365312}, half).ok());
}

TEST(Compare, NanBoundFails) { EXPECT_FALSE(run({1}, {2}, {0, kNan}).ok()); }

TEST(Compare, ZeroBoundAsksForEquality) {
  EXPECT_TRUE(run({0, -0.0, 3}, {0, 0, 3}, {0, 0}).ok());
  EXPECT_FALSE(run({std::nextafter(1.0, 2.0)}, {1}, {0, 0}).ok());
}

TEST(Compare, ShapesMustAgree) {
  const Difference d = compare({{2, 1}, {0, 0}}, {{1, 2}, {0, 0}}, {1, 1});
  EXPECT_FALSE(d.ok());
  EXPECT_EQ(d.where, "shape [2,1], needed [1,2]");
  EXPECT_FALSE(compare({{0}, {}}, {{1}, {0}}, {1, 1}).ok());
  EXPECT_TRUE(compare({{0}, {}}, {{0}, {}}, {0, 0}).ok());
}

}  // namespace
}  // namespace heed
