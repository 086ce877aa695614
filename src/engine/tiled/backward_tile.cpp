// One tile of the backward:
//
//   S = Q K^T, A = dO V^T (and T = R K^T);  W = weights(S), dS from W and A
//   dV^T += dO^T W   dK^T += Q^T dS   dQ += dS K   (dK^T += R^T dT, dR += dT K)
#include <limits>

#include "engine/tiled/backward.h"

namespace heed::tiled {

template <class T>
typename Backward<T>::Memory Backward<T>::memory(Cutter& cut) const {
  const int64_t stride = this->block_stride();
  const auto bytes = [&](int64_t count) { return cut.take<std::byte>(count); };
  const auto block = [&](int64_t rows) { return Block{cut.take<T>(rows * stride), stride}; };
  Memory m{};
  m.keys = bytes(products_.key_bytes(tile_keys_, head_dim_));
  m.key_values = bytes(products_.value_bytes(tile_keys_, head_dim_));
  m.values = bytes(products_.key_bytes(tile_keys_, value_dim_));
  m.q = bytes(row_operand_bytes(head_dim_, padded_dim_));
  m.dout = bytes(row_operand_bytes(value_dim_, padded_values_));
  m.q_columns = bytes(products_.column_bytes(block_rows_, head_dim_));
  m.dout_columns = bytes(products_.column_bytes(block_rows_, value_dim_));
  m.s = block(block_rows_);
  m.a = block(block_rows_);
  if (second_) {
    m.r = bytes(row_operand_bytes(head_dim_, padded_dim_));
    m.r_columns = bytes(products_.column_bytes(block_rows_, head_dim_));
    m.t = block(block_rows_);
  }
  if (problem_.policy.softcap > 0 || problem_.policy.most) m.slope = block(block_rows_);
  if (this->drops()) m.factors = block(block_rows_);
  if (path_.half_operands) {
    m.rounded = cut.take<uint16_t>(block_rows_ * stride);
    m.paired = cut.take<uint16_t>(block_rows_ * stride);
  }
  m.dk = block(round_up(head_dim_, products_.column_multiple));
  m.dv = block(round_up(value_dim_, products_.column_multiple));
  m.ranges = cut.take<KeyRange>(block_rows_);
  return m;
}

template <class T>
int64_t Backward<T>::row_operand_bytes(int64_t width, int64_t padded) const {
  return path_.few_rows ? block_rows_ * padded * static_cast<int64_t>(sizeof(T))
                        : products_.query_bytes(block_rows_, width);
}

template <class T>
void Backward<T>::clear_row_operands(const Memory& m) const {
  const auto clear = [&](void* operand, int64_t width, int64_t padded) {
    std::memset(operand, 0, static_cast<size_t>(row_operand_bytes(width, padded)));
  };
  clear(m.q, head_dim_, padded_dim_);
  clear(m.dout, value_dim_, padded_values_);
  if (second_) clear(m.r, head_dim_, padded_dim_);
}

template <class T>
bool Backward<T>::in_one_tile(const Unit& unit) const {
  const SequenceGradient& to = gradient(unit.sequence);
  if (path_.half_operands || second_ || group_ * query_tiles(unit.sequence) != 1) return false;
  if (to.k.offsets != nullptr || to.v.offsets != nullptr) return false;
  return finite_rows_of({unit.sequence, unit.kv_head, 0, sequence(unit.sequence).plan.queries()});
}

template <class T>
void Backward<T>::pack_keys(const Sequence& s, int64_t kv_head, Interval keys,
                            const Memory& m) const {
  const Rows k = rows_of(s.k, kv_head, keys.begin, keys.end);
  products_.pack_keys(k, m.keys);
  products_.pack_keys(rows_of(s.v, kv_head, keys.begin, keys.end), m.values);
  if (!products_.pack_values(k, m.key_values)) {
    // A row that sees such a key has NaN in dS; all others must not meet it.
    products_.pack_values(finite_rows(k).view(), m.key_values);
  }
}

// What the next query tile reads, of the group's query tiles.
template <class T>
kernels::ReadAhead Backward<T>::rows_ahead(const Unit& unit, int64_t tile, Block dq) const {
  const Sequence& s = sequence(unit.sequence);
  const int64_t tiles = query_tiles(unit.sequence), head = unit.kv_head * group_ + tile / tiles;
  const int64_t begin = tile % tiles * path_.query_tile,
                end = std::min(begin + path_.query_tile, s.plan.queries());
  return {rows_of(s.q, head, begin, end),
          rows_of(gradient(unit.sequence).out, head, begin, end),
          {dq.data, dtype_of<T>, dq.stride, end - begin, head_dim_}};
}

template <class T>
void Backward<T>::run_key_tile(int lane, const Unit& unit, Interval keys, const RowGradients& rows,
                               double* sums, const Memory& m) const {
  const Sequence& s = sequence(unit.sequence);
  const SequenceGradient& to = gradient(unit.sequence);
  const int64_t tiles = query_tiles(unit.sequence), count = keys.end - keys.begin;
  const auto clear = [&](const Block& block, int64_t width) {
    const int64_t columns = round_up(count, products_.key_multiple);
    for (int64_t f = 0; f < round_up(width, products_.column_multiple); ++f) {
      std::fill_n(block.row(f), columns, T{0});
    }
  };
  if (!m.one_tile) {
    clear(m.dk, head_dim_);
    clear(m.dv, value_dim_);
  }
  bool packed = false;
  for (int64_t i = 0; i < group_ * tiles; ++i) {
    const int64_t begin = i % tiles * path_.query_tile;
    const TileAt at{unit.sequence, unit.kv_head * group_ + i / tiles,
                    begin,         std::min(path_.query_tile, s.plan.queries() - begin),
                    keys.begin,    count};
    const Seen seen = this->look(at, m.ranges);
    if (!seen.any) continue;
    if (!packed) pack_keys(s, unit.kv_head, keys, m);
    packed = true;
    const auto row_block = [&](const Array& array, int64_t tile) {
      return Block{array.template as<T>() + tile * tile_rows_ * padded_dim_, padded_dim_};
    };
    kernels::ReadAhead next;
    if (i + 1 < group_ * tiles) next = rows_ahead(unit, i + 1, row_block(rows.q, i + 1));
    next.spread(at.rows * at.keys * (2 * head_dim_ + value_dim_) / 2);  // some keys are not seen
    run_tile(lane, at, seen, row_block(rows.q, i), second_ ? row_block(rows.r, i) : Block{},
             sums + i / tiles * 2, next, m);
  }
  if (m.one_tile) {
    const int64_t seen_rows = packed ? s.plan.queries() : 0;
    const auto spread = [&](Block weights, const void* x, int64_t stride, double scale,
                            const HeadRows& to_rows) {
      wide_.spread_rows(weights, {static_cast<const T*>(x), stride}, seen_rows,
                        static_cast<T>(scale), rows_out(to_rows, unit.kv_head, keys));
    };
    spread(m.a, m.q, padded_dim_, std::abs(scale_), to.k);
    spread(m.s, m.dout, padded_values_, 1, to.v);
    return;
  }
  const double factor = second_ ? 1 : std::abs(scale_);
  const auto finish = [&](const Block& columns, int64_t width, double scale,
                          const HeadRows& to_rows) {
    const Rows out = rows_of(to_rows, unit.kv_head, keys.begin, keys.end);
    wide_.finish_columns(columns, count, width, static_cast<T>(scale),
                         to_rows.origin(unit.kv_head, keys.begin), out.dtype, out.stride,
                         out.offsets);
  };
  finish(m.dk, head_dim_, factor, to.k);
  finish(m.dv, value_dim_, 1, to.v);
}

template <class T>
typename Backward<T>::Columns Backward<T>::pack_rows(const TileAt& at, bool finite,
                                                     const Memory& m) const {
  const Sequence& s = sequence(at.sequence);
  const bool same = products_.pack_columns == products_.pack_queries;
  const auto pack = [&](const HeadRows& from, bool negate, void* rows, void* columns) {
    const Rows x = rows_of(from, at.head, at.row, at.row + at.rows);
    products_.pack_queries(x, negate, rows);
    if (finite && same) return static_cast<const void*>(rows);
    if (finite) {
      products_.pack_columns(x, negate, columns);
    } else {
      products_.pack_columns(finite_rows(x).view(), negate, columns);
    }
    return static_cast<const void*>(columns);
  };
  Columns columns;
  columns.q = pack(s.q, scale_ < 0, m.q, m.q_columns);
  if (second_) columns.r = pack(s.r, false, m.r, m.r_columns);
  columns.dout = pack(gradient(at.sequence).out, false, m.dout, m.dout_columns);
  return columns;
}

template <class T>
void Backward<T>::run_tile(int lane, const TileAt& at, const Seen& seen, Block dq, Block dr,
                           double* sums, kernels::ReadAhead& next, const Memory& m) const {
  const bool finite = !seen.partial() || finite_rows_of(at);
  const Columns columns = pack_rows(at, finite, m);
  products_.scores(m.q, at.rows, m.keys, at.keys, head_dim_, seen.ranges, m.s, &next);
  products_.scores(m.dout, at.rows, m.values, at.keys, value_dim_, seen.ranges, m.a, &next);
  if (second_) {
    products_.scores(m.r, at.rows, m.keys, at.keys, head_dim_, seen.ranges, m.t, nullptr);
  }
  differentiate(lane, at, seen, dq, sums, m);
  add_products(at, seen, columns, finite, dq, dr, next, m);
}

template <class T>
bool Backward<T>::finite_rows_of(const TileAt& at) const {
  const char* flags = finite_.data() + row_index(at.sequence, at.head, at.row);
  return std::all_of(flags, flags + at.rows, [](char f) { return f != 0; });
}

template <class T>
void Backward<T>::differentiate(int lane, const TileAt& at, const Seen& seen, Block dq,
                                double* sums, const Memory& m) const {
  weigh(at, seen, m);
  if (problem_.head_gradients) {
    wide_.sum_tile(m.a, at.rows, at.keys, seen.ranges,
                   sequence(at.sequence).plan.position(at.row) - at.key, sums[0], sums[1]);
  }
  if (terms_ != nullptr && terms_->has_gradient()) {
    terms_->add_gradient(lane, at, m.a, dq);
  }
  if (m.slope.data != nullptr || second_) {
    const T scale = static_cast<T>(second_ ? std::abs(scale_) : 1);
    wide_.multiply(m.a, at.rows, at.keys, seen.ranges, scale, m.slope);
  }
}

// S becomes the weights with dropout, A becomes dS, T becomes dT.
template <class T>
void Backward<T>::weigh(const TileAt& at, const Seen& seen, const Memory& m) const {
  const Policy& policy = problem_.policy;
  this->shape_scores(at, seen, m.s, m.slope);
  const int64_t row = row_index(at.sequence, at.head, at.row);
  const auto rows = [row](const Array& array) { return array.template as<T>() + row; };
  const auto shape = this->weight_shape(at);
  if (second_) {
    wide_.parallax_gradients(m.s, m.t, m.a, at.rows, at.keys, seen.ranges, shape, rows(pivot_),
                             rows(t_mean_), rows(dot_out_), rows(dot_mean_));
    return;
  }
  const auto drop_out = [&](const Block& block) {
    wide_.multiply(block, at.rows, at.keys, seen.ranges, 1, m.factors);
  };
  if (this->drops()) {
    wide_.dropout_factors(this->dropout(at), at.rows, at.keys, seen.ranges, this->kept(),
                          m.factors);
    drop_out(m.a);
  }
  wide_.gradients[static_cast<int>(policy.weight)](m.s, m.a, at.rows, at.keys, seen.ranges, shape,
                                                   rows(pivot_), rows(shift_));
  if (this->drops()) drop_out(m.s);
}

template <class T>
void Backward<T>::add_products(const TileAt& at, const Seen& seen, const Columns& columns,
                               bool finite, Block dq, Block dr, kernels::ReadAhead& next,
                               const Memory& m) const {
  const Sequence& s = sequence(at.sequence);
  const auto rows = [&](const HeadRows& t) {
    return rows_of(t, at.head, at.row, at.row + at.rows);
  };
  add_rows(at, seen, m.a, dq, &next, m);
  if (m.one_tile) return;
  add_columns(at, seen, m.s, columns.dout, rows(gradient(at.sequence).out), value_dim_, finite,
              false, m.dv, m);
  add_columns(at, seen, m.a, columns.q, rows(s.q), head_dim_, finite, scale_ < 0, m.dk, m);
  if (second_) {
    add_columns(at, seen, m.t, columns.r, rows(s.r), head_dim_, finite, false, m.dk, m);
    add_rows(at, seen, m.t, dr, nullptr, m);
  }
}

template <class T>
void Backward<T>::add_columns(const TileAt& at, const Seen& seen, Block weights,
                              const void* columns, const Rows& from, int64_t width, bool finite,
                              bool negate, Block to, const Memory& m) const {
  const void* operand = weights.data;
  if (path_.half_operands) {
    products_.pair_weights(weights, at.rows, at.keys, m.paired, weights.stride);
    operand = m.paired;
  }
  products_.accumulate_columns(columns, at.rows, width, operand, weights.stride, at.keys,
                               seen.ranges, to);
  if (finite) return;
  for (int64_t r = 0; r < at.rows; ++r) {
    if (finite_[static_cast<size_t>(row_index(at.sequence, at.head, at.row + r))] != 0) continue;
    for (int64_t i = 0; i < at.keys; ++i) {
      const T w = weights.row(r)[i];
      if (w != 0) add_row(from, r, negate ? -w : w, to.data + i, to.stride);
    }
  }
}

template <class T>
void Backward<T>::add_rows(const TileAt& at, const Seen& seen, Block weights, Block to,
                           kernels::ReadAhead* next, const Memory& m) const {
  const void* operand = weights.data;
  if (path_.half_operands) {
    products_.round_weights(weights, at.rows, at.keys, m.rounded, weights.stride);
    operand = m.rounded;
  }
  products_.accumulate(operand, weights.stride, at.rows, m.key_values, at.keys, head_dim_,
                       seen.ranges, nullptr, to, next);
}

template class Backward<float>;
template class Backward<double>;

}  // namespace heed::tiled
