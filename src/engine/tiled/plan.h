// The tile plan: which keys each query row visits. The engine asks it and never asks why.
#pragma once
#include <cstdint>
#include <vector>

#include "heed/masks.h"

namespace heed::tiled {

/// Keys [begin, end).
struct Interval {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

/// Query row i of batch entry b sees one interval of keys, whose ends never decrease with i.
class TilePlan {
 public:
  /// Masks of api.md, aligned to the end of the keys. Throws Error if lengths or windows are wrong.
  static TilePlan from_masks(const char* op, const Masks& masks, int64_t batch, int64_t queries,
                             int64_t keys);
  /// The last `queries` tokens of sequences of lengths[b] keys, causal, with a window to the left.
  static TilePlan for_decoding(const char* op, const Tensor& lengths, std::optional<int64_t> window,
                               int64_t batch, int64_t queries, int64_t capacity);

  Interval row(int64_t b, int64_t i) const;
  /// What rows [begin, end) see together.
  Interval rows(int64_t b, int64_t begin, int64_t end) const;
  /// True if each of the rows [begin, end) sees all of `keys`.
  bool covers(int64_t b, int64_t begin, int64_t end, Interval keys) const;
  /// Position of query 0 minus position of key 0, for mechanisms with distances.
  int64_t offset(int64_t b) const { return offset_[static_cast<size_t>(b)]; }
  int64_t queries() const { return queries_; }
  int64_t keys() const { return keys_; }

  /// Pairs (query, key) that are visible, over all batch entries: what exact work would be.
  int64_t visible_pairs() const;
  /// Pairs in the key tiles that the engine visits for query tiles of the given size.
  int64_t visited_pairs(int64_t query_tile, int64_t key_tile) const;

 private:
  TilePlan(int64_t batch, int64_t queries, int64_t keys);
  int64_t batch_ = 0, queries_ = 0, keys_ = 0;
  int64_t left_ = 0, right_ = 0;  // clamped to queries + keys, which is open
  std::vector<int64_t> offset_, limit_;
};

}  // namespace heed::tiled
