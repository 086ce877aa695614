#include "hardware/column.h"

#include <gtest/gtest.h>

#include <random>

#include "cascade/cascade.h"
#include "hardware/machine.h"
#include "heed/error.h"

namespace heed::hardware {
namespace {

std::vector<double> normal(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = distribution(random);
  return values;
}

struct Inputs {
  explicit Inputs(const ColumnCase& c)
      : q(normal(c.query_tiles * c.head_dim, 1)),
        k(normal(c.key_tiles * c.elements * c.head_dim, 2)),
        v(normal(c.key_tiles * c.elements * c.value_dim, 3)) {}
  std::vector<double> q, k, v;
};

// The queries of all tiles as one, the same keys.
cascade::NdArray by_cascade(const ColumnCase& c, const Inputs& in) {
  cascade::Bindings b;
  b.tensors = {{"Q", {{1, 1, c.query_tiles, c.head_dim}, in.q}},
               {"K", {{1, 1, c.key_tiles * c.elements, c.head_dim}, in.k}},
               {"V", {{1, 1, c.key_tiles * c.elements, c.value_dim}, in.v}}};
  const auto file = "cascades/three_pass.cascade";
  return cascade::evaluate(cascade::parse(data_file(file), file), b).at("AV");
}

void expect_attention(const ColumnCase& c, const Inputs& in, const ColumnRun& run) {
  const cascade::NdArray want = by_cascade(c, in);
  ASSERT_EQ(run.result.size(), want.values.size());
  for (size_t i = 0; i < want.values.size(); ++i) {
    ASSERT_NEAR(run.result[i], want.values[i], 1e-12) << i;
  }
}

TEST(Column, SteadyUtilisationIsTheClosedForm) {
  for (int64_t n : {8, 16, 24, 32}) {
    for (int64_t e : {48, 64}) {
      SCOPED_TRACE(testing::Message() << "N " << n << " E " << e);
      ColumnCase c{n, e, e, 4, 40};
      const Inputs in(c);
      const auto d = static_cast<double>(e);
      const ColumnRun binding = run_column(c, in.q, in.k, in.v);
      EXPECT_DOUBLE_EQ(binding.interval, 2 * d + 10);
      EXPECT_DOUBLE_EQ(binding.util_2d, (2 * d + 9) / (2 * d + 10));
      EXPECT_DOUBLE_EQ(binding.util_1d, 1);
      expect_attention(c, in, binding);
      c.schedule = Schedule::one_tile;
      const ColumnRun architecture = run_column(c, in.q, in.k, in.v);
      const double interval = 3 * d + 10 + static_cast<double>(n);
      EXPECT_DOUBLE_EQ(architecture.interval, interval);
      EXPECT_DOUBLE_EQ(architecture.util_2d, (2 * d + 9) / interval);
      expect_attention(c, in, architecture);
      EXPECT_EQ(architecture.scores_held, 1);
    }
  }
}

TEST(Column, TheClosedFormOfOneTileNeedsMoreValuesThanRows) {
  // The sums of SLNV take N + 1 cycles to leave, SPNV covers F of them; the closed form charges none.
  for (int64_t n : {31, 32, 40}) {
    ColumnCase c{n, 32, 32, 4, 10, Schedule::one_tile};
    const Inputs in(c);
    const ColumnRun run = run_column(c, in.q, in.k, in.v);
    EXPECT_DOUBLE_EQ(run.interval,
                     run.expected_interval + static_cast<double>(std::max<int64_t>(0, n + 1 - 32)));
  }
}

TEST(Column, EveryShapeComputesAttention) {
  for (const ColumnCase& c :
       {ColumnCase{1, 1, 1, 1, 1}, ColumnCase{3, 5, 7, 2, 4}, ColumnCase{8, 16, 4, 3, 5},
        ColumnCase{5, 4, 16, 1, 6}, ColumnCase{40, 8, 8, 4, 4}}) {
    for (Schedule schedule : {Schedule::one_tile, Schedule::interleaved}) {
      for (int64_t lead : {0, 1, 3}) {
        for (int64_t lag = 0; lag < c.query_tiles; ++lag) {
          SCOPED_TRACE(testing::Message() << c.elements << " lead " << lead << " lag " << lag);
          ColumnCase one = c;
          one.schedule = schedule;
          one.lead = lead;
          one.lag = lag;
          const Inputs in(one);
          expect_attention(one, in, run_column(one, in.q, in.k, in.v));
        }
      }
    }
  }
}

TEST(Column, WithoutTilesAheadTheMaximumIsWaitedFor) {
  ColumnCase c{32, 64, 64, 4, 10};
  c.lead = 0;
  const Inputs in(c);
  const ColumnRun run = run_column(c, in.q, in.k, in.v);
  EXPECT_GT(run.interval, run.expected_interval + 30);
  const ColumnCase best = with_best_lead(c, in.q, in.k, in.v);
  EXPECT_EQ(best.lead, 1);
  EXPECT_EQ(best.lag, 0);
}

TEST(Column, MoreRowsThanATileHasWorkNeedMoreTilesInFlight) {
  // 256 rows drain in 256 cycles, a tile has 137 of work: one tile ahead does not cover it.
  ColumnCase c{256, 64, 64, 8, 6};
  const Inputs in(c);
  EXPECT_GT(run_column(c, in.q, in.k, in.v).interval, 138);
  const ColumnCase best = with_best_lead(c, in.q, in.k, in.v);
  const ColumnRun run = run_column(best, in.q, in.k, in.v);
  EXPECT_DOUBLE_EQ(run.interval, 138);
  EXPECT_GT(best.lead, 1);
  EXPECT_GT(run.scores_held, 2);
  expect_attention(best, in, run);
}

TEST(Column, ImpossibleSizesAreRefused) {
  const Inputs in(ColumnCase{});
  ColumnCase c;
  EXPECT_THROW(run_column({0}, in.q, in.k, in.v), Error);
  c.lag = c.query_tiles;
  EXPECT_THROW(run_column(c, in.q, in.k, in.v), Error);
  c = {};
  c.key_tiles = 9;
  EXPECT_THROW(run_column(c, in.q, in.k, in.v), Error);
  c.key_tiles = 1 << 16;
  c.query_tiles = 1 << 16;
  EXPECT_THROW(run_column(c, in.q, in.k, in.v), Error);
}

}  // namespace
}  // namespace heed::hardware
