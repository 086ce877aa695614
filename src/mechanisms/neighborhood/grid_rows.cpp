#include "mechanisms/neighborhood/grid_rows.h"

#include <algorithm>
#include <map>

namespace heed::na {

using tiled::GridPoint;
using tiled::Interval;
using tiled::kGridAxes;
using tiled::TilePlan;

namespace {

// Copies of a part for each thread: they come back from the caches when tiles are packed.
constexpr int64_t kPartBytes = int64_t{4} << 20;

}  // namespace

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
  const TileCosts costs =
      tile_costs(call_.query.size(kWidth), call_.value.size(kWidth), call_.query.dtype(), run_);
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
  terms_ = std::make_unique<BoxTerms>(shapes_, std::move(tiles), bias_ ? &*bias_ : nullptr);
}

void GridRows::set_tiles(tiled::Problem& problem) const {
  problem.terms = terms_.get();
  if (!boxed_) return;
  problem.query_tile = points_per_box(shapes_.queries);
  problem.key_tile = points_per_box(shapes_.keys);
}

std::vector<CallPart> GridRows::parts() const {
  const int64_t batch = call_.batch(), heads = call_.key.size(kHeads);
  if (!boxed_) return {{{0, batch}, {0, heads}}};
  const int64_t rows = call_.group() * this->rows(Side::queries) + this->rows(Side::keys);
  const int64_t head_bytes = rows * (call_.query.size(kWidth) + call_.value.size(kWidth)) *
                             static_cast<int64_t>(size_of(call_.query.dtype()));
  const int64_t budget = kPartBytes * run_.threads.value_or(default_threads());
  const int64_t head_step = std::clamp<int64_t>(budget / head_bytes, 1, heads);
  const int64_t batch_step =
      head_step < heads ? 1 : std::clamp<int64_t>(budget / (heads * head_bytes), 1, batch);
  std::vector<CallPart> parts;
  for (int64_t b = 0; b < batch; b += batch_step) {
    for (int64_t h = 0; h < heads; h += head_step) {
      parts.push_back({{b, std::min(b + batch_step, batch)}, {h, std::min(h + head_step, heads)}});
    }
  }
  return parts;
}

int64_t GridRows::part_bytes(const CallPart& part) const {
  if (!boxed_) return 0;
  const int64_t keys = (part.batch.end - part.batch.begin) *
                       (part.kv_heads.end - part.kv_heads.begin) * rows(Side::keys);
  const int64_t queries = keys / rows(Side::keys) * call_.group() * rows(Side::queries);
  const DType dtype = call_.query.dtype();
  const auto bytes = [](DType type, int64_t rows, int64_t width) {
    return RowMemory::bytes_of(type, rows * width);
  };
  const int64_t dim = call_.query.size(kWidth), value_dim = call_.value.size(kWidth);
  return bytes(dtype, queries, dim) + bytes(dtype, queries, value_dim) +
         bytes(DType::f64, queries, 1) + bytes(dtype, keys, dim) + bytes(dtype, keys, value_dim);
}

Tensor GridRows::rows_in(const Tensor& tokens, Side side, RowMemory& memory) const {
  return memory.take(tokens.dtype(),
                     {tokens.size(kBatch), tokens.size(kHeads), rows(side), tokens.size(kWidth)});
}

Tensor GridRows::read(const Tensor& tokens, Side side, RowMemory& memory, double outside) const {
  if (!boxed_) {
    return {tokens.data(),
            tokens.dtype(),
            {tokens.size(kBatch), tokens.size(kHeads), tokens.size(3), tokens.size(kWidth)},
            {tokens.stride(kBatch), tokens.stride(kHeads), tokens.stride(3), 1}};
  }
  const Tensor rows = rows_in(tokens, side, memory);
  order(side).gather(tokens, outside, rows, run_);
  return rows;
}

Tensor GridRows::to_write(const Tensor& tokens, Side side, RowMemory& memory) const {
  return boxed_ ? rows_in(tokens, side, memory) : read(tokens, side, memory);
}

void GridRows::store(const Tensor& rows, const Tensor& tokens, Side side) const {
  if (boxed_) order(side).scatter(rows, tokens, run_);
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
