// The tile plan: which keys each query row visits. The engine asks it and never asks why.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "heed/masks.h"

namespace heed::tiled {

/// Keys [begin, end).
struct Interval {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

/// Query row i of one sequence sees an interval of keys, whose ends never decrease with i.
class TilePlan {
 public:
  /// Every row sees every key.
  TilePlan(int64_t queries = 0, int64_t keys = 0);
  /// Masks of api.md for each batch entry, aligned to the end of the keys. Throws Error if lengths or
  /// windows are wrong.
  static std::vector<TilePlan> from_masks(const char* op, const Masks& masks, int64_t batch,
                                          int64_t queries, int64_t keys);
  /// The last `queries` tokens of sequences of lengths[b] keys, causal, with a window to the left.
  static std::vector<TilePlan> for_decoding(const char* op, const Tensor& lengths,
                                            std::optional<int64_t> window, int64_t batch,
                                            int64_t queries, int64_t capacity);
  /// The plan of some of the rows: row i of the result is row rows[i] of this plan. Increasing.
  TilePlan of_rows(std::vector<int64_t> rows) const;
  /// Row i sees intervals[i / rows_each], whose ends never decrease.
  static TilePlan of_intervals(std::vector<Interval> intervals, int64_t rows_each, int64_t queries,
                               int64_t keys);

  Interval row(int64_t i) const;
  /// What rows [begin, end) see together.
  Interval rows(int64_t begin, int64_t end) const;
  /// True if each of the rows [begin, end) sees all of `keys`.
  bool covers(int64_t begin, int64_t end, Interval keys) const;
  /// Position of row i on the axis of the keys, for masks and distances.
  int64_t position(int64_t i) const {
    return (rows_ ? (*rows_)[static_cast<size_t>(i)] : i) + offset_;
  }
  int64_t queries() const { return queries_; }
  int64_t keys() const { return keys_; }

 private:
  int64_t queries_ = 0, keys_ = 0;
  int64_t left_ = 0, right_ = 0;  // clamped to queries + keys, which is open
  int64_t offset_ = 0, limit_ = 0;
  std::shared_ptr<const std::vector<int64_t>> rows_;
  std::shared_ptr<const std::vector<Interval>> intervals_;
  int64_t rows_each_ = 1;  // that share an interval
};

}  // namespace heed::tiled
