#include "mechanisms/neighborhood/small_windows.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numbers>
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "kernels/window_lanes.h"

namespace heed::na {

namespace {

using kernels::Rows;
using tiled::GridGroup;
using tiled::Interval;
using tiled::WindowLine;

constexpr int64_t kChunkPoints = 64;      // of a line that is turned at once
constexpr int64_t kMostWindowLines = 32;  // of keys, that one query sees
constexpr int64_t kMostLines = 8;         // of queries, that products take at once
constexpr int64_t kMostLanes = 16;

// Costs in the units of tiles.cpp, measured in float32.
constexpr double kProduct = 1.3;       // a multiply-add with AVX-512
constexpr double kProductOfFew = 1.9;  // without: fewer lines share what is loaded
constexpr double kWeight = 10;         // a score: exponential, maximum, sum
constexpr double kToken = 40;          // an element of a token, turned and turned back

/// Neighbouring queries of a line, one a lane: at which shifts they see keys.
template <class T>
struct LaneWindow {
  int64_t begin = 0, count = 0;         // queries; further lanes are as the last of them
  int64_t first_shift = 0, shifts = 0;  // from a query to the keys that one of the lanes sees
  bool whole = true;                    // all lanes see all of them
  std::array<T, kMostLanes> first{}, last{};
};

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

std::vector<Interval> line_windows(const WindowLine& line) {
  std::vector<Interval> windows;
  for (int64_t i = 0; i < line.length(); ++i) windows.push_back(line.keys_of(i));
  return windows;
}

/// One residue group of a plane: lines of points.
template <class T>
struct Plane {
  Plane(const GridGroup& group, int64_t width, const kernels::WindowKernels<T>& kernels)
      : points(group.lines[2].length()),
        seen(line_windows(group.lines[1])),
        windows(lane_windows<T>(group.lines[2], kernels.lanes)),
        first{group.first_token / width, group.first_token % width},
        step{group.token_step[1] / width, group.token_step[2]} {
    for (const LaneWindow<T>& w : windows) {
      before = std::max(before, -w.first_shift);
      behind = std::max(behind, w.first_shift + w.shifts);
      most_shifts = std::max(most_shifts, w.shifts);
    }
    for (int64_t y = 0; y < lines(); ++y) {
      const Interval keys = seen_by({y, std::min(y + kernels.lines, lines())});
      most_lines = std::max(most_lines, keys.end - keys.begin);
    }
  }
  int64_t lines() const { return static_cast<int64_t>(seen.size()); }
  /// Lines of keys.
  Interval seen_by(int64_t y) const { return seen[static_cast<size_t>(y)]; }
  Interval seen_by(Interval queries) const {
    return {seen_by(queries.begin).begin, seen_by(queries.end - 1).end};
  }

  int64_t points;              // of a line
  std::vector<Interval> seen;  // lines of keys, by each line of queries; neither end decreases
  std::vector<LaneWindow<T>> windows;
  std::array<int64_t, 2> first, step;  // tokens of the grid, along its last two axes
  int64_t before = 0, behind = 0;      // points beside queries that shifts reach
  int64_t most_shifts = 0;
  int64_t most_lines = 0;  // of keys, seen by lines of queries taken at once
};

/// Lines of keys in a row that the same lines of queries see.
struct Meeting {
  Interval queries, keys;
};

template <class T>
class SmallWindows {
 public:
  SmallWindows(const GridCall& call, const RunOptions& run)
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

  bool forward() {
    const std::vector<Item> items = this->items();
    const auto count = static_cast<int64_t>(items.size());
    parallel_for(count, threads_for(run_, count), [&](int64_t i, int) {
      if (finite_ && !run_item(items[static_cast<size_t>(i)])) finite_ = false;
    });
    return finite_;
  }

 private:
  /// Queries of one head, and results.
  struct Item {
    const Plane<T>* plane;
    int64_t batch, head;
    Interval lines, points;
  };

  /// Turned lines: of keys and values as many as are seen at once, line y where y modulo their number says.
  struct Memory {
    T *keys, *values, *queries, *scores, *out, *pivot, *sum;
    int64_t origin, stride;  // point at column 0 of keys and values, and elements of their rows
    int64_t query_stride;
    int64_t score_line;  // scores from a line of queries to the next
    int64_t turned = 0;  // lines of keys before this one are there
  };

  std::vector<Item> items() const {
    constexpr int64_t kFewestLines = 8;  // what is turned beside them is turned again for others
    const int64_t heads = call_.batch() * call_.heads();
    const int64_t wanted = 4 * run_.threads.value_or(default_threads());
    std::vector<Item> items;
    for (const Plane<T>& plane : planes_) {
      const int64_t chunks = ceil_div(plane.points, kChunkPoints);
      const int64_t points = round_up(ceil_div(plane.points, chunks), lanes_);
      const int64_t pieces = heads * chunks * static_cast<int64_t>(planes_.size());
      const int64_t bands =
          std::clamp<int64_t>(ceil_div(wanted, pieces), 1, ceil_div(plane.lines(), kFewestLines));
      for (int64_t n = 0; n < heads; ++n) {
        for (int64_t band = 0; band < bands; ++band) {
          const Interval lines{share_begin(plane.lines(), band, bands),
                               share_begin(plane.lines(), band + 1, bands)};
          for (int64_t x = 0; x < plane.points; x += points) {
            items.push_back({&plane,
                             n / call_.heads(),
                             n % call_.heads(),
                             lines,
                             {x, std::min(x + points, plane.points)}});
          }
        }
      }
    }
    return items;
  }

  static std::byte* point(const Tensor& t, const Item& item, int64_t head, int64_t y, int64_t x) {
    const Plane<T>& p = *item.plane;
    return t.at({item.batch, 0, p.first[0] + y * p.step[0], p.first[1] + x * p.step[1], head});
  }
  // Elements from a point of a line to the next.
  static int64_t point_stride(const Tensor& t, const Item& item) {
    return t.stride(3) * item.plane->step[1];
  }
  static Rows rows(const Tensor& t, const Item& item, int64_t head, int64_t y, Interval points) {
    return {point(t, item, head, y, points.begin), t.dtype(), point_stride(t, item),
            points.end - points.begin, t.size(kWidth)};
  }

  bool run_item(const Item& item) const {
    const Plane<T>& p = *item.plane;
    const int64_t lines = kernels_.lines, before = round_up(p.before, lanes_);
    Memory m{};
    m.query_stride = round_up(item.points.end - item.points.begin, lanes_);
    m.origin = item.points.begin - before;
    m.stride = before + m.query_stride + round_up(p.behind, lanes_);
    m.score_line = p.most_lines * p.most_shifts * lanes_;
    const int64_t keys = p.most_lines * dim_ * m.stride, values = p.most_lines * values_ * m.stride;
    const int64_t queries = lines * dim_ * m.query_stride, out = lines * values_ * lanes_;
    const int64_t statistics = lines * lanes_;
    Scratch scratch(Scratch::rounded(static_cast<size_t>(keys + values + queries + out +
                                                         lines * m.score_line + 2 * statistics) *
                                     sizeof(T)) +
                    7 * 64);
    m.keys = scratch.take<T>(keys);
    m.values = scratch.take<T>(values);
    m.queries = scratch.take<T>(queries);
    m.scores = scratch.take<T>(lines * m.score_line);
    m.out = scratch.take<T>(out);
    m.pivot = scratch.take<T>(statistics);
    m.sum = scratch.take<T>(statistics);
    // Columns beside the line and behind its queries: no result has part in them, but they are read.
    std::fill_n(m.keys, keys, T{0});
    std::fill_n(m.values, values, T{0});
    std::fill_n(m.queries, queries, T{0});
    for (int64_t y = item.lines.begin; y < item.lines.end; y += lines) {
      if (!run_lines(item, {y, std::min(y + lines, item.lines.end)}, m)) return false;
    }
    return true;
  }

  bool run_lines(const Item& item, Interval lines, Memory& m) const {
    if (!turn(item, lines, m)) return false;
    const std::vector<Meeting> meetings = this->meetings(*item.plane, lines);
    const int64_t first = item.points.begin / lanes_, last = ceil_div(item.points.end, lanes_);
    for (int64_t x = first; x < last; ++x) {
      const LaneWindow<T>& window = item.plane->windows[static_cast<size_t>(x)];
      if (!run_lanes(item, lines, meetings, window, m)) return false;
    }
    return true;
  }

  bool turn(const Item& item, Interval lines, Memory& m) const {
    const Plane<T>& p = *item.plane;
    const Interval seen = p.seen_by(lines);
    const Interval points{std::max<int64_t>(0, item.points.begin - p.before),
                          std::min(item.points.end + p.behind, p.points)};
    const int64_t key_head = item.head / group_, column = points.begin - m.origin;
    bool finite = true;
    for (m.turned = std::max(m.turned, seen.begin); m.turned < seen.end; ++m.turned) {
      finite &= kernels_.turn(rows(call_.key, item, key_head, m.turned, points), 1,
                              line(m.keys, p, m, m.turned, dim_) + column, m.stride);
      finite &= kernels_.turn(rows(call_.value, item, key_head, m.turned, points), 1,
                              line(m.values, p, m, m.turned, values_) + column, m.stride);
    }
    const auto factor = static_cast<T>(call_.scale * std::numbers::log2e);
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      finite &=
          kernels_.turn(rows(call_.query, item, item.head, y, item.points), factor,
                        m.queries + (y - lines.begin) * dim_ * m.query_stride, m.query_stride);
    }
    return finite;
  }

  static T* line(T* turned, const Plane<T>& p, const Memory& m, int64_t y, int64_t width) {
    return turned + y % p.most_lines * width * m.stride;
  }

  std::vector<Meeting> meetings(const Plane<T>& p, Interval lines) const {
    std::vector<Meeting> meetings;
    const Interval seen = p.seen_by(lines);
    Interval queries{lines.begin, lines.begin};
    for (int64_t key = seen.begin; key < seen.end; ++key) {
      const Interval last = queries;
      while (queries.end < lines.end && p.seen_by(queries.end).begin <= key) ++queries.end;
      while (queries.begin < queries.end && p.seen_by(queries.begin).end <= key) ++queries.begin;
      if (meetings.empty() || queries.begin != last.begin || queries.end != last.end) {
        meetings.push_back({queries, {key, key}});
      }
      ++meetings.back().keys.end;
    }
    return meetings;
  }

  bool run_lanes(const Item& item, Interval lines, const std::vector<Meeting>& meetings,
                 const LaneWindow<T>& window, const Memory& m) const {
    const Plane<T>& p = *item.plane;
    const int64_t x = window.begin - item.points.begin;
    const int64_t column = window.begin + window.first_shift - m.origin;
    const int64_t out_line = values_ * lanes_;
    const auto scores_of = [&](int64_t query, int64_t key) {
      return m.scores + (query - lines.begin) * m.score_line +
             (key - p.seen_by(query).begin) * window.shifts * lanes_;
    };
    T* scores[kMostLines];
    for (const auto& [queries, keys] : meetings) {
      const T* q = m.queries + (queries.begin - lines.begin) * dim_ * m.query_stride + x;
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        for (int64_t y = queries.begin; y < queries.end; ++y) {
          scores[y - queries.begin] = scores_of(y, key);
        }
        kernels_.scores(q, m.query_stride, dim_ * m.query_stride, queries.end - queries.begin,
                        line(m.keys, p, m, key, dim_) + column, m.stride, dim_, window.shifts,
                        scores);
      }
    }
    kernels::LaneShifts<T> shifts;
    if (!window.whole) shifts = {window.first.data(), window.last.data()};
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const Interval keys = p.seen_by(y);
      const int64_t r = (y - lines.begin) * lanes_;
      if (!kernels_.weights(scores_of(y, keys.begin), keys.end - keys.begin, window.shifts, shifts,
                            m.pivot + r, m.sum + r)) {
        return false;
      }
    }
    std::fill_n(m.out, (lines.end - lines.begin) * out_line, T{0});
    const T* values[kMostWindowLines];
    for (const auto& [queries, keys] : meetings) {
      for (int64_t y = queries.begin; y < queries.end; ++y) {
        scores[y - queries.begin] = scores_of(y, keys.begin);
      }
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        values[key - keys.begin] = line(m.values, p, m, key, values_) + column;
      }
      kernels_.sums(scores, queries.end - queries.begin, values, keys.end - keys.begin, m.stride,
                    values_, window.shifts, m.out + (queries.begin - lines.begin) * out_line,
                    out_line);
    }
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const int64_t r = (y - lines.begin) * lanes_;
      finish(item, y, window, m.out + (y - lines.begin) * out_line, m.pivot + r, m.sum + r);
    }
    return true;
  }

  void finish(const Item& item, int64_t y, const LaneWindow<T>& window, T* out, const T* pivot,
              const T* sum) const {
    kernels_.divide(out, values_, sum);
    tiles_.finish_columns({out, lanes_}, window.count, values_, 1,
                          point(call_.out, item, item.head, y, window.begin), call_.out.dtype(),
                          point_stride(call_.out, item), nullptr);
    if (!call_.lse.defined()) return;
    T* lse = reinterpret_cast<T*>(point(call_.lse, item, item.head, y, window.begin));
    for (int64_t i = 0; i < window.count; ++i) {
      const double total = double{pivot[i]} + std::log2(double{sum[i]});
      lse[i * point_stride(call_.lse, item)] = static_cast<T>(total / std::numbers::log2e);
    }
  }

  const GridCall& call_;
  const RunOptions& run_;
  const kernels::WindowKernels<T>& kernels_;
  const kernels::TileKernels<T>& tiles_;
  const int64_t lanes_, dim_, values_, group_;
  std::vector<Plane<T>> planes_;
  std::atomic<bool> finite_{true};
};

}  // namespace

bool takes_small_windows(const GridCall& call, const TileShapes& shapes, const RunOptions& run) {
  const bool plane = call.rank > 1 && call.grid.axis(0).length == 1;
  if (!plane || call.has_additional() || call.rpb.defined()) return false;
  const GridGroup group = call.grid.group(0);
  double lines = 0, shifts = 0;
  for (const Interval keys : line_windows(group.lines[1])) {
    if (keys.end - keys.begin > kMostWindowLines) return false;
    lines += static_cast<double>(keys.end - keys.begin);
  }
  const Isa isa = chosen_isa(run);
  const int64_t lanes = call.query.dtype() == DType::f64
                            ? kernels::window_kernels<double>(isa).lanes
                            : kernels::window_kernels<float>(isa).lanes;
  for (const auto& window : lane_windows<double>(group.lines[2], lanes)) {
    shifts += static_cast<double>(window.shifts);
  }
  const double product = isa == Isa::avx512 || isa == Isa::amx ? kProduct : kProductOfFew;
  const auto widths = static_cast<double>(call.query.size(kWidth) + call.value.size(kWidth));
  const auto tokens = static_cast<double>(group.lines[1].length() * group.lines[2].length());
  const double cost = lines * shifts * static_cast<double>(lanes) * (product * widths + kWeight) +
                      tokens * widths * kToken;
  return cost < shapes.cost;
}

bool small_windows_forward(const GridCall& call, const RunOptions& run) {
  if (call.query.dtype() == DType::f64) return SmallWindows<double>(call, run).forward();
  return SmallWindows<float>(call, run).forward();
}

}  // namespace heed::na
