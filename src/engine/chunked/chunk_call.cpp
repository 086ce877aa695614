#include "engine/chunked/chunk_call.h"

#include <cmath>

namespace heed::chunked {

namespace {

template <class T>
CallKind kind_of(const Problem<T>& problem) {
  const Policy<T>& policy = problem.policy;
  const auto needs_t = [](const RowMap<T>* map) { return map && !map->has_halves(); };
  const bool mapped = needs_t(policy.maps.q) || needs_t(policy.maps.k) || policy.sums;
  const int64_t score_width = policy.polynomial ? problem.q.size(3) : policy.features;
  return {problem.q.dtype(), problem.k.size(2), mapped,      problem.causal,
          policy.features,   problem.v.size(3), score_width, problem.initial.defined()};
}

}  // namespace

template <class T>
RunOptions worth_waking(const Problem<T>& problem, const RunOptions& run) {
  // Multiply-adds with a state and inside a chunk, bytes of a state that is read and written, a head.
  constexpr double kHead = 200, kChunk = 48;
  const auto tokens = static_cast<double>(std::max(problem.q.size(2), problem.k.size(2)));
  const auto features = static_cast<double>(problem.policy.features),
             values = static_cast<double>(problem.v.size(3));
  const double inside = std::min(tokens, kChunk) / 2 * (features + values);
  const double head = tokens * (2 * features * values + inside) * kMultiplyAddNanoseconds +
                      features * values * 2 * sizeof(T) * kByteNanoseconds + kHead;
  return worth_waking(run, head * static_cast<double>(problem.q.size(0) * problem.q.size(1)));
}
template RunOptions worth_waking(const Problem<float>&, const RunOptions&);
template RunOptions worth_waking(const Problem<double>&, const RunOptions&);

template <class T>
ChunkCall<T>::ChunkCall(const Problem<T>& problem, const RunOptions& run, bool decay_tables)
    : problem_(problem),
      run_(run),
      path_(choose_path(kind_of(problem), run)),
      wide_(kernels::tile_kernels<T>(path_.isa)),
      products_(kernels::tile_kernels<T>(path_.isa, path_.half_operands)),
      rows_(kernels::chunk_kernels<T>(path_.isa)),
      half_(path_.half_operands),
      batch_(problem.q.size(0)),
      heads_(problem.q.size(1)),
      group_(std::max<int64_t>(1, heads_ / std::max<int64_t>(1, problem.k.size(1)))),
      queries_(problem.q.size(2)),
      tokens_(problem.k.size(2)),
      width_(problem.q.size(3)),
      features_(problem.policy.features),
      value_dim_(problem.v.size(3)),
      padded_width_(round_up(width_, products_.dim_multiple)),
      padded_features_(
          round_up(features_, std::max(products_.dim_multiple, products_.key_multiple))),
      padded_values_(round_up(value_dim_, products_.dim_multiple)),
      chunk_(std::min(path_.chunk, round_up(std::max({queries_, tokens_, int64_t{1}}), 16))),
      tile_(problem.policy.polynomial ? std::min(features_, kFeatureTile) : features_),
      tile_rows_(round_up(chunk_, products_.row_multiple)),
      score_stride_(round_up(chunk_, products_.key_multiple) + kBlockPad),
      ones_(static_cast<size_t>(std::max(chunk_, tile_) + kBlockPad), T{1}) {
  state_size_ = features_ * padded_values_;
  if (problem.policy.key_sum) state_size_ += padded_features_;
  if (problem.policy.value_sum) state_size_ += padded_values_;
  if (!decay_tables) return;
  for (double slope : problem.policy.slopes) decays_.emplace_back(slope, chunk_);
}

template <class T>
Chunk ChunkCall<T>::causal_chunk(int64_t b, int64_t i) const {
  const int64_t offset = tokens_ - queries_;
  Chunk chunk = key_chunk(b, i);
  chunk.query = std::max<int64_t>(chunk.begin - offset, 0);
  chunk.queries = std::max<int64_t>(0, chunk.begin + chunk.tokens - offset - chunk.query);
  chunk.shift = chunk.query + offset - chunk.begin;
  return chunk;
}

template <class T>
Chunk ChunkCall<T>::key_chunk(int64_t b, int64_t i) const {
  Chunk chunk{.begin = i * chunk_};
  chunk.tokens = chunk_tokens(i);
  chunk.keys = std::clamp<int64_t>(existing(b) - chunk.begin, 0, chunk.tokens);
  return chunk;
}

template <class T>
Chunk ChunkCall<T>::query_chunk(int64_t i) const {
  return {.query = i * chunk_, .queries = std::min(chunk_, queries_ - i * chunk_)};
}

template <class T>
Decay<T> ChunkCall<T>::decay(int64_t head, int64_t tokens) const {
  if (problem_.policy.slopes.empty()) return {};
  const double exponent =
      -problem_.policy.slopes[static_cast<size_t>(head)] * static_cast<double>(tokens);
  const double less = std::expm1(exponent);
  if (less >= -0.5) return {static_cast<T>(less), true};
  return {static_cast<T>(std::exp(exponent)), false};
}

template <class T>
Source<T> ChunkCall<T>::queries(int64_t b, int64_t h, const Chunk& chunk) const {
  return {rows(problem_.q, b, h, chunk.query, chunk.queries),
          {b, h, chunk.query},
          problem_.policy.maps.q};
}

template <class T>
Source<T> ChunkCall<T>::keys(int64_t b, int64_t h, const Chunk& chunk) const {
  const int64_t own = key_head(h);
  return {rows(problem_.k, b, own, chunk.begin, chunk.keys),
          {b, own, chunk.begin},
          problem_.policy.maps.k};
}

template <class T>
Source<T> ChunkCall<T>::for_sums(Source<T> source, bool query) const {
  if (problem_.policy.sums) source.map = query ? problem_.policy.sums->q : problem_.policy.sums->k;
  return source;
}

template <class T>
kernels::Block<const T> ChunkCall<T>::sum_features(const Source<T>& source, bool query,
                                                   const Rows& phi, Block block) const {
  if (separate_sums()) return whole_features(for_sums(source, query), 0, features_, block);
  if (source.map == nullptr || half_) return whole_rows(phi, block);
  return {static_cast<const T*>(phi.data), phi.stride};
}

template <class T>
void ChunkCall<T>::features(const Source<T>& source, int64_t first, int64_t count, Block to) const {
  if (source.map != nullptr) return source.map->map(source.at, source.rows, first, count, to);
  rows_.pack_rows(columns(source.rows, first, count), nullptr, to);
}

template <class T>
kernels::Block<const T> ChunkCall<T>::whole_rows(const Rows& x, Block block) const {
  if (x.dtype == kType && x.width % products_.dim_multiple == 0) {
    return {static_cast<const T*>(x.data), x.stride};
  }
  rows_.pack_rows(x, nullptr, block);
  return {block.data, block.stride};
}

template <class T>
kernels::Block<const T> ChunkCall<T>::whole_features(const Source<T>& source, int64_t first,
                                                     int64_t count, Block block) const {
  if (source.map == nullptr) return whole_rows(columns(source.rows, first, count), block);
  source.map->map(source.at, source.rows, first, count, block);
  return {block.data, block.stride};
}

template <class T>
kernels::Block<const T> ChunkCall<T>::features_after_sums(const Source<T>& source,
                                                          kernels::Block<const T> psi,
                                                          int64_t first, int64_t count,
                                                          Block block) const {
  const bool made = source.map != nullptr && psi.data == block.data &&
                    source.map->from_sums(source.at, source.rows.count, first, count, block);
  if (made) return psi;
  return whole_features(source, first, count, block);
}

template <class T>
Rows ChunkCall<T>::operand(const Source<T>& source, Block block, uint16_t* half) const {
  if (source.map == nullptr) return source.rows;
  const int64_t rows = source.rows.count;
  if (half_) {
    source.map->map_half(source.at, source.rows,
                         {half, DType::bf16, half_stride(), rows, features_});
    return {half, DType::bf16, half_stride(), rows, features_};
  }
  features(source, 0, features_, block);
  return as_rows({block.data, block.stride}, rows, features_);
}

template <class T>
template <class U>
StateView<U> ChunkCall<T>::view(U* state) const {
  StateView<U> v{{state, padded_values_}};
  if (state == nullptr) return v;
  U* next = state + features_ * padded_values_;
  if (problem_.policy.key_sum) {
    v.keys = next;
    next += padded_features_;
  }
  if (problem_.policy.value_sum) v.values = next;
  return v;
}

namespace {

template <class T>
void load_row(const Tensor& from, std::initializer_list<int64_t> index, int64_t width, T* to) {
  if (!from.defined()) return;
  const T* row = reinterpret_cast<const T*>(from.at(index));
  const int64_t stride = from.stride(from.rank() - 1);
  for (int64_t i = 0; i < width; ++i) to[i] = row[i * stride];
}

template <class T>
void store_row(const T* from, int64_t width, const Tensor& to,
               std::initializer_list<int64_t> index) {
  if (!to.defined()) return;
  T* row = reinterpret_cast<T*>(to.at(index));
  const int64_t stride = to.stride(to.rank() - 1);
  for (int64_t i = 0; i < width; ++i) row[i * stride] = from[i];
}

}  // namespace

template <class T>
void ChunkCall<T>::load_state(const State& from, int64_t lane, T* state) const {
  const int64_t b = lane / heads_, h = lane % heads_;
  const StateView<T> v = view(state);
  std::fill_n(state, state_size_, T{0});
  for (int64_t f = 0; f < features_; ++f) {
    load_row<T>(from.sums, {b, h, f}, value_dim_, v.sums.row(f));
  }
  if (v.keys != nullptr) load_row<T>(from.keys, {b, h}, features_, v.keys);
  if (v.values != nullptr) load_row<T>(from.values, {b, h}, value_dim_, v.values);
}

template <class T>
void ChunkCall<T>::store_state(const T* state, const State& to, int64_t lane) const {
  const int64_t b = lane / heads_, h = lane % heads_;
  const StateView<const T> v = view(state);
  for (int64_t f = 0; f < features_; ++f) {
    store_row<T>(v.sums.row(f), value_dim_, to.sums, {b, h, f});
  }
  if (v.keys != nullptr) store_row<T>(v.keys, features_, to.keys, {b, h});
  if (v.values != nullptr) store_row<T>(v.values, value_dim_, to.values, {b, h});
}

template <class T>
typename ChunkCall<T>::UpdateMemory ChunkCall<T>::update_memory(Cutter& cut) const {
  const int64_t padded_tile = round_up(tile_, products_.dim_multiple);
  UpdateMemory m;
  m.row = cut.take<T>(std::max(padded_features_, padded_values_));
  if (!half_) {
    m.x = {cut.take<T>(chunk_ * padded_tile), padded_tile};
    m.y = {cut.take<T>(chunk_ * padded_values_), padded_values_};
  } else {
    const int64_t tile_rows = round_up(tile_, products_.row_multiple);
    m.y_packed = cut.take<std::byte>(products_.value_bytes(chunk_, value_dim_));
    m.x_transposed = cut.take<uint16_t>(tile_rows * round_up(chunk_, products_.key_multiple));
    m.x_half = half_memory(cut);
    m.sums = {cut.take<T>(tile_rows * padded_values_), padded_values_};
  }
  return m;
}

template <class T>
void ChunkCall<T>::advance_view(const FeatureRange& rows, const Decay<T>& decay,
                                const StateView<const T>& from, const StateView<const T>& added,
                                const StateView<T>& to) const {
  rows_.advance(from.sums.row(rows.first), added.sums.row(rows.first),
                rows.count() * padded_values_, decay, to.sums.row(rows.first));
  if (to.keys != nullptr) {
    const int64_t last = rows.last == features_ ? padded_features_ : rows.last;
    rows_.advance(from.keys + rows.first, added.keys + rows.first, last - rows.first, {},
                  to.keys + rows.first);
  }
  if (to.values != nullptr && rows.first == 0) {
    rows_.advance(from.values, added.values, padded_values_, {}, to.values);
  }
}

template <class T>
void ChunkCall<T>::add_half_outer(const Rows& x, const Added& added, const Decay<T>& decay,
                                  kernels::Block<const T> from, Block to,
                                  const UpdateMemory& m) const {
  if constexpr (sizeof(T) == 4) {
    const int64_t depth = added.y.count, stride = round_up(depth, products_.key_multiple);
    const int64_t size = features_ * padded_values_;
    products_.pack_values(added.y, m.y_packed);
    rows_.pack_transposed(x, added.factor, m.x_transposed, stride);
    // Not into the state: products write whole blocks of rows, more than it has.
    std::fill_n(m.sums.data, size, T{0});
    products_.accumulate(m.x_transposed, stride, features_, m.y_packed, depth, value_dim_, nullptr,
                         ones(), m.sums, nullptr);
    if (from.data == nullptr) {
      std::copy_n(m.sums.data, size, to.data);
    } else {
      rows_.advance(from.data, m.sums.data, size, decay, to.data);
    }
  }
}

template <class T>
void ChunkCall<T>::add_to_sum(const Rows& x, const T* factor, const T* from, const UpdateMemory& m,
                              T* to) const {
  rows_.sum_rows(x, factor, from == nullptr ? to : m.row);
  if (from == nullptr) return;
  rows_.advance(from, m.row, round_up(x.width, products_.dim_multiple), {}, to);
}

template <class T>
kernels::Block<const T> ChunkCall<T>::update_rows(const Added& added, kernels::Block<const T> psi,
                                                  int64_t first, int64_t count, Block block) const {
  const bool same = psi.data != nullptr && !separate_sums();
  if (added.factor == nullptr) {
    return same ? psi : features_after_sums(added.x, psi, first, count, block);
  }
  if (added.x.map == nullptr) {
    rows_.pack_rows(columns(added.x.rows, first, count), added.factor, block);
  } else {
    if (!same) features_after_sums(added.x, psi, first, count, block);
    rows_.scale_rows(block, added.y.count, block.stride, added.factor);
  }
  return {block.data, block.stride};
}

template <class T>
void ChunkCall<T>::update_state(const Added& added, const Decay<T>& decay,
                                const StateView<const T>& from, const StateView<T>& to,
                                const UpdateMemory& m) const {
  const int64_t depth = added.y.count;
  const auto before = [](const T* p, int64_t i) { return p == nullptr ? nullptr : p + i; };
  ReadAhead ahead{added.next_x, added.next_y};
  if (half_) {  // its product is short
    ahead.ask(ahead.lines());
  } else {
    ahead.spread(depth * features_ * value_dim_);
  }
  if (to.values != nullptr) add_to_sum(added.y, added.value_factor, from.values, m, to.values);
  kernels::Block<const T> y;
  Rows half_x;
  if (half_) {
    half_x = operand(added.x, {}, m.x_half);
    add_half_outer(half_x, added, decay, from.sums, to.sums, m);
  } else {
    y = whole_rows(added.y, m.y);
  }
  // Below, sums of keys are written up to dim_multiple; denominators read all of their padding.
  if (to.keys != nullptr && to.keys != from.keys) std::fill_n(to.keys, padded_features_, T{0});
  for (int64_t first = 0; first < features_; first += tile_) {
    const int64_t count = std::min(tile_, features_ - first);
    const Block block{m.x.data, round_up(count, products_.dim_multiple)};
    kernels::Block<const T> psi;
    if (to.keys != nullptr) {
      if (!half_) psi = whole_features(added.psi, first, count, block);
      // Half operands have no other features for sums.
      add_to_sum(half_ ? half_x : as_rows(psi, depth, count), added.key_factor,
                 before(from.keys, first), m, to.keys + first);
    }
    if (half_) continue;
    rows_.outer(update_rows(added, psi, first, count, block), y, depth, count, padded_values_,
                decay, {before(from.sums.data, first * from.sums.stride), from.sums.stride},
                {to.sums.row(first), to.sums.stride}, &ahead);
  }
}

template <class T>
typename ChunkCall<T>::Left ChunkCall<T>::left(const Rows& x, int64_t readable, Block block,
                                               void* packed) const {
  const int64_t multiple = half_ ? products_.key_multiple : products_.dim_multiple;
  if (lies_packed(x, multiple) && round_up(x.count, products_.row_multiple) <= readable) {
    return {x.data, x.stride};
  }
  if (half_) {
    products_.pack_queries(x, false, packed);
    return {packed, round_up(x.width, products_.key_multiple)};
  }
  if (x.data != block.data) rows_.pack_rows(x, nullptr, block);
  return {block.data, block.stride};
}

template <class T>
void ChunkCall<T>::scores(const Left& left, int64_t count, const void* panels, int64_t keys,
                          int64_t width, const KeyRange* ranges, Block s, ReadAhead* ahead) const {
  products_.scores(left.data, count, panels, keys, width, ranges, s, ahead);
}

template <class T>
void ChunkCall<T>::accumulate(const Left& left, int64_t count, const void* values, int64_t keys,
                              int64_t width, const KeyRange* ranges, const T* carry, Block o,
                              ReadAhead* ahead) const {
  products_.accumulate(left.data, left.stride, count, values, keys, width, ranges, carry, o, ahead);
}

template <class T>
typename ChunkCall<T>::Block ChunkCall<T>::in_place(const Tensor& to, int64_t b, int64_t h,
                                                    int64_t first, int64_t count,
                                                    Block scratch) const {
  const bool whole_blocks = count % products_.row_multiple == 0 &&
                            to.size(3) % products_.key_multiple == 0 &&
                            to.size(3) % products_.dim_multiple == 0;
  if (to.dtype() != kType || !whole_blocks) return scratch;
  return {reinterpret_cast<T*>(to.at({b, h, first})), to.stride(2)};
}

template <class T>
void ChunkCall<T>::finish(Block rows, const Tensor& to, int64_t b, int64_t h, int64_t first,
                          int64_t count) const {
  void* out = to.at({b, h, first});
  if (rows.data == out) return;
  wide_.finish(rows, count, to.size(3), nullptr, out, to.dtype(), to.stride(2));
}

template <class T>
typename ChunkCall<T>::StateOperandMemory ChunkCall<T>::state_operand_memory(Cutter& cut,
                                                                             bool as_keys) const {
  StateOperandMemory m;
  if (half_) m.rounded = cut.take<uint16_t>(tile_ * padded_values_);
  if (as_keys) {
    m.packed = cut.take<std::byte>(products_.key_bytes(tile_, value_dim_));
  } else if (half_) {
    m.packed = cut.take<std::byte>(products_.value_bytes(tile_, value_dim_));
  }
  return m;
}

template <class T>
const void* ChunkCall<T>::state_values(Block sums, int64_t count,
                                       const StateOperandMemory& m) const {
  if (!half_) return sums.data;
  products_.pack_values(
      round(as_rows({sums.data, sums.stride}, count, value_dim_), m.rounded, padded_values_),
      m.packed);
  return m.packed;
}

template <class T>
const void* ChunkCall<T>::state_keys(Block sums, int64_t count, const StateOperandMemory& m) const {
  const Rows rows = as_rows({sums.data, sums.stride}, count, value_dim_);
  panels(half_ ? round(rows, m.rounded, padded_values_) : rows, m.packed);
  return m.packed;
}

template <class T>
void ChunkCall<T>::weigh_and_add(const WeightMemory& m, int64_t count, int64_t columns,
                                 const KeyRange* ranges, const kernels::WeightFactors<T>& factors,
                                 bool weighed, const Right& right, const T* carry, Block o,
                                 ReadAhead* ahead) const {
  const int64_t stride = m.scores.stride;
  if (half_ && right.finite) {
    rows_.weigh_half(m.scores, count, columns, ranges, factors, m.rounded, stride);
    accumulate({m.rounded, stride}, count, right.packed, columns, right.rows.width, ranges, carry,
               o, ahead);
    return;
  }
  if (!weighed) {
    rows_.weigh(m.scores, count, columns, ranges, factors, m.scores.data, stride);
  }
  if (right.finite) {
    accumulate({m.scores.data, stride}, count, right.packed, columns, right.rows.width, ranges,
               carry, o, ahead);
    return;
  }
  // 0 * NaN would let a hidden row through: each row adds what it sees by itself.
  for (int64_t r = 0; r < count; ++r) {
    Rows seen = right.rows;
    seen.data = static_cast<const std::byte*>(seen.data) +
                ranges[r].begin * seen.stride * static_cast<int64_t>(size_of(seen.dtype));
    seen.count = std::max(0, ranges[r].end - ranges[r].begin);
    wide_.add_rows({m.scores.row(r) + ranges[r].begin, stride}, 1, seen, carry + r,
                   {o.row(r), o.stride});
  }
}

template <class T>
void ChunkCall<T>::query_ranges(const Chunk& chunk, KeyRange* ranges) const {
  for (int64_t r = 0; r < tile_rows_; ++r) {
    const int64_t end = r < chunk.queries ? std::min(chunk.keys, chunk.shift + r + 1) : 0;
    ranges[r] = {0, static_cast<int32_t>(end)};
  }
}

template <class T>
void ChunkCall<T>::key_ranges(const Chunk& chunk, KeyRange* ranges) const {
  for (int64_t r = 0; r < tile_rows_; ++r) {
    const int64_t begin = std::clamp<int64_t>(r - chunk.shift, 0, chunk.queries);
    ranges[r] = {static_cast<int32_t>(begin),
                 static_cast<int32_t>(r < chunk.keys ? chunk.queries : begin)};
  }
}

template class ChunkCall<float>;
template class ChunkCall<double>;
template StateView<float> ChunkCall<float>::view(float*) const;
template StateView<const float> ChunkCall<float>::view(const float*) const;
template StateView<double> ChunkCall<double>::view(double*) const;
template StateView<const double> ChunkCall<double>::view(const double*) const;

}  // namespace heed::chunked
