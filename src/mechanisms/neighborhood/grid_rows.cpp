#include "mechanisms/neighborhood/grid_rows.h"

#include <algorithm>
#include <map>

namespace heed::na {

using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;
using tiled::TilePlan;

TileShapes shapes_for(const GridCall& call, const RunOptions& run) {
  if (call.rank == 1) return {};
  const TileCosts costs =
      tile_costs(call.query.size(kWidth), call.value.size(kWidth), call.query.dtype(), run);
  return choose_tiles(call.grid.group(0), call.grid, costs);
}

GridRows::GridRows(const GridCall& call, const TileShapes& shapes)
    : call_(call), boxed_(call.rank > 1), shapes_(shapes) {
  if (call.rpb.defined()) {
    bias_.emplace(call.rpb, wide_type(call.query.dtype()), call.grid);
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
  terms_ = std::make_unique<BoxTerms>(shapes_, std::move(tiles), bias_ ? &*bias_ : nullptr);
}

void GridRows::set_tiles(tiled::Problem& problem) const {
  problem.terms = terms_.get();
  if (!boxed_) return;
  problem.query_tile = points_per_box(shapes_.queries);
  problem.key_tile = points_per_box(shapes_.keys);
}

GridTensor GridRows::tokens(const Tensor& tokens, Side side, Outside outside) const {
  if (!tokens.defined()) return {};
  const Tensor rows(
      tokens.data(), tokens.dtype(),
      {tokens.size(kBatch), tokens.size(kHeads), this->rows(side), tokens.size(kWidth)},
      {tokens.stride(kBatch), tokens.stride(kHeads), boxed_ ? 0 : tokens.stride(3), 1});
  return {rows, boxed_ ? order(side).offsets(tokens, outside) : nullptr};
}

tiled::HeadRows GridTensor::entry(int64_t b) const {
  if (!defined()) return {};
  tiled::HeadRows entry(rows.select(0, b));
  entry.offsets = offsets;
  return entry;
}

tiled::HeadRows GridRows::group(const GridTensor& t, int64_t b, int64_t g, Side side) const {
  if (!t.defined()) return {};
  tiled::HeadRows rows = t.entry(b);
  const Interval part = boxed_ ? order(side).group_rows(g) : Interval{g, g + plan(g).queries()};
  Dims shape = rows.shape(), strides = rows.strides();
  shape[1] = part.end - part.begin;
  if (!boxed_) strides[1] *= groups();
  tiled::HeadRows group(Tensor(rows.origin(0, part.begin), rows.dtype(), shape, strides));
  if (t.offsets != nullptr) group.offsets = {t.offsets, t.offsets.get() + part.begin};
  return group;
}

}  // namespace heed::na
