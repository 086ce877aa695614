// The tokens of a call as sequences of the tiled engine, read and written where they lie: a line (na1d) as
// strided views, one for each residue group, grids of two and three axes in the order of boxes.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "mechanisms/neighborhood/grid_call.h"
#include "mechanisms/neighborhood/grid_terms.h"

namespace heed::na {

/// Rows [B,H,rows,width] in the order of the engine: tokens of a grid, or an array of its own.
struct GridTensor {
  Tensor rows;  // offsets: strides of the rows are meaningless
  std::shared_ptr<const int64_t> offsets;
  bool defined() const { return rows.defined(); }
  /// All rows of a batch entry.
  tiled::HeadRows entry(int64_t b) const;
};

/// Boxes of planes and grids; lines have none.
TileShapes shapes_for(const GridCall& call, const RunOptions& run);

class GridRows {
 public:
  enum class Side { queries, keys };
  using Outside = BoxOrder::Outside;

  /// `shapes`: what shapes_for chose.
  GridRows(const GridCall& call, const TileShapes& shapes);

  int64_t groups() const { return call_.grid.groups(); }
  int64_t rows(Side side) const { return boxed_ ? order(side).rows() : call_.query.size(3); }

  /// The tokens of a grid tensor; undefined stays undefined. Queries in no_row have no gradient and no
  /// result, `nearest` is for everything that is only read.
  GridTensor tokens(const Tensor& tokens, Side side, Outside outside) const;
  /// Rows of batch entry b and residue group g.
  tiled::HeadRows group(const GridTensor& t, int64_t b, int64_t g, Side side) const;
  const tiled::TilePlan& plan(int64_t g) const { return plans_[static_cast<size_t>(g)]; }

  /// Plans, tile sizes and terms for the sequences of `problem`, which are all groups of each batch
  /// entry in turn.
  void set_tiles(tiled::Problem& problem) const;
  tiled::ScoreTerms* terms() const { return terms_.get(); }
  /// Of the backward; empty without rpb.
  Array bias_gradient() const { return bias_ ? bias_->gradient() : Array(); }

 private:
  const BoxOrder& order(Side side) const { return side == Side::queries ? *queries_ : *keys_; }
  void plan_lines();
  void plan_boxes();

  const GridCall& call_;
  const bool boxed_;
  const TileShapes shapes_;
  std::optional<BoxOrder> queries_, keys_;
  std::vector<tiled::TilePlan> plans_;  // of each residue group
  std::optional<RelativeBias> bias_;
  std::unique_ptr<tiled::ScoreTerms> terms_;
};

}  // namespace heed::na
