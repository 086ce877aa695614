// Rows that see few keys, as in a window: query tiles are the outer loop. Each meets all keys that it sees
// at once, so that its rows need neither a carry nor a place beside those of other tiles. Packed keys
// slide along, each is packed once:
//
//   for query tile:  pack Q;  pack what it sees of K, V behind what is packed
//                    P = weights(Q K^T);  out = P V / sum
//
// The key tile begins at a multiple of kSlideStep below the first key that the query tile sees, so results
// depend on no other tile.
#include <cstring>

#include "engine/tiled/forward.h"

namespace heed::tiled {

/// The keys [begin, end) of one head in packed form, begin a multiple of kSlideStep.
template <class T>
class Forward<T>::PackedKeys {
 public:
  PackedKeys(const Forward& call, const Item& item, const Memory& m)
      : call_(call),
        item_(item),
        keys_(static_cast<std::byte*>(m.keys)),
        values_(static_cast<std::byte*>(m.values)),
        key_step_(call.products_.key_bytes(kSlideStep, call.head_dim_)),
        value_step_(call.products_.value_bytes(kSlideStep, call.value_dim_)) {}

  /// Packs what is missing of `keys`, which begin and end at or behind those of the call before.
  void cover(Interval keys) {
    if (keys.begin >= end_) {
      begin_ = end_ = keys.begin;
      infinite_.clear();
    } else if (keys.end - begin_ > call_.packed_keys()) {
      drop(keys.begin);
    }
    if (keys.end > end_) pack({end_, keys.end});
    end_ = std::max(end_, keys.end);
  }
  int64_t end() const { return end_; }
  void* keys_at(int64_t key) const { return keys_ + steps_to(key) * key_step_; }
  void* values_at(int64_t key) const { return values_ + steps_to(key) * value_step_; }
  /// Keys with values that are not finite, counted from keys.begin.
  std::vector<int64_t> infinite(Interval keys) const {
    std::vector<int64_t> found;
    for (int64_t key : infinite_) {
      if (key >= keys.begin && key < keys.end) found.push_back(key - keys.begin);
    }
    return found;
  }

 private:
  int64_t steps_to(int64_t key) const { return (key - begin_) / kSlideStep; }
  void drop(int64_t until) {
    const int64_t steps = ceil_div(end_ - until, kSlideStep);
    std::memmove(keys_, keys_at(until), static_cast<size_t>(steps * key_step_));
    std::memmove(values_, values_at(until), static_cast<size_t>(steps * value_step_));
    begin_ = until;
    std::erase_if(infinite_, [&](int64_t key) { return key < until; });
  }
  void pack(Interval keys) {
    const Sequence& s = call_.sequence(item_.sequence);
    call_.products_.pack_keys(rows_of(s.k, item_.kv_head, keys.begin, keys.end),
                              keys_at(keys.begin));
    const Rows v = rows_of(s.v, item_.kv_head, keys.begin, keys.end);
    for (int64_t row : call_.pack_finite(v, values_at(keys.begin))) {
      infinite_.push_back(keys.begin + row);
    }
  }

  const Forward& call_;
  const Item& item_;
  std::byte *keys_, *values_;
  const int64_t key_step_, value_step_;  // bytes of kSlideStep keys
  int64_t begin_ = 0, end_ = 0;
  std::vector<int64_t> infinite_;
};

/// The key tile of a query tile.
template <class T>
Interval Forward<T>::sight(const Item& item, const QueryTile& tile) const {
  const Interval seen = sequence(item.sequence).plan.rows(tile.begin, tile.end);
  if (seen.empty()) return {};
  return {seen.begin / kSlideStep * kSlideStep,
          std::min(round_up(seen.end, kSlideStep), item.keys.end)};
}

/// What the next query tile reads that is not packed, and writes.
template <class T>
kernels::ReadAhead Forward<T>::rows_ahead(const Item& item, const QueryTile& next,
                                          int64_t packed_end) const {
  const Sequence& s = sequence(item.sequence);
  const int64_t end = sight(item, next).end;
  return {rows_of(s.q, next.head, next.begin, next.end),
          rows_of(s.out, next.head, next.begin, next.end),
          rows_of(s.k, item.kv_head, packed_end, end), rows_of(s.v, item.kv_head, packed_end, end)};
}

template <class T>
void Forward<T>::run_sliding(const Item& item) const {
  const std::vector<QueryTile> tiles = query_tiles(item);
  std::vector<QueryTile> one(1);
  const LaidOut scratch([&](Cutter& cut) { return memory(cut, one); });
  const Memory& m = scratch.memory;
  clear_padding(item, one, m);
  PackedKeys packed(*this, item, m);
  for (size_t t = 0; t < tiles.size(); ++t) {
    one[0] = {tiles[t].head, tiles[t].begin, tiles[t].end};
    start_rows(item, one, m);
    const Interval keys = sight(item, one[0]);
    const TileAt at = tile_at(item, one[0], keys);
    const Seen seen = this->look(at, m.ranges);
    if (seen.any) {
      pack_item(item, one, m);
      packed.cover(keys);
      kernels::ReadAhead next;
      if (t + 1 < tiles.size()) next = rows_ahead(item, tiles[t + 1], packed.end());
      next.spread(work(at.rows, at.keys) * 2 / 3);  // some keys are not seen
      add_tile(one[0], at, seen,
               {packed_queries(one, 0, 0, m), packed_queries(one, streams_ - 1, 0, m),
                packed.keys_at(keys.begin), packed.values_at(keys.begin), packed.infinite(keys)},
               next, m);
    }
    finish(item.sequence, one[0], m);
  }
}

template void Forward<float>::run_sliding(const Item& item) const;
template void Forward<double>::run_sliding(const Item& item) const;

}  // namespace heed::tiled
