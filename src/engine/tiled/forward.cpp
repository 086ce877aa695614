// Loops. An item is a range of query rows of one key head (all query heads of its group) against a
// range of keys; key tiles are the outer loop, so that a packed tile serves every row of the item:
//
//   for key tile:  pack K, V
//     for query tile of the item that sees it:  S = Q K^T;  P = weights(S);  O = carry O + P V
//   out = O / sum
//
// Key tiles start at multiples of the tile size whatever the item, and every row's sums run in key
// order, so results do not depend on how rows are dealt out to threads. Where rows see few keys, the
// loops are the other way round (sliding.cpp). Few queries with many keys are cut along the keys
// instead, into parts of fixed size, merged in order.
#include "engine/tiled/forward.h"

#include <limits>

#include "engine/tiled/fold.h"

namespace heed::tiled {

namespace {

// Query tiles during which the next key tile is asked for.
constexpr int64_t kReadAheadTiles = 8;

}  // namespace

template <class T>
Forward<T>::Forward(const Problem& problem, const RunOptions& run)
    : TileCall<T>(problem, run, false),
      streams_(second_ ? 2 : 1),
      padded_dim_(round_up(head_dim_, wide_.dim_multiple)),
      padded_values_(round_up(value_dim_, std::max(products_.dim_multiple, wide_.dim_multiple))),
      tile_rows_(round_up(path_.query_tile, products_.row_multiple)),
      tile_keys_(path_.key_tile) {}

template <class T>
void Forward<T>::run() {
  plan_items();
  const auto count = static_cast<int64_t>(items_.size());
  parallel_for(count, threads_for(run_, count), [&](int64_t i, int) {
    kernels::with_unit(products_, [&] { run_item(items_[static_cast<size_t>(i)]); });
  });
  if (parts_ > 0) merge_parts();
}

template <class T>
void Forward<T>::plan_items() {
  for (int64_t s = 0; s < static_cast<int64_t>(problem_.sequences.size()); ++s) {
    const TilePlan& plan = sequence(s).plan;
    if (plan.queries() == 0) continue;
    if (path_.part_keys > 0) {
      plan_parts(s);
      continue;
    }
    for (int64_t end = plan.queries(); end > 0;) {
      const int64_t begin = (end - 1) / path_.group_rows * path_.group_rows;
      for (int64_t h = 0; h < sequence(s).k.size(0); ++h) {
        items_.push_back({s, h, begin, end, plan.rows(begin, end)});
      }
      end = begin;
    }
  }
  if (path_.part_keys > 0) {
    if (parts_ == 0) return;
    part_sums_ = Array(DType::f64, {parts_, most_rows_, kPartSums});
    part_out_ = Array(dtype_of<T>, {parts_, streams_ * most_rows_, padded_values_});
    return;
  }
  // Long items first: later rows see more keys under a causal mask.
  const auto cost = [](const Item& item) {
    return (item.row_end - item.row_begin) * std::max<int64_t>(0, item.keys.end - item.keys.begin);
  };
  std::stable_sort(items_.begin(), items_.end(),
                   [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
}

template <class T>
void Forward<T>::plan_parts(int64_t s) {
  const TilePlan& plan = sequence(s).plan;
  const Interval seen = plan.rows(0, plan.queries());
  const int64_t first = seen.begin / tile_keys_, last = (seen.end + tile_keys_ - 1) / tile_keys_;
  const int64_t tiles = std::max<int64_t>(0, last - first);
  int64_t part_tiles = std::max<int64_t>(1, path_.part_keys / tile_keys_);
  if (problem_.splits) {
    part_tiles = std::max<int64_t>(1, ceil_div(tiles, *problem_.splits));
  }
  for (int64_t h = 0; h < sequence(s).k.size(0); ++h) {
    if (tiles <= part_tiles) {
      items_.push_back({s, h, 0, plan.queries(), seen});
      continue;
    }
    for (int64_t t = first; t < last; t += part_tiles) {
      const Interval keys{std::max(seen.begin, t * tile_keys_),
                          std::min(seen.end, (t + part_tiles) * tile_keys_)};
      items_.push_back({s, h, 0, plan.queries(), keys, parts_++, t == first});
    }
    most_rows_ = std::max(most_rows_, slots(query_tiles(items_.back())));
  }
}

template <class T>
std::vector<QueryTile> Forward<T>::query_tiles(const Item& item) const {
  std::vector<QueryTile> tiles;
  int64_t slot = 0;
  const int64_t step = path_.few_rows ? item.row_end - item.row_begin : path_.query_tile;
  for (int64_t begin = item.row_begin; begin < item.row_end; begin += step) {
    const int64_t end = std::min(begin + step, item.row_end);
    for (int64_t g = 0; g < group_; ++g) {
      tiles.push_back({item.kv_head * group_ + g, begin, end, slot});
      slot += path_.few_rows ? end - begin : tile_rows_;
    }
  }
  return tiles;
}

template <class T>
int64_t Forward<T>::slots(const std::vector<QueryTile>& tiles) const {
  if (!path_.few_rows) return static_cast<int64_t>(tiles.size()) * tile_rows_;
  return tiles.back().slot + tiles.back().rows();
}

template <class T>
int64_t Forward<T>::query_bytes(const std::vector<QueryTile>& tiles) const {
  if (path_.few_rows) {
    return streams_ * slots(tiles) * padded_dim_ * static_cast<int64_t>(sizeof(T));
  }
  return streams_ * static_cast<int64_t>(tiles.size()) *
         round_up(products_.query_bytes(tile_rows_, head_dim_), 64);
}

template <class T>
typename Forward<T>::Layout Forward<T>::layout(const std::vector<QueryTile>& tiles) const {
  Layout l{};
  l.rows = slots(tiles);
  l.out_rows = streams_ * l.rows;
  l.block_rows = path_.few_rows ? round_up(l.out_rows, 4) : tile_rows_;
  l.block_stride = this->block_stride();
  // A second stream puts its own weights over the scores.
  if (path_.half_operands) l.weight_rows = second_ ? l.block_rows : kernels::kWeightRowsBefore;
  return l;
}

template <class T>
typename Forward<T>::Memory Forward<T>::memory(Cutter& cut,
                                               const std::vector<QueryTile>& tiles) const {
  const Layout l = layout(tiles);
  Memory m{};
  m.second = l.rows;
  m.queries = cut.take<std::byte>(query_bytes(tiles));
  m.query_tile_bytes =
      path_.few_rows ? 0 : round_up(products_.query_bytes(tile_rows_, head_dim_), 64);
  m.pivot = cut.take<T>(l.out_rows);
  m.sum = cut.take<T>(l.out_rows);
  m.carry = cut.take<T>(l.out_rows);
  m.out = {cut.take<T>(l.out_rows * padded_values_), padded_values_};
  // Scores behind the weights that are written over them.
  T* weights = cut.take<T>((l.weight_rows + l.block_rows) * l.block_stride);
  m.weights = weights;
  m.scores = {weights + l.weight_rows * l.block_stride, l.block_stride};
  if (second_ && !path_.few_rows) {
    m.second_scores = {cut.take<T>(l.block_rows * l.block_stride), l.block_stride};
  }
  m.ranges = cut.take<KeyRange>(l.block_rows);
  if (path_.few_rows) {
    m.kept = {cut.take<T>(l.out_rows * (padded_values_ + 2)), padded_values_ + 2};
  } else {
    m.keys = cut.take<std::byte>(products_.key_bytes(packed_keys(), head_dim_));
    m.values = cut.take<std::byte>(products_.value_bytes(packed_keys(), value_dim_));
  }
  return m;
}

template <class T>
void Forward<T>::clear_padding(const Item& item, const std::vector<QueryTile>& tiles,
                               const Memory& m) const {
  if (item.row_end % path_.query_tile == 0 && tile_rows_ == path_.query_tile && !path_.few_rows) {
    return;
  }
  // It stays finite.
  std::fill_n(static_cast<std::byte*>(m.queries), query_bytes(tiles), std::byte{0});
}

// Rows that have seen no key so far.
template <class T>
void Forward<T>::start_rows(const Item& item, const std::vector<QueryTile>& tiles,
                            const Memory& m) const {
  const Layout l = layout(tiles);
  std::fill_n(m.pivot, l.out_rows, -std::numeric_limits<T>::infinity());
  std::fill_n(m.sum, l.out_rows, T{0});
  std::fill_n(m.carry, l.out_rows, T{1});
  std::fill_n(m.out.data, l.out_rows * padded_values_, T{0});
  if (problem_.policy.sink.empty()) return;
  if (second_) std::fill_n(m.pivot + m.second, l.rows, T{0});  // a sink's t is 0 and stays so
  if (item.first_part) place_sinks(tiles, m);
}

// A sink is a key that every row has seen already, with a value of zero.
template <class T>
void Forward<T>::place_sinks(const std::vector<QueryTile>& tiles, const Memory& m) const {
  for (const QueryTile& tile : tiles) {
    const T sink = static_cast<T>(this->sink(tile.head));
    if (sink == -std::numeric_limits<T>::infinity()) continue;
    std::fill_n(m.pivot + tile.slot, tile.rows(), sink);
    std::fill_n(m.sum + tile.slot, tile.rows(), T{1});
  }
}

template <class T>
void Forward<T>::pack_item(const Item& item, const std::vector<QueryTile>& tiles,
                           const Memory& m) const {
  const Sequence& s = sequence(item.sequence);
  for (int64_t stream = 0; stream < streams_; ++stream) {
    const HeadRows& from = stream == 0 ? s.q : s.r;
    const bool negate = stream == 0 && scale_ < 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Rows q = rows_of(from, tiles[t].head, tiles[t].begin, tiles[t].end);
      if (path_.few_rows) {
        wide_.pack_queries(
            q, negate,
            reinterpret_cast<T*>(m.queries) + (stream * m.second + tiles[t].slot) * padded_dim_);
      } else {
        products_.pack_queries(q, negate, packed_queries(tiles, stream, t, m));
      }
    }
  }
}

template <class T>
void Forward<T>::run_item(const Item& item) const {
  if (path_.sliding) return run_sliding(item);
  const std::vector<QueryTile> tiles = query_tiles(item);
  const Sequence& s = sequence(item.sequence);
  const LaidOut scratch([&](Cutter& cut) { return memory(cut, tiles); });
  const Memory& m = scratch.memory;
  clear_padding(item, tiles, m);
  start_rows(item, tiles, m);
  pack_item(item, tiles, m);
  if (!item.keys.empty()) {
    const int64_t first = item.keys.begin / tile_keys_ * tile_keys_;
    for (int64_t key = first; key < item.keys.end; key += tile_keys_) {
      const Interval keys{key, std::min(key + tile_keys_, item.keys.end)};
      if (path_.few_rows) {
        run_few_rows(item, tiles, keys, m);
      } else {
        const int64_t next = std::min(keys.end + tile_keys_, item.keys.end);
        run_key_tile(item, tiles, keys,
                     {rows_of(s.k, item.kv_head, keys.end, next),
                      rows_of(s.v, item.kv_head, keys.end, next)},
                     m);
      }
    }
  }
  for (const QueryTile& tile : tiles) {
    if (item.part < 0) {
      finish(item.sequence, tile, m);
    } else {
      keep_part(item.part, tile, m);
    }
  }
}

template <class T>
void Forward<T>::run_key_tile(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                              kernels::ReadAhead next, const Memory& m) const {
  next.spread(kReadAheadTiles * work(path_.query_tile, tile_keys_));
  const Sequence& s = sequence(item.sequence);
  bool packed = false;
  std::vector<int64_t> infinite;
  for (size_t t = 0; t < tiles.size(); ++t) {
    const QueryTile& tile = tiles[t];
    const TileAt at = tile_at(item, tile, keys);
    const Seen seen = this->look(at, m.ranges);
    if (!seen.any) continue;
    if (!packed) {
      products_.pack_keys(rows_of(s.k, item.kv_head, keys.begin, keys.end), m.keys);
      infinite = pack_finite(rows_of(s.v, item.kv_head, keys.begin, keys.end), m.values);
      packed = true;
    }
    add_tile(tile, at, seen,
             {packed_queries(tiles, 0, t, m), packed_queries(tiles, streams_ - 1, t, m), m.keys,
              m.values, infinite},
             next, m);
  }
}

template <class T>
std::vector<int64_t> Forward<T>::pack_finite(const Rows& v, void* to) const {
  if (products_.pack_values(v, to)) return {};
  const FiniteRows finite = finite_rows(v);
  products_.pack_values(finite.view(), to);
  return finite.rows;
}

template <class T>
void Forward<T>::add_tile(const QueryTile& tile, const TileAt& at, const Seen& seen,
                          const PackedTile& packed, kernels::ReadAhead& next,
                          const Memory& m) const {
  if (attend_tile(tile, at, seen, packed, next, m)) return;
  products_.scores(packed.queries, at.rows, packed.keys, at.keys, head_dim_, seen.ranges, m.scores,
                   &next);
  this->shape_scores(at, seen, m.scores, {});
  std::vector<SeenElement> special = seen_elements(packed.infinite, at, seen, m.scores);
  weigh_and_add(at, seen, tile, packed, special, next, m);
  if (special.empty()) return;
  const Rows v = rows_of(sequence(at.sequence).v, at.head / group_, at.key, at.key + at.keys);
  for (const SeenElement& e : special) {
    add_row(v, e.key, static_cast<T>(e.weight), m.out.row(tile.slot + e.row), 1);
    if (second_) {
      add_row(v, e.key, static_cast<T>(e.second_weight), m.out.row(m.second + tile.slot + e.row),
              1);
    }
  }
}

template <class T>
bool Forward<T>::attend_tile(const QueryTile& tile, const TileAt& at, const Seen& seen,
                             const PackedTile& packed, kernels::ReadAhead& next,
                             const Memory& m) const {
  const auto attend = products_.attend[static_cast<int>(problem_.policy.weight)];
  const auto shape = this->weight_shape(at);
  if (attend == nullptr || !path_.fused || !packed.infinite.empty() ||
      !(shape.scale > 0 && std::isfinite(shape.scale))) {
    return false;
  }
  attend({packed.queries, packed.keys, packed.values, at.rows, at.keys, head_dim_, value_dim_,
          seen.ranges},
         shape, state_of(tile, m), {m.out.row(tile.slot), m.out.stride}, &next);
  return true;
}

template <class T>
std::vector<SeenElement> Forward<T>::seen_elements(const std::vector<int64_t>& keys,
                                                   const TileAt& at, const Seen& seen,
                                                   Block s) const {
  std::vector<SeenElement> elements;
  for (int64_t key : keys) {
    for (int64_t r = 0; r < at.rows; ++r) {
      if (seen.ranges != nullptr && (key < seen.ranges[r].begin || key >= seen.ranges[r].end)) {
        continue;
      }
      if (seen.masked && s.row(r)[key] == -std::numeric_limits<T>::infinity()) continue;
      elements.push_back({.row = r, .key = key});
    }
  }
  return elements;
}

// From shaped scores to sums, and to the weights of special elements. Where nobody needs weights in T, they
// are written as operands of the product at once, from rows of scores to rows of half as many bytes; those
// of the second stream over the scores.
template <class T>
void Forward<T>::weigh_and_add(const TileAt& at, const Seen& seen, const QueryTile& tile,
                               const PackedTile& packed, std::vector<SeenElement>& special,
                               kernels::ReadAhead& next, const Memory& m) const {
  const auto kind = static_cast<int>(problem_.policy.weight);
  const RowState<T> state = state_of(tile, m);
  const bool half = path_.half_operands && special.empty();
  const auto& kernels = half ? products_ : wide_;
  const int64_t stride = m.scores.stride, weight_stride = half ? 2 * stride : stride;
  void* weights = half ? m.weights : m.scores.data;
  void* second_weights = half ? m.scores.data : m.second_scores.data;
  kernels.weights[kind](m.scores, at.rows, at.keys, seen.ranges, this->weight_shape(at), state,
                        weights, weight_stride);
  if (this->drops()) {
    kernels.drop_out(this->dropout(at), at.rows, at.keys, seen.ranges, weights, weight_stride);
  }
  if (second_) {
    products_.scores(packed.second_queries, at.rows, packed.keys, at.keys, head_dim_, seen.ranges,
                     m.second_scores, nullptr);
    kernels.second_weights(weights, weight_stride, m.second_scores, at.rows, at.keys, seen.ranges,
                           state.carry, m.pivot + m.second + tile.slot,
                           m.sum + m.second + tile.slot, second_weights);
  }
  for (SeenElement& e : special) {
    e.weight = m.scores.row(e.row)[e.key];
    if (second_) e.second_weight = m.second_scores.row(e.row)[e.key];
  }
  const auto accumulate = [&](const void* from, int64_t slot) {
    if (path_.half_operands && !half) {
      products_.round_weights({static_cast<const T*>(from), stride}, at.rows, at.keys, m.weights,
                              stride);
      from = m.weights;
    }
    products_.accumulate(from, weight_stride, at.rows, packed.values, at.keys, value_dim_,
                         seen.ranges, state.carry, {m.out.row(slot), m.out.stride}, &next);
  };
  accumulate(weights, tile.slot);
  if (second_) accumulate(second_weights, m.second + tile.slot);
}

template <class T>
void Forward<T>::finish(int64_t s, const QueryTile& tile, const Memory& m) const {
  const Sequence& at = sequence(s);
  const T* sum = m.sum + tile.slot;
  T* share = m.carry + tile.slot;  // of a weight in its row; nothing is carried any more
  for (int64_t r = 0; r < tile.rows(); ++r) share[r] = sum[r] == 0 ? T{0} : this->kept() / sum[r];
  const auto store = [&](const HeadRows& to, bool divide) {
    for_each_run(to, tile.begin, tile.end, [&](int64_t row, int64_t rows, int64_t stride) {
      const int64_t first = row - tile.begin;
      wide_.finish({m.out.row(tile.slot + first), m.out.stride}, rows, value_dim_,
                   divide ? share + first : nullptr, to.row(tile.head, row), to.dtype(), stride);
    });
  };
  if (second_) {
    if (at.v_mean.defined()) store(at.v_mean, true);
    for (int64_t r = 0; r < tile.rows(); ++r) combine_streams(s, tile, r, m);
  }
  store(at.out, problem_.policy.divide_by_sum());
  if (!at.lse.defined()) return;
  const bool plain = problem_.policy.weight == kernels::WeightKind::polynomial;
  for (int64_t r = 0; r < tile.rows(); ++r) {
    const double total = sum[r], pivot = m.pivot[tile.slot + r];
    std::byte* lse = at.lse.row(tile.head, tile.begin + r);
    if (lse == nullptr) continue;
    store_statistic(lse, at.lse.dtype(), plain ? total : (pivot + std::log2(total)) / kLog2E);
  }
}

// out = v_mean (1 + t_mean - shift) - O2 / sum with the shift that O2 has, the division left to finish.
template <class T>
void Forward<T>::combine_streams(int64_t s, const QueryTile& tile, int64_t r,
                                 const Memory& m) const {
  const int64_t row = tile.slot + r, second = m.second + row;
  const T sum = m.sum[row], shift = m.pivot[second];
  const T above = sum == 0 ? T{0} : m.sum[second] / sum;
  T* out = m.out.row(row);
  for (int64_t f = 0; f < value_dim_; ++f) out[f] = out[f] * (1 + above) - m.out.row(second)[f];
  const bool seen = shift != -std::numeric_limits<T>::infinity();
  const Tensor& t_mean = sequence(s).t_mean;
  if (!t_mean.defined()) return;
  store_statistic(t_mean.at({tile.head, tile.begin + r}), t_mean.dtype(),
                  seen ? above + shift : above);
}

template class Forward<float>;
template class Forward<double>;

namespace {

void forward_alike(const Problem& problem, const RunOptions& given) {
  const std::optional<Problem> folded = heads_as_rows(problem);
  const Problem& call = folded ? *folded : problem;
  const RunOptions run = worth_waking(given, forward_nanoseconds(call));
  with_wide_type(call.sequences[0].q.dtype(), [&]<class T>(T) { Forward<T>(call, run).run(); });
}

}  // namespace

void forward(const Problem& problem, const RunOptions& run) {
  const auto nothing = [](const Sequence& s) { return s.q.size(0) == 0 || s.q.size(1) == 0; };
  const auto& all = problem.sequences;
  if (std::all_of(all.begin(), all.end(), nothing)) return;
  // One call may read a prompt and continue other sequences by a token each: few rows go their own way. Terms
  // know sequences by their place.
  const std::vector<bool> is_few = have_few_rows(all, run);
  const bool alike =
      std::all_of(is_few.begin(), is_few.end(), [&](bool x) { return x == is_few[0]; });
  if (alike || problem.terms != nullptr) return forward_alike(problem, run);
  Problem few = problem, many = problem;
  few.sequences.clear();
  many.sequences.clear();
  for (size_t s = 0; s < all.size(); ++s) {
    (is_few[s] ? few : many).sequences.push_back(all[s]);
  }
  forward_alike(many, run);
  forward_alike(few, run);
}

}  // namespace heed::tiled
