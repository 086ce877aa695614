// Score terms of neighborhood attention: windows that are no intervals of rows, and relative biases.
#pragma once
#include <memory>
#include <vector>

#include "engine/tiled/problem.h"
#include "mechanisms/neighborhood/tiles.h"

namespace heed::na {

/// The table rpb [H, 2 kernel - 1 per axis] and its gradient.
class RelativeBias {
 public:
  /// `type` is float32, or float64 in float64 calls.
  RelativeBias(const Tensor& table, DType type, const tiled::Neighborhood& grid);

  /// Index of the bias of a key right at the query, inside a head's table; steps per axis.
  int64_t centre() const { return centre_; }
  int64_t step(size_t axis) const { return steps_[axis]; }
  template <class T>
  const T* values(int64_t head) const {
    return values_.as<T>() + head * size_;
  }
  void begin_gradient(int lanes);
  double* sums(int lane, int64_t head) const {
    return sums_[static_cast<size_t>(lane)].as<double>() + head * size_;
  }
  /// In the shape and type of the table.
  Array gradient() const;

 private:
  Tensor table_;
  Array values_;
  int64_t size_ = 1, centre_ = 0;
  std::array<int64_t, tiled::kGridAxes> steps_{};
  std::vector<Array> sums_;  // per lane
};

/// A line (na1d): windows are intervals of the plan, only biases are added.
class LineTerms final : public tiled::ScoreTerms {
 public:
  /// Sequence s is residue group s % groups.
  LineTerms(RelativeBias* bias, std::vector<tiled::TilePlan> groups)
      : bias_(bias), groups_(std::move(groups)) {}
  void shape(const tiled::TileAt& at, kernels::Block<float> s) const override;
  void shape(const tiled::TileAt& at, kernels::Block<double> s) const override;
  bool has_gradient() const override { return true; }
  void begin_gradient(int lanes) override { bias_->begin_gradient(lanes); }
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const float> ds,
                    kernels::Block<float> dq) const override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const double> ds,
                    kernels::Block<double> dq) const override;

 private:
  template <class T, class Each>
  void for_each_row(const tiled::TileAt& at, kernels::Block<T> block, const Each& each) const;
  template <class T>
  void shape_tile(const tiled::TileAt& at, kernels::Block<T> s) const;
  template <class T>
  void add_tile(int lane, const tiled::TileAt& at, kernels::Block<const T> ds) const;

  RelativeBias* bias_;
  std::vector<tiled::TilePlan> groups_;
};

/// Boxes (na2d, na3d): dead pairs of boxes are left out, the others masked where they must be.
class BoxTerms final : public tiled::ScoreTerms {
 public:
  /// Sequence s is residue group s % groups.
  BoxTerms(const TileShapes& shapes, std::vector<std::shared_ptr<const GroupTiles>> groups,
           RelativeBias* bias)
      : shapes_(shapes),
        rows_each_(points_per_box(shapes.queries)),
        keys_each_(points_per_box(shapes.keys)),
        groups_(std::move(groups)),
        bias_(bias) {}
  tiled::Visit visit(const tiled::TileAt& at) const override;
  bool adds() const override { return bias_ != nullptr; }
  bool ranges(const tiled::TileAt& at, kernels::KeyRange* ranges) const override;
  void shape(const tiled::TileAt& at, kernels::Block<float> s) const override;
  void shape(const tiled::TileAt& at, kernels::Block<double> s) const override;
  bool has_gradient() const override { return bias_ != nullptr; }
  void begin_gradient(int lanes) override { bias_->begin_gradient(lanes); }
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const float> ds,
                    kernels::Block<float> dq) const override;
  void add_gradient(int lane, const tiled::TileAt& at, kernels::Block<const double> ds,
                    kernels::Block<double> dq) const override;

 private:
  const GroupTiles& group_of(const tiled::TileAt& at) const {
    return *groups_[static_cast<size_t>(at.sequence) % groups_.size()];
  }
  template <class Each>
  void for_each_row(const tiled::TileAt& at, const Each& each) const;
  template <class T>
  void shape_tile(const tiled::TileAt& at, kernels::Block<T> s) const;
  template <class T>
  void add_tile(int lane, const tiled::TileAt& at, kernels::Block<const T> ds) const;

  TileShapes shapes_;
  int64_t rows_each_, keys_each_;
  std::vector<std::shared_ptr<const GroupTiles>> groups_;
  RelativeBias* bias_;
};

}  // namespace heed::na
