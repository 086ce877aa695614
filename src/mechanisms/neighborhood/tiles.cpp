#include "mechanisms/neighborhood/tiles.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/tile.h"

namespace heed::na {

using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;

namespace {

// Boxes that lie inside an interval of points, with all their points.
Interval whole_boxes(Interval points, AxisBoxes boxes) {
  return {(points.begin + boxes.shift + boxes.side - 1) / boxes.side,
          (points.end + boxes.shift) / boxes.side};
}

}  // namespace

AxisTiles::AxisTiles(const tiled::WindowLine& line, AxisBoxes queries, AxisBoxes keys)
    : query_boxes_(queries.count(line.length())), key_boxes_(keys.count(line.length())) {
  const int64_t length = line.length();
  for (int64_t i = 0; i < length; ++i) windows_.push_back(line.keys_of(i));
  for (int64_t q = 0; q < query_boxes_; ++q) {
    const Interval rows = queries.points(q, length);
    const Interval seen = line.keys_of(rows), shared = line.shared_keys_of(rows);
    visited_.push_back({keys.box_of(seen.begin), keys.box_of(seen.end - 1) + 1});
    full_.push_back(whole_boxes(shared, keys));
  }
}

GroupTiles::GroupTiles(const tiled::GridGroup& group, const Boxes& queries, const Boxes& keys) {
  int64_t query_boxes = 1, key_boxes = 1;
  for (size_t a = 0; a < kGridAxes; ++a) {
    axes[a] = AxisTiles(group.lines[a], queries[a], keys[a]);
    query_boxes *= axes[a].query_boxes();
    key_boxes *= axes[a].key_boxes();
  }
  const int64_t rows_each = points_per_box(queries), keys_each = points_per_box(keys);
  std::vector<Interval> seen;
  for (int64_t n = 0; n < query_boxes; ++n) {
    int64_t first = 0, last = 0, rest = n, step = 1;
    for (size_t a = kGridAxes; a-- > 0;) {
      const Interval visited = axes[a].visited(rest % axes[a].query_boxes());
      rest /= axes[a].query_boxes();
      first += visited.begin * step;
      last += (visited.end - 1) * step;
      step *= axes[a].key_boxes();
    }
    seen.push_back({first * keys_each, (last + 1) * keys_each});
  }
  // Ends of a plan never decrease; boxes inside the intervals that no query sees are left out later.
  for (size_t n = seen.size(); n-- > 1;) {
    seen[n - 1].begin = std::min(seen[n - 1].begin, seen[n].begin);
  }
  for (size_t n = 1; n < seen.size(); ++n) seen[n].end = std::max(seen[n].end, seen[n - 1].end);
  plan = tiled::TilePlan::of_intervals(std::move(seen), rows_each, query_boxes * rows_each,
                                       key_boxes * keys_each);
}

namespace {

// Costs in multiply-adds of the products, measured with AVX-512 in float32 and bfloat16.
constexpr double kElement = 10;     // a score: exponential, maximum, sum
constexpr double kRow = 500;        // a row of a tile: accumulators and statistics in and out
constexpr double kTile = 10000;     // a tile
constexpr double kMasked = 6;       // a score of a tile that is masked
constexpr double kMaskedRow = 500;  // a row of a tile that is masked
constexpr double kCopied = 33;      // an element of a token
constexpr int64_t kFewestRows = 32, kMostRows = 64, kMostKeys = 256;

struct AxisCount {
  double visited = 0, full = 0;  // pairs of boxes
  double seen = 0;               // keys that a query sees, summed over boxes of queries
  double query_boxes = 0;
};

// Pairs of boxes along one axis; of very many boxes, a sample stands for all.
AxisCount count_axis(const std::vector<Interval>& windows, int64_t query_side, AxisBoxes keys) {
  constexpr int64_t kMostSamples = 256;
  const auto length = static_cast<int64_t>(windows.size());
  const int64_t boxes = (length + query_side - 1) / query_side;
  const int64_t step = (boxes + kMostSamples - 1) / kMostSamples;
  AxisCount count;
  double samples = 0;
  for (int64_t box = 0; box < boxes; box += step, ++samples) {
    const int64_t begin = box * query_side, end = std::min(begin + query_side, length);
    const Interval first = windows[static_cast<size_t>(begin)];
    const Interval last = windows[static_cast<size_t>(end - 1)];
    const Interval full = whole_boxes({last.begin, first.end}, keys);
    count.visited += static_cast<double>(keys.box_of(last.end - 1) - keys.box_of(first.begin) + 1);
    count.full += static_cast<double>(std::max<int64_t>(0, full.end - full.begin));
    count.seen += static_cast<double>(first.end - first.begin + last.end - last.begin) / 2;
  }
  const double scale = static_cast<double>(boxes) / samples;
  return {count.visited * scale, count.full * scale, count.seen * scale,
          static_cast<double>(boxes)};
}

std::vector<int64_t> sides_up_to(int64_t length, int64_t most) {
  std::vector<int64_t> sides;
  for (int64_t side : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256}) {
    if (side < length && side <= most) sides.push_back(side);
  }
  if (length <= most) sides.push_back(length);
  return sides;
}

// All pair counts of one axis: by query side, key side, and shift of the keys.
class AxisCounts {
 public:
  AxisCounts(const tiled::WindowLine& line, const tiled::NeighborhoodAxis& axis)
      : query_sides_(sides_up_to(line.length(), kMostRows)),
        key_sides_(sides_up_to(line.length(), kMostKeys)) {
    std::vector<Interval> windows;
    for (int64_t i = 0; i < line.length(); ++i) windows.push_back(line.keys_of(i));
    // Windows away from the borders start at multiples of the stride from here on.
    const int64_t start =
        axis.causal ? axis.stride - axis.kernel : axis.stride / 2 - axis.kernel / 2;
    for (int64_t query_side : query_sides_) {
      for (int64_t key_side : key_sides_) {
        const int64_t shift = ((-start) % key_side + key_side) % key_side;
        const AxisCount plain = count_axis(windows, query_side, {key_side, 0});
        const AxisCount shifted = count_axis(windows, query_side, {key_side, shift});
        const bool better = shifted.visited < plain.visited ||
                            (shifted.visited == plain.visited && shifted.full > plain.full);
        counts_.push_back(better ? shifted : plain);
        keys_.push_back({key_side, better ? shift : 0});
      }
    }
  }
  const std::vector<int64_t>& query_sides() const { return query_sides_; }
  const std::vector<int64_t>& key_sides() const { return key_sides_; }
  const AxisCount& count(size_t query, size_t key) const {
    return counts_[query * key_sides_.size() + key];
  }
  AxisBoxes keys(size_t query, size_t key) const { return keys_[query * key_sides_.size() + key]; }

 private:
  std::vector<int64_t> query_sides_, key_sides_;
  std::vector<AxisCount> counts_;
  std::vector<AxisBoxes> keys_;
};

using Choice = std::array<size_t, kGridAxes>;

// Shapes from the sides of every axis with a number of points in the range; all small ones if none is.
std::vector<Choice> shapes(const std::array<std::vector<int64_t>, kGridAxes>& sides, int64_t fewest,
                           int64_t most) {
  std::vector<Choice> found;
  int64_t largest = 0;
  const auto each = [&](const auto& visit) {
    for (size_t z = 0; z < sides[0].size(); ++z) {
      for (size_t y = 0; y < sides[1].size(); ++y) {
        for (size_t x = 0; x < sides[2].size(); ++x) {
          const int64_t points = sides[0][z] * sides[1][y] * sides[2][x];
          if (points <= most) visit(Choice{z, y, x}, points);
        }
      }
    }
  };
  each([&](const Choice&, int64_t points) { largest = std::max(largest, points); });
  each([&](const Choice& choice, int64_t points) {
    if (points >= std::min(fewest, largest)) found.push_back(choice);
  });
  return found;
}

using Counts = std::array<AxisCount, kGridAxes>;

/// Points of a box in one plane or line across the axis.
double across(const GridPoint& sides, size_t axis) {
  double points = 1;
  for (size_t a = axis + 1; a < kGridAxes; ++a) points *= static_cast<double>(sides[a]);
  return points;
}

// Keys along the slowest axis of the boxes of keys, where a row's work ends with its window: in steps
// of the products, and rows that they take at once are computed together.
double computed_along(const GridPoint& rows, const GridPoint& keys, size_t axis,
                      const AxisCount& count) {
  const double step = std::max(1.0, kKeyStep / across(keys, axis));
  const double together = std::max(1.0, kRowBlock / across(rows, axis));
  const double computed =
      count.seen + count.query_boxes * (together - 1) + count.visited * (step - 1) / 2;
  return std::min(computed, count.visited * static_cast<double>(keys[axis]));
}

// Of all pairs of boxes. A box that is visited is computed whole along all axes but the slowest; every part
// of a box counts as masked.
TileWork estimate(const GridPoint& rows, const GridPoint& keys, const Counts& counts) {
  double all_rows = 1, all_keys = 1, visited = 1, full = 1, computed = 1;
  bool slowest = true;
  for (size_t a = 0; a < kGridAxes; ++a) {
    const auto side = static_cast<double>(keys[a]);
    computed *= slowest && keys[a] > 1 ? computed_along(rows, keys, a, counts[a])
                                       : counts[a].visited * side;
    slowest = slowest && keys[a] == 1;
    all_rows *= static_cast<double>(rows[a]);
    all_keys *= side;
    visited *= counts[a].visited;
    full *= counts[a].full;
  }
  all_rows = std::ceil(all_rows / kRowBlock) * kRowBlock;
  const double parts = (visited - full) * all_rows;
  return {.scores = computed * all_rows,
          .sums = computed * all_rows,
          .tiles = visited,
          .rows = visited * all_rows,
          .masked_rows = parts,
          .masked_pairs = parts * all_keys};
}

}  // namespace

double cost_of(const TileWork& work, const TileCosts& costs) {
  return work.scores * (costs.product * static_cast<double>(costs.head_dim) + kElement) +
         work.sums * costs.product * static_cast<double>(costs.value_dim) + work.tiles * kTile +
         work.rows * kRow + work.masked_rows * kMaskedRow + work.masked_pairs * kMasked +
         work.copied * static_cast<double>(costs.head_dim + costs.value_dim) * kCopied;
}

TileCosts tile_costs(int64_t head_dim, int64_t value_dim, DType dtype, const RunOptions& run) {
  TileCosts costs{head_dim, value_dim, dtype == DType::f64 ? 8 : 4};
  const bool half_unit =
      dtype == DType::bf16 && kernels::half_tile_kernels(chosen_isa(run)) != nullptr;
  if (half_unit) costs.product = 0.5;
  return costs;
}

TileShapes choose_tiles(const tiled::GridGroup& group, const tiled::Neighborhood& grid,
                        const TileCosts& costs) {
  std::vector<AxisCounts> axes;
  std::array<std::vector<int64_t>, kGridAxes> query_sides, key_sides;
  for (size_t a = 0; a < kGridAxes; ++a) {
    axes.emplace_back(group.lines[a], grid.axis(static_cast<int>(a)));
    query_sides[a] = axes[a].query_sides();
    key_sides[a] = axes[a].key_sides();
  }
  // Packed keys and values stay in the second-level cache.
  const int64_t cached = 128 * 1024 / ((costs.head_dim + costs.value_dim) * costs.element);
  const int64_t most_keys = std::clamp<int64_t>(cached, 64, kMostKeys);
  const auto key_shapes = shapes(key_sides, 64, most_keys);
  TileShapes best;
  best.cost = std::numeric_limits<double>::infinity();
  for (const Choice& q : shapes(query_sides, kFewestRows, kMostRows)) {
    for (const Choice& k : key_shapes) {
      GridPoint rows, keys;
      Counts counts;
      for (size_t a = 0; a < kGridAxes; ++a) {
        rows[a] = query_sides[a][q[a]];
        keys[a] = key_sides[a][k[a]];
        counts[a] = axes[a].count(q[a], k[a]);
      }
      const double cost = cost_of(estimate(rows, keys, counts), costs);
      if (cost >= best.cost) continue;
      best.cost = cost;
      for (size_t a = 0; a < kGridAxes; ++a) {
        best.queries[a] = {query_sides[a][q[a]], 0};
        best.keys[a] = axes[a].keys(q[a], k[a]);
      }
    }
  }
  return best;
}

}  // namespace heed::na
