#include "hardware/kernel_tiles.h"

#include "heed/error.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::hardware {
namespace {

using tiled::kGridAxes;

/// Pairs of boxes, and boxes of queries, over all residue groups.
struct BoxPairs {
  double visited = 0, query_boxes = 0;
};

BoxPairs count_pairs(const tiled::Neighborhood& grid, const na::TileShapes& shapes) {
  BoxPairs pairs;
  for (int64_t g = 0; g < grid.groups(); ++g) {
    const na::GroupTiles tiles(grid.group(g), shapes.queries, shapes.keys);
    double visited = 1, query_boxes = 1;
    for (const na::AxisTiles& axis : tiles.axes) {
      double on_axis = 0;
      for (int64_t q = 0; q < axis.query_boxes(); ++q) {
        const tiled::Interval boxes = axis.visited(q);
        on_axis += static_cast<double>(boxes.end - boxes.begin);
      }
      visited *= on_axis;
      query_boxes *= static_cast<double>(axis.query_boxes());
    }
    pairs.visited += visited;
    pairs.query_boxes += query_boxes;
  }
  return pairs;
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
  const auto query_points = static_cast<double>(na::points_per_box(shapes.queries));
  const auto key_points = static_cast<double>(na::points_per_box(shapes.keys));
  const auto tokens = static_cast<double>(grid.tokens());
  const BoxPairs pairs = count_pairs(grid, shapes);
  return {sides_of(shapes.queries, axes.size()), sides_of(shapes.keys, axes.size()),
          pairs.visited / pairs.query_boxes, tokens / key_points,
          tokens * tokens / (pairs.visited * query_points * key_points)};
}

}  // namespace heed::hardware
