#include "hardware/tiles.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "heed/error.h"

namespace heed::hardware {
namespace {

using tiled::NeighborhoodAxis;
using Coordinates = std::vector<int64_t>;

// The rule as arXiv 2504.16922 prints it, for a residue group of `length` points.
bool attends(const NeighborhoodAxis& axis, int64_t length, int64_t i, int64_t j) {
  const int64_t k = axis.kernel, s = axis.stride;
  if (axis.causal) {
    const int64_t lead = std::min(i / s * s + s - 1, length - 1);
    return j >= std::max<int64_t>(lead - k + 1, 0) && j <= i;
  }
  const int64_t left = k / 2, right = k / 2 + k % 2 - 1;
  const int64_t lead = std::min(i / s * s + s / 2, length - 1);
  const int64_t start =
      std::max<int64_t>(lead - left, 0) + (lead + right >= length ? length - right - lead - 1 : 0);
  return j >= start && j < start + k;
}

// All points of a box of extents, the last axis fastest.
std::vector<Coordinates> points_of(const Coordinates& extents) {
  std::vector<Coordinates> points{{}};
  for (int64_t extent : extents) {
    std::vector<Coordinates> longer;
    for (const Coordinates& point : points) {
      for (int64_t x = 0; x < extent; ++x) {
        longer.push_back(point);
        longer.back().push_back(x);
      }
    }
    points = std::move(longer);
  }
  return points;
}

// Pair by pair: which key tile each seen key lies in.
TileStatistic brute_force(const TilePlanCase& plan) {
  const size_t rank = plan.axes.size();
  TileStatistic result{0, 0, 1, 0, 1, true};
  Coordinates dilations;
  int64_t tokens = 1;
  for (size_t a = 0; a < rank; ++a) {
    const NeighborhoodAxis& axis = plan.axes[a];
    dilations.push_back(axis.dilation);
    result.flop_speedup *= static_cast<double>(axis.length) / static_cast<double>(axis.kernel);
    tokens *= axis.length;
    if (plan.tiling == Tiling::flat) continue;
    result.dense *= (axis.length + plan.key_tile[a] - 1) / plan.key_tile[a];
  }
  if (plan.tiling == Tiling::flat)
    result.dense = (tokens + plan.key_tile[0] - 1) / plan.key_tile[0];
  double tiles = 0, visited_tiles = 0;
  for (const Coordinates& residue : points_of(dilations)) {
    Coordinates lengths;
    for (size_t a = 0; a < rank; ++a) {
      const NeighborhoodAxis& axis = plan.axes[a];
      lengths.push_back((axis.length - residue[a] + axis.dilation - 1) / axis.dilation);
    }
    const std::vector<Coordinates> points = points_of(lengths);
    const auto flat_index = [&](const Coordinates& point) {
      int64_t index = 0;
      for (size_t a = 0; a < rank; ++a) index = index * lengths[a] + point[a];
      return index;
    };
    const auto sees = [&](const Coordinates& q, const Coordinates& k) {
      for (size_t a = 0; a < rank; ++a) {
        if (!attends(plan.axes[a], lengths[a], q[a], k[a])) return false;
      }
      return true;
    };
    std::map<Coordinates, std::vector<Coordinates>> query_tiles;
    for (const Coordinates& q : points) {
      Coordinates tile;
      if (plan.tiling == Tiling::flat) tile = {flat_index(q) / plan.query_tile[0]};
      for (size_t a = 0; a < rank && plan.tiling != Tiling::flat; ++a) {
        tile.push_back(q[a] / plan.query_tile[a]);
      }
      query_tiles[tile].push_back(q);
    }
    for (const auto& [tile, queries] : query_tiles) {
      Coordinates origin(rank, 0);
      if (plan.tiling == Tiling::at_first_key) {
        origin = lengths;
        for (const Coordinates& q : queries) {
          for (const Coordinates& k : points) {
            for (size_t a = 0; a < rank && sees(q, k); ++a) origin[a] = std::min(origin[a], k[a]);
          }
        }
      }
      // Keys before the origin lie in no tile; none of them is seen.
      const auto tile_of = [&](const Coordinates& k) -> Coordinates {
        if (plan.tiling == Tiling::flat) return {flat_index(k) / plan.key_tile[0]};
        Coordinates at;
        for (size_t a = 0; a < rank; ++a) {
          at.push_back(k[a] < origin[a] ? -1 : (k[a] - origin[a]) / plan.key_tile[a]);
        }
        return at;
      };
      // A dynamic tile ends with the window; keys behind it are not in the tile.
      std::map<Coordinates, std::vector<bool>> uses;
      std::set<Coordinates> seen_tiles;
      std::vector<std::pair<Coordinates, int64_t>> views;
      Coordinates end(rank, 0);
      for (const Coordinates& k : points) {
        int64_t viewers = 0;
        for (const Coordinates& q : queries) viewers += sees(q, k);
        views.emplace_back(k, viewers);
        if (viewers == 0) continue;
        seen_tiles.insert(tile_of(k));
        for (size_t a = 0; a < rank; ++a) end[a] = std::max(end[a], k[a] + 1);
      }
      for (const auto& [k, viewers] : views) {
        if (!seen_tiles.contains(tile_of(k))) continue;
        bool exists = true;
        for (size_t a = 0; a < rank && plan.tiling == Tiling::at_first_key; ++a) {
          exists &= k[a] < end[a];
        }
        if (exists) result.block_sparse &= viewers == static_cast<int64_t>(queries.size());
      }
      const auto visited = static_cast<int64_t>(seen_tiles.size());
      result.visited_max = std::max(result.visited_max, visited);
      visited_tiles += static_cast<double>(visited);
      tiles += 1;
    }
  }
  result.visited_mean = visited_tiles / tiles;
  result.analytical_speedup =
      static_cast<double>(result.dense) / static_cast<double>(result.visited_max);
  return result;
}

TEST(Tiles, CountsEqualBruteForceOnRandomGrids) {
  std::mt19937_64 random(3);
  const auto draw = [&](int64_t from, int64_t to) {
    return std::uniform_int_distribution<int64_t>(from, to)(random);
  };
  for (int n = 0; n < 900; ++n) {
    TilePlanCase plan;
    plan.tiling = static_cast<Tiling>(n % 3);
    const int64_t rank = draw(1, 3), longest = rank == 1 ? 50 : rank == 2 ? 12 : 6;
    for (int64_t a = 0; a < rank; ++a) {
      NeighborhoodAxis axis;
      axis.length = draw(1, longest);
      axis.dilation = draw(0, 1) == 0 ? 1 : draw(1, axis.length);
      axis.kernel = draw(1, axis.length / axis.dilation);
      axis.stride = draw(1, axis.kernel);
      axis.causal = draw(0, 3) == 0;
      plan.axes.push_back(axis);
      if (plan.tiling == Tiling::flat && a > 0) continue;
      plan.query_tile.push_back(draw(1, plan.tiling == Tiling::flat ? 20 : 5));
      plan.key_tile.push_back(draw(1, plan.tiling == Tiling::flat ? 20 : 5));
    }
    SCOPED_TRACE(testing::Message() << "case " << n << " " << name_of(plan.tiling));
    const TileStatistic found = tile_statistic(plan), want = brute_force(plan);
    ASSERT_EQ(found.visited_max, want.visited_max);
    ASSERT_NEAR(found.visited_mean, want.visited_mean, 1e-12 * want.visited_mean);
    ASSERT_EQ(found.dense, want.dense);
    ASSERT_DOUBLE_EQ(found.analytical_speedup, want.analytical_speedup);
    ASSERT_DOUBLE_EQ(found.flop_speedup, want.flop_speedup);
    ASSERT_EQ(found.block_sparse, want.block_sparse);
  }
}

TilePlanCase square(int64_t length, int64_t kernel, int64_t stride, Coordinates query,
                    Coordinates key, Tiling tiling) {
  TilePlanCase plan{{}, std::move(query), std::move(key), tiling};
  plan.axes.assign(2, {length, kernel, stride});
  return plan;
}

TEST(Tiles, CountsOfThePapersAppendix) {
  const auto max_and_mean = [](const TilePlanCase& plan) {
    const TileStatistic s = tile_statistic(plan);
    return std::pair(s.visited_max, s.visited_mean);
  };
  const auto fixed = [&](int64_t stride) {
    return max_and_mean(square(64, 24, stride, {8, 8}, {8, 8}, Tiling::fixed));
  };
  EXPECT_EQ(fixed(1), std::pair(int64_t{25}, 18.0625));
  EXPECT_EQ(fixed(8), std::pair(int64_t{9}, 9.0));
  EXPECT_EQ(fixed(16), std::pair(int64_t{16}, 12.25));
  EXPECT_EQ(fixed(24), std::pair(int64_t{9}, 9.0));
  TilePlanCase one_axis = square(64, 24, 1, {8, 8}, {8, 8}, Tiling::fixed);
  one_axis.axes[0].stride = 8;
  EXPECT_EQ(max_and_mean(one_axis), std::pair(int64_t{15}, 12.75));
  EXPECT_EQ(max_and_mean(square(64, 24, 1, {8, 8}, {8, 8}, Tiling::at_first_key)).first, 16);
  EXPECT_EQ(max_and_mean(square(64, 24, 1, {64}, {64}, Tiling::flat)).first, 24);
  TilePlanCase volume{{{16, 8}, {32, 16}, {32, 16}}, {2, 4, 8}, {2, 4, 8}, Tiling::fixed};
  TileStatistic s = tile_statistic(volume);
  EXPECT_NEAR(static_cast<double>(s.dense) / s.visited_mean, 5.06, 0.005);
  volume.axes = {{16, 8, 4}, {32, 16, 8}, {32, 16, 16}};
  s = tile_statistic(volume);
  EXPECT_DOUBLE_EQ(static_cast<double>(s.dense) / s.visited_mean, 8);
}

TEST(Tiles, PublishedTables) {
  // Bounds of the operator as the simulator gives them, then end to end: all steps sparse, dense
  // first steps. The first row of Cosmos at 56 % was published as 1.35, rounded twice.
  const double analytical[] = {6.10, 8.53, 10.24, 1.75, 1.96, 2.04, 2.29, 5.24, 6.11,  7.86, 9.17,
                               1.43, 2.00, 2.40,  3.27, 3.60, 5.45, 6.00, 9.09, 10.00, 11.11};
  const double all[] = {1.76, 1.84, 1.88, 1.32, 1.42, 1.42, 1.50, 1.90, 1.96, 2.05, 2.10,
                        1.21, 1.44, 1.55, 1.73, 1.78, 1.99, 2.02, 2.17, 2.20, 2.23};
  const double kept[] = {1.42, 1.45, 1.46, 1.19, 1.24, 1.24, 1.28, 1.45, 1.48, 1.51, 1.52,
                         1.14, 1.27, 1.33, 1.42, 1.44, 1.53, 1.55, 1.61, 1.62, 1.63};
  const auto cases = paper_tile_cases();
  ASSERT_EQ(cases.size(), std::size(analytical));
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(cases[i].model + " row " + std::to_string(i));
    const TileStatistic s = tile_statistic(cases[i].plan);
    EXPECT_NEAR(s.analytical_speedup, analytical[i], 0.0051);
    EXPECT_NEAR(end_to_end(s.analytical_speedup, cases[i].all_steps), all[i], 0.01);
    EXPECT_NEAR(end_to_end(s.analytical_speedup, cases[i].kept_steps), kept[i], 0.01);
  }
}

TEST(Tiles, WindowedBlocksOfHunyuan) {
  TilePlanCase plan{
      {{30, 18, 18}, {48, 24, 24}, {80, 24, 24}}, {4, 8, 8}, {2, 8, 8}, Tiling::fixed};
  EXPECT_NEAR(tile_statistic(plan).analytical_speedup, 6.67, 0.005);
  plan.axes = {{30, 30, 30}, {48, 40, 40}, {80, 40, 40}};
  plan.query_tile = {2, 16, 8};
  EXPECT_NEAR(tile_statistic(plan).analytical_speedup, 2.00, 0.005);
}

TEST(Tiles, StrideSearchKeepsWhatNoSmallerStrideReaches) {
  TilePlanCase plan{{{30, 18}, {48, 24}, {80, 24}}, {4, 8, 8}, {2, 8, 8}, Tiling::fixed};
  const auto rows = search_strides(plan);
  std::set<int64_t> visited;
  for (const StrideRow& row : rows) {
    for (size_t a = 0; a < 3; ++a) plan.axes[a].stride = row.stride[a];
    const TileStatistic s = tile_statistic(plan);
    EXPECT_EQ(s.visited_max, row.statistic.visited_max);
    // One step less on any axis visits more.
    for (size_t a = 0; a < 3; ++a) {
      if (row.stride[a] == 1) continue;
      TilePlanCase smaller = plan;
      --smaller.axes[a].stride;
      EXPECT_GT(tile_statistic(smaller).visited_max, s.visited_max);
    }
    visited.insert(s.visited_max);
  }
  EXPECT_EQ(*visited.begin(), 81);
  int64_t least = INT64_MAX;  // of all strides there are
  for (plan.axes[0].stride = 1; plan.axes[0].stride <= 18; ++plan.axes[0].stride) {
    for (plan.axes[1].stride = 1; plan.axes[1].stride <= 24; ++plan.axes[1].stride) {
      for (plan.axes[2].stride = 1; plan.axes[2].stride <= 24; ++plan.axes[2].stride) {
        least = std::min(least, tile_statistic(plan).visited_max);
      }
    }
  }
  EXPECT_EQ(least, 81);
}

TEST(Tiles, ImpossibleAndHugeCasesAreRefused) {
  const auto message = [](const TilePlanCase& plan) -> std::string {
    try {
      tile_statistic(plan);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const auto has = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  has(message({{{8, 9}}, {2}, {2}, Tiling::fixed}), "kernel_size of axis 0 is 9");
  has(message({{{8, 4}}, {0}, {2}, Tiling::fixed}), "q-tile of axis 0 is 0");
  has(message({{{8, 4}}, {2}, {2, 2}, Tiling::fixed}), "kv-tile has 2 sides");
  has(message({{{8, 4}, {8, 4}}, {2, 2}, {2, 2}, Tiling::flat}), "one number for q-tile");
  has(message({{{8, 4}}, {2}, {0}, Tiling::flat}), "number >= 1");
  const int64_t big = int64_t{1} << 40;
  has(message({{{big, 1}}, {1}, {1}, Tiling::fixed}), "larger tiles");
  has(message({{{big, 1}}, {big}, {1}, Tiling::flat}), "too long");
  has(message({{{big, big}, {1 << 20, 1 << 20}}, {big, 1 << 20}, {1, 1}, Tiling::fixed}),
      "no error");
  EXPECT_THROW(parse_tiling("statik"), Error);
  EXPECT_THROW(check(EndToEnd{0, 1, 0}), Error);
  EXPECT_THROW(check(EndToEnd{0.5, 10, 11}), Error);
  EXPECT_THROW(check(EndToEnd{0.5, 0, 0}), Error);
}

}  // namespace
}  // namespace heed::hardware
