// Which boxes of keys the boxes of queries meet, and the choice of their shapes.
#pragma once
#include <array>
#include <vector>

#include "heed/run.h"
#include "mechanisms/neighborhood/boxes.h"

namespace heed::na {

/// One axis of a residue group, cut into boxes.
class AxisTiles {
 public:
  AxisTiles() = default;
  AxisTiles(const tiled::WindowLine& line, AxisBoxes queries, AxisBoxes keys);

  int64_t length() const { return static_cast<int64_t>(windows_.size()); }
  /// Points of the keys that a query sees.
  tiled::Interval window(int64_t query) const { return windows_[static_cast<size_t>(query)]; }
  int64_t query_boxes() const { return query_boxes_; }
  int64_t key_boxes() const { return key_boxes_; }
  /// `partial` also where a box of keys reaches over an end of the line.
  tiled::TileUse use(int64_t query_box, int64_t key_box) const {
    const auto holds = [key_box](tiled::Interval boxes) {
      return key_box >= boxes.begin && key_box < boxes.end;
    };
    if (!holds(visited(query_box))) return tiled::TileUse::dead;
    return holds(full_[static_cast<size_t>(query_box)]) ? tiled::TileUse::full
                                                        : tiled::TileUse::partial;
  }
  /// Boxes of keys that hold a key seen by the box of queries.
  tiled::Interval visited(int64_t query_box) const {
    return visited_[static_cast<size_t>(query_box)];
  }

 private:
  int64_t query_boxes_ = 0, key_boxes_ = 0;
  std::vector<tiled::Interval> windows_, visited_, full_;
};

/// The boxes of one residue group.
struct GroupTiles {
  GroupTiles(const tiled::GridGroup& group, const Boxes& queries, const Boxes& keys);

  std::array<AxisTiles, tiled::kGridAxes> axes;
  tiled::TilePlan plan;  // of rows and keys in the order of boxes
};

/// Rows and keys that the products take at once (AVX-512, float32).
inline constexpr int64_t kRowBlock = 6, kKeyStep = 16;

struct TileShapes {
  Boxes queries, keys;
  double cost = 0;  // estimated, of one residue group
};

/// What the choice of shapes depends on besides the grid.
struct TileCosts {
  int64_t head_dim = 1, value_dim = 1;
  int64_t element = 4;  // bytes of one element while it is computed with
  double product = 1;   // cost of a multiply-add against float32's
};

TileCosts tile_costs(int64_t head_dim, int64_t value_dim, DType dtype, const RunOptions& run);

/// What visits of tiles consist of.
struct TileWork {
  double scores = 0, sums = 0;               // pairs of tokens in the two products
  double tiles = 0, rows = 0;                // visited, and their rows
  double masked_rows = 0, masked_pairs = 0;  // of tiles of which single scores are hidden
  double copied = 0;  // tokens with their D + Dv elements, out of place or back
};
/// Multiply-adds of float32's products that take as long.
double cost_of(const TileWork& work, const TileCosts& costs);

/// The cheapest of a few hundred shapes by the number of tile pairs that they visit.
TileShapes choose_tiles(const tiled::GridGroup& group, const tiled::Neighborhood& grid,
                        const TileCosts& costs);

}  // namespace heed::na
