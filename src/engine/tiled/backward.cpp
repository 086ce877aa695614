// Gradients from recomputed tiles (arXiv 2307.08691, Algorithm 2). A unit owns key tiles: gradients of
// keys and values stay with it, those of queries are summed in T over its key tiles. Where there
// are too few key heads for all threads, several units share a key head, and their sums over query rows
// are added in a fixed order: same bits for the same number of threads, memory O(threads x L).
#include "engine/tiled/backward.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <numeric>

#include "kernels/row_maps.h"

namespace heed::tiled {

namespace {

// The weight of a logit, in units of log2, as the kernels have it.
template <class T>
double weight_of(double logit, T pivot) {
  using Pivot = kernels::RoundedPivot<T>;
  const T size = std::abs(pivot);
  const double error = size >= Pivot::kLarge ? static_cast<double>(size * Pivot::kError) : 0;
  const double t = logit - pivot;
  return t >= -error ? 1 : std::exp2(t);
}

}  // namespace

template <class T>
Backward<T>::Backward(const Problem& problem, const std::vector<SequenceGradient>& gradients,
                      ScoreTerms* terms, const RunOptions& run)
    : TileCall<T>(problem, run, true),
      gradients_(gradients),
      terms_(terms),
      padded_dim_(round_up(head_dim_, std::max(products_.dim_multiple, wide_.dim_multiple))),
      padded_values_(round_up(value_dim_, wide_.dim_multiple)),
      tile_rows_(path_.few_rows ? path_.query_tile
                                : round_up(path_.query_tile, products_.row_multiple)),
      block_rows_(path_.few_rows ? group_ * tile_rows_ : tile_rows_),
      tile_keys_(path_.key_tile) {}

template <class T>
HeadGradients Backward<T>::run() {
  prepare_rows();
  plan_units();
  const std::vector<Task> tasks = deal_out(longest_first());
  const auto count = static_cast<int64_t>(tasks.size());
  parallel_for(count, threads_for(run_, count), [&](int64_t i, int) {
    const Task& task = tasks[static_cast<size_t>(i)];
    kernels::with_unit(products_, [&] {
      for (size_t unit : task.units) run_unit(task.lane, static_cast<int64_t>(unit));
    });
  });
  for (size_t first = 0; first < units_.size();) {
    const size_t last = first + static_cast<size_t>(units_[first].parts);
    if (units_[first].parts > 1) {
      std::vector<RowGradients*> parts;
      for (size_t i = first; i < last; ++i) parts.push_back(&partial_[i]);
      finish_rows(units_[first].sequence, units_[first].kv_head, parts);
    }
    first = last;
  }
  return head_gradients();
}

template <class T>
void Backward<T>::prepare_rows() {
  reserve_rows();
  const std::vector<RowBlock> blocks = row_blocks();
  const auto count = static_cast<int64_t>(blocks.size());
  parallel_for(count, threads_for(run_, count),
               [&](int64_t i, int) { prepare_block(blocks[static_cast<size_t>(i)]); });
}

template <class T>
void Backward<T>::reserve_rows() {
  int64_t total = 0;
  for (const Sequence& s : problem_.sequences) {
    row_base_.push_back(total);
    total += s.q.size(0) * s.plan.queries();
  }
  const DType type = dtype_of<T>;
  for (Array* rows : {&pivot_, &shift_}) *rows = Array::zeros(type, {total});
  if (second_) {
    for (Array* rows : {&t_mean_, &dot_out_, &dot_mean_}) *rows = Array::zeros(type, {total});
  }
  finite_.assign(static_cast<size_t>(total), 1);
}

template <class T>
std::vector<typename Backward<T>::RowBlock> Backward<T>::row_blocks() const {
  std::vector<RowBlock> blocks;
  for (int64_t s = 0; s < static_cast<int64_t>(problem_.sequences.size()); ++s) {
    const int64_t rows = sequence(s).plan.queries();
    // Heads inside: where they lie side by side, memory is read in its order.
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      for (int64_t head = 0; head < sequence(s).q.size(0); ++head) {
        blocks.push_back({s, head, row, std::min(row + kBlockRows, rows)});
      }
    }
  }
  return blocks;
}

template <class T>
void Backward<T>::prepare_block(const RowBlock& block) {
  const Sequence& s = sequence(block.sequence);
  const auto rows = [&](const HeadRows& t) {
    return rows_of(t, block.head, block.begin, block.end);
  };
  const SequenceGradient& given = gradient(block.sequence);
  const HeadRows& g = given.out;
  double out_dots[kBlockRows] = {}, mean_dots[kBlockRows] = {};
  if (problem_.policy.weight == kernels::WeightKind::softmax) {
    const auto& maps = kernels::row_map_kernels<T>(path_.isa);
    if (!given.delta.defined()) maps.dots(rows(g), rows(s.out), out_dots);
    if (second_) maps.dots(rows(g), rows(s.v_mean), mean_dots);
  }
  for (int64_t row = block.begin; row < block.end; ++row) {
    const int64_t at = row - block.begin;
    prepare_row(block.sequence, block.head, row, out_dots[at], mean_dots[at]);
  }
  const bool hides =
      problem_.terms != nullptr || !s.plan.covers(block.begin, block.end, {0, s.plan.keys()});
  if (!hides) return;
  for (const HeadRows* t : {&s.q, &g, &s.r}) {
    if (t->defined()) find_finite(block, rows(*t));
  }
}

// Which rows have nothing infinite or NaN.
template <class T>
void Backward<T>::find_finite(const RowBlock& block, const Rows& x) {
  const auto& maps = kernels::row_map_kernels<T>(path_.isa);
  if (maps.all_finite(x)) return;
  for (int64_t r = 0; r < x.count; ++r) {
    const Rows row{static_cast<const std::byte*>(x.data) +
                       x.offset(r) * static_cast<int64_t>(size_of(x.dtype)),
                   x.dtype, 0, 1, x.width};
    if (maps.all_finite(row)) continue;
    finite_[static_cast<size_t>(row_index(block.sequence, block.head, block.begin + r))] = 0;
  }
}

template <class T>
void Backward<T>::prepare_row(int64_t s, int64_t head, int64_t row, double out_dot,
                              double mean_dot) {
  const int64_t at = row_index(s, head, row);
  const HeadRows& lse_gradient = gradient(s).lse;
  const double from_lse = lse_gradient.defined() ? load_statistic(lse_gradient, head, row) : 0;
  const auto set = [at](Array& rows, double x) { rows.as<T>()[at] = static_cast<T>(x); };
  if (problem_.policy.weight != kernels::WeightKind::softmax) {
    set(shift_, from_lse);
    return;
  }
  const double lse = load_statistic(sequence(s).lse, head, row);
  // A row without keys has no gradient, whatever arrives.
  const bool dead = lse == -std::numeric_limits<double>::infinity();
  set(pivot_, lse * kLog2E);
  const HeadRows& known = gradient(s).delta;
  const double delta = known.defined() ? load_statistic(known, head, row) : out_dot - from_lse;
  set(shift_, dead ? 0 : -delta);
  if (second_) {
    set(t_mean_, load_statistic(sequence(s).t_mean, head, row));
    set(dot_out_, delta);
    set(dot_mean_, mean_dot);
  }
}

template <class T>
void Backward<T>::plan_units() {
  int64_t heads = 0;
  for (const Sequence& s : problem_.sequences) heads += s.k.size(0);
  const int64_t threads = run_.threads.value_or(default_threads());
  // Two units a thread even out what key tiles cost; more, within bounds for the memory of their sums,
  // where threads would wait for the last ones.
  int64_t wanted = ceil_div(2 * threads, std::max<int64_t>(1, heads));
  const auto waits = [&] {
    const int64_t units = heads * wanted;
    return 10 * ceil_div(units, threads) * threads > 11 * units;
  };
  while (waits() && heads * (wanted + 1) <= 8 * threads) ++wanted;
  if (threads == 1) wanted = 1;
  for (int64_t s = 0; s < static_cast<int64_t>(problem_.sequences.size()); ++s) {
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, key_tiles(s)));
    for (int64_t h = 0; h < sequence(s).k.size(0); ++h) {
      for (int64_t part = 0; part < parts; ++part) units_.push_back({s, h, part, parts});
    }
  }
  partial_.resize(units_.size());
  sums_.assign(units_.size() * static_cast<size_t>(group_) * 2, 0.0);
}

template <class T>
std::vector<size_t> Backward<T>::longest_first() const {
  std::vector<int64_t> pairs;
  for (const Unit& unit : units_) {
    const TilePlan& plan = sequence(unit.sequence).plan;
    int64_t keys = 0;
    for (int64_t tile = 0; tile < key_tiles(unit.sequence); ++tile) {
      if (unit.owns(tile)) keys += std::min(tile_keys_, plan.keys() - tile * tile_keys_);
    }
    pairs.push_back(keys * plan.queries());
  }
  std::vector<size_t> order(units_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return pairs[a] > pairs[b]; });
  return order;
}

// Units whose sums of the terms overlap share a task, or are dealt out to as many lanes as keep all threads
// busy.
template <class T>
std::vector<Task> Backward<T>::deal_out(const std::vector<size_t>& order) const {
  std::vector<Task> tasks;
  if (terms_ == nullptr || !terms_->has_gradient()) {
    for (size_t unit : order) tasks.push_back({0, {unit}});
    return tasks;
  }
  const GradientOverlap overlap = terms_->gradient_overlap();
  std::vector<std::vector<size_t>> overlapping;
  std::map<std::array<int64_t, 3>, size_t> places;
  size_t most = 0;
  for (size_t i : order) {
    const Unit& unit = units_[i];
    const std::array<int64_t, 3> where{overlap.sequences ? 0 : unit.sequence,
                                       overlap.heads ? 0 : unit.kv_head,
                                       overlap.keys ? 0 : unit.part};
    const size_t place = places.try_emplace(where, overlapping.size()).first->second;
    if (place == overlapping.size()) overlapping.emplace_back();
    overlapping[place].push_back(i);
    most = std::max(most, overlapping[place].size());
  }
  const auto threads = static_cast<size_t>(threads_for(run_, static_cast<int64_t>(order.size())));
  const size_t lanes = std::min(most, (threads + overlapping.size() - 1) / overlapping.size());
  terms_->begin_gradient(static_cast<int>(lanes));
  for (const std::vector<size_t>& units : overlapping) {
    for (size_t lane = 0; lane < std::min(lanes, units.size()); ++lane) {
      tasks.push_back({static_cast<int>(lane), {}});
      for (size_t i = lane; i < units.size(); i += lanes) tasks.back().units.push_back(units[i]);
    }
  }
  return tasks;
}

template <class T>
typename Backward<T>::RowGradients Backward<T>::make_row_gradients(const Unit& unit) const {
  const DType type = dtype_of<T>;
  // Few rows are added to in one tile, also where a sequence among others, or alone, has none.
  const int64_t tiles = std::max<int64_t>(query_tiles(unit.sequence), path_.few_rows ? 1 : 0);
  const Dims shape{group_ * tiles * tile_rows_, padded_dim_};
  RowGradients rows{Array::zeros(type, shape), {}};
  if (second_) rows.r = Array::zeros(type, shape);
  return rows;
}

template <class T>
void Backward<T>::run_unit(int lane, int64_t index) {
  const Unit& unit = units_[static_cast<size_t>(index)];
  RowGradients rows = make_row_gradients(unit);
  LaidOut scratch([&](Cutter& cut) { return memory(cut); });
  Memory& m = scratch.memory;
  clear_row_operands(m);
  m.one_tile = in_one_tile(unit);
  double* sums = sums_.data() + index * group_ * 2;
  const int64_t keys = sequence(unit.sequence).plan.keys();
  if (path_.few_rows) pack_few_rows(unit, m);
  for (int64_t tile = 0; tile < key_tiles(unit.sequence); ++tile) {
    if (!unit.owns(tile)) continue;
    const Interval at{tile * tile_keys_, std::min((tile + 1) * tile_keys_, keys)};
    if (path_.few_rows) {
      run_few_rows(lane, unit, at, rows, sums, m);
    } else {
      run_key_tile(lane, unit, at, rows, sums, m);
    }
  }
  if (unit.parts == 1) {
    finish_rows(unit.sequence, unit.kv_head, {&rows});
  } else {
    partial_[static_cast<size_t>(index)] = std::move(rows);
  }
}

template <class T>
void Backward<T>::finish_rows(int64_t s, int64_t kv_head,
                              const std::vector<RowGradients*>& parts) const {
  std::vector<T*> q, r;
  for (RowGradients* part : parts) {
    q.push_back(part->q.template as<T>());
    if (second_) r.push_back(part->r.template as<T>());
  }
  // With a second stream the scale is in dS already, all but its sign.
  const double factor = !second_ ? scale_ : scale_ < 0 ? -1 : 1;
  finish_rows_of(gradient(s).q, s, kv_head, factor, q);
  if (second_) finish_rows_of(gradient(s).r, s, kv_head, 1, r);
}

template <class T>
void Backward<T>::finish_rows_of(const HeadRows& to, int64_t s, int64_t kv_head, double factor,
                                 const std::vector<T*>& parts) const {
  const int64_t tiles = query_tiles(s), queries = sequence(s).plan.queries();
  const int64_t count = group_ * tiles;
  parallel_for(count, threads_for(run_, count), [&](int64_t i, int) {
    const int64_t begin = i % tiles * path_.query_tile;
    const int64_t rows = std::min(path_.query_tile, queries - begin);
    const int64_t offset = i * tile_rows_ * padded_dim_;
    const Block sum{parts[0] + offset, padded_dim_};
    const int64_t elements = rows * padded_dim_;
    for (size_t part = 1; part < parts.size(); ++part) {
      const T* more = parts[part] + offset;
      for (int64_t x = 0; x < elements; ++x) sum.data[x] += more[x];
    }
    const T scale = static_cast<T>(factor);
    for (int64_t x = 0; x < elements; ++x) sum.data[x] *= scale;
    const int64_t head = kv_head * group_ + i / tiles;
    for_each_run(to, begin, begin + rows, [&](int64_t row, int64_t run, int64_t stride) {
      wide_.finish({sum.row(row - begin), sum.stride}, run, head_dim_, nullptr, to.row(head, row),
                   to.dtype(), stride);
    });
  });
}

template <class T>
HeadGradients Backward<T>::head_gradients() const {
  const Policy& policy = problem_.policy;
  const auto heads = static_cast<size_t>(problem_.sequences[0].q.size(0));
  HeadGradients sums{std::vector<double>(heads),
                     std::vector<double>(std::max(heads, policy.alibi_slope.size())),
                     std::vector<double>(heads)};
  for (size_t u = 0; u < units_.size(); ++u) {
    for (int64_t g = 0; g < group_; ++g) {
      const auto head = static_cast<size_t>(units_[u].kv_head * group_ + g);
      const double* sum = sums_.data() + (static_cast<int64_t>(u) * group_ + g) * 2;
      sums.bias[head] += sum[0];
      const int64_t batch = sequence(units_[u].sequence).batch;
      sums.alibi_slope[policy.slope_index(batch, static_cast<int64_t>(head))] -= sum[1];
    }
  }
  if (policy.sink.empty()) return sums;
  for (int64_t s = 0; s < static_cast<int64_t>(problem_.sequences.size()); ++s) {
    for (size_t head = 0; head < heads; ++head) {
      const double sink = this->sink(static_cast<int64_t>(head));
      if (sink == -std::numeric_limits<double>::infinity()) continue;
      for (int64_t row = 0; row < sequence(s).plan.queries(); ++row) {
        const int64_t at = row_index(s, static_cast<int64_t>(head), row);
        const double weight = weight_of<T>(sink, pivot_.template as<T>()[at]);
        sums.sink[head] += weight * shift_.template as<T>()[at];
      }
    }
  }
  return sums;
}

namespace {

// Without sequences the number of heads is known from the numbers per head.
HeadGradients nothing_summed(const Policy& policy) {
  const auto zeros = [](const std::vector<double>& like) {
    return std::vector<double>(like.size());
  };
  return {zeros(policy.head_bias), zeros(policy.alibi_slope), zeros(policy.sink)};
}

}  // namespace

template class Backward<float>;
template class Backward<double>;

HeadGradients backward(const Problem& problem, const std::vector<SequenceGradient>& gradients,
                       ScoreTerms* terms, const RunOptions& given) {
  const bool no_heads = problem.sequences.empty() || problem.sequences[0].k.size(0) == 0;
  if (no_heads) return nothing_summed(problem.policy);
  // Two and a half times the products of a forward in three loops, each of which wakes the threads.
  const RunOptions run = worth_waking(given, forward_nanoseconds(problem) * 2.5 / 3);
  return with_wide_type(problem.sequences[0].q.dtype(), [&]<class T>(T) {
    return Backward<T>(problem, gradients, terms, run).run();
  });
}

}  // namespace heed::tiled
