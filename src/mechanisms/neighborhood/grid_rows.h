// The tokens of a call as sequences of the tiled engine. A line (na1d) is read in place, its residue
// groups as strided views; grids of two and three axes are copied into the order of boxes.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "mechanisms/neighborhood/grid_call.h"
#include "mechanisms/neighborhood/grid_terms.h"

namespace heed::na {

/// Rows [B,H,rows,width], and the memory they need where they are no view of the caller's.
struct RowsOf {
  Array memory;
  Tensor rows;
};

class GridRows {
 public:
  enum class Side { queries, keys };

  explicit GridRows(const GridCall& call, const RunOptions& run);

  int64_t groups() const { return call_.grid.groups(); }
  int64_t rows(Side side) const { return boxed_ ? order(side).rows() : call_.query.size(3); }

  /// The tokens of a grid tensor; `outside` stands where a box reaches over the grid.
  RowsOf read(const Tensor& tokens, Side side, double outside = 0) const;
  /// Rows to be written and then stored as these tokens.
  RowsOf to_write(const Tensor& tokens, Side side) const;
  void store(const RowsOf& from, const Tensor& tokens, Side side) const;

  /// Rows of residue group g: of [H,rows,width] or [H,rows].
  Tensor group(const Tensor& rows, int64_t g, Side side) const;
  const tiled::TilePlan& plan(int64_t g) const { return plans_[static_cast<size_t>(g)]; }

  /// Plans, tile sizes and terms for the sequences of `problem`, which are all groups of each batch
  /// entry in turn.
  void set_tiles(tiled::Problem& problem) const;
  tiled::ScoreTerms* terms() const { return terms_.get(); }
  RelativeBias* bias() { return bias_ ? &*bias_ : nullptr; }

 private:
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
