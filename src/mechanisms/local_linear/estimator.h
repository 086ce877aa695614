// Local linear attention in tiles. With p the softmax weights of a row and bars for means under them, the
// estimate of local_linear_attention.h is, without a quotient that cancels,
//
//   out = sum_m p_m (1 - c_m) v_m     c_m = (k_m - kbar) . x     x = (S + ridge * 1)^-1 (kbar - q)
//   S   = sum_m p_m (k_m - kbar) (k_m - kbar)^T
//
// Rows of a key head are its queries of all query heads one behind the other, so that a tile of keys
// serves them all.
#pragma once
#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "engine/tiled/plan.h"
#include "kernels/matrix.h"
#include "kernels/second_moments.h"
#include "kernels/tile.h"
#include "mechanisms/row_blocks.h"

namespace heed::local_linear {

struct Call {
  Tensor q, k, v;
  double scale = 1, ridge = 0;
  tiled::TilePlan plan;
  RunOptions run;
};

class Estimator {
 public:
  explicit Estimator(const Call& call);
  void forward(const Tensor& out) const;

 protected:
  using Block = kernels::Block<double>;
  static constexpr int64_t kTileKeys = 64;
  static constexpr int64_t kTileRows = 48;  // at most
  static constexpr int64_t kScoreStride = kTileKeys + 16;

  /// Rows [begin, begin + count) of a key head.
  struct Tile {
    int64_t batch = 0, kv_head = 0, begin = 0, count = 0;
  };

  /// Keys and values of one tile. Operands of sums over keys are finite: what is not is 0 there and
  /// listed instead.
  struct Keys {
    int64_t begin = 0, count = 0;
    Block k, turned_k;  // [keys, D], [D, keys]
    Block v, turned_v;  // [keys, Dv], [Dv, keys]
    std::vector<int64_t> bad_keys;
    struct BadValue {
      int64_t key = 0, column = 0;
      double value = 0;
    };
    std::vector<BadValue> bad_values;
  };

  /// Running softmax of the rows of a tile and what comes of it.
  struct Rows {
    Block q;  // [rows, D]
    double *pivot, *sum, *carry;
    Block mean;                 // [rows, D], kbar
    Block x;                    // [rows, D]
    double* x_mean;             // x . kbar
    double* moments;            // [rows, D, stride]: S + ridge * 1, then its factor
    kernels::KeyRange* ranges;  // within the tile of keys
    int64_t* ends;              // keys that a row sees
    int64_t most = 0;           // the largest of them
  };

  int64_t rows() const { return group_ * queries_; }  // of a key head
  int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head * group_ + row / queries_; }
  int64_t end_of(int64_t row) const {
    return std::max<int64_t>(0, call_.plan.row(row % queries_).end);
  }

  /// Runs body(row tile) for all tiles, those that see most keys first.
  template <class Body>
  void for_row_tiles(const Body& body) const {
    const int64_t per_head = (rows() + tile_rows_ - 1) / tile_rows_;
    const int64_t heads = call_.q.size(0) * kv_heads_, items = heads * per_head;
    parallel_for(items, threads_for(call_.run, items), [&](int64_t item, int) {
      const int64_t begin = (per_head - 1 - item / heads) * tile_rows_, head = item % heads;
      body({head / kv_heads_, head % kv_heads_, begin, std::min(tile_rows_, rows() - begin)});
    });
  }

  /// What weights are multiplied with: 0 for a row that sees nothing.
  static double share_of(double sum) { return sum == 0 ? 0 : 1 / sum; }

  int64_t keys_elements() const;
  int64_t rows_elements() const;
  Keys take_keys(Scratch& scratch) const;
  Rows take_rows(Scratch& scratch) const;
  /// One matrix with as many rows as a tile of rows.
  Block take_block(Scratch& scratch, int64_t stride) const {
    return {scratch.take<double>(tile_rows_ * stride), stride};
  }
  Block take_scores(Scratch& scratch, int64_t rows) const {
    return {scratch.take<double>(rows * kScoreStride), kScoreStride};
  }

  void load_rows(const Tensor& from, const Tile& tile, Block to) const;
  void store_rows(Block from, const Tile& tile, const Tensor& to) const;
  void load_keys(const Tile& tile, int64_t begin, Keys& keys) const;
  void load_values(const Tile& tile, Keys& keys) const;
  void begin_rows(const Tile& tile, Rows& rows) const;
  /// Ranges of the rows in a tile of keys; false if no row sees any.
  bool look(const Tile& tile, const Keys& keys, const int64_t* ends,
            kernels::KeyRange* ranges) const;
  /// c = a b, row by row; `b` is [depth, columns].
  void multiply(Block a, Block b, int64_t depth, Block c, int64_t rows, int64_t columns,
                bool add = false) const {
    matrix_.multiply({a.data, a.stride, 1}, {b.data, b.stride}, depth, c, rows, columns, add);
  }
  /// c += a^T b; `a` is [depth, rows].
  void add_turned(Block a, Block b, int64_t depth, Block c, int64_t rows, int64_t columns) const {
    matrix_.multiply({a.data, 1, a.stride}, {b.data, b.stride}, depth, c, rows, columns, true);
  }
  /// w = 2^(score - pivot), 0 outside the ranges, NaN for keys that are not finite.
  void weigh(Block q, int64_t count, const Keys& keys, const kernels::KeyRange* ranges,
             const kernels::RowState<double>& state, Block w) const;
  /// Sums over keys of one tile: weights, mean and moments of the rows. Leaves the weights in w.
  void add_statistics(const Tile& tile, const Keys& keys, const Rows& rows, Block w) const;
  /// From sums to mean, factor and x of one row.
  void solve_row(int64_t row, const Rows& rows) const;
  Block factor_of(int64_t row, const Rows& rows) const {
    return {rows.moments + row * dim_ * dim_stride_, dim_stride_};
  }

  const Call& call_;
  const int64_t queries_, kv_heads_, group_, dim_, value_dim_;
  const int64_t dim_stride_, value_stride_, tile_rows_;
  const kernels::MatrixKernels<double>& matrix_;
  const kernels::TileKernels<double>& tile_;
  const kernels::SecondMomentKernels& moments_;

 private:
  void run_tile(const Tile& tile, const Tensor& out) const;
};

struct Gradients {
  Tensor q, k, v;
};
void backward(const Call& call, const Tensor& grad_out, const Gradients& to);

}  // namespace heed::local_linear
