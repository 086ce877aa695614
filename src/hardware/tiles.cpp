#include "hardware/tiles.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "base/round_up.h"
#include "hardware/machine.h"
#include "heed/error.h"
#include "mechanisms/nearest.h"

namespace heed::hardware {
namespace {

using tiled::GridBox;
using tiled::GridGroup;
using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;
using tiled::Neighborhood;
using tiled::WindowLine;

constexpr const char* kOp = "tiles";
constexpr int64_t kMostTiles = int64_t{1} << 26;  // of one axis
constexpr double kMostRows = 4e9;                 // rows of keys that runs are looked up in

int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw Error("tiles: the number of key tiles does not fit 64 bits; larger tiles are needed");
  }
  return product;
}

/// Counts of one axis over all its residue groups; counts of the grid are products of these.
struct AxisCount {
  int64_t visited_max = 0;
  double visited = 0, query_tiles = 0;  // sums over tiles
  bool block_sparse = true;
};

void add_line(const WindowLine& line, double groups, int64_t query_tile, int64_t key_tile,
              Tiling tiling, AxisCount& count) {
  const int64_t length = line.length();
  for (int64_t q = 0; q < length;) {
    const Interval queries{q, q + std::min(query_tile, length - q)};
    const Interval seen = line.keys_of(queries), shared = line.shared_keys_of(queries);
    Interval covered = seen;
    if (tiling == Tiling::fixed) {
      const int64_t end = ceil_div(seen.end, key_tile);
      covered = {seen.begin / key_tile * key_tile,
                 end > length / key_tile ? length : end * key_tile};
    }
    const int64_t visited = ceil_div(covered.end - covered.begin, key_tile);
    count.visited_max = std::max(count.visited_max, visited);
    count.visited += groups * static_cast<double>(visited);
    count.query_tiles += groups;
    count.block_sparse &= shared.begin <= covered.begin && covered.end <= shared.end;
    q = queries.end;
  }
}

AxisCount count_axis(const tiled::NeighborhoodAxis& axis, int64_t query_tile, int64_t key_tile,
                     Tiling tiling) {
  if (axis.length / query_tile > kMostTiles) {
    throw Error("tiles: more than 2^26 query tiles along one axis; larger tiles are needed");
  }
  // Residue groups have one of two lengths: the first ones a point more.
  AxisCount count;
  const int64_t longer = axis.length % axis.dilation;
  if (longer > 0) {
    add_line(WindowLine(axis, 0), static_cast<double>(longer), query_tile, key_tile, tiling, count);
  }
  add_line(WindowLine(axis, axis.dilation - 1), static_cast<double>(axis.dilation - longer),
           query_tile, key_tile, tiling, count);
  return count;
}

double flop_speedup(const TilePlanCase& plan) {
  double speedup = 1;
  for (const auto& axis : plan.axes) {
    speedup *= static_cast<double>(axis.length) / static_cast<double>(axis.kernel);
  }
  return speedup;
}

using AxisCounts = std::array<AxisCount, kGridAxes>;

TileStatistic combined(const TilePlanCase& plan, const Neighborhood& grid,
                       const GridPoint& key_tile, const AxisCounts& counts) {
  TileStatistic result{1, 1, 1, 0, flop_speedup(plan), true};
  for (size_t a = 0; a < kGridAxes; ++a) {
    const int64_t length = grid.axis(static_cast<int>(a)).length;
    result.visited_max = checked_product(result.visited_max, counts[a].visited_max);
    result.visited_mean *= counts[a].visited / counts[a].query_tiles;
    result.dense = checked_product(result.dense, ceil_div(length, key_tile[a]));
    result.block_sparse &= counts[a].block_sparse;
  }
  result.analytical_speedup =
      static_cast<double>(result.dense) / static_cast<double>(result.visited_max);
  return result;
}

TileStatistic box_statistic(const TilePlanCase& plan, const Neighborhood& grid) {
  const GridPoint query_tile = grid.tile_shape(kOp, "q-tile", plan.query_tile);
  const GridPoint key_tile = grid.tile_shape(kOp, "kv-tile", plan.key_tile);
  AxisCounts counts;
  for (size_t a = 0; a < kGridAxes; ++a) {
    counts[a] = count_axis(grid.axis(static_cast<int>(a)), query_tile[a], key_tile[a], plan.tiling);
  }
  return combined(plan, grid, key_tile, counts);
}

/// Boxes that together are the points [begin, end) of the row-major order of the group.
void boxes_of_run(const GridGroup& group, int axis, Interval run, GridBox box,
                  std::vector<GridBox>& boxes) {
  if (run.empty()) return;
  const auto a = static_cast<size_t>(axis);
  if (axis == kGridAxes - 1) {
    box[a] = run;
    boxes.push_back(box);
    return;
  }
  int64_t inner = 1;
  for (size_t later = a + 1; later < kGridAxes; ++later) inner *= group.lines[later].length();
  const int64_t first = run.begin / inner, last = (run.end - 1) / inner;
  const auto part = [&](int64_t at, Interval inside) {
    box[a] = {at, at + 1};
    boxes_of_run(group, axis + 1, inside, box, boxes);
  };
  if (first == last) return part(first, {run.begin - first * inner, run.end - first * inner});
  // A broken plane at each end, whole planes between.
  int64_t whole_begin = first, whole_end = last + 1;
  if (run.begin % inner != 0) part(whole_begin++, {run.begin - first * inner, inner});
  if (run.end % inner != 0) part(--whole_end, {0, run.end - last * inner});
  if (whole_begin >= whole_end) return;
  box[a] = {whole_begin, whole_end};
  for (size_t later = a + 1; later < kGridAxes; ++later)
    box[later] = {0, group.lines[later].length()};
  boxes.push_back(box);
}

class FlatRuns {
 public:
  FlatRuns(const GridGroup& group, int64_t key_run) : group_(group), key_run_(key_run) {
    points_ = tiled::point_count(group.points());
    marked_.assign(static_cast<size_t>(ceil_div(points_, key_run)), -1);
  }
  int64_t points() const { return points_; }

  /// Runs of keys that the queries of a run see, and whether each sees all of their keys.
  std::pair<int64_t, bool> visit(Interval queries) {
    std::vector<GridBox> boxes;
    boxes_of_run(group_, 0, queries, {}, boxes);
    visited_ = keys_ = 0;
    ++stamp_;
    GridBox shared = group_.points();
    for (const GridBox& box : boxes) {
      mark(group_.keys_of(box));
      const GridBox all = group_.shared_keys_of(box);
      for (size_t a = 0; a < kGridAxes; ++a) {
        shared[a] = {std::max(shared[a].begin, all[a].begin), std::min(shared[a].end, all[a].end)};
      }
    }
    return {visited_, tiled::point_count(shared) == keys_};
  }

 private:
  void mark(const GridBox& keys) {
    const int64_t height = group_.lines[1].length(), width = group_.lines[2].length();
    for (int64_t x = keys[0].begin; x < keys[0].end; ++x) {
      for (int64_t y = keys[1].begin; y < keys[1].end; ++y) {
        const int64_t row = (x * height + y) * width;
        const int64_t last = (row + keys[2].end - 1) / key_run_;
        for (int64_t r = (row + keys[2].begin) / key_run_; r <= last; ++r) {
          if (marked_[static_cast<size_t>(r)] == stamp_) continue;
          marked_[static_cast<size_t>(r)] = stamp_;
          ++visited_;
          keys_ += std::min(key_run_, points_ - r * key_run_);
        }
      }
    }
  }

  const GridGroup& group_;
  int64_t key_run_, points_ = 0, stamp_ = 0, visited_ = 0, keys_ = 0;
  std::vector<int64_t> marked_;
};

void check_flat_work(const TilePlanCase& plan, const Neighborhood& grid) {
  if (plan.query_tile.size() != 1 || plan.key_tile.size() != 1) {
    throw Error(
        "tiles: flat tiles are runs of the row-major index, one number for q-tile and one "
        "for kv-tile is needed");
  }
  if (plan.query_tile[0] < 1 || plan.key_tile[0] < 1) {
    throw Error("tiles: a flat tile has " +
                std::to_string(std::min(plan.query_tile[0], plan.key_tile[0])) +
                " tokens, a number >= 1 is needed");
  }
  // Rows of keys for every query tile: the window, and what its queries spread over.
  const auto tokens = static_cast<double>(grid.tokens());
  const double query_tiles =
      tokens / static_cast<double>(plan.query_tile[0]) + static_cast<double>(grid.groups());
  double rows = 1, spread = static_cast<double>(plan.query_tile[0]);
  for (int a = kGridAxes - 1; a >= 0; --a) {
    const auto length = static_cast<double>(grid.axis(a).length);
    if (a < kGridAxes - 1) {
      rows *= std::min(length, static_cast<double>(grid.axis(a).kernel) + spread + 1);
    }
    spread /= length;
  }
  if (query_tiles * rows > kMostRows || tokens > kMostRows) {
    throw Error(
        "tiles: flat tiling of this grid takes too long; smaller grids or larger tiles are "
        "needed");
  }
}

TileStatistic flat_statistic(const TilePlanCase& plan, const Neighborhood& grid) {
  check_flat_work(plan, grid);
  TileStatistic result{0,   0, ceil_div(grid.tokens(), plan.key_tile[0]), 0, flop_speedup(plan),
                       true};
  double visited = 0, query_tiles = 0;
  for (int64_t g = 0; g < grid.groups(); ++g) {
    const GridGroup group = grid.group(g);
    FlatRuns runs(group, std::min(plan.key_tile[0], grid.tokens()));
    const int64_t side = std::min(plan.query_tile[0], runs.points());
    for (int64_t q = 0; q < runs.points(); q += side) {
      const auto [count, full] = runs.visit({q, std::min(q + side, runs.points())});
      result.visited_max = std::max(result.visited_max, count);
      result.block_sparse &= full;
      visited += static_cast<double>(count);
      query_tiles += 1;
    }
  }
  result.visited_mean = visited / query_tiles;
  result.analytical_speedup =
      static_cast<double>(result.dense) / static_cast<double>(result.visited_max);
  return result;
}

/// Strides of an axis at which fewer tiles are visited than at every smaller one.
std::vector<std::pair<int64_t, AxisCount>> axis_records(tiled::NeighborhoodAxis axis,
                                                        int64_t query_tile, int64_t key_tile,
                                                        Tiling tiling) {
  const double work = static_cast<double>(axis.kernel) * static_cast<double>(axis.length) /
                      static_cast<double>(query_tile);
  constexpr double kMostWork = 1e9;
  if (work > kMostWork) throw Error("search-stride: too many strides times tiles on one axis");
  std::vector<std::pair<int64_t, AxisCount>> records;
  int64_t least = INT64_MAX;
  for (axis.stride = 1; axis.stride <= axis.kernel; ++axis.stride) {
    const AxisCount count = count_axis(axis, query_tile, key_tile, tiling);
    if (count.visited_max >= least) continue;
    least = count.visited_max;
    records.emplace_back(axis.stride, count);
  }
  return records;
}

std::vector<int64_t> numbers(const Json& list) { return list.get<std::vector<int64_t>>(); }

}  // namespace

Tiling parse_tiling(const std::string& name) {
  const std::vector<std::string> names = {"static", "dynamic", "flat"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Tiling>(i);
  }
  throw Error("kv-tiling: found '" + name + "'" + did_you_mean(name, names) + ", one of " +
              joined(names) + " is needed");
}

const char* name_of(Tiling tiling) {
  return tiling == Tiling::fixed ? "static" : tiling == Tiling::at_first_key ? "dynamic" : "flat";
}

TileStatistic tile_statistic(const TilePlanCase& plan) {
  const Neighborhood grid(kOp, plan.axes);
  return plan.tiling == Tiling::flat ? flat_statistic(plan, grid) : box_statistic(plan, grid);
}

void check(const EndToEnd& program) {
  if (!(program.share > 0 && program.share <= 1)) {
    throw Error("e2e-share: found " + std::to_string(program.share) +
                ", the attention's share of the time, above 0 and at most 1, is needed");
  }
  if (program.steps < 1) {
    throw Error("steps: found " + std::to_string(program.steps) + ", a number >= 1 is needed");
  }
  if (program.dense_steps < 0 || program.dense_steps > program.steps) {
    throw Error("dense-steps: found " + std::to_string(program.dense_steps) +
                ", a number from 0 to the steps " + std::to_string(program.steps) + " is needed");
  }
}

double end_to_end(double speedup, const EndToEnd& program) {
  const double rounded = std::round(speedup * 10) / 10;
  const double sparse = program.share * static_cast<double>(program.steps - program.dense_steps) /
                        static_cast<double>(program.steps);
  return 1 / (1 - sparse + sparse / rounded);
}

std::vector<StrideRow> search_strides(TilePlanCase plan) {
  if (plan.tiling == Tiling::flat) {
    throw Error("search-stride: found flat tiling, static or dynamic is needed");
  }
  const Neighborhood grid(kOp, plan.axes);
  const GridPoint query_tile = grid.tile_shape(kOp, "q-tile", plan.query_tile);
  const GridPoint key_tile = grid.tile_shape(kOp, "kv-tile", plan.key_tile);
  // Visited tiles are a product over the axes, so records of the axes are records of the grid.
  std::vector<std::pair<GridPoint, AxisCounts>> chosen(1);
  for (size_t a = 0; a < kGridAxes; ++a) {
    const auto records =
        axis_records(grid.axis(static_cast<int>(a)), query_tile[a], key_tile[a], plan.tiling);
    constexpr size_t kMostRows = 100000;
    if (records.size() > kMostRows / chosen.size()) {
      throw Error("search-stride: more than 100000 strides remain; larger tiles are needed");
    }
    std::vector<std::pair<GridPoint, AxisCounts>> longer;
    for (auto [stride, counts] : chosen) {
      for (const auto& record : records) {
        std::tie(stride[a], counts[a]) = record;
        longer.emplace_back(stride, counts);
      }
    }
    chosen = std::move(longer);
  }
  std::vector<StrideRow> rows;
  for (const auto& [stride, counts] : chosen) {
    const auto skipped = static_cast<int64_t>(kGridAxes - plan.axes.size());
    rows.push_back(
        {{stride.begin() + skipped, stride.end()}, combined(plan, grid, key_tile, counts)});
  }
  std::stable_sort(rows.begin(), rows.end(), [](const StrideRow& a, const StrideRow& b) {
    return a.statistic.visited_max > b.statistic.visited_max;
  });
  return rows;
}

std::vector<PaperCase> paper_tile_cases() {
  const Json tables = parse_json(data_file("data/paper.tiles.json"), "paper.tiles.json");
  std::vector<PaperCase> cases;
  for (const Json& table : tables.at("tables")) {
    const auto grid = numbers(table.at("grid"));
    for (const Json& row : table.at("rows")) {
      PaperCase c;
      c.model = table.at("model").get<std::string>();
      const auto kernel = numbers(row.at("kernel")), stride = numbers(row.at("stride"));
      for (size_t a = 0; a < grid.size(); ++a)
        c.plan.axes.push_back({grid[a], kernel[a], stride[a]});
      c.plan.query_tile = numbers(row.at("query_tile"));
      c.plan.key_tile = numbers(row.at("key_tile"));
      const double share = table.at("attention_share").get<double>();
      const auto steps = table.at("steps").get<int64_t>();
      c.all_steps = {share, steps, 0};
      c.kept_steps = {share, steps, table.at("dense_steps").get<int64_t>()};
      cases.push_back(std::move(c));
    }
  }
  return cases;
}

}  // namespace heed::hardware
