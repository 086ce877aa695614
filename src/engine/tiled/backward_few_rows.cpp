// Few query rows against many keys, backward: memory is the bound, so keys and values are read in place and
// their gradients written at once, for all rows of a group. Row g * tile_rows_ + r of all blocks is row r of
// the group's query head g; rows that a shorter sequence lacks are zeros.
#include <algorithm>

#include "engine/tiled/backward.h"
#include "kernels/row_maps.h"

namespace heed::tiled {

template <class T>
TileAt Backward<T>::few_rows_at(const Unit& unit, int64_t g, Interval keys) const {
  return {unit.sequence, unit.kv_head * group_ + g, 0, sequence(unit.sequence).plan.queries(),
          keys.begin,    keys.end - keys.begin};
}

template <class T>
bool Backward<T>::finite_few_rows(const Unit& unit) const {
  for (int64_t g = 0; g < group_; ++g) {
    if (!finite_rows_of(few_rows_at(unit, g, {}))) return false;
  }
  return true;
}

template <class T>
void Backward<T>::pack_few_rows(const Unit& unit, const Memory& m) const {
  const bool finite = finite_few_rows(unit);
  const auto pack = [&](const HeadRows& from, bool negate, void* rows, void* columns,
                        int64_t stride) {
    for (int64_t g = 0; g < group_; ++g) {
      const TileAt at = few_rows_at(unit, g, {});
      const Rows x = rows_of(from, at.head, 0, at.rows);
      const int64_t first = g * tile_rows_ * stride;
      wide_.pack_queries(x, negate, static_cast<T*>(rows) + first);
      if (finite) continue;
      wide_.pack_queries(finite_rows(x).view(), negate, static_cast<T*>(columns) + first);
    }
  };
  pack(sequence(unit.sequence).q, scale_ < 0, m.q, m.q_columns, padded_dim_);
  pack(gradient(unit.sequence).out, false, m.dout, m.dout_columns, padded_values_);
}

template <class T>
void Backward<T>::run_few_rows(int lane, const Unit& unit, Interval keys, const RowGradients& rows,
                               double* sums, const Memory& m) const {
  const Sequence& s = sequence(unit.sequence);
  const SequenceGradient& to = gradient(unit.sequence);
  const Rows k = rows_of(s.k, unit.kv_head, keys.begin, keys.end);
  const Block dq{rows.q.template as<T>(), padded_dim_};
  wide_.dot_rows({static_cast<T*>(m.q), padded_dim_}, block_rows_, k, m.s);
  wide_.dot_rows({static_cast<T*>(m.dout), padded_values_}, block_rows_,
                 rows_of(s.v, unit.kv_head, keys.begin, keys.end), m.a);
  bool partial = false;
  for (int64_t g = 0; g < group_; ++g) {
    const TileAt at = few_rows_at(unit, g, keys);
    const int64_t first = g * tile_rows_;
    const Seen seen = at.rows > 0 ? this->look(at, m.ranges) : Seen{};
    partial = partial || !seen.any || seen.partial();
    Memory head = m;
    head.s.data = m.s.row(first);
    head.a.data = m.a.row(first);
    if (seen.any) differentiate(lane, at, seen, {dq.row(first), dq.stride}, sums + g * 2, head);
    for (int64_t r = seen.any ? at.rows : 0; r < tile_rows_; ++r) {
      std::fill_n(head.s.row(r), at.keys, T{0});
      std::fill_n(head.a.row(r), at.keys, T{0});
    }
  }
  // A row that sees a key which is not finite has NaN in dS; all others must not meet it.
  const bool safe = !partial || kernels::row_map_kernels<T>(path_.isa).all_finite(k);
  const FiniteRows finite = safe ? FiniteRows() : finite_rows(k);
  wide_.add_rows(m.a, block_rows_, safe ? k : finite.view(), nullptr, dq);
  const bool as_they_are = !partial || finite_few_rows(unit);
  const auto spread = [&](Block weights, const HeadRows& from, const void* x, int64_t stride,
                          T factor, bool negate, const HeadRows& gradients) {
    const kernels::RowsOut out = rows_out(gradients, unit.kv_head, keys);
    wide_.spread_rows(weights, {static_cast<const T*>(x), stride}, block_rows_, factor, out);
    if (!as_they_are) add_infinite(unit, from, weights, negate ? -factor : factor, out);
  };
  spread(m.a, s.q, as_they_are ? m.q : m.q_columns, padded_dim_, static_cast<T>(std::abs(scale_)),
         scale_ < 0, to.k);
  spread(m.s, to.out, as_they_are ? m.dout : m.dout_columns, padded_values_, 1, false, to.v);
}

template <class T>
void Backward<T>::add_infinite(const Unit& unit, const HeadRows& from, Block weights, T factor,
                               const kernels::RowsOut& to) const {
  std::vector<T> sum(static_cast<size_t>(round_up(to.width, wide_.dim_multiple)));
  const auto bytes = static_cast<int64_t>(size_of(to.dtype));
  for (int64_t i = 0; i < block_rows_; ++i) {
    const TileAt at = few_rows_at(unit, i / tile_rows_, {});
    const int64_t r = i % tile_rows_;
    if (r >= at.rows || finite_rows_of({at.sequence, at.head, r, 1})) continue;
    for (int64_t key = 0; key < to.count; ++key) {
      const T weight = weights.row(i)[key];
      if (weight == 0) continue;
      std::byte* row = static_cast<std::byte*>(to.data) + key * to.stride * bytes;
      wide_.pack_queries({row, to.dtype, to.stride, 1, to.width}, false, sum.data());
      add_row(rows_of(from, at.head, r, r + 1), 0, factor * weight, sum.data(), 1);
      wide_.finish({sum.data(), 0}, 1, to.width, nullptr, row, to.dtype, to.stride);
    }
  }
}

template class Backward<float>;
template class Backward<double>;

}  // namespace heed::tiled
