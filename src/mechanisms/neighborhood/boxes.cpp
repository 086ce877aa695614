#include "mechanisms/neighborhood/boxes.h"

#include <algorithm>
#include <span>

#include "kernels/tile.h"
#include "mechanisms/neighborhood/grid_call.h"

namespace heed::na {

using tiled::GridPoint;
using tiled::kGridAxes;

tiled::Interval AxisBoxes::points(int64_t n, int64_t length) const {
  const int64_t begin = n * side - shift;
  return {std::max<int64_t>(begin, 0), std::min(begin + side, length)};
}

int64_t points_per_box(const Boxes& boxes) {
  int64_t points = 1;
  for (const AxisBoxes& axis : boxes) points *= axis.side;
  return points;
}

BoxOrder::BoxOrder(const tiled::Neighborhood& grid, const Boxes& boxes)
    : boxes_(boxes), first_row_{0} {
  for (size_t a = 0; a < kGridAxes; ++a) dilation_[a] = grid.axis(static_cast<int>(a)).dilation;
  for (int64_t n = 0; n < grid.groups(); ++n) {
    const tiled::GridGroup lines = grid.group(n);
    Group group;
    int64_t count = points_per_box(boxes), rest = n;
    for (size_t a = kGridAxes; a-- > 0;) {
      group.residue[a] = rest % dilation_[a];
      rest /= dilation_[a];
      group.length[a] = lines.lines[a].length();
      group.boxes[a] = boxes[a].count(group.length[a]);
      count *= group.boxes[a];
    }
    groups_.push_back(group);
    first_row_.push_back(first_row_.back() + count);
  }
}

std::shared_ptr<const int64_t> BoxOrder::offsets(const Tensor& tokens, Outside outside) const {
  GridPoint strides;
  for (size_t a = 0; a < kGridAxes; ++a) strides[a] = tokens.stride(kGrid + static_cast<int>(a));
  auto all = std::make_shared<std::vector<int64_t>>();
  all->reserve(static_cast<size_t>(rows()));
  for (const Group& group : groups_) add_offsets(group, strides, outside, *all);
  return {all, all->data()};
}

void BoxOrder::add_offsets(const Group& group, const GridPoint& strides, Outside outside,
                           std::vector<int64_t>& offsets) const {
  // Of the points of all boxes along each axis.
  std::array<std::vector<int64_t>, kGridAxes> along;
  for (size_t a = 0; a < kGridAxes; ++a) {
    for (int64_t i = 0; i < group.boxes[a] * boxes_[a].side; ++i) {
      const int64_t point = i - boxes_[a].shift;
      const int64_t inside = std::clamp<int64_t>(point, 0, group.length[a] - 1);
      const bool none = outside == Outside::no_row && point != inside;
      along[a].push_back(none ? kernels::kNoRow
                              : (inside * dilation_[a] + group.residue[a]) * strides[a]);
    }
  }
  const auto part = [&](size_t a, int64_t box) {
    return std::span(along[a]).subspan(static_cast<size_t>(box * boxes_[a].side),
                                       static_cast<size_t>(boxes_[a].side));
  };
  const int64_t boxes = group.boxes[0] * group.boxes[1] * group.boxes[2];
  for (int64_t n = 0; n < boxes; ++n) {
    for (int64_t z : part(0, n / (group.boxes[1] * group.boxes[2]))) {
      for (int64_t y : part(1, n / group.boxes[2] % group.boxes[1])) {
        for (int64_t x : part(2, n % group.boxes[2])) {
          const bool none = std::min({z, y, x}) == kernels::kNoRow;
          offsets.push_back(none ? kernels::kNoRow : z + y + x);
        }
      }
    }
  }
}

}  // namespace heed::na
