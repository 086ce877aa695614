#include "engine/tiled/neighborhood.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "heed/error.h"

namespace heed::tiled {
namespace {

// The rule as arXiv 2504.16922 prints it, for a group of `length` points.
bool attends(const NeighborhoodAxis& axis, int64_t length, int64_t i, int64_t j) {
  const int64_t k = axis.kernel, s = axis.stride;
  if (axis.causal) {
    const int64_t lead = std::min(i / s * s + s - 1, length - 1);
    return j >= std::max<int64_t>(lead - k + 1, 0) && j < std::min(i + 1, length);
  }
  const int64_t left = k / 2, right = k / 2 + k % 2 - 1;
  const int64_t lead = std::min(i / s * s + s / 2, length - 1);
  const int64_t start =
      std::max<int64_t>(lead - left, 0) + (lead + right >= length ? length - right - lead - 1 : 0);
  return j >= start && j < start + k;
}

// Tokens of an axis: the same residue, and the rule among the tokens of that residue.
bool tokens_attend(const NeighborhoodAxis& axis, int64_t i, int64_t j) {
  const int64_t d = axis.dilation, residue = i % d;
  if (j % d != residue) return false;
  return attends(axis, (axis.length - residue + d - 1) / d, i / d, j / d);
}

void check_line(const NeighborhoodAxis& axis) {
  const WindowLine line(axis, 0);
  const int64_t n = line.length();
  for (int64_t a = 0; a < n; ++a) {
    for (int64_t j = 0; j < n; ++j) {
      const bool want = attends(axis, n, a, j);
      const Interval keys = line.keys_of(a);
      ASSERT_EQ(j >= keys.begin && j < keys.end, want) << "query " << a << " key " << j;
    }
    const int64_t seen = line.keys_of(a).end - line.keys_of(a).begin;
    ASSERT_TRUE(axis.causal || seen == axis.kernel);
  }
}

TEST(WindowLine, KeysOfEveryShortLine) {
  for (int64_t length = 1; length <= 24; ++length) {
    for (int64_t kernel = 1; kernel <= length; ++kernel) {
      for (int64_t stride = 1; stride <= kernel; ++stride) {
        for (bool causal : {false, true}) {
          SCOPED_TRACE(testing::Message() << "L " << length << " k " << kernel << " s " << stride
                                          << (causal ? " causal" : ""));
          check_line({length, kernel, stride, 1, causal});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

struct RandomGrid {
  std::mt19937_64 random;
  int64_t draw(int64_t from, int64_t to) {
    return std::uniform_int_distribution<int64_t>(from, to)(random);
  }
  NeighborhoodAxis axis(int64_t longest) {
    NeighborhoodAxis axis;
    axis.length = draw(1, longest);
    axis.dilation = draw(0, 1) == 0 ? 1 : draw(1, axis.length);
    axis.kernel = draw(1, axis.length / axis.dilation);
    axis.stride = draw(1, axis.kernel);
    axis.causal = draw(0, 2) == 0;
    return axis;
  }
};

TEST(WindowLine, KeysOfBoxesOfQueries) {
  RandomGrid grid{std::mt19937_64(1)};
  for (int n = 0; n < 4000; ++n) {
    const NeighborhoodAxis axis = grid.axis(40);
    const WindowLine line(axis, grid.draw(0, axis.dilation - 1));
    const int64_t length = line.length();
    const int64_t q0 = grid.draw(0, length - 1), q1 = grid.draw(q0 + 1, length);
    const Interval queries{q0, q1};
    std::set<int64_t> seen, shared;
    for (int64_t j = 0; j < length; ++j) {
      int64_t viewers = 0;
      for (int64_t i = q0; i < q1; ++i) viewers += attends(axis, length, i, j);
      if (viewers > 0) seen.insert(j);
      if (viewers == q1 - q0) shared.insert(j);
    }
    const auto equal = [](Interval found, const std::set<int64_t>& want) {
      if (want.empty()) return found.empty();
      return found.begin == *want.begin() && found.end == *want.rbegin() + 1 &&
             found.end - found.begin == static_cast<int64_t>(want.size());
    };
    ASSERT_TRUE(equal(line.keys_of(queries), seen)) << n;
    ASSERT_TRUE(equal(line.shared_keys_of(queries), shared)) << n;
  }
}

GridPoint point_of(int64_t token, const Neighborhood& grid) {
  GridPoint point;
  for (int a = kGridAxes - 1; a >= 0; --a) {
    point[static_cast<size_t>(a)] = token % grid.axis(a).length;
    token /= grid.axis(a).length;
  }
  return point;
}

bool grid_attends(const Neighborhood& grid, int64_t query, int64_t key) {
  const GridPoint q = point_of(query, grid), k = point_of(key, grid);
  for (int a = 0; a < kGridAxes; ++a) {
    const auto axis = static_cast<size_t>(a);
    if (!tokens_attend(grid.axis(a), q[axis], k[axis])) return false;
  }
  return true;
}

std::vector<int64_t> tokens_of(const GridGroup& group, const GridBox& box) {
  std::vector<int64_t> tokens;
  for (int64_t a = box[0].begin; a < box[0].end; ++a) {
    for (int64_t b = box[1].begin; b < box[1].end; ++b) {
      for (int64_t c = box[2].begin; c < box[2].end; ++c) tokens.push_back(group.token({a, b, c}));
    }
  }
  return tokens;
}

// Every pair of a box of queries with the grid's keys.
void check_queries(const Neighborhood& grid, const GridGroup& group, const GridBox& queries) {
  const std::vector<int64_t> rows = tokens_of(group, queries);
  std::vector<int64_t> seen, shared;
  for (int64_t k = 0; k < grid.tokens(); ++k) {
    int64_t viewers = 0;
    for (int64_t q : rows) viewers += grid_attends(grid, q, k);
    if (viewers > 0) seen.push_back(k);
    if (viewers == static_cast<int64_t>(rows.size())) shared.push_back(k);
  }
  ASSERT_EQ(tokens_of(group, group.keys_of(queries)), seen);
  ASSERT_EQ(tokens_of(group, group.shared_keys_of(queries)), shared);
}

TEST(Neighborhood, RandomGridsPairByPair) {
  RandomGrid random{std::mt19937_64(2)};
  for (int n = 0; n < 300; ++n) {
    SCOPED_TRACE(n);
    std::vector<NeighborhoodAxis> axes(static_cast<size_t>(random.draw(1, 3)));
    const int64_t longest = axes.size() == 1 ? 60 : axes.size() == 2 ? 12 : 6;
    for (NeighborhoodAxis& axis : axes) axis = random.axis(longest);
    const Neighborhood grid("na", axes);
    std::set<int64_t> all;
    for (int64_t g = 0; g < grid.groups(); ++g) {
      const GridGroup group = grid.group(g);
      for (int64_t q : tokens_of(group, group.points())) ASSERT_TRUE(all.insert(q).second);
      for (int box = 0; box < 8; ++box) {
        GridBox queries = group.points();
        for (Interval& side : queries) {
          side.begin = random.draw(0, side.end - 1);
          side.end = random.draw(side.begin + 1, side.end);
        }
        check_queries(grid, group, queries);
        if (HasFatalFailure()) return;
      }
    }
    ASSERT_EQ(static_cast<int64_t>(all.size()), grid.tokens());
  }
}

TEST(Neighborhood, ErrorsNameTheArgumentAndTheAxis) {
  const auto message = [](std::vector<NeighborhoodAxis> axes) -> std::string {
    try {
      Neighborhood("na2d", axes);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const NeighborhoodAxis good{8, 4, 2, 2, false};
  EXPECT_EQ(message({good}), "no error");
  EXPECT_NE(message({good, {8, 5, 1, 2}}).find("na2d: kernel_size of axis 1 is 5"),
            std::string::npos);
  EXPECT_NE(message({{8, 4, 5}}).find("stride of axis 0 is 5"), std::string::npos);
  EXPECT_NE(message({{8, 4, 0}}).find("stride of axis 0 is 0"), std::string::npos);
  EXPECT_NE(message({{8, 0}}).find("kernel_size of axis 0 is 0"), std::string::npos);
  EXPECT_NE(message({{8, 1, 1, 0}}).find("dilation of axis 0 is 0"), std::string::npos);
  EXPECT_NE(message({{8, INT64_MAX, 1, INT64_MAX}}).find("dilation"), std::string::npos);
  EXPECT_NE(message({{0, 1}}).find("length of axis 0 is 0"), std::string::npos);
  EXPECT_NE(message({}).find("0 axes"), std::string::npos);
  EXPECT_NE(message({good, good, good, good}).find("4 axes"), std::string::npos);
  const NeighborhoodAxis huge{int64_t{1} << 40, 1};
  EXPECT_NE(message({huge, huge}).find("2^62"), std::string::npos);
  const std::vector<NeighborhoodAxis> axes = {good};
  const Neighborhood grid("na1d", axes);
  EXPECT_THROW(grid.tile_shape("na1d", "q-tile", std::vector<int64_t>{0}), Error);
  EXPECT_THROW(grid.tile_shape("na1d", "q-tile", std::vector<int64_t>{4, 4}), Error);
}

TEST(Neighborhood, SizesNearTheLimitDoNotOverflow) {
  const int64_t length = int64_t{1} << 62;
  const std::vector<NeighborhoodAxis> axes = {{length, length, length / 2}};
  const Neighborhood grid("na1d", axes);
  const GridGroup group = grid.group(0);
  EXPECT_EQ(group.lines[2].keys_of(length - 1).end, length);
  EXPECT_EQ(group.token({0, 0, length - 1}), length - 1);
}

}  // namespace
}  // namespace heed::tiled
