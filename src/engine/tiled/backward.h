// The backward pass as a class, in three files: backward.cpp (work units and what surrounds them),
// backward_tile.cpp (one tile) and backward_few_rows.cpp (few query rows against many keys).
#pragma once
#include <vector>

#include "base/parallel.h"
#include "engine/tiled/tile_call.h"
#include "kernels/read_ahead.h"

namespace heed::tiled {

/// A share of the key tiles of one key head, with all query heads of its group.
struct Unit {
  int64_t sequence = 0, kv_head = 0;
  int64_t part = 0, parts = 1;
  /// To and fro, so that every part of a causal plan gets early and late keys.
  bool owns(int64_t key_tile) const {
    const int64_t turn = key_tile % (2 * parts);
    return part == (turn < parts ? turn : 2 * parts - 1 - turn);
  }
};

/// Units that one thread runs one after the other.
struct Task {
  int lane = 0;  // of the terms' gradient
  std::vector<size_t> units;
};

template <class T>
class Backward : private TileCall<T> {
 public:
  Backward(const Problem& problem, const std::vector<SequenceGradient>& gradients,
           ScoreTerms* terms, const RunOptions& run);
  HeadGradients run();

 private:
  using typename TileCall<T>::Block;
  using KeyRange = kernels::KeyRange;
  using Rows = kernels::Rows;
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

  /// What one unit needs, cut from one block of scratch.
  struct Memory {
    void *keys, *key_values, *values;            // K twice, V as the keys of dP
    void *q, *r, *dout;                          // operands of products along head dims
    void *q_columns, *r_columns, *dout_columns;  // of products along rows, where they differ
    Block s, a, t, slope, factors;
    void *rounded, *paired;  // bfloat16, with half operands
    Block dk, dv;            // transposed: [head dim, keys]
    KeyRange* ranges;
    bool one_tile;  // holds all rows that see any key, and one product writes the gradients of keys
  };

  /// Accumulated gradients of the query rows of a group, one slot of tile_rows_ rows per query tile.
  struct RowGradients {
    Array q, r;
  };

  /// Query rows that one thread prepares at a time.
  struct RowBlock {
    int64_t sequence, head, begin, end;
  };
  static constexpr int64_t kBlockRows = 64;

  const SequenceGradient& gradient(int64_t s) const { return gradients_[static_cast<size_t>(s)]; }
  int64_t query_tiles(int64_t s) const {
    return ceil_div(sequence(s).plan.queries(), path_.query_tile);
  }
  int64_t key_tiles(int64_t s) const { return ceil_div(sequence(s).plan.keys(), tile_keys_); }
  int64_t row_index(int64_t s, int64_t head, int64_t row) const {
    return row_base_[static_cast<size_t>(s)] + head * sequence(s).plan.queries() + row;
  }

  // backward.cpp
  void prepare_rows();
  void reserve_rows();
  std::vector<RowBlock> row_blocks() const;
  void prepare_block(const RowBlock& block);
  void find_finite(const RowBlock& block, const Rows& x);
  void prepare_row(int64_t s, int64_t head, int64_t row, double out_dot, double mean_dot);
  void plan_units();
  std::vector<size_t> longest_first() const;
  std::vector<Task> deal_out(const std::vector<size_t>& order) const;
  RowGradients make_row_gradients(const Unit& unit) const;
  void run_unit(int lane, int64_t index);
  /// Overwrites the first part.
  void finish_rows(int64_t s, int64_t kv_head, const std::vector<RowGradients*>& parts) const;
  void finish_rows_of(const HeadRows& to, int64_t s, int64_t kv_head, double factor,
                      const std::vector<T*>& parts) const;
  HeadGradients head_gradients() const;

  // backward_tile.cpp
  Memory memory(Cutter& cut) const;
  /// Of queries and gradients of a block; their padding rows stay finite.
  int64_t row_operand_bytes(int64_t width, int64_t padded) const;
  void clear_row_operands(const Memory& m) const;
  void run_key_tile(int lane, const Unit& unit, Interval keys, const RowGradients& rows,
                    double* sums, const Memory& m) const;
  bool in_one_tile(const Unit& unit) const;
  static kernels::RowsOut rows_out(const HeadRows& to, int64_t kv_head, Interval keys) {
    return {to.origin(kv_head, keys.begin), to.dtype(), to.stride(1), keys.end - keys.begin,
            to.size(2)};
  }
  void pack_keys(const Sequence& s, int64_t kv_head, Interval keys, const Memory& m) const;
  kernels::ReadAhead rows_ahead(const Unit& unit, int64_t tile, Block dq) const;
  /// `next`: rows that are read later.
  void run_tile(int lane, const TileAt& at, const Seen& seen, Block dq, Block dr, double* sums,
                kernels::ReadAhead& next, const Memory& m) const;
  /// Operands of products along rows.
  struct Columns {
    const void *q = nullptr, *r = nullptr, *dout = nullptr;
  };
  Columns pack_rows(const TileAt& at, bool finite, const Memory& m) const;
  bool finite_rows_of(const TileAt& at) const;
  /// From raw scores and dP of a tile to its weights and dS, which the terms and the sums per head get.
  void differentiate(int lane, const TileAt& at, const Seen& seen, Block dq, double* sums,
                     const Memory& m) const;
  void weigh(const TileAt& at, const Seen& seen, const Memory& m) const;
  void add_products(const TileAt& at, const Seen& seen, const Columns& columns, bool finite,
                    Block dq, Block dr, kernels::ReadAhead& next, const Memory& m) const;
  void add_columns(const TileAt& at, const Seen& seen, Block weights, const void* columns,
                   const Rows& from, int64_t width, bool finite, bool negate, Block to,
                   const Memory& m) const;
  void add_rows(const TileAt& at, const Seen& seen, Block weights, Block to,
                kernels::ReadAhead* next, const Memory& m) const;

  // backward_few_rows.cpp
  /// The query head of a group against `keys`.
  TileAt few_rows_at(const Unit& unit, int64_t g, Interval keys) const;
  bool finite_few_rows(const Unit& unit) const;
  void pack_few_rows(const Unit& unit, const Memory& m) const;
  void run_few_rows(int lane, const Unit& unit, Interval keys, const RowGradients& rows,
                    double* sums, const Memory& m) const;
  /// Adds infinite and NaN elements of query rows to the keys that they see.
  void add_infinite(const Unit& unit, const HeadRows& from, Block weights, T factor,
                    const kernels::RowsOut& to) const;

  const std::vector<SequenceGradient>& gradients_;
  ScoreTerms* terms_;
  const int64_t padded_dim_, padded_values_;
  const int64_t tile_rows_;   // of a query tile, with padding
  const int64_t block_rows_;  // of scratch blocks: few rows of a group share one
  const int64_t tile_keys_;
  std::vector<int64_t> row_base_;
  // Per query row of all sequences and heads. pivot in units of log2.
  Array pivot_, shift_, t_mean_, dot_out_, dot_mean_;
  std::vector<char> finite_;  // q, r and the gradient of out are finite
  std::vector<Unit> units_;
  std::vector<RowGradients> partial_;  // of units that share their rows with others
  std::vector<double> sums_;           // [units, group, (bias, slope)]
};

}  // namespace heed::tiled
