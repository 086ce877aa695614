// Neighborhood attention on grids of one to three axes: which keys a query sees, which queries a key
// serves, and which tiles meet. The mask is a product of one interval per axis, so every question
// about boxes is answered axis by axis.
//
// Per axis: kernel (keys of a window), stride (queries that share one window), dilation (step between
// the keys of a window) and causality. A dilated axis is `dilation` independent lines, its residue
// groups; coordinates below count points of a group unless they are called tokens.
//
// Sources: arXiv 2403.04690 (windows, dilation, causal axes), arXiv 2504.16922 (stride, tile counts).
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/tiled/plan.h"

namespace heed::tiled {

struct NeighborhoodAxis {
  int64_t length = 1;  // tokens
  int64_t kernel = 1;
  int64_t stride = 1;    // 1..kernel
  int64_t dilation = 1;  // kernel * dilation <= length
  bool causal = false;   // keys behind the query's own coordinate are not seen
};

/// What a tile of queries sees of a tile of keys: nothing, some pairs, every pair.
enum class TileUse { dead, partial, full };

/// One residue group of one axis. Windows slide inside the line: a query that is not causal always
/// sees `kernel` keys. Both ends of a window never decrease with the query.
class WindowLine {
 public:
  WindowLine() = default;
  /// The tokens residue, residue + dilation, ... of the axis.
  WindowLine(const NeighborhoodAxis& axis, int64_t residue);

  int64_t length() const { return length_; }
  /// Keys that one query sees.
  Interval keys_of(int64_t query) const { return {start(query), end(query)}; }
  /// Keys that at least one of the queries sees; every key in it is seen by one.
  Interval keys_of(Interval queries) const;
  /// Keys that all of the queries see; may be empty.
  Interval shared_keys_of(Interval queries) const;

 private:
  int64_t start(int64_t query) const;
  int64_t end(int64_t query) const;

  int64_t length_ = 1, kernel_ = 1, stride_ = 1;
  bool causal_ = false;
};

/// Grids of fewer axes have axes of one point in front.
inline constexpr int kGridAxes = 3;
using GridPoint = std::array<int64_t, kGridAxes>;
using GridBox = std::array<Interval, kGridAxes>;
int64_t point_count(const GridBox& box);  // 0 if a side is empty

/// One residue group of the grid.
struct GridGroup {
  std::array<WindowLine, kGridAxes> lines;
  int64_t first_token = 0;                      // row-major index of point 0 in the grid
  std::array<int64_t, kGridAxes> token_step{};  // tokens between neighbours along an axis

  GridBox points() const;
  int64_t token(const GridPoint& point) const;
  GridBox keys_of(const GridBox& queries) const;
  GridBox shared_keys_of(const GridBox& queries) const;
  bool sees(const GridPoint& query, const GridPoint& key) const;
};

class Neighborhood {
 public:
  /// One to three axes, the slowest first. Throws Error naming `op`, the argument and its axis.
  Neighborhood(const char* op, std::span<const NeighborhoodAxis> axes);

  const NeighborhoodAxis& axis(int a) const { return axes_[static_cast<size_t>(a)]; }
  int64_t tokens() const;
  int64_t groups() const;  // the product of the dilations
  GridGroup group(int64_t n) const;
  /// A tile shape given for the grid's own axes, with ones in front.
  GridPoint tile_shape(const char* op, const char* argument, std::span<const int64_t> sides) const;

 private:
  std::array<NeighborhoodAxis, kGridAxes> axes_{};
  int rank_ = 1;
};

}  // namespace heed::tiled
