// The forward pass as a class, in three files: forward.cpp (tiles of packed operands), sliding.cpp (rows
// that see few of the keys) and few_rows.cpp (few query rows against many keys).
#pragma once
#include <vector>

#include "base/parallel.h"
#include "engine/tiled/tile_call.h"
#include "kernels/read_ahead.h"

namespace heed::tiled {

/// Rows of one query head inside an item, and where their state lies.
struct QueryTile {
  int64_t head = 0, begin = 0, end = 0;
  int64_t slot = 0;  // first row of its state
  int64_t rows() const { return end - begin; }
};

/// Query rows of all heads of a group, against a range of keys.
struct Item {
  int64_t sequence = 0, kv_head = 0;
  int64_t row_begin = 0, row_end = 0;
  Interval keys;
  int64_t part = -1;  // index among the partial results; -1: finishes its rows itself
  bool first_part = true;
};

/// An element with a value that is not finite, and its weights in both streams.
struct SeenElement {
  int64_t row = 0, key = 0;
  double weight = 0, second_weight = 0;
};

template <class T>
class Forward : private TileCall<T> {
 public:
  Forward(const Problem& problem, const RunOptions& run);
  void run();

 private:
  using typename TileCall<T>::Block;
  using KeyRange = kernels::KeyRange;
  using Rows = kernels::Rows;
  template <class U>
  using RowState = kernels::RowState<U>;
  using TileCall<T>::group_;
  using TileCall<T>::head_dim_;
  using TileCall<T>::path_;
  using TileCall<T>::problem_;
  using TileCall<T>::products_;
  using TileCall<T>::run_;
  using TileCall<T>::scale_;
  using TileCall<T>::second_;
  using TileCall<T>::sequence;
  using TileCall<T>::value_dim_;
  using TileCall<T>::wide_;

  /// Sizes of an item's blocks. State and result rows of a second stream lie `rows` rows behind.
  struct Layout {
    int64_t rows, out_rows, block_rows, block_stride;
    int64_t weight_rows;  // of T in front of the scores, that weights of half operands begin in
  };

  /// Everything one item needs, cut from one block of scratch.
  struct Memory {
    std::byte* queries;
    int64_t query_tile_bytes;
    void *keys, *values;
    T *pivot, *sum, *carry;
    int64_t second;  // rows from a row's state to that of its second stream
    Block scores, second_scores, out;
    Block kept;     // of few rows: out, pivot and sum before a key tile
    void* weights;  // bfloat16, with half operands: over the scores of rows before
    KeyRange* ranges;
  };

  /// Operands of one tile.
  struct PackedTile {
    const void *queries, *second_queries, *keys, *values;
    std::vector<int64_t> infinite;  // keys with values that are not finite
  };

  void plan_items();
  void plan_parts(int64_t s);
  std::vector<QueryTile> query_tiles(const Item& item) const;
  int64_t slots(const std::vector<QueryTile>& tiles) const;
  int64_t query_bytes(const std::vector<QueryTile>& tiles) const;
  Layout layout(const std::vector<QueryTile>& tiles) const;
  Memory memory(Cutter& cut, const std::vector<QueryTile>& tiles) const;
  /// Of packed queries, behind the rows of a tile.
  void clear_padding(const Item& item, const std::vector<QueryTile>& tiles, const Memory& m) const;
  void start_rows(const Item& item, const std::vector<QueryTile>& tiles, const Memory& m) const;
  void place_sinks(const std::vector<QueryTile>& tiles, const Memory& m) const;
  void pack_item(const Item& item, const std::vector<QueryTile>& tiles, const Memory& m) const;
  void run_item(const Item& item) const;
  /// `next`: operands of the key tile that follows.
  void run_key_tile(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                    kernels::ReadAhead next, const Memory& m) const;
  /// Packs values with zeros for what is not finite, and returns the rows that have such elements: 0 * NaN
  /// would let a hidden value through, so each row adds them by itself.
  std::vector<int64_t> pack_finite(const Rows& v, void* to) const;
  /// Adds keys to the rows of a tile. `next`: rows that are read later.
  void add_tile(const QueryTile& tile, const TileAt& at, const Seen& seen, const PackedTile& packed,
                kernels::ReadAhead& next, const Memory& m) const;
  /// The same in one, where the kernels have it and nothing is special; false: nothing done.
  bool attend_tile(const QueryTile& tile, const TileAt& at, const Seen& seen,
                   const PackedTile& packed, kernels::ReadAhead& next, const Memory& m) const;
  std::vector<SeenElement> seen_elements(const std::vector<int64_t>& keys, const TileAt& at,
                                         const Seen& seen, Block s) const;
  void weigh_and_add(const TileAt& at, const Seen& seen, const QueryTile& tile,
                     const PackedTile& packed, std::vector<SeenElement>& special,
                     kernels::ReadAhead& next, const Memory& m) const;
  void finish(int64_t s, const QueryTile& tile, const Memory& m) const;
  void combine_streams(int64_t s, const QueryTile& tile, int64_t r, const Memory& m) const;

  std::byte* packed_queries(const std::vector<QueryTile>& tiles, int64_t stream, size_t tile,
                            const Memory& m) const {
    const auto index = stream * static_cast<int64_t>(tiles.size()) + static_cast<int64_t>(tile);
    return m.queries + index * m.query_tile_bytes;
  }
  /// Keys that there is room for in packed form.
  int64_t packed_keys() const { return path_.sliding ? tile_keys_ + kSlideKeys : tile_keys_; }
  RowState<T> state_of(const QueryTile& tile, const Memory& m) const {
    return {m.pivot + tile.slot, m.sum + tile.slot, m.carry + tile.slot};
  }
  /// Multiply-adds of a tile without a second stream.
  int64_t work(int64_t rows, int64_t keys) const { return rows * keys * (head_dim_ + value_dim_); }
  TileAt tile_at(const Item& item, const QueryTile& tile, Interval keys) const {
    return {item.sequence, tile.head, tile.begin, tile.rows(), keys.begin, keys.end - keys.begin};
  }

  // sliding.cpp
  class PackedKeys;
  void run_sliding(const Item& item) const;
  Interval sight(const Item& item, const QueryTile& tile) const;
  kernels::ReadAhead rows_ahead(const Item& item, const QueryTile& next, int64_t packed_end) const;

  // few_rows.cpp
  void run_few_rows(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                    const Memory& m) const;
  bool finite_sums(const Memory& m) const;
  void add_few_rows(const Item& item, const std::vector<QueryTile>& tiles, Interval keys,
                    const std::vector<Seen>& all_seen, const FiniteRows& finite,
                    const Memory& m) const;
  void keep_part(int64_t part, const QueryTile& tile, const Memory& m) const;
  void merge_parts() const;
  void merge_group(size_t first, size_t last) const;
  void merge_row(size_t first, size_t last, int64_t slot, const Memory& m) const;

  const int64_t streams_, padded_dim_, padded_values_, tile_rows_, tile_keys_;
  std::vector<Item> items_;
  int64_t parts_ = 0, most_rows_ = 0;
  static constexpr int64_t kSlideKeys = 256;  // packed before those left behind are dropped
  // [parts, rows, (pivot, sum, shift and sum of the second stream)], [parts, streams x rows, value dim]
  static constexpr int64_t kPartSums = 4;
  Array part_sums_, part_out_;
};

}  // namespace heed::tiled
