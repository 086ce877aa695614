// Few query rows against many keys: memory is the bound, so keys and values are read in place, once for
// all rows of a group and both streams, whose rows lie behind one another.
#include <algorithm>
#include <limits>

#include "engine/tiled/forward.h"
#include "kernels/row_maps.h"

namespace heed::tiled {

template <class T>
void Forward<T>::run_few_rows(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                              const Memory& m) const {
  std::vector<Seen> seen;
  bool partial = false;
  for (const QueryTile& tile : tiles) {
    seen.push_back(this->look(tile_at(item, tile, keys), m.ranges + tile.slot));
    partial = partial || !seen.back().any || seen.back().partial();
  }
  // A tile unit adds a weight in two parts, either of which times infinity may be NaN.
  if (!partial && path_.isa != Isa::amx) return add_few_rows(item, tiles, keys, seen, {}, m);
  // Hidden keys have a weight of 0: enough where their values are finite, as they nearly always are.
  for (int64_t r = 0; r < streams_ * m.second; ++r) {
    T* kept = std::copy_n(m.out.row(r), padded_values_, m.kept.row(r));
    kept[0] = m.pivot[r];
    kept[1] = m.sum[r];
  }
  add_few_rows(item, tiles, keys, seen, {}, m);
  if (finite_sums(m)) return;
  for (int64_t r = 0; r < streams_ * m.second; ++r) {
    std::copy_n(m.kept.row(r), padded_values_, m.out.row(r));
    m.pivot[r] = m.kept.row(r)[padded_values_];
    m.sum[r] = m.kept.row(r)[padded_values_ + 1];
  }
  const Sequence& s = sequence(item.sequence);
  add_few_rows(item, tiles, keys, seen,
               finite_rows(rows_of(s.v, item.kv_head, keys.begin, keys.end)), m);
}

template <class T>
bool Forward<T>::finite_sums(const Memory& m) const {
  return kernels::row_map_kernels<T>(path_.isa).all_finite(
      {m.out.data, dtype_of<T>, m.out.stride, streams_ * m.second, value_dim_});
}

// `finite`: the values, where some of them are not; each row adds those that it sees by itself.
template <class T>
void Forward<T>::add_few_rows(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                              const std::vector<Seen>& all_seen, const FiniteRows& finite,
                              const Memory& m) const {
  const Sequence& s = sequence(item.sequence);
  const int64_t rows = m.second, count = keys.end - keys.begin;
  const Rows v = rows_of(s.v, item.kv_head, keys.begin, keys.end);
  wide_.dot_rows({reinterpret_cast<const T*>(m.queries), padded_dim_}, streams_ * rows,
                 rows_of(s.k, item.kv_head, keys.begin, keys.end), m.scores);
  std::vector<SeenElement> special;
  for (size_t t = 0; t < tiles.size(); ++t) {
    const QueryTile& tile = tiles[t];
    const TileAt at = tile_at(item, tile, keys);
    const Seen& seen = all_seen[t];
    const Block scores{m.scores.row(tile.slot), m.scores.stride};
    const Block second{m.scores.row(rows + tile.slot), m.scores.stride};
    std::fill_n(m.carry + tile.slot, tile.rows(), T{1});
    if (!seen.any) {
      for (int64_t r = 0; r < tile.rows(); ++r) {
        std::fill_n(scores.row(r), count, T{0});
        if (second_) std::fill_n(second.row(r), count, T{0});
      }
      continue;
    }
    this->shape_scores(at, seen, scores, {});
    for (const SeenElement& e : seen_elements(finite.rows, at, seen, scores)) {
      special.push_back({.row = tile.slot + e.row, .key = e.key});
    }
    wide_.weights[static_cast<int>(problem_.policy.weight)](
        scores, at.rows, at.keys, seen.ranges, this->weight_shape(at), state_of(tile, m),
        scores.data, scores.stride);
    if (this->drops()) {
      wide_.drop_out(this->dropout(at), at.rows, at.keys, seen.ranges, scores.data, scores.stride);
    }
    if (second_) {
      wide_.second_weights(scores.data, scores.stride, second, at.rows, at.keys, seen.ranges,
                           m.carry + tile.slot, m.pivot + rows + tile.slot,
                           m.sum + rows + tile.slot, second.data);
    }
  }
  if (second_) std::copy_n(m.carry, rows, m.carry + rows);
  wide_.add_rows({m.scores.data, m.scores.stride}, streams_ * rows,
                 finite.rows.empty() ? v : finite.view(), m.carry, m.out);
  for (const SeenElement& e : special) {
    for (int64_t row = e.row; row < streams_ * rows; row += rows) {
      add_row(v, e.key, m.scores.row(row)[e.key], m.out.row(row), 1);
    }
  }
}

template <class T>
void Forward<T>::keep_part(int64_t part, const QueryTile& tile, const Memory& m) const {
  for (int64_t r = tile.slot; r < tile.slot + tile.rows(); ++r) {
    double* sums = part_sums_.template as<double>() + (part * most_rows_ + r) * kPartSums;
    sums[0] = m.pivot[r];
    sums[1] = m.sum[r];
    if (second_) {
      sums[2] = m.pivot[m.second + r];
      sums[3] = m.sum[m.second + r];
    }
    for (int64_t stream = 0; stream < streams_; ++stream) {
      std::memcpy(part_out_.template as<T>() +
                      ((part * streams_ + stream) * most_rows_ + r) * padded_values_,
                  m.out.row(stream * m.second + r),
                  static_cast<size_t>(padded_values_) * sizeof(T));
    }
  }
}

// Items of one (sequence, key head) lie together, in key order.
template <class T>
void Forward<T>::merge_parts() const {
  std::vector<size_t> firsts;
  for (size_t i = 0; i < items_.size(); ++i) {
    const bool same = i > 0 && items_[i].sequence == items_[i - 1].sequence &&
                      items_[i].kv_head == items_[i - 1].kv_head;
    if (!same && items_[i].part >= 0) firsts.push_back(i);
  }
  const auto groups = static_cast<int64_t>(firsts.size());
  parallel_for(groups, threads_for(run_, groups), [&](int64_t group, int) {
    const size_t first = firsts[static_cast<size_t>(group)];
    size_t last = first + 1;
    while (last < items_.size() && items_[last].part >= 0 && !items_[last].first_part) ++last;
    merge_group(first, last);
  });
}

template <class T>
void Forward<T>::merge_group(size_t first, size_t last) const {
  const std::vector<QueryTile> tiles = query_tiles(items_[first]);
  const int64_t rows = slots(tiles);
  Scratch scratch(static_cast<size_t>(streams_ * rows * (padded_values_ + 3)) * sizeof(T) + 4 * 64);
  Memory m{};
  m.second = rows;
  m.out = {scratch.take<T>(streams_ * rows * padded_values_), padded_values_};
  m.pivot = scratch.take<T>(streams_ * rows);
  m.sum = scratch.take<T>(streams_ * rows);
  m.carry = scratch.take<T>(rows);
  for (const QueryTile& tile : tiles) {
    for (int64_t r = 0; r < tile.rows(); ++r) merge_row(first, last, tile.slot + r, m);
    finish(items_[first].sequence, tile, m);
  }
}

template <class T>
void Forward<T>::merge_row(size_t first, size_t last, int64_t slot, const Memory& m) const {
  constexpr double kUnset = -std::numeric_limits<double>::infinity();
  const bool softmax = problem_.policy.divide_by_sum();
  const auto sums = [&](size_t i) {
    return part_sums_.template as<double>() + (items_[i].part * most_rows_ + slot) * kPartSums;
  };
  const auto out_of = [&](size_t i, int64_t stream) {
    return part_out_.template as<T>() +
           ((items_[i].part * streams_ + stream) * most_rows_ + slot) * padded_values_;
  };
  double pivot = kUnset, sum = 0, shift = kUnset, second = 0;
  for (size_t i = first; i < last; ++i) pivot = std::max(pivot, sums(i)[0]);
  for (int64_t stream = 0; stream < streams_; ++stream) {
    std::fill_n(m.out.row(stream * m.second + slot), padded_values_, T{0});
  }
  for (size_t i = first; i < last; ++i) {
    const bool empty = softmax && sums(i)[1] == 0;
    if (empty) continue;
    const double factor = !softmax || sums(i)[0] == pivot ? 1 : std::exp2(sums(i)[0] - pivot);
    sum += factor * sums(i)[1];
    T* out = m.out.row(slot);
    for (int64_t f = 0; f < value_dim_; ++f) out[f] += static_cast<T>(factor) * out_of(i, 0)[f];
    if (!second_) continue;
    // All parts get the shift of the first.
    if (shift == kUnset) shift = sums(i)[2];
    const double moved = sums(i)[2] == kUnset ? 0 : factor * (sums(i)[2] - shift);
    second += factor * sums(i)[3] + moved * sums(i)[1];
    out = m.out.row(m.second + slot);
    for (int64_t f = 0; f < value_dim_; ++f) {
      out[f] += static_cast<T>(factor) * out_of(i, 1)[f] + static_cast<T>(moved) * out_of(i, 0)[f];
    }
  }
  m.pivot[slot] = static_cast<T>(pivot);
  m.sum[slot] = static_cast<T>(sum);
  if (second_) {
    m.pivot[m.second + slot] = static_cast<T>(shift);
    m.sum[m.second + slot] = static_cast<T>(second);
  }
}

template class Forward<float>;
template class Forward<double>;

}  // namespace heed::tiled
