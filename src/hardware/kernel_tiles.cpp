#include "hardware/kernel_tiles.h"

#include "heed/error.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::hardware {
namespace {

using tiled::kGridAxes;

double size_of(tiled::Interval i) { return static_cast<double>(i.end - i.begin); }

/// Pairs of boxes that meet, boxes of queries, and pairs of tokens that are computed.
struct Counts {
  double visited = 1, query_boxes = 1, computed = 1;
};

void multiply_axis(const na::AxisTiles& axis, double query_side, double key_side, bool cut,
                   Counts& counts) {
  double visited = 0, seen = 0;
  for (int64_t q = 0; q < axis.query_boxes(); ++q) visited += size_of(axis.visited(q));
  for (int64_t q = 0; q < axis.length(); ++q) seen += size_of(axis.window(q));
  counts.visited *= visited;
  counts.query_boxes *= static_cast<double>(axis.query_boxes());
  counts.computed *= cut ? seen : visited * query_side * key_side;
}

Counts count(const tiled::Neighborhood& grid, const na::TileShapes& shapes) {
  Counts all{0, 0, 0};
  for (int64_t g = 0; g < grid.groups(); ++g) {
    const na::GroupTiles tiles(grid.group(g), shapes.queries, shapes.keys);
    Counts group;
    bool slowest = true;  // along this axis of its boxes of keys, a row's work ends with its window
    for (size_t a = 0; a < kGridAxes; ++a) {
      const int64_t key_side = shapes.keys[a].side;
      multiply_axis(tiles.axes[a], static_cast<double>(shapes.queries[a].side),
                    static_cast<double>(key_side), slowest && key_side > 1, group);
      slowest = slowest && key_side == 1;
    }
    all.visited += group.visited;
    all.query_boxes += group.query_boxes;
    all.computed += group.computed;
  }
  return all;
}

std::vector<int64_t> sides_of(const na::Boxes& boxes, size_t axes) {
  std::vector<int64_t> sides;
  for (size_t a = kGridAxes - axes; a < kGridAxes; ++a) sides.push_back(boxes[a].side);
  return sides;
}

}  // namespace

KernelTiles kernel_tiles(std::span<const tiled::NeighborhoodAxis> axes, int64_t head_dim,
                         int64_t value_dim, DType dtype, const RunOptions& run) {
  if (axes.size() < 2) throw Error("tiles: the kernels cut grids of two or three axes into boxes");
  const tiled::Neighborhood grid("tiles", axes);
  const na::TileShapes shapes =
      na::choose_tiles(grid.group(0), grid, na::tile_costs(head_dim, value_dim, dtype, run));
  const auto key_points = static_cast<double>(na::points_per_box(shapes.keys));
  const auto tokens = static_cast<double>(grid.tokens());
  const Counts counts = count(grid, shapes);
  return {sides_of(shapes.queries, axes.size()), sides_of(shapes.keys, axes.size()),
          counts.visited / counts.query_boxes, tokens / key_points,
          tokens * tokens / counts.computed};
}

}  // namespace heed::hardware
