// What the kernels' boxes visit, against pairs counted one by one.
#include "hardware/kernel_tiles.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "heed/error.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::hardware {
namespace {

using tiled::GridPoint;
using tiled::kGridAxes;
using tiled::NeighborhoodAxis;

struct Counted {
  double visited = 0, query_boxes = 0;  // pairs of boxes with a seen key, boxes of queries
};

/// Every pair of points of every residue group.
Counted brute_force(const tiled::Neighborhood& grid, const na::TileShapes& shapes) {
  Counted counted;
  for (int64_t g = 0; g < grid.groups(); ++g) {
    const tiled::GridGroup group = grid.group(g);
    std::vector<GridPoint> points;
    for (int64_t z = 0; z < group.lines[0].length(); ++z) {
      for (int64_t y = 0; y < group.lines[1].length(); ++y) {
        for (int64_t x = 0; x < group.lines[2].length(); ++x) points.push_back({z, y, x});
      }
    }
    const auto box_of = [](const na::Boxes& boxes, const GridPoint& point) {
      GridPoint box;
      for (size_t a = 0; a < kGridAxes; ++a) box[a] = boxes[a].box_of(point[a]);
      return box;
    };
    std::map<GridPoint, std::set<GridPoint>> seen;
    for (const GridPoint& query : points) {
      for (const GridPoint& key : points) {
        if (!group.sees(query, key)) continue;
        seen[box_of(shapes.queries, query)].insert(box_of(shapes.keys, key));
      }
    }
    for (const auto& [query_box, key_boxes] : seen) {
      counted.visited += static_cast<double>(key_boxes.size());
    }
    counted.query_boxes += static_cast<double>(seen.size());
  }
  return counted;
}

TEST(KernelTiles, VisitWhatPairsSay) {
  std::mt19937 random(3);
  const auto between = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<NeighborhoodAxis> axes(static_cast<size_t>(between(2, 3)));
    for (NeighborhoodAxis& axis : axes) {
      axis.length = between(2, axes.size() == 2 ? 22 : 8);
      axis.dilation = between(1, std::min<int64_t>(2, axis.length));
      axis.kernel = between(1, axis.length / axis.dilation);
      axis.stride = between(1, axis.kernel);
      axis.causal = between(0, 3) == 0;
    }
    const KernelTiles tiles = kernel_tiles(axes, 64, 64, DType::f32, {});
    const tiled::Neighborhood grid("tiles", axes);
    const na::TileShapes shapes =
        na::choose_tiles(grid.group(0), grid, na::tile_costs(64, 64, DType::f32, {}));
    const Counted counted = brute_force(grid, shapes);
    EXPECT_NEAR(tiles.visited_mean, counted.visited / counted.query_boxes, 1e-9) << trial;
    double most = 1;  // no plan computes fewer pairs than windows hold
    for (const NeighborhoodAxis& axis : axes) {
      double pairs = 0;
      for (int64_t r = 0; r < axis.dilation; ++r) {
        const tiled::WindowLine line(axis, r);
        for (int64_t i = 0; i < line.length(); ++i) {
          const tiled::Interval keys = line.keys_of(i);
          pairs += static_cast<double>(keys.end - keys.begin);
        }
      }
      most *= static_cast<double>(axis.length * axis.length) / pairs;
    }
    EXPECT_GT(tiles.speedup, 0) << trial;
    EXPECT_LE(tiles.speedup, most * (1 + 1e-9)) << trial;
  }
}

TEST(KernelTiles, WholeBoxesReachTheBound) {
  const std::vector<NeighborhoodAxis> axes = {{64, 24, 8}, {64, 24, 8}};
  const KernelTiles tiles = kernel_tiles(axes, 64, 64, DType::f32, {});
  EXPECT_NEAR(tiles.speedup, 64.0 * 64 / (24 * 24), 1e-9);
  EXPECT_LT(tiles.predicted, tiles.speedup);
  EXPECT_GT(tiles.predicted, tiles.speedup / 2);
  EXPECT_EQ(tiles.query_tile.size(), 2u);
}

TEST(KernelTiles, LinesAndImpossibleWindowsAreRefused) {
  const std::vector<NeighborhoodAxis> line = {{64, 8}}, wide = {{8, 9}, {8, 1}};
  EXPECT_THROW(kernel_tiles(line, 64, 64, DType::f32, {}), Error);
  EXPECT_THROW(kernel_tiles(wide, 64, 64, DType::f32, {}), Error);
}

}  // namespace
}  // namespace heed::hardware
