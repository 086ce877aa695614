#include "mechanisms/neighborhood/boxes.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
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

BoxOrder::Box BoxOrder::box(int64_t n) const {
  const int64_t first_row = n * points_per_box(boxes_);
  const auto next = std::upper_bound(first_row_.begin(), first_row_.end(), first_row);
  Box found{next - first_row_.begin() - 1, first_row, {}};
  const Group& group = groups_[static_cast<size_t>(found.group)];
  n -= first_row_[static_cast<size_t>(found.group)] / points_per_box(boxes_);
  for (size_t a = kGridAxes; a-- > 0;) {
    found.at[a] = n % group.boxes[a];
    n /= group.boxes[a];
  }
  return found;
}

// visit(first token of the run, its row, tokens): runs along the last axis.
template <class Visit>
void BoxOrder::for_each_run(const Box& box, const Visit& visit) const {
  const Group& group = groups_[static_cast<size_t>(box.group)];
  std::array<tiled::Interval, kGridAxes> points;
  for (size_t a = 0; a < kGridAxes; ++a) points[a] = boxes_[a].points(box.at[a], group.length[a]);
  const auto place = [&](size_t a, int64_t point) {
    return point - (box.at[a] * boxes_[a].side - boxes_[a].shift);
  };
  const auto token = [&](size_t a, int64_t point) {
    return point * dilation_[a] + group.residue[a];
  };
  for (int64_t z = points[0].begin; z < points[0].end; ++z) {
    for (int64_t y = points[1].begin; y < points[1].end; ++y) {
      const int64_t line = place(0, z) * boxes_[1].side + place(1, y);
      visit(GridPoint{token(0, z), token(1, y), token(2, points[2].begin)},
            box.first_row + line * boxes_[2].side + place(2, points[2].begin),
            points[2].end - points[2].begin);
    }
  }
}

namespace {

void fill_rows(const Tensor& rows, int64_t begin, int64_t end, double value) {
  const int64_t width = rows.size(1), count = (end - begin) * width;
  std::byte* to = rows.at({begin});
  if (value == 0) {
    std::memset(to, 0, static_cast<size_t>(count) * size_of(rows.dtype()));
  } else if (rows.dtype() == DType::f64) {
    std::fill_n(reinterpret_cast<double*>(to), count, value);
  } else {
    std::fill_n(reinterpret_cast<float*>(to), count, static_cast<float>(value));
  }
}

}  // namespace

void BoxOrder::gather(const Tensor& tokens, double outside, const Tensor& rows,
                      const RunOptions& run) const {
  const int64_t heads = tokens.size(kHeads), width = tokens.size(kWidth);
  const int64_t points = points_per_box(boxes_), boxes = this->rows() / points;
  const size_t bytes = static_cast<size_t>(width) * size_of(tokens.dtype());
  const int64_t step =
      tokens.stride(kGrid + 2) * dilation_[2] * static_cast<int64_t>(size_of(tokens.dtype()));
  const int64_t count = tokens.size(kBatch) * boxes;
  parallel_for(count, threads_for(run, count), [&](int64_t item, int) {
    const int64_t b = item / boxes;
    const Box box = this->box(item % boxes);
    int64_t existing = 0;
    for_each_run(box,
                 [&](const GridPoint&, int64_t, int64_t run_length) { existing += run_length; });
    for (int64_t h = 0; h < heads && existing < points; ++h) {
      fill_rows(rows.select(0, b).select(0, h), box.first_row, box.first_row + points, outside);
    }
    for_each_run(box, [&](const GridPoint& t, int64_t row, int64_t run_length) {
      for (int64_t h = 0; h < heads; ++h) {
        const std::byte* from = tokens.at({b, t[0], t[1], t[2], h});
        std::byte* to = rows.at({b, h, row});
        for (int64_t x = 0; x < run_length; ++x, from += step, to += bytes) {
          std::memcpy(to, from, bytes);
        }
      }
    });
  });
}

void BoxOrder::scatter(const Tensor& rows, const Tensor& tokens, const RunOptions& run) const {
  const int64_t heads = tokens.size(kHeads), width = tokens.size(kWidth);
  const int64_t boxes = this->rows() / points_per_box(boxes_);
  const auto element = static_cast<int64_t>(size_of(tokens.dtype()));
  const size_t bytes = static_cast<size_t>(width * element);
  const int64_t step = tokens.stride(kGrid + 2) * dilation_[2] * element;
  const int64_t row_step = rows.stride(2) * element;
  const int64_t count = tokens.size(kBatch) * boxes;
  parallel_for(count, threads_for(run, count), [&](int64_t item, int) {
    const int64_t b = item / boxes;
    for_each_run(this->box(item % boxes), [&](const GridPoint& t, int64_t row, int64_t run_length) {
      for (int64_t h = 0; h < heads; ++h) {
        std::byte* to = tokens.at({b, t[0], t[1], t[2], h});
        const std::byte* from = rows.at({b, h, row});
        for (int64_t x = 0; x < run_length; ++x, to += step, from += row_step) {
          std::memcpy(to, from, bytes);
        }
      }
    });
  });
}

}  // namespace heed::na
