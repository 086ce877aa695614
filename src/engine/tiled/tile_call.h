// What forward and backward do alike in every tile: operands, ranges, the way from products to shaped
// scores, dropout.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/round_up.h"
#include "engine/operands.h"
#include "engine/tiled/path.h"
#include "engine/tiled/problem.h"

namespace heed::tiled {

inline constexpr double kLog2E = 1.4426950408889634;

/// A number that scores get, as scores hold it: a finite one stays finite, also `times` times it.
template <class T>
double bounded_term(double x, int64_t times = 1) {
  const double most = static_cast<double>(kMostTerm<T>) / static_cast<double>(times);
  return std::isfinite(x) ? std::clamp(x, -most, most) : x;
}

/// Rows of one head: t [heads, rows, width].
inline kernels::Rows rows_of(const HeadRows& t, int64_t head, int64_t begin, int64_t end) {
  const int64_t* offsets = t.offsets == nullptr ? nullptr : t.offsets.get() + begin;
  return {t.origin(head, begin), t.dtype(), t.stride(1), end - begin, t.size(2), offsets};
}

/// Calls body(row, rows, stride) for runs of the rows [begin, end) that exist and are evenly spaced.
template <class Body>
void for_each_run(const HeadRows& t, int64_t begin, int64_t end, const Body& body) {
  const int64_t* offsets = t.offsets.get();
  if (offsets == nullptr) return body(begin, end - begin, t.stride(1));
  while (begin < end) {
    if (offsets[begin] == kernels::kNoRow) {
      ++begin;
      continue;
    }
    int64_t next = begin + 1;
    const int64_t stride =
        next < end && offsets[next] != kernels::kNoRow ? offsets[next] - offsets[begin] : t.size(2);
    while (next < end && offsets[next] == offsets[begin] + (next - begin) * stride) ++next;
    body(begin, next - begin, stride);
    begin = next;
  }
}

inline double load_statistic(const HeadRows& t, int64_t head, int64_t row) {
  const std::byte* p = t.row(head, row);
  if (p == nullptr) return -std::numeric_limits<double>::infinity();
  return t.dtype() == DType::f64 ? *reinterpret_cast<const double*>(p)
                                 : *reinterpret_cast<const float*>(p);
}

inline void store_statistic(std::byte* p, DType dtype, double value) {
  with_wide_type(dtype, [&]<class T>(T) { *reinterpret_cast<T*>(p) = static_cast<T>(value); });
}

inline uint32_t drop_limit(double p) { return static_cast<uint32_t>(std::ldexp(p, 32)); }

/// A copy of rows in which everything infinite or NaN is 0, and which elements those were.
struct FiniteRows {
  Array copy;                 // [rows, width]
  std::vector<int64_t> rows;  // that have such elements
  kernels::Rows view() const {
    const Tensor& t = copy;
    return {t.data(), t.dtype(), t.stride(0), t.size(0), t.size(1)};
  }
};
FiniteRows finite_rows(const kernels::Rows& rows);

/// to[i] += factor * row[i] as it is, without any vector kernel.
template <class T>
void add_row(const kernels::Rows& rows, int64_t row, T factor, T* to, int64_t to_stride);

/// What the rows of a tile see of it.
struct Seen {
  bool any = false;
  bool masked = false;                        // `shape` of the terms hides elements
  const kernels::KeyRange* ranges = nullptr;  // null: every row sees all keys up to `masked`
  bool partial() const { return masked || ranges != nullptr; }
};

template <class T>
class TileCall {
 protected:
  using Block = kernels::Block<T>;

  TileCall(const Problem& problem, const RunOptions& run, bool backward)
      : problem_(problem),
        run_(run),
        path_(choose_path(problem, run, backward)),
        wide_(kernels::tile_kernels<T>(path_.isa)),
        products_(kernels::tile_kernels<T>(path_.isa, path_.half_operands)),
        head_dim_(problem.sequences[0].q.size(2)),
        value_dim_(problem.sequences[0].v.size(2)),
        group_(problem.sequences[0].q.size(0) / problem.sequences[0].k.size(0)),
        second_(problem.sequences[0].r.defined()),
        scale_(bounded_term<T>(problem.scale)),
        shaped_(adds(problem.terms) || problem.policy.softcap > 0 || problem.policy.most) {}

  static bool adds(const ScoreTerms* terms) { return terms != nullptr && terms->adds(); }

  const Sequence& sequence(int64_t s) const { return problem_.sequences[static_cast<size_t>(s)]; }

  /// `ranges` has room for the rows of the tile.
  Seen look(const TileAt& at, kernels::KeyRange* ranges) const {
    const TilePlan& plan = sequence(at.sequence).plan;
    const Interval keys{at.key, at.key + at.keys}, all = plan.rows(at.row, at.row + at.rows);
    if (all.empty() || all.begin >= keys.end || all.end <= keys.begin) return {};
    const Visit visit = problem_.terms == nullptr ? Visit::whole : problem_.terms->visit(at);
    if (visit == Visit::none) return {};
    Seen seen{true, visit == Visit::masked, nullptr};
    const bool covered = plan.covers(at.row, at.row + at.rows, keys);
    assert(covered || visit != Visit::ranged);  // the ranges of both would have to meet
    if (covered) {
      const bool asks = visit != Visit::whole;
      if (asks && problem_.terms->ranges(at, ranges)) seen.ranges = ranges;
      return seen;
    }
    for (int64_t r = 0; r < at.rows; ++r) {
      const Interval row = plan.row(at.row + r);
      ranges[r] = {static_cast<int32_t>(std::clamp(row.begin, keys.begin, keys.end) - keys.begin),
                   static_cast<int32_t>(std::clamp(row.end, keys.begin, keys.end) - keys.begin)};
    }
    seen.ranges = ranges;
    return seen;
  }

  bool drops() const { return problem_.policy.dropout > 0; }
  kernels::Dropout dropout(const TileAt& at) const {
    const Policy& policy = problem_.policy;
    return {policy.seed,
            drop_limit(policy.dropout),
            static_cast<uint32_t>(at.head),
            static_cast<uint32_t>(sequence(at.sequence).batch),
            at.row,
            at.key};
  }
  /// What weights that are not dropped are multiplied by.
  T kept() const { return static_cast<T>(1 / (1 - problem_.policy.dropout)); }

  /// From products to what the weight kernels take with weight_shape.
  void shape_scores(const TileAt& at, const Seen& seen, Block s, Block slope) const {
    if (shaped_) {
      kernels::ScoreCaps<T> caps;
      if (problem_.policy.softcap > 0) caps.softcap = in_range(problem_.policy.softcap);
      if (problem_.policy.most) caps.most = static_cast<T>(*problem_.policy.most);
      wide_.cap_scores(s, at.rows, at.keys, seen.ranges, static_cast<T>(std::abs(scale_)), caps,
                       slope);
    }
    if (seen.masked || adds(problem_.terms)) problem_.terms->shape(at, s);
  }

  kernels::WeightShape<T> weight_shape(const TileAt& at) const {
    const auto head = static_cast<size_t>(at.head);
    const Policy& policy = problem_.policy;
    const double unit = policy.weight == kernels::WeightKind::polynomial ? 1 : kLog2E;
    kernels::WeightShape<T> shape;
    const TilePlan& plan = sequence(at.sequence).plan;
    shape.scale = static_cast<T>((shaped_ ? 1 : std::abs(scale_)) * unit);
    shape.order = policy.order;
    if (!policy.head_bias.empty()) {
      shape.bias = static_cast<T>(bounded_term<T>(policy.head_bias[head]) * unit);
    }
    if (!policy.alibi_slope.empty()) {
      const int64_t farthest = plan.queries() + plan.keys();
      const double slope =
          policy.alibi_slope[policy.slope_index(sequence(at.sequence).batch, at.head)];
      shape.slope = static_cast<T>(bounded_term<T>(slope, farthest) * unit);
    }
    shape.distance = plan.position(at.row) - at.key;
    return shape;
  }

  /// The logit of a head's sink, in units of log2.
  double sink(int64_t head) const {
    return bounded_term<T>(problem_.policy.sink[static_cast<size_t>(head)]) * kLog2E;
  }

  // The nearest number that is neither 0, which would be no cap at all, nor infinite.
  static T in_range(double positive) {
    using Limits = std::numeric_limits<T>;
    return static_cast<T>(std::clamp(positive, double{Limits::min()}, double{Limits::max()}));
  }

  // Elements from row to row of score blocks: whole panels, pairs of keys, and rows that do not fall on
  // the same cache sets.
  int64_t block_stride() const { return round_up(path_.key_tile, 64) + 64 + 16; }

  const Problem& problem_;
  const RunOptions& run_;
  const Path path_;
  const kernels::TileKernels<T>& wide_;      // operands of type T
  const kernels::TileKernels<T>& products_;  // operands of the path
  const int64_t head_dim_, value_dim_, group_;
  const bool second_;  // there is a second stream
  const double scale_;
  const bool shaped_;  // scores are scaled, and more, before they become weights
};

}  // namespace heed::tiled
