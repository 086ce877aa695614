// Small windows on planes: neighbouring queries of a line lie in the lanes of vectors. What forward and
// backward share: which lines and shifts meet, how work is cut, and the turned lines of keys and values.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "base/parallel.h"
#include "kernels/window_lanes.h"
#include "mechanisms/neighborhood/grid_call.h"

namespace heed::na {

using tiled::Interval;

inline constexpr int64_t kMostWindowLanes = 16;
inline constexpr int64_t kMostLinesAtOnce = 8;   // that products take
inline constexpr int64_t kMostWindowLines = 32;  // of keys, that one query sees

/// Neighbouring queries of a line, one a lane: at which shifts they see keys.
template <class T>
struct LaneWindow {
  int64_t begin = 0, count = 0;         // queries; further lanes are as the last of them
  int64_t first_shift = 0, shifts = 0;  // from a query to the keys that one of the lanes sees
  bool whole = true;                    // all lanes see all of them
  std::array<T, kMostWindowLanes> first{}, last{};

  kernels::LaneShifts<T> seen() const {
    if (whole) return {};
    return {first.data(), last.data()};
  }
};

template <class T>
std::vector<LaneWindow<T>> lane_windows(const tiled::WindowLine& line, int64_t lanes);

std::vector<Interval> line_windows(const tiled::WindowLine& line);

/// Lines of keys in a row that the same lines of queries see.
struct Meeting {
  Interval queries, keys;
};

/// One residue group of a plane: lines of points.
template <class T>
struct Plane {
  /// `width`: points of a line of the grid.
  Plane(const tiled::GridGroup& group, int64_t width, const kernels::WindowKernels<T>& kernels);

  int64_t lines() const { return static_cast<int64_t>(seen.size()); }
  /// Lines of keys.
  Interval seen_by(int64_t y) const { return seen[static_cast<size_t>(y)]; }
  Interval seen_by(Interval queries) const {
    return {seen_by(queries.begin).begin, seen_by(queries.end - 1).end};
  }
  /// The keys among `keys` that lines of queries see.
  std::vector<Meeting> meetings(Interval queries, Interval keys) const;

  int64_t points;              // of a line
  std::vector<Interval> seen;  // lines of keys, by each line of queries; neither end decreases
  std::vector<LaneWindow<T>> windows;
  std::vector<Interval> key_shifts;    // at which the keys of a vector are seen
  std::array<int64_t, 2> first, step;  // tokens of the grid, along its last two axes
  int64_t before = 0, behind = 0;      // points beside queries that shifts reach
  int64_t most_shifts = 0;
  int64_t window_lines = 0;  // of keys, seen by a line of queries at most
  int64_t most_lines = 0;    // of keys, seen by lines of queries taken at once
  int64_t chunk = 0;         // points of a line that one item has, at most; whole vectors
};

/// Part of a plane, of one batch entry and head.
template <class T>
struct PlaneItem {
  const Plane<T>* plane;
  int64_t batch, head;
  Interval lines, points;
};

/// Turned lines of keys and values in a row, as many as are seen at once.
template <class T>
struct KeyLines {
  T *keys = nullptr, *values = nullptr;
  int64_t origin = 0, stride = 0;  // point at column 0, and elements from a row to the next
  int64_t turned = 0;              // lines before this one are there
};

template <class T>
class PlaneCall {
 public:
  PlaneCall(const GridCall& call, const RunOptions& run);

 protected:
  /// `heads` heads of each batch entry, in parts of lines: of at least `fewest` where there are as many.
  std::vector<PlaneItem<T>> items(int64_t heads, int64_t fewest, int64_t most) const;

  /// Whether run(item) is true for all of them; once it is not, the rest may be left out.
  template <class Run>
  bool run_all(const std::vector<PlaneItem<T>>& items, const Run& run) const {
    std::atomic<bool> good{true};
    const auto count = static_cast<int64_t>(items.size());
    parallel_for(count, threads_for(run_, count), [&](int64_t i, int) {
      if (good && !run(items[static_cast<size_t>(i)])) good = false;
    });
    return good;
  }

  static std::byte* point(const Tensor& t, const PlaneItem<T>& item, int64_t head, int64_t y,
                          int64_t x);
  /// Elements from a point of a line to the next.
  static int64_t point_stride(const Tensor& t, const PlaneItem<T>& item) {
    return t.stride(3) * item.plane->step[1];
  }
  static kernels::Rows rows(const Tensor& t, const PlaneItem<T>& item, int64_t head, int64_t y,
                            Interval points);
  /// Writes `count` points from x on of what lies at c[element * stride + point], times a factor.
  void store(kernels::Block<T> c, int64_t count, T factor, const Tensor& to,
             const PlaneItem<T>& item, int64_t head, int64_t y, int64_t x) const;

  /// For queries at `points`; elements of each of the two buffers.
  KeyLines<T> key_lines(const Plane<T>& plane, Interval points) const;
  int64_t key_line_elements(const Plane<T>& plane, const KeyLines<T>& lines, int64_t width) const {
    return plane.most_lines * width * lines.stride;
  }
  /// Points of the lines.
  static Interval points_of(const Plane<T>& plane, const KeyLines<T>& lines) {
    return {std::max<int64_t>(0, lines.origin),
            std::min(lines.origin + lines.stride, plane.points)};
  }
  /// Turns what is missing of the lines of key head `head` that are seen. False if something is not finite.
  bool turn_keys(const PlaneItem<T>& item, int64_t head, Interval seen, KeyLines<T>& lines) const;
  const T* key_line(const Plane<T>& plane, const KeyLines<T>& lines, int64_t y) const {
    return lines.keys + y % plane.most_lines * dim_ * lines.stride;
  }
  const T* value_line(const Plane<T>& plane, const KeyLines<T>& lines, int64_t y) const {
    return lines.values + y % plane.most_lines * values_ * lines.stride;
  }

  const GridCall& call_;
  const RunOptions& run_;
  const kernels::WindowKernels<T>& kernels_;
  const kernels::TileKernels<T>& tiles_;
  const int64_t lanes_, dim_, values_, group_;  // group_: heads of queries of a key head
  std::vector<Plane<T>> planes_;
};

}  // namespace heed::na
