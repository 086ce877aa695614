// The backward of small windows. A part of a plane writes the gradients of its queries and keys. Weights p
// and gradients dS of all scores of a few lines of queries are kept as rows of points, one for each line of
// keys and shift, zero where nobody sees anything:
//
//   for lines of queries that see keys of the part:
//     S = Q K^T;  dP = dO V^T;  p, dS           queries in lanes, keys shifted
//     dQ = dS K                                 of the part's own queries
//     dV += p^T dO;  dK += dS^T Q               keys in lanes, queries shifted
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>
#include <vector>

#include "base/round_up.h"
#include "engine/operands.h"
#include "mechanisms/neighborhood/small_windows.h"
#include "mechanisms/neighborhood/window_planes.h"

namespace heed::na {

namespace {

using kernels::Rows;

constexpr int64_t kScoreBytes = 384 * 1024;  // of weights and gradients, in the second-level cache

constexpr int64_t kMostOwnLines = 64;  // of which a part keeps all gradients of keys and values

// Costs in the units of tiles.cpp, measured in float32 and bfloat16: a multiply-add, less the more lines of
// queries are taken at once, with many registers and with few.
constexpr double kProduct = 0.8, kProductOfOneLine = 0.95;
constexpr double kProductOfFew = 1.3, kProductOfFewOfOneLine = 1.35;
constexpr double kWeight = 12;     // a score
constexpr double kTileToken = 10;  // an element of a token, more in tiles than here

/// Rows of scores: queries of a part of a line, with zeros beside them.
struct ScoreRows {
  Interval span;                // queries that see keys of the part, in whole vectors, and its own
  int64_t row = 0, origin = 0;  // elements; the query at element 0
  int64_t key_scores = 0, line_scores = 0;  // from a line of keys, of queries to the next
  int64_t lines = 0;                        // of queries at once
};

template <class T>
ScoreRows score_rows(const Plane<T>& p, Interval points, const kernels::WindowKernels<T>& kernels) {
  const int64_t lanes = kernels.lanes, beside = round_up(std::max(p.before, p.behind), lanes);
  ScoreRows s;
  s.span = {std::max<int64_t>(0, points.begin - round_up(p.behind, lanes)),
            std::min(p.points, round_up(points.end + p.before, lanes))};
  s.row = round_up(s.span.end - s.span.begin, lanes) + 2 * beside;
  s.origin = s.span.begin - beside;
  s.key_scores = (p.before + p.behind) * s.row;
  s.line_scores = p.window_lines * s.key_scores;
  const int64_t line_bytes = 2 * s.line_scores * static_cast<int64_t>(sizeof(T));
  s.lines = std::clamp<int64_t>(kScoreBytes / line_bytes, 1, kernels.lines);
  return s;
}

template <class T>
class SmallWindowsBackward : PlaneCall<T> {
 public:
  SmallWindowsBackward(const GridCall& call, const CallGradients& gradients, const RunOptions& run)
      : Base(call, run), gradients_(gradients) {}

  bool run() {
    // Lines of queries beside a band are met again in others.
    const int64_t fewest = 2 * Base::planes_[0].window_lines + 2;
    return this->run_all(
        this->items(call_.key.size(kHeads), fewest, std::max(fewest, kMostOwnLines)),
        [&](const Item& item) { return run_item(item); });
  }

 private:
  using Base = PlaneCall<T>;
  using Item = PlaneItem<T>;
  using Base::call_, Base::run_, Base::kernels_, Base::lanes_, Base::dim_, Base::values_,
      Base::group_;

  struct Memory : ScoreRows {
    KeyLines<T> keys;
    T *queries = nullptr, *grads = nullptr;  // turned lines of queries and dO: [line][width][row]
    T* outs = nullptr;                       // one of out
    T *pivot = nullptr, *offset = nullptr;   // [line][row]
    T *weights = nullptr, *score_grads = nullptr;    // [line of queries][line of keys][shift][row]
    T* query_grads = nullptr;                        // [line][dim][lanes]
    T *key_grads = nullptr, *value_grads = nullptr;  // [line of the item][width][own_stride]
    int64_t own_stride = 0;
  };

  /// Lines of keys that queries of line y meet: those beside the item's own meet only its keys.
  static Interval met(const Item& item, int64_t y) {
    const Interval seen = item.plane->seen_by(y);
    if (y >= item.lines.begin && y < item.lines.end) return seen;
    return {std::max(seen.begin, item.lines.begin), std::min(seen.end, item.lines.end)};
  }

  bool run_item(const Item& item) const {
    const Plane<T>& p = *item.plane;
    Memory m;
    static_cast<ScoreRows&>(m) = score_rows(p, item.points, kernels_);
    m.keys = this->key_lines(p, m.span);
    m.own_stride = round_up(item.points.end - item.points.begin, lanes_);
    const int64_t own_lines = item.lines.end - item.lines.begin;
    const std::pair<T**, int64_t> parts[] = {
        {&m.keys.keys, this->key_line_elements(p, m.keys, dim_)},
        {&m.keys.values, this->key_line_elements(p, m.keys, values_)},
        {&m.queries, m.lines * dim_ * m.row},
        {&m.grads, m.lines * values_ * m.row},
        {&m.outs, values_ * m.row},
        {&m.pivot, m.lines * m.row},
        {&m.offset, m.lines * m.row},
        {&m.weights, m.lines * m.line_scores},
        {&m.score_grads, m.lines * m.line_scores},
        {&m.query_grads, m.lines * dim_ * lanes_},
        {&m.key_grads, own_lines * dim_ * m.own_stride},
        {&m.value_grads, own_lines * values_ * m.own_stride}};
    size_t bytes = 0;
    for (const auto& part : parts) {
      bytes += Scratch::rounded(static_cast<size_t>(part.second) * sizeof(T));
    }
    Scratch scratch(bytes);
    for (const auto& [at, count] : parts) {
      *at = scratch.take<T>(count);
      std::fill_n(*at, count, T{0});
    }
    for (int64_t n = 0; n < group_; ++n) {
      if (!run_head(item, item.head * group_ + n, m)) return false;
    }
    const int64_t points = item.points.end - item.points.begin;
    for (int64_t y = item.lines.begin; y < item.lines.end; ++y) {
      const int64_t own = y - item.lines.begin;
      this->store({m.key_grads + own * dim_ * m.own_stride, m.own_stride}, points,
                  static_cast<T>(std::numbers::ln2), gradients_.key, item, item.head, y,
                  item.points.begin);
      this->store({m.value_grads + own * values_ * m.own_stride, m.own_stride}, points, 1,
                  gradients_.value, item, item.head, y, item.points.begin);
    }
    return true;
  }

  bool run_head(const Item& item, int64_t head, Memory& m) const {
    const Plane<T>& p = *item.plane;
    Interval lines = item.lines;
    while (lines.begin > 0 && !met(item, lines.begin - 1).empty()) --lines.begin;
    while (lines.end < p.lines() && !met(item, lines.end).empty()) ++lines.end;
    m.keys.turned = 0;
    for (int64_t y = lines.begin; y < lines.end;) {
      // The item's own lines and those beside them are not taken at once.
      const int64_t end = y < item.lines.begin ? item.lines.begin
                          : y < item.lines.end ? item.lines.end
                                               : lines.end;
      const Interval now{y, std::min(y + m.lines, end)};
      const Interval next{now.end, std::min(now.end + m.lines, lines.end)};
      if (!run_lines(item, head, now, next, m)) return false;
      y = now.end;
    }
    return true;
  }

  // What `lines` of queries read first.
  std::vector<Rows> rows_ahead(const Item& item, int64_t head, Interval lines,
                               const Memory& m) const {
    std::vector<Rows> ahead;
    if (lines.empty()) return ahead;
    const Interval points = Base::points_of(*item.plane, m.keys);
    const int64_t end = item.plane->seen_by(lines).end;
    for (int64_t y = m.keys.turned; y < end; ++y) {
      for (const Tensor* t : {&call_.key, &call_.value}) {
        ahead.push_back(Base::rows(*t, item, item.head, y, points));
      }
    }
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      for (const Tensor* t : {&call_.query, &gradients_.out, &call_.out}) {
        ahead.push_back(Base::rows(*t, item, head, y, m.span));
      }
    }
    return ahead;
  }

  // One of `parts` parts.
  static void ask(std::vector<Rows>& ahead, int64_t parts) {
    for (int64_t n = ceil_div(static_cast<int64_t>(ahead.size()), parts); n > 0; --n) {
      kernels::ReadAhead lines({ahead.back()});
      lines.ask(lines.lines());
      ahead.pop_back();
    }
  }

  bool run_lines(const Item& item, int64_t head, Interval lines, Interval next, Memory& m) const {
    const Plane<T>& p = *item.plane;
    if (!this->turn_keys(item, item.head, p.seen_by(lines), m.keys)) return false;
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      if (!turn_queries(item, head, y, y - lines.begin, m)) return false;
    }
    const Interval met_keys{met(item, lines.begin).begin, met(item, lines.end - 1).end};
    const std::vector<Meeting> meetings = p.meetings(lines, met_keys);
    const bool own = lines.begin >= item.lines.begin && lines.end <= item.lines.end;
    std::vector<Rows> ahead = rows_ahead(item, head, next, m);
    const int64_t last = ceil_div(m.span.end, lanes_);
    for (int64_t x = m.span.begin / lanes_; x < last; ++x) {
      ask(ahead, last - x);
      const LaneWindow<T>& window = p.windows[static_cast<size_t>(x)];
      weigh(item, lines, meetings, window, m);
      if (own && window.begin >= item.points.begin && window.begin < item.points.end) {
        add_to_queries(item, head, lines, meetings, window, m);
      }
    }
    for (int64_t x = item.points.begin; x < item.points.end; x += lanes_) {
      for (int64_t y = lines.begin; y < lines.end; ++y) add_to_keys(item, lines, y, x, m);
    }
    return true;
  }

  // Line y of queries and of dO, and what its rows add to dP: grad_lse - dO . out. False if something is not
  // finite, or a pivot so large that its rounding moves weights.
  bool turn_queries(const Item& item, int64_t head, int64_t y, int64_t line, Memory& m) const {
    T* queries = m.queries + line * dim_ * m.row;
    T* grads = m.grads + line * values_ * m.row;
    T *pivot = m.pivot + line * m.row, *offset = m.offset + line * m.row;
    const int64_t first = m.span.begin - m.origin, end = m.span.end - m.origin;
    const auto turn = [&](const Tensor& t, double factor, T* to) {
      return kernels_.turn(Base::rows(t, item, head, y, m.span), static_cast<T>(factor), to + first,
                           m.row);
    };
    bool finite = turn(call_.query, call_.scale * std::numbers::log2e, queries);
    finite &= turn(gradients_.out, 1, grads);
    finite &= turn(call_.out, 1, m.outs);
    for (int64_t x = first; x < end; x += lanes_) {
      T dots[kMostWindowLanes];
      T* to = dots;
      kernels_.scores(grads + x, m.row, 0, 1, m.outs + x, m.row, values_, 1, &to, lanes_);
      for (int64_t i = 0; i < lanes_; ++i) {
        const auto at = [&](const Tensor& t) {
          return *reinterpret_cast<const T*>(Base::point(t, item, head, y, m.origin + x + i));
        };
        const bool query = x + i < end;
        // Behind the queries nothing has weight.
        pivot[x + i] = query ? static_cast<T>(double{at(call_.lse)} * std::numbers::log2e)
                             : std::numeric_limits<T>::infinity();
        offset[x + i] = query && gradients_.lse.defined() ? at(gradients_.lse) - dots[i] : -dots[i];
        finite &= !query || (std::abs(pivot[x + i]) < kernels::RoundedPivot<T>::kLarge &&
                             std::isfinite(offset[x + i]));
      }
    }
    return finite;
  }

  T* at_key(T* scores, const Item& item, Interval lines, int64_t y, int64_t key,
            const Memory& m) const {
    return scores + (y - lines.begin) * m.line_scores + (key - met(item, y).begin) * m.key_scores;
  }

  void weigh(const Item& item, Interval lines, const std::vector<Meeting>& meetings,
             const LaneWindow<T>& window, const Memory& m) const {
    const Plane<T>& p = *item.plane;
    const int64_t x = window.begin - m.origin;
    const int64_t column = window.begin + window.first_shift - m.keys.origin;
    const int64_t element = (window.first_shift + p.before) * m.row + x;
    T *scores[kMostLinesAtOnce], *grads[kMostLinesAtOnce];
    for (const auto& [queries, keys] : meetings) {
      const int64_t first = queries.begin - lines.begin, count = queries.end - queries.begin;
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        for (int64_t y = queries.begin; y < queries.end; ++y) {
          scores[y - queries.begin] = at_key(m.weights, item, lines, y, key, m) + element;
          grads[y - queries.begin] = at_key(m.score_grads, item, lines, y, key, m) + element;
        }
        const int64_t query_line = dim_ * m.row, grad_line = values_ * m.row;
        kernels_.scores(m.queries + first * query_line + x, m.row, query_line, count,
                        this->key_line(p, m.keys, key) + column, m.keys.stride, dim_, window.shifts,
                        scores, m.row);
        kernels_.scores(m.grads + first * grad_line + x, m.row, grad_line, count,
                        this->value_line(p, m.keys, key) + column, m.keys.stride, values_,
                        window.shifts, grads, m.row);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = (first + i) * m.row + x;
          kernels_.gradients(scores[i], grads[i], window.shifts, m.row, window.seen(),
                             m.pivot + row, m.offset + row);
        }
      }
    }
  }

  void add_to_queries(const Item& item, int64_t head, Interval lines,
                      const std::vector<Meeting>& meetings, const LaneWindow<T>& window,
                      const Memory& m) const {
    const Plane<T>& p = *item.plane;
    const int64_t out_line = dim_ * lanes_;
    const int64_t column = window.begin + window.first_shift - m.keys.origin;
    const int64_t element = (window.first_shift + p.before) * m.row + window.begin - m.origin;
    std::fill_n(m.query_grads, (lines.end - lines.begin) * out_line, T{0});
    const T *weights[kMostLinesAtOnce], *values[kMostWindowLines];
    for (const auto& [queries, keys] : meetings) {
      for (int64_t y = queries.begin; y < queries.end; ++y) {
        weights[y - queries.begin] = at_key(m.score_grads, item, lines, y, keys.begin, m) + element;
      }
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        values[key - keys.begin] = this->key_line(p, m.keys, key) + column;
      }
      kernels_.sums({.weights = weights,
                     .lines = queries.end - queries.begin,
                     .weight_line = m.key_scores,
                     .weight_step = m.row,
                     .values = values,
                     .count = keys.end - keys.begin,
                     .value_stride = m.keys.stride,
                     .shifts = window.shifts,
                     .width = dim_,
                     .out = m.query_grads + (queries.begin - lines.begin) * out_line,
                     .out_line = out_line,
                     .out_step = lanes_});
    }
    for (int64_t y = lines.begin; y < lines.end; ++y) {
      this->store({m.query_grads + (y - lines.begin) * out_line, lanes_}, window.count,
                  static_cast<T>(call_.scale), gradients_.query, item, head, y, window.begin);
    }
  }

  // What queries of line y give to the vector of keys at point x in all lines of the item that they see.
  void add_to_keys(const Item& item, Interval lines, int64_t y, int64_t x, const Memory& m) const {
    const Plane<T>& p = *item.plane;
    const Interval shifts = p.key_shifts[static_cast<size_t>(x / lanes_)];
    const Interval seen = met(item, y);
    const Interval keys{std::max(seen.begin, item.lines.begin), std::min(seen.end, item.lines.end)};
    if (shifts.empty() || keys.empty()) return;
    // The query at the first shift; the next one lies a point before it, its weights a row behind.
    const int64_t query = x - shifts.begin;
    const int64_t element = (shifts.begin + p.before) * m.row + query - m.origin;
    const int64_t parts = ceil_div(keys.end - keys.begin, kernels_.lines);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = keys.begin + share_begin(keys.end - keys.begin, part, parts),
                    end = keys.begin + share_begin(keys.end - keys.begin, part + 1, parts);
      const auto add = [&](T* scores, const T* turned, int64_t width, T* grads) {
        const T* weights[kMostLinesAtOnce];
        for (int64_t key = first; key < end; ++key) {
          weights[key - first] = at_key(scores, item, lines, y, key, m) + element;
        }
        const T* values = turned + (y - lines.begin) * width * m.row + query - m.origin;
        const int64_t out_line = width * m.own_stride;
        kernels_.sums({.weights = weights,
                       .lines = end - first,
                       .weight_step = m.row - 1,
                       .values = &values,
                       .count = 1,
                       .value_stride = m.row,
                       .value_step = -1,
                       .shifts = shifts.end - shifts.begin,
                       .width = width,
                       .out = grads + (first - item.lines.begin) * out_line + x - item.points.begin,
                       .out_line = out_line,
                       .out_step = m.own_stride});
      };
      add(m.weights, m.grads, values_, m.value_grads);
      add(m.score_grads, m.queries, dim_, m.key_grads);
    }
  }

  const CallGradients& gradients_;
};

}  // namespace

bool takes_small_windows_backward(const GridCall& call, const TileShapes& shapes,
                                  const RunOptions& run) {
  const std::optional<SmallWindowWork> work = small_window_work(call, run);
  if (!work) return false;
  const int64_t score_lines = with_wide_type(call.query.dtype(), [&]<class T>(T) {
    const auto& kernels = kernels::window_kernels<T>(chosen_isa(run));
    const Plane<T> plane(call.grid.group(0), call.query.size(3), kernels);
    return score_rows(plane, {0, std::min(plane.chunk, plane.points)}, kernels).lines;
  });
  const auto lines = static_cast<double>(score_lines);
  const double product = work->many_registers ? kProduct + kProductOfOneLine / lines
                                              : kProductOfFew + kProductOfFewOfOneLine / lines;
  return work->pairs * (product * work->widths + kWeight) <
         shapes.cost + work->tokens * work->widths * kTileToken;
}

bool small_windows_backward(const GridCall& call, const CallGradients& gradients,
                            const RunOptions& run) {
  return with_wide_type(call.query.dtype(), [&]<class T>(T) {
    return SmallWindowsBackward<T>(call, gradients, run).run();
  });
}

}  // namespace heed::na
