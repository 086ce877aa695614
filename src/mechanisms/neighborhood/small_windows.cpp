#include "mechanisms/neighborhood/small_windows.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "base/round_up.h"
#include "engine/operands.h"
#include "mechanisms/neighborhood/window_planes.h"

namespace heed::na {

namespace {

using tiled::GridGroup;

// Costs in the units of tiles.cpp, measured in float32 and bfloat16.
constexpr double kProduct = 1.0;        // a multiply-add with AVX-512
constexpr double kProductOfFew = 1.45;  // without: fewer lines share what is loaded
constexpr double kWeight = 8;           // a score: exponential, maximum, sum
constexpr double kToken = 30;           // an element of a token, turned and turned back

template <class T>
class SmallWindows : PlaneCall<T> {
 public:
  using PlaneCall<T>::PlaneCall;

  bool forward() {
    // Keys and values that are turned beside a band of lines are turned again for others.
    constexpr int64_t kFewestLines = 8;
    return this->run_all(this->items(call_.heads(), kFewestLines, call_.query.size(2)),
                         [&](const Item& item) { return run_item(item); });
  }

 private:
  using Base = PlaneCall<T>;
  using Item = PlaneItem<T>;
  using Base::call_, Base::run_, Base::kernels_, Base::lanes_, Base::dim_, Base::values_,
      Base::group_;

  struct Memory {
    KeyLines<T> keys;
    T *queries, *scores, *out, *pivot, *sum;
    int64_t query_stride;
    int64_t score_line;  // scores from a line of queries to the next
  };

  bool run_item(const Item& item) const {
    const Plane<T>& p = *item.plane;
    const int64_t lines = kernels_.lines;
    Memory m{};
    m.keys = this->key_lines(p, item.points);
    m.query_stride = round_up(item.points.end - item.points.begin, lanes_);
    m.score_line = p.most_lines * p.most_shifts * lanes_;
    const int64_t keys = this->key_line_elements(p, m.keys, dim_),
                  values = this->key_line_elements(p, m.keys, values_);
    const int64_t queries = lines * dim_ * m.query_stride, out = lines * values_ * lanes_;
    const int64_t statistics = lines * lanes_;
    Scratch scratch(Scratch::rounded(static_cast<size_t>(keys + values + queries + out +
                                                         lines * m.score_line + 2 * statistics) *
                                     sizeof(T)) +
                    7 * 64);
    m.keys.keys = scratch.take<T>(keys);
    m.keys.values = scratch.take<T>(values);
    m.queries = scratch.take<T>(queries);
    m.scores = scratch.take<T>(lines * m.score_line);
    m.out = scratch.take<T>(out);
    m.pivot = scratch.take<T>(statistics);
    m.sum = scratch.take<T>(statistics);
    // Columns beside the line and behind its queries: no result has part in them, but they are read.
    std::fill_n(m.keys.keys, keys, T{0});
    std::fill_n(m.keys.values, values, T{0});
    std::fill_n(m.queries, queries, T{0});
    for (int64_t y = item.lines.begin; y < item.lines.end; y += lines) {
      if (!run_lines(item, {y, std::min(y + lines, item.lines.end)}, m)) return false;
    }
    return true;
  }

  bool run_lines(const Item& item, Interval lines, Memory& m) const {
    const Plane<T>& p = *item.plane;
    const Interval seen = p.seen_by(lines);
    bool finite = this->turn_keys(item, item.head / group_, seen, m.keys);
    const auto factor = static_cast<T>(call_.scale * std::numbers::log2e);
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      finite &=
          kernels_.turn(Base::rows(call_.query, item, item.head, y, item.points), factor,
                        m.queries + (y - lines.begin) * dim_ * m.query_stride, m.query_stride);
    }
    if (!finite) return false;
    const std::vector<Meeting> meetings = p.meetings(lines, seen);
    const int64_t first = item.points.begin / lanes_, last = ceil_div(item.points.end, lanes_);
    for (int64_t x = first; x < last; ++x) {
      if (!run_lanes(item, lines, meetings, p.windows[static_cast<size_t>(x)], m)) return false;
    }
    return true;
  }

  bool run_lanes(const Item& item, Interval lines, const std::vector<Meeting>& meetings,
                 const LaneWindow<T>& window, const Memory& m) const {
    const Plane<T>& p = *item.plane;
    const int64_t x = window.begin - item.points.begin;
    const int64_t column = window.begin + window.first_shift - m.keys.origin;
    const int64_t key_scores = window.shifts * lanes_, out_line = values_ * lanes_;
    const auto scores_of = [&](int64_t query, int64_t key) {
      return m.scores + (query - lines.begin) * m.score_line +
             (key - p.seen_by(query).begin) * key_scores;
    };
    T* scores[kMostLinesAtOnce];
    for (const auto& [queries, keys] : meetings) {
      const T* q = m.queries + (queries.begin - lines.begin) * dim_ * m.query_stride + x;
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        for (int64_t y = queries.begin; y < queries.end; ++y) {
          scores[y - queries.begin] = scores_of(y, key);
        }
        kernels_.scores(q, m.query_stride, dim_ * m.query_stride, queries.end - queries.begin,
                        this->key_line(p, m.keys, key) + column, m.keys.stride, dim_, window.shifts,
                        scores, lanes_);
      }
    }
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      const Interval keys = p.seen_by(y);
      const int64_t r = (y - lines.begin) * lanes_;
      if (!kernels_.weights(scores_of(y, keys.begin), keys.end - keys.begin, window.shifts,
                            window.seen(), m.pivot + r, m.sum + r)) {
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
        values[key - keys.begin] = this->value_line(p, m.keys, key) + column;
      }
      kernels_.sums({.weights = scores,
                     .lines = queries.end - queries.begin,
                     .weight_line = key_scores,
                     .weight_step = lanes_,
                     .values = values,
                     .count = keys.end - keys.begin,
                     .value_stride = m.keys.stride,
                     .shifts = window.shifts,
                     .width = values_,
                     .out = m.out + (queries.begin - lines.begin) * out_line,
                     .out_line = out_line,
                     .out_step = lanes_});
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
    this->store({out, lanes_}, window.count, 1, call_.out, item, item.head, y, window.begin);
    if (!call_.lse.defined()) return;
    T* lse = reinterpret_cast<T*>(Base::point(call_.lse, item, item.head, y, window.begin));
    for (int64_t i = 0; i < window.count; ++i) {
      const double total = double{pivot[i]} + std::log2(double{sum[i]});
      lse[i * Base::point_stride(call_.lse, item)] = static_cast<T>(total / std::numbers::log2e);
    }
  }
};

}  // namespace

std::optional<SmallWindowWork> small_window_work(const GridCall& call, const RunOptions& run) {
  const bool plane = call.rank > 1 && call.grid.axis(0).length == 1;
  if (!plane || call.has_additional() || call.rpb.defined()) return {};
  const GridGroup group = call.grid.group(0);
  double lines = 0, shifts = 0;
  for (const Interval keys : line_windows(group.lines[1])) {
    if (keys.end - keys.begin > kMostWindowLines) return {};
    lines += static_cast<double>(keys.end - keys.begin);
  }
  const Isa isa = chosen_isa(run);
  const int64_t lanes = with_wide_type(
      call.query.dtype(), [&]<class T>(T) { return kernels::window_kernels<T>(isa).lanes; });
  for (const auto& window : lane_windows<double>(group.lines[2], lanes)) {
    shifts += static_cast<double>(window.shifts);
  }
  return SmallWindowWork{
      .pairs = lines * shifts * static_cast<double>(lanes),
      .tokens = static_cast<double>(group.lines[1].length() * group.lines[2].length()),
      .widths = static_cast<double>(call.query.size(kWidth) + call.value.size(kWidth)),
      .many_registers = isa == Isa::avx512 || isa == Isa::amx};
}

bool takes_small_windows(const GridCall& call, const TileShapes& shapes, const RunOptions& run) {
  const std::optional<SmallWindowWork> work = small_window_work(call, run);
  if (!work) return false;
  const double product = work->many_registers ? kProduct : kProductOfFew;
  return work->pairs * (product * work->widths + kWeight) + work->tokens * work->widths * kToken <
         shapes.cost;
}

bool small_windows_forward(const GridCall& call, const RunOptions& run) {
  return with_wide_type(call.query.dtype(),
                        [&]<class T>(T) { return SmallWindows<T>(call, run).forward(); });
}

}  // namespace heed::na
