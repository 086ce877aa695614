#include "mechanisms/neighborhood/window_planes.h"

#include <algorithm>

#include "base/round_up.h"

namespace heed::na {

using kernels::Rows;
using tiled::GridGroup;
using tiled::WindowLine;

namespace {

constexpr int64_t kChunkPoints = 64;  // of a line that is turned at once

std::vector<Interval> shifts_of_keys(const WindowLine& line, int64_t lanes) {
  std::vector<Interval> shifts(static_cast<size_t>(ceil_div(line.length(), lanes)));
  for (int64_t query = 0; query < line.length(); ++query) {
    const Interval keys = line.keys_of(query);
    for (int64_t n = keys.begin / lanes; n * lanes < keys.end; ++n) {
      const int64_t begin = std::max(keys.begin, n * lanes) - query;
      const int64_t end = std::min(keys.end, (n + 1) * lanes) - query;
      Interval& all = shifts[static_cast<size_t>(n)];
      all = all.empty() ? Interval{begin, end}
                        : Interval{std::min(all.begin, begin), std::max(all.end, end)};
    }
  }
  return shifts;
}

}  // namespace

template <class T>
std::vector<LaneWindow<T>> lane_windows(const WindowLine& line, int64_t lanes) {
  std::vector<LaneWindow<T>> windows;
  for (int64_t x = 0; x < line.length(); x += lanes) {
    LaneWindow<T> w;
    w.begin = x;
    w.count = std::min(lanes, line.length() - x);
    int64_t least = line.length(), most = -line.length();
    for (int64_t query = x; query < x + w.count; ++query) {
      const Interval keys = line.keys_of(query);
      least = std::min(least, keys.begin - query);
      most = std::max(most, keys.end - query);
    }
    w.first_shift = least;
    w.shifts = most - least;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t query = x + std::min(lane, w.count - 1);
      const Interval keys = line.keys_of(query);
      w.first[static_cast<size_t>(lane)] = static_cast<T>(keys.begin - query - least);
      w.last[static_cast<size_t>(lane)] = static_cast<T>(keys.end - query - least);
      w.whole = w.whole && keys.begin - query == least && keys.end - query == most;
    }
    windows.push_back(w);
  }
  return windows;
}

template std::vector<LaneWindow<float>> lane_windows(const WindowLine&, int64_t);
template std::vector<LaneWindow<double>> lane_windows(const WindowLine&, int64_t);

std::vector<Interval> line_windows(const WindowLine& line) {
  std::vector<Interval> windows;
  for (int64_t i = 0; i < line.length(); ++i) windows.push_back(line.keys_of(i));
  return windows;
}

template <class T>
Plane<T>::Plane(const GridGroup& group, int64_t width, const kernels::WindowKernels<T>& kernels)
    : points(group.lines[2].length()),
      seen(line_windows(group.lines[1])),
      windows(lane_windows<T>(group.lines[2], kernels.lanes)),
      key_shifts(shifts_of_keys(group.lines[2], kernels.lanes)),
      first{group.first_token / width, group.first_token % width},
      step{group.token_step[1] / width, group.token_step[2]} {
  for (const LaneWindow<T>& w : windows) {
    before = std::max(before, -w.first_shift);
    behind = std::max(behind, w.first_shift + w.shifts);
    most_shifts = std::max(most_shifts, w.shifts);
  }
  for (int64_t y = 0; y < lines(); ++y) {
    window_lines = std::max(window_lines, seen_by(y).end - seen_by(y).begin);
    const Interval keys = seen_by({y, std::min(y + kernels.lines, lines())});
    most_lines = std::max(most_lines, keys.end - keys.begin);
  }
  chunk = round_up(ceil_div(points, ceil_div(points, kChunkPoints)), kernels.lanes);
}

template <class T>
std::vector<Meeting> Plane<T>::meetings(Interval queries, Interval keys) const {
  std::vector<Meeting> meetings;
  const Interval all = seen_by(queries);
  Interval now{queries.begin, queries.begin};
  for (int64_t key = std::max(all.begin, keys.begin); key < std::min(all.end, keys.end); ++key) {
    const Interval last = now;
    while (now.end < queries.end && seen_by(now.end).begin <= key) ++now.end;
    while (now.begin < now.end && seen_by(now.begin).end <= key) ++now.begin;
    if (meetings.empty() || now.begin != last.begin || now.end != last.end) {
      meetings.push_back({now, {key, key}});
    }
    ++meetings.back().keys.end;
  }
  return meetings;
}

template <class T>
PlaneCall<T>::PlaneCall(const GridCall& call, const RunOptions& run)
    : call_(call),
      run_(run),
      kernels_(kernels::window_kernels<T>(chosen_isa(run))),
      tiles_(kernels::tile_kernels<T>(chosen_isa(run))),
      lanes_(kernels_.lanes),
      dim_(call.query.size(kWidth)),
      values_(call.value.size(kWidth)),
      group_(call.heads() / call.key.size(kHeads)) {
  for (int64_t g = 0; g < call.grid.groups(); ++g) {
    planes_.emplace_back(call.grid.group(g), call.query.size(3), kernels_);
  }
}

template <class T>
std::vector<PlaneItem<T>> PlaneCall<T>::items(int64_t heads, int64_t fewest, int64_t most) const {
  const int64_t wanted = 4 * run_.threads.value_or(default_threads());
  std::vector<PlaneItem<T>> items;
  for (const Plane<T>& plane : planes_) {
    const int64_t all = call_.batch() * heads;
    const int64_t pieces =
        all * ceil_div(plane.points, plane.chunk) * static_cast<int64_t>(planes_.size());
    const int64_t bands =
        std::max(std::clamp<int64_t>(ceil_div(wanted, pieces), 1, ceil_div(plane.lines(), fewest)),
                 ceil_div(plane.lines(), most));
    for (int64_t n = 0; n < all; ++n) {
      for (int64_t band = 0; band < bands; ++band) {
        const Interval lines{share_begin(plane.lines(), band, bands),
                             share_begin(plane.lines(), band + 1, bands)};
        for (int64_t x = 0; x < plane.points; x += plane.chunk) {
          const Interval points{x, std::min(x + plane.chunk, plane.points)};
          items.push_back({&plane, n / heads, n % heads, lines, points});
        }
      }
    }
  }
  return items;
}

template <class T>
std::byte* PlaneCall<T>::point(const Tensor& t, const PlaneItem<T>& item, int64_t head, int64_t y,
                               int64_t x) {
  const Plane<T>& p = *item.plane;
  return t.at({item.batch, 0, p.first[0] + y * p.step[0], p.first[1] + x * p.step[1], head});
}

template <class T>
Rows PlaneCall<T>::rows(const Tensor& t, const PlaneItem<T>& item, int64_t head, int64_t y,
                        Interval points) {
  return {point(t, item, head, y, points.begin), t.dtype(), point_stride(t, item),
          points.end - points.begin, t.size(kWidth)};
}

template <class T>
void PlaneCall<T>::store(kernels::Block<T> c, int64_t count, T factor, const Tensor& to,
                         const PlaneItem<T>& item, int64_t head, int64_t y, int64_t x) const {
  tiles_.finish_columns(c, count, to.size(kWidth), factor, point(to, item, head, y, x), to.dtype(),
                        point_stride(to, item), nullptr);
}

template <class T>
KeyLines<T> PlaneCall<T>::key_lines(const Plane<T>& plane, Interval points) const {
  const int64_t before = round_up(plane.before, lanes_);
  KeyLines<T> lines{};
  lines.origin = points.begin - before;
  lines.stride =
      before + round_up(points.end - points.begin, lanes_) + round_up(plane.behind, lanes_);
  return lines;
}

template <class T>
bool PlaneCall<T>::turn_keys(const PlaneItem<T>& item, int64_t head, Interval seen,
                             KeyLines<T>& lines) const {
  const Plane<T>& p = *item.plane;
  const Interval points = points_of(p, lines);
  const int64_t column = points.begin - lines.origin;
  bool finite = true;
  for (lines.turned = std::max(lines.turned, seen.begin); lines.turned < seen.end; ++lines.turned) {
    const int64_t y = lines.turned, slot = y % p.most_lines;
    finite &= kernels_.turn(rows(call_.key, item, head, y, points), 1,
                            lines.keys + slot * dim_ * lines.stride + column, lines.stride);
    finite &= kernels_.turn(rows(call_.value, item, head, y, points), 1,
                            lines.values + slot * values_ * lines.stride + column, lines.stride);
  }
  return finite;
}

template struct Plane<float>;
template struct Plane<double>;
template class PlaneCall<float>;
template class PlaneCall<double>;

}  // namespace heed::na
