#include "mechanisms/neighborhood/grid_terms.h"

#include <algorithm>
#include <limits>

namespace heed::na {

using kernels::Block;
using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;
using tiled::TileAt;
using tiled::TileUse;
using tiled::Visit;

RelativeBias::RelativeBias(const Tensor& table, DType type, const tiled::Neighborhood& grid)
    : table_(table), values_(convert(table, type)) {
  for (size_t a = kGridAxes; a-- > 0;) {
    const int64_t kernel = grid.axis(static_cast<int>(a)).kernel;
    steps_[a] = size_;
    centre_ += (kernel - 1) * size_;
    size_ *= 2 * kernel - 1;
  }
}

void RelativeBias::begin_gradient(int lanes) {
  while (sums_.size() < static_cast<size_t>(lanes)) {
    sums_.push_back(Array::zeros(DType::f64, {table_.size(0), size_}));
  }
}

Array RelativeBias::gradient() const {
  Array total = Array::zeros(DType::f64, table_.shape());
  for (const Array& lane : sums_) {
    for (int64_t i = 0; i < total.count(); ++i) total.as<double>()[i] += lane.as<double>()[i];
  }
  return convert(total, table_.dtype());
}

// each(bias of the row's first key in the tile, that key's row of the block, keys).
template <class T, class Each>
void LineTerms::for_each_row(const TileAt& at, Block<T> block, const Each& each) const {
  const tiled::TilePlan& plan = groups_[static_cast<size_t>(at.sequence) % groups_.size()];
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t query = at.row + r;
    const Interval window = plan.row(query);
    const int64_t begin = std::max(window.begin, at.key);
    const int64_t end = std::min(window.end, at.key + at.keys);
    if (begin < end)
      each(bias_->centre() + begin - query, block.row(r) + begin - at.key, end - begin);
  }
}

template <class T>
void LineTerms::shape_tile(const TileAt& at, Block<T> s) const {
  const T* bias = bias_->values<T>(at.head);
  for_each_row(at, s, [bias](int64_t first, T* row, int64_t keys) {
    for (int64_t m = 0; m < keys; ++m) row[m] += bias[first + m];
  });
}

template <class T>
void LineTerms::add_tile(int lane, const TileAt& at, Block<const T> ds) const {
  double* sums = bias_->sums(lane, at.head);
  for_each_row(at, ds, [sums](int64_t first, const T* row, int64_t keys) {
    for (int64_t m = 0; m < keys; ++m) sums[first + m] += row[m];
  });
}

void LineTerms::shape(const TileAt& at, Block<float> s) const { shape_tile(at, s); }
void LineTerms::shape(const TileAt& at, Block<double> s) const { shape_tile(at, s); }
void LineTerms::add_gradient(int lane, const TileAt& at, Block<const float> ds,
                             Block<float> /*dq*/) const {
  add_tile(lane, at, ds);
}
void LineTerms::add_gradient(int lane, const TileAt& at, Block<const double> ds,
                             Block<double> /*dq*/) const {
  add_tile(lane, at, ds);
}

namespace {

/// Numbers of a box along the axes.
template <class Count>
GridPoint unravel(int64_t n, const Count& count) {
  GridPoint at;
  for (size_t a = kGridAxes; a-- > 0;) {
    at[a] = n % count(a);
    n /= count(a);
  }
  return at;
}

/// What a query sees of a box of keys, from the box's first point.
struct SeenPart {
  std::array<Interval, kGridAxes> sides;
};

template <class T>
void hide(T* row, int64_t count) {
  for (int64_t m = 0; m < count; ++m) row[m] = -std::numeric_limits<T>::infinity();
}

// Hides everything of a box of keys but the part, between its first and last key.
template <class T>
void hide_between(T* row, const SeenPart& part, const Boxes& boxes) {
  const auto [z, y, x] = part.sides;
  const int64_t line = boxes[2].side, plane = boxes[1].side * line;
  const int64_t behind_line = line - (x.end - x.begin),
                behind_plane = plane - (y.end - y.begin) * line;
  for (int64_t i = z.begin; i < z.end; ++i) {
    T* at = row + i * plane + y.begin * line + x.end;
    if (behind_line > 0) {
      for (int64_t j = y.begin; j + 1 < y.end; ++j, at += line) hide(at, behind_line);
    } else {
      at += (y.end - y.begin - 1) * line;
    }
    if (i + 1 < z.end) hide(at, behind_plane + behind_line);
  }
}

// The part's keys from the first to the last.
kernels::KeyRange range_of(const SeenPart& part, const Boxes& boxes) {
  const auto [z, y, x] = part.sides;
  if (z.empty() || y.empty() || x.empty()) return {};
  const int64_t line = boxes[2].side, plane = boxes[1].side * line;
  return {static_cast<int32_t>(z.begin * plane + y.begin * line + x.begin),
          static_cast<int32_t>((z.end - 1) * plane + (y.end - 1) * line + x.end)};
}

// each(index of the first key's bias, offset of that key in the box, keys) for the lines of the part.
template <class Each>
void for_each_bias(const RelativeBias& bias, const SeenPart& part, const GridPoint& from_query,
                   const Boxes& boxes, const Each& each) {
  const auto [z, y, x] = part.sides;
  const int64_t first = bias.centre() + (from_query[2] + x.begin) * bias.step(2);
  for (int64_t i = z.begin; i < z.end; ++i) {
    for (int64_t j = y.begin; j < y.end; ++j) {
      each(first + (from_query[0] + i) * bias.step(0) + (from_query[1] + j) * bias.step(1),
           (i * boxes[1].side + j) * boxes[2].side + x.begin, x.end - x.begin);
    }
  }
}

}  // namespace

Visit BoxTerms::visit(const TileAt& at) const {
  const GroupTiles& group = group_of(at);
  const GridPoint query =
      unravel(at.row / rows_each_, [&](size_t a) { return group.axes[a].query_boxes(); });
  const GridPoint key =
      unravel(at.key / keys_each_, [&](size_t a) { return group.axes[a].key_boxes(); });
  Visit visit = Visit::whole;
  bool slowest = true;  // of the axes along which a box has several keys: there, a part is a range
  for (size_t a = 0; a < kGridAxes; ++a) {
    const TileUse use = group.axes[a].use(query[a], key[a]);
    if (use == TileUse::dead) return Visit::none;
    if (use == TileUse::partial) visit = std::max(visit, slowest ? Visit::ranged : Visit::masked);
    slowest = slowest && shapes_.keys[a].side == 1;
  }
  return visit;
}

// each(row of the tile, what it sees, key box origin - query). Rows outside the grid see what the last
// point inside sees; nobody reads them.
template <class Each>
void BoxTerms::for_each_row(const TileAt& at, const Each& each) const {
  const GroupTiles& group = group_of(at);
  const GridPoint key_box =
      unravel(at.key / keys_each_, [&](size_t a) { return group.axes[a].key_boxes(); });
  const GridPoint box =
      unravel(at.row / rows_each_, [&](size_t a) { return group.axes[a].query_boxes(); });
  SeenPart part;
  GridPoint from_query;
  const auto set = [&](size_t a, int64_t inside) {
    const int64_t query =
        std::min(box[a] * shapes_.queries[a].side + inside, group.axes[a].length() - 1);
    const AxisBoxes keys = shapes_.keys[a];
    const int64_t origin = key_box[a] * keys.side - keys.shift;
    const Interval window = group.axes[a].window(query);
    part.sides[a] = {std::clamp<int64_t>(window.begin - origin, 0, keys.side),
                     std::clamp<int64_t>(window.end - origin, 0, keys.side)};
    from_query[a] = origin - query;
  };
  int64_t r = 0;
  for (int64_t z = 0; z < shapes_.queries[0].side; ++z) {
    set(0, z);
    for (int64_t y = 0; y < shapes_.queries[1].side; ++y) {
      set(1, y);
      for (int64_t x = 0; x < shapes_.queries[2].side; ++x) {
        set(2, x);
        each(r++, part, from_query);
      }
    }
  }
}

bool BoxTerms::ranges(const TileAt& at, kernels::KeyRange* ranges) const {
  for_each_row(at, [&](int64_t r, const SeenPart& part, const GridPoint&) {
    ranges[r] = range_of(part, shapes_.keys);
  });
  return true;
}

template <class T>
void BoxTerms::shape_tile(const TileAt& at, Block<T> s) const {
  const T* bias = bias_ == nullptr ? nullptr : bias_->values<T>(at.head);
  for_each_row(at, [&](int64_t r, const SeenPart& part, const GridPoint& from_query) {
    T* row = s.row(r);
    const kernels::KeyRange range = range_of(part, shapes_.keys);
    if (range.empty()) return;
    hide_between(row, part, shapes_.keys);
    if (bias == nullptr) return;
    for_each_bias(*bias_, part, from_query, shapes_.keys,
                  [&](int64_t first, int64_t offset, int64_t keys) {
                    for (int64_t m = 0; m < keys; ++m) row[offset + m] += bias[first + m];
                  });
  });
}

template <class T>
void BoxTerms::add_tile(int lane, const TileAt& at, Block<const T> ds) const {
  double* sums = bias_->sums(lane, at.head);
  for_each_row(at, [&](int64_t r, const SeenPart& part, const GridPoint& from_query) {
    if (range_of(part, shapes_.keys).empty()) return;
    for_each_bias(*bias_, part, from_query, shapes_.keys,
                  [&](int64_t first, int64_t offset, int64_t keys) {
                    const T* row = ds.row(r) + offset;
                    for (int64_t m = 0; m < keys; ++m) sums[first + m] += row[m];
                  });
  });
}

void BoxTerms::shape(const TileAt& at, Block<float> s) const { shape_tile(at, s); }
void BoxTerms::shape(const TileAt& at, Block<double> s) const { shape_tile(at, s); }
void BoxTerms::add_gradient(int lane, const TileAt& at, Block<const float> ds,
                            Block<float> /*dq*/) const {
  add_tile(lane, at, ds);
}
void BoxTerms::add_gradient(int lane, const TileAt& at, Block<const double> ds,
                            Block<double> /*dq*/) const {
  add_tile(lane, at, ds);
}

}  // namespace heed::na
