#include "mechanisms/neighborhood/grid_rows.h"

#include <map>

namespace heed::na {

using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;
using tiled::TilePlan;

GridRows::GridRows(const GridCall& call, const RunOptions& run)
    : call_(call), run_(run), boxed_(call.rank > 1) {
  if (call.rpb.defined()) {
    bias_.emplace(call.rpb, tiled::statistics_type(call.query.dtype()), call.grid);
  }
  if (boxed_) {
    plan_boxes();
  } else {
    plan_lines();
  }
}

void GridRows::plan_lines() {
  std::map<int64_t, TilePlan> by_length;
  for (int64_t g = 0; g < groups(); ++g) {
    const tiled::WindowLine line = call_.grid.group(g).lines[kGridAxes - 1];
    const int64_t length = line.length();
    auto found = by_length.find(length);
    if (found == by_length.end()) {
      std::vector<Interval> windows;
      for (int64_t i = 0; i < length; ++i) windows.push_back(line.keys_of(i));
      found =
          by_length.emplace(length, TilePlan::of_intervals(std::move(windows), 1, length, length))
              .first;
    }
    plans_.push_back(found->second);
  }
  if (bias_) terms_ = std::make_unique<LineTerms>(&*bias_, plans_);
}

void GridRows::plan_boxes() {
  const TileCosts costs{call_.query.size(kWidth), call_.value.size(kWidth),
                        call_.query.dtype() == DType::f64 ? 8 : 4};
  shapes_ = choose_tiles(call_.grid.group(0), call_.grid, costs);
  queries_.emplace(call_.grid, shapes_.queries);
  keys_.emplace(call_.grid, shapes_.keys);
  std::map<GridPoint, std::shared_ptr<const GroupTiles>> by_length;
  std::vector<std::shared_ptr<const GroupTiles>> tiles;
  for (int64_t g = 0; g < groups(); ++g) {
    const tiled::GridGroup group = call_.grid.group(g);
    GridPoint length;
    for (size_t a = 0; a < kGridAxes; ++a) length[a] = group.lines[a].length();
    auto& found = by_length[length];
    if (!found) found = std::make_shared<const GroupTiles>(group, shapes_.queries, shapes_.keys);
    tiles.push_back(found);
    plans_.push_back(found->plan);
  }
  terms_ = std::make_unique<BoxTerms>(shapes_, std::move(tiles), bias());
}

void GridRows::set_tiles(tiled::Problem& problem) const {
  problem.terms = terms_.get();
  if (!boxed_) return;
  problem.query_tile = points_per_box(shapes_.queries);
  problem.key_tile = points_per_box(shapes_.keys);
}

RowsOf GridRows::read(const Tensor& tokens, Side side, double outside) const {
  RowsOf result;
  if (boxed_) {
    result.memory = order(side).gather(tokens, outside, run_);
    result.rows = result.memory;
  } else {
    result.rows = {tokens.data(),
                   tokens.dtype(),
                   {tokens.size(kBatch), tokens.size(kHeads), tokens.size(3), tokens.size(kWidth)},
                   {tokens.stride(kBatch), tokens.stride(kHeads), tokens.stride(3), 1}};
  }
  return result;
}

RowsOf GridRows::to_write(const Tensor& tokens, Side side) const {
  if (!boxed_) return read(tokens, side);
  RowsOf result;
  result.memory = Array(
      tokens.dtype(), {tokens.size(kBatch), tokens.size(kHeads), rows(side), tokens.size(kWidth)});
  result.rows = result.memory;
  return result;
}

void GridRows::store(const RowsOf& from, const Tensor& tokens, Side side) const {
  if (boxed_) order(side).scatter(from.rows, tokens, run_);
}

Tensor GridRows::group(const Tensor& rows, int64_t g, Side side) const {
  if (boxed_) {
    const Interval part = order(side).group_rows(g);
    return rows.slice(1, part.begin, part.end);
  }
  Dims shape = rows.shape(), strides = rows.strides();
  shape[1] = plan(g).queries();
  strides[1] *= groups();
  return {rows.at({0, g}), rows.dtype(), shape, strides};
}

}  // namespace heed::na
