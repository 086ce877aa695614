// The order in which tokens of a grid become rows of the tiled engine: residue groups one behind the
// other, each cut into boxes of one shape, so that a tile of the engine is a box.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "engine/tiled/neighborhood.h"
#include "heed/tensor.h"

namespace heed::na {

/// Boxes along one axis of a residue group: box n holds points [n side - shift, (n + 1) side - shift).
struct AxisBoxes {
  int64_t side = 1, shift = 0;
  int64_t count(int64_t length) const { return (length + shift + side - 1) / side; }
  /// Points of box n that exist.
  tiled::Interval points(int64_t n, int64_t length) const;
  int64_t box_of(int64_t point) const { return (point + shift) / side; }
};
using Boxes = std::array<AxisBoxes, tiled::kGridAxes>;
int64_t points_per_box(const Boxes& boxes);

class BoxOrder {
 public:
  BoxOrder(const tiled::Neighborhood& grid, const Boxes& boxes);

  /// Rows of one batch entry and head, those of box points outside the grid included.
  int64_t rows() const { return first_row_.back(); }
  tiled::Interval group_rows(int64_t group) const {
    const auto g = static_cast<size_t>(group);
    return {first_row_[g], first_row_[g + 1]};
  }

  /// Where the rows of [B,Z,Y,X,H,W] lie, in elements from a batch entry's head on. Box points outside
  /// the grid: `nearest`, the token next to them, to be read by nobody who counts; or kNoRow.
  enum class Outside { nearest, no_row };
  std::shared_ptr<const int64_t> offsets(const Tensor& tokens, Outside outside) const;

 private:
  struct Group {
    tiled::GridPoint residue, length, boxes;
  };
  void add_offsets(const Group& group, const tiled::GridPoint& strides, Outside outside,
                   std::vector<int64_t>& offsets) const;

  Boxes boxes_;
  tiled::GridPoint dilation_{};
  std::vector<Group> groups_;
  std::vector<int64_t> first_row_;  // per group, and one past the end
};

}  // namespace heed::na
