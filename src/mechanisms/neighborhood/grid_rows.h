// The tokens of a call as sequences of the tiled engine. A line (na1d) is read in place, its residue
// groups as strided views; grids of two and three axes are copied into the order of boxes.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "mechanisms/neighborhood/grid_call.h"
#include "mechanisms/neighborhood/grid_terms.h"
#include "mechanisms/row_memory.h"

namespace heed::na {

class GridRows {
 public:
  enum class Side { queries, keys };

  explicit GridRows(const GridCall& call, const RunOptions& run);

  int64_t groups() const { return call_.grid.groups(); }
  int64_t rows(Side side) const { return boxed_ ? order(side).rows() : call_.query.size(3); }

  /// Parts of the call whose copies stay in the caches; one part where nothing is copied.
  std::vector<CallPart> parts() const;
  /// Room for query, key, value, out and lse of a part.
  int64_t part_bytes(const CallPart& part) const;

  /// The tokens of a grid tensor as rows [B,H,rows,width], in `memory` unless they are a view;
  /// `outside` stands where a box reaches over the grid.
  Tensor read(const Tensor& tokens, Side side, RowMemory& memory, double outside = 0) const;
  /// Rows to be written and then stored as these tokens.
  Tensor to_write(const Tensor& tokens, Side side, RowMemory& memory) const;
  void store(const Tensor& rows, const Tensor& tokens, Side side) const;

  /// Rows of residue group g: of [H,rows,width] or [H,rows].
  Tensor group(const Tensor& rows, int64_t g, Side side) const;
  const tiled::TilePlan& plan(int64_t g) const { return plans_[static_cast<size_t>(g)]; }

  /// Plans, tile sizes and terms for the sequences of `problem`, which are all groups of each batch
  /// entry in turn.
  void set_tiles(tiled::Problem& problem) const;
  tiled::ScoreTerms* terms() const { return terms_.get(); }
  /// The head of the whole call that a part starts with.
  void set_first_head(int64_t head) {
    if (bias_) bias_->set_first_head(head);
  }
  /// Of the backward calls so far; empty without rpb.
  Array bias_gradient() const { return bias_ ? bias_->gradient() : Array(); }

 private:
  Tensor rows_in(const Tensor& tokens, Side side, RowMemory& memory) const;
  const BoxOrder& order(Side side) const { return side == Side::queries ? *queries_ : *keys_; }
  void plan_lines();
  void plan_boxes();

  const GridCall& call_;
  const RunOptions& run_;
  const bool boxed_;
  TileShapes shapes_;
  std::optional<BoxOrder> queries_, keys_;
  std::vector<tiled::TilePlan> plans_;  // of each residue group
  std::optional<RelativeBias> bias_;
  std::unique_ptr<tiled::ScoreTerms> terms_;
};

}  // namespace heed::na
