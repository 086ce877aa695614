#include "hardware/kernel_tiles.h"

#include <algorithm>
#include <memory>

#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/product_loops.h"
#include "mechanisms/neighborhood/grid_terms.h"

namespace heed::hardware {
namespace {

using tiled::kGridAxes;

// Tiles of dense attention.
constexpr double kDenseRows = 64, kDenseKeys = 256;
// How often a token is copied: its query into a tile and the result back; its key and value for most of
// two groups of rows that share them.
constexpr double kCopies = 3;

/// Blocks of rows that see some of a tile: their scores in steps of keys, their sums from the first key
/// that one of them sees to the last.
void add_blocks(const std::vector<kernels::KeyRange>& ranges, na::TileWork& work) {
  const auto rows = static_cast<int64_t>(ranges.size());
  for (int64_t r = 0; r < rows; r += na::kRowBlock) {
    const int64_t height = std::min(na::kRowBlock, rows - r);
    const kernels::KeyRange joint = kernels::joint_range(ranges.data(), r, height, 1 << 30);
    if (joint.empty()) continue;
    const int64_t begin = joint.begin / na::kKeyStep * na::kKeyStep;
    work.scores += static_cast<double>(height * (round_up(joint.end, na::kKeyStep) - begin));
    work.sums += static_cast<double>(height * (joint.end - joint.begin));
  }
}

/// Asks for every tile what the engine asks. Returns the boxes of queries.
int64_t add_group(const tiled::GridGroup& group, const na::TileShapes& shapes, na::TileWork& work) {
  const auto tiles = std::make_shared<const na::GroupTiles>(group, shapes.queries, shapes.keys);
  const na::BoxTerms terms(shapes, {tiles}, nullptr);
  const int64_t rows = na::points_per_box(shapes.queries), keys = na::points_per_box(shapes.keys);
  std::vector<kernels::KeyRange> ranges(static_cast<size_t>(rows));
  for (int64_t row = 0; row < tiles->plan.queries(); row += rows) {
    const tiled::Interval seen = tiles->plan.row(row);
    for (int64_t key = seen.begin; key < seen.end; key += keys) {
      const tiled::TileAt at{0, 0, row, rows, key, keys};
      const tiled::Visit visit = terms.visit(at);
      if (visit == tiled::Visit::none) continue;
      const auto of_tile = static_cast<double>(rows);
      ++work.tiles;
      work.rows += of_tile;
      if (visit == tiled::Visit::masked) {
        work.masked_rows += of_tile;
        work.masked_pairs += of_tile * static_cast<double>(keys);
      }
      if (visit == tiled::Visit::whole) {
        std::fill(ranges.begin(), ranges.end(), kernels::KeyRange{0, static_cast<int32_t>(keys)});
      } else {
        terms.ranges(at, ranges.data());
      }
      add_blocks(ranges, work);
    }
  }
  return tiles->plan.queries() / rows;
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
  const na::TileCosts costs = na::tile_costs(head_dim, value_dim, dtype, run);
  const na::TileShapes shapes = na::choose_tiles(grid.group(0), grid, costs);
  const auto key_points = static_cast<double>(na::points_per_box(shapes.keys));
  const auto tokens = static_cast<double>(grid.tokens());
  na::TileWork work;
  int64_t query_boxes = 0;
  for (int64_t g = 0; g < grid.groups(); ++g) query_boxes += add_group(grid.group(g), shapes, work);
  const auto dim = static_cast<double>(head_dim), values = static_cast<double>(value_dim);
  const double computed = (work.scores * dim + work.sums * values) / (dim + values);
  const double pairs = tokens * tokens;
  work.copied = kCopies * tokens;
  const na::TileWork dense{.scores = pairs,
                           .sums = pairs,
                           .tiles = pairs / (kDenseRows * kDenseKeys),
                           .rows = pairs / kDenseKeys,
                           .copied = work.copied};
  return {.query_tile = sides_of(shapes.queries, axes.size()),
          .key_tile = sides_of(shapes.keys, axes.size()),
          .visited_mean = work.tiles / static_cast<double>(query_boxes),
          .dense = tokens / key_points,
          .speedup = pairs / computed,
          .predicted = na::cost_of(dense, costs) / na::cost_of(work, costs)};
}

}  // namespace heed::hardware
