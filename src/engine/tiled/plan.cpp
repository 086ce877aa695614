#include "engine/tiled/plan.h"

#include <algorithm>
#include <string>

#include "engine/operands.h"
#include "heed/error.h"

namespace heed::tiled {

namespace {

int64_t window_side(const char* op, const char* side, const std::optional<int64_t>& value,
                    int64_t open) {
  if (!value) return open;
  if (*value < 0) {
    throw Error(std::string(op) + ": window " + side + " is " + std::to_string(*value) +
                ", a number of keys >= 0 is needed (leave it out for an open side)");
  }
  return std::min(*value, open);
}

}  // namespace

TilePlan::TilePlan(int64_t queries, int64_t keys)
    : queries_(queries),
      keys_(keys),
      left_(queries + keys),
      right_(queries + keys),
      offset_(keys - queries),
      limit_(keys) {}

std::vector<TilePlan> TilePlan::from_masks(const char* op, const Masks& masks, int64_t batch,
                                           int64_t queries, int64_t keys) {
  TilePlan plan(queries, keys);
  const int64_t open = queries + keys;
  plan.left_ = window_side(op, "left", masks.window.left, open);
  plan.right_ = window_side(op, "right", masks.window.right, open);
  if (masks.causal) plan.right_ = 0;
  if (masks.from_start) plan.offset_ = 0;
  std::vector<TilePlan> plans(static_cast<size_t>(batch), plan);
  if (masks.lengths.defined()) {
    const std::vector<int64_t> lengths = read_lengths(op, masks.lengths, batch, keys);
    for (size_t b = 0; b < plans.size(); ++b) plans[b].limit_ = lengths[b];
  }
  return plans;
}

std::vector<TilePlan> TilePlan::for_decoding(const char* op, const Tensor& lengths,
                                             std::optional<int64_t> window, int64_t batch,
                                             int64_t queries, int64_t capacity) {
  TilePlan plan(queries, capacity);
  plan.left_ = window_side(op, "left", window, queries + capacity);
  plan.right_ = 0;
  std::vector<TilePlan> plans;
  for (int64_t length : read_lengths(op, lengths, batch, capacity)) {
    plan.limit_ = length;
    plan.offset_ = length - queries;
    plans.push_back(plan);
  }
  return plans;
}

TilePlan TilePlan::of_rows(std::vector<int64_t> rows) const {
  TilePlan plan = *this;
  plan.queries_ = static_cast<int64_t>(rows.size());
  plan.rows_ = std::make_shared<const std::vector<int64_t>>(std::move(rows));
  return plan;
}

TilePlan TilePlan::of_intervals(std::vector<Interval> intervals, int64_t rows_each, int64_t queries,
                                int64_t keys) {
  TilePlan plan(queries, keys);
  plan.intervals_ = std::make_shared<const std::vector<Interval>>(std::move(intervals));
  plan.rows_each_ = rows_each;
  return plan;
}

Interval TilePlan::row(int64_t i) const {
  if (intervals_) return (*intervals_)[static_cast<size_t>(i / rows_each_)];
  const int64_t at = position(i);
  return {std::max<int64_t>(0, at - left_), std::min(limit_, at + right_ + 1)};
}

Interval TilePlan::rows(int64_t begin, int64_t end) const {
  // Empty rows at either end (before the first key, behind the last) do not stretch the interval:
  // begin and end are both non-decreasing.
  return {row(begin).begin, row(end - 1).end};
}

bool TilePlan::covers(int64_t begin, int64_t end, Interval keys) const {
  return row(end - 1).begin <= keys.begin && row(begin).end >= keys.end;
}

}  // namespace heed::tiled
