#include "mechanisms/local_linear/estimator.h"

#include <cmath>
#include <limits>
#include <numbers>

namespace heed::local_linear {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Rows whose moments, n x stride each, take about 2 MiB together: as many as blocks of 6 allow.
int64_t rows_for(int64_t n, int64_t stride, int64_t most) {
  const int64_t fit = (int64_t{1} << 18) / (n * stride);
  return std::clamp<int64_t>(fit < 6 ? fit : fit / 6 * 6, 1, most);
}

}  // namespace

Estimator::Estimator(const Call& call)
    : call_(call),
      queries_(call.q.size(2)),
      kv_heads_(call.k.size(1)),
      group_(kv_heads_ == 0 ? 0 : call.q.size(1) / kv_heads_),
      dim_(call.q.size(3)),
      value_dim_(call.v.size(3)),
      dim_stride_(round_up(dim_, kernels::kMomentPad)),
      value_stride_(round_up(value_dim_, kernels::kMomentPad)),
      tile_rows_(rows_for(dim_, dim_stride_, kTileRows)),
      matrix_(kernels::matrix_kernels<double>(chosen_isa(call.run))),
      tile_(kernels::tile_kernels<double>(chosen_isa(call.run))),
      moments_(kernels::second_moment_kernels(chosen_isa(call.run))) {}

void Estimator::forward(const Tensor& out) const {
  for_row_tiles([&](const Tile& tile) { run_tile(tile, out); });
}

// Elements that take_keys and take_rows cut, with room for the alignment of each block.
int64_t Estimator::keys_elements() const {
  return kTileKeys * (dim_stride_ + value_stride_) + (dim_ + value_dim_) * kScoreStride + 4 * 8;
}

int64_t Estimator::rows_elements() const {
  return tile_rows_ * (dim_ * dim_stride_ + 3 * dim_stride_ + 6) + 10 * 8;
}

Estimator::Keys Estimator::take_keys(Scratch& scratch) const {
  Keys keys;
  keys.k = {scratch.take<double>(kTileKeys * dim_stride_), dim_stride_};
  keys.turned_k = {scratch.take<double>(dim_ * kScoreStride), kScoreStride};
  keys.v = {scratch.take<double>(kTileKeys * value_stride_), value_stride_};
  keys.turned_v = {scratch.take<double>(value_dim_ * kScoreStride), kScoreStride};
  return keys;
}

Estimator::Rows Estimator::take_rows(Scratch& scratch) const {
  Rows rows{};
  rows.q = take_block(scratch, dim_stride_);
  rows.mean = take_block(scratch, dim_stride_);
  rows.x = take_block(scratch, dim_stride_);
  for (double** statistic : {&rows.pivot, &rows.sum, &rows.carry, &rows.x_mean}) {
    *statistic = scratch.take<double>(tile_rows_);
  }
  rows.moments = scratch.take<double>(tile_rows_ * dim_ * dim_stride_);
  rows.ranges = scratch.take<kernels::KeyRange>(tile_rows_);
  rows.ends = scratch.take<int64_t>(tile_rows_);
  return rows;
}

// A tile may hold the last rows of one query head and the first of the next.
void Estimator::load_rows(const Tensor& from, const Tile& tile, Block to) const {
  for (int64_t r = 0; r < tile.count;) {
    const int64_t row = tile.begin + r, at = row % queries_;
    const int64_t run = std::min(tile.count - r, queries_ - at);
    matrix_.load_rows(rows_of(from, {tile.batch, head_of(tile.kv_head, row), at, run}),
                      {to.row(r), to.stride});
    r += run;
  }
}

void Estimator::store_rows(Block from, const Tile& tile, const Tensor& to) const {
  for (int64_t r = 0; r < tile.count;) {
    const int64_t row = tile.begin + r, at = row % queries_;
    const int64_t run = std::min(tile.count - r, queries_ - at);
    matrix_.store_rows({from.row(r), from.stride},
                       out_rows(to, {tile.batch, head_of(tile.kv_head, row), at, run}));
    r += run;
  }
}

void Estimator::load_keys(const Tile& tile, int64_t begin, Keys& keys) const {
  keys.begin = begin;
  keys.count = std::min(kTileKeys, call_.k.size(2) - begin);
  matrix_.load_rows(rows_of(call_.k, {tile.batch, tile.kv_head, begin, keys.count}), keys.k);
  matrix_.transpose({keys.k.data, keys.k.stride}, keys.count, dim_, keys.turned_k);
  keys.bad_keys.clear();
  for (int64_t m = 0; m < keys.count; ++m) {
    double bad = 0;
    for (int64_t e = 0; e < dim_; ++e) bad += keys.k.row(m)[e] - keys.k.row(m)[e];
    if (bad == 0) continue;
    keys.bad_keys.push_back(m);
    std::fill_n(keys.k.row(m), dim_, 0.0);
  }
}

void Estimator::load_values(const Tile& tile, Keys& keys) const {
  matrix_.load_rows(rows_of(call_.v, {tile.batch, tile.kv_head, keys.begin, keys.count}), keys.v);
  matrix_.transpose({keys.v.data, keys.v.stride}, keys.count, value_dim_, keys.turned_v);
  keys.bad_values.clear();
  for (int64_t m = 0; m < keys.count; ++m) {
    for (int64_t f = 0; f < value_dim_; ++f) {
      double& value = keys.v.row(m)[f];
      if (std::isfinite(value)) continue;
      keys.bad_values.push_back({m, f, value});
      value = 0;
    }
  }
}

void Estimator::begin_rows(const Tile& tile, Rows& rows) const {
  load_rows(call_.q, tile, rows.q);
  std::fill_n(rows.pivot, tile.count, -std::numeric_limits<double>::infinity());
  std::fill_n(rows.sum, tile.count, 0.0);
  std::fill_n(rows.mean.data, tile.count * dim_stride_, 0.0);
  std::fill_n(rows.moments, tile.count * dim_ * dim_stride_, 0.0);
  rows.most = 0;
  for (int64_t r = 0; r < tile.count; ++r) {
    rows.ends[r] = end_of(tile.begin + r);
    rows.most = std::max(rows.most, rows.ends[r]);
  }
}

bool Estimator::look(const Tile& tile, const Keys& keys, const int64_t* ends,
                     kernels::KeyRange* ranges) const {
  bool any = false;
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t end = std::clamp<int64_t>(ends[r] - keys.begin, 0, keys.count);
    ranges[r] = {0, static_cast<int32_t>(end)};
    any = any || end > 0;
  }
  return any;
}

void Estimator::weigh(Block q, int64_t count, const Keys& keys, const kernels::KeyRange* ranges,
                      const kernels::RowState<double>& state, Block w) const {
  multiply(q, keys.turned_k, dim_, w, count, keys.count);
  if (call_.scale < 0) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t m = 0; m < keys.count; ++m) w.row(r)[m] = -w.row(r)[m];
    }
  }
  kernels::WeightShape<double> shape;
  shape.scale = std::abs(call_.scale) * std::numbers::log2e;
  tile_.weights[static_cast<int>(kernels::WeightKind::softmax)](w, count, keys.count, ranges, shape,
                                                                state, w.data, w.stride);
  for (int64_t m : keys.bad_keys) {
    for (int64_t r = 0; r < count; ++r) {
      if (m < ranges[r].end) w.row(r)[m] = kNaN;
    }
  }
}

void Estimator::add_statistics(const Tile& tile, const Keys& keys, const Rows& rows,
                               Block w) const {
  weigh(rows.q, tile.count, keys, rows.ranges, {rows.pivot, rows.sum, rows.carry}, w);
  for (int64_t r = 0; r < tile.count; ++r) {
    for (int64_t e = 0; e < dim_; ++e) rows.mean.row(r)[e] *= rows.carry[r];
  }
  multiply(w, keys.k, keys.count, rows.mean, tile.count, dim_, true);
  moments_.add_moments({w.data, w.stride}, tile.count, {keys.k.data, keys.k.stride}, keys.count,
                       dim_, rows.carry, rows.moments);
}

void Estimator::solve_row(int64_t row, const Rows& rows) const {
  double *mean = rows.mean.row(row), *x = rows.x.row(row);
  std::fill_n(x, dim_stride_, 0.0);
  rows.x_mean[row] = 0;
  if (rows.sum[row] == 0) return;  // sees nothing
  const double share = 1 / rows.sum[row];
  for (int64_t e = 0; e < dim_; ++e) mean[e] *= share;
  const Block a = factor_of(row, rows);
  for (int64_t i = 0; i < dim_; ++i) {
    double* to = a.row(i);
    for (int64_t j = 0; j < dim_; ++j) to[j] = to[j] * share - mean[i] * mean[j];
    to[i] += call_.ridge;
    x[i] = mean[i] - rows.q.row(row)[i];
  }
  moments_.factorize(a, dim_, call_.ridge);
  moments_.solve({a.data, a.stride}, dim_, x);
  rows.x_mean[row] = matrix_.dot(x, mean, dim_);
}

void Estimator::run_tile(const Tile& tile, const Tensor& out) const {
  const int64_t elements = keys_elements() + rows_elements() +
                           tile_rows_ * (2 * kScoreStride + value_stride_ + 2) + 5 * 8;
  Scratch scratch(static_cast<size_t>(elements) * sizeof(double));
  Keys keys = take_keys(scratch);
  Rows rows = take_rows(scratch);
  const Block w = take_scores(scratch, tile_rows_), c = take_scores(scratch, tile_rows_);
  const Block result = take_block(scratch, value_stride_);
  double *sum = scratch.take<double>(tile_rows_), *carry = scratch.take<double>(tile_rows_);

  begin_rows(tile, rows);
  for (int64_t begin = 0; begin < rows.most; begin += kTileKeys) {
    load_keys(tile, begin, keys);
    if (look(tile, keys, rows.ends, rows.ranges)) add_statistics(tile, keys, rows, w);
  }
  for (int64_t r = 0; r < tile.count; ++r) solve_row(r, rows);

  std::fill_n(result.data, tile.count * value_stride_, 0.0);
  std::fill_n(sum, tile.count, 0.0);
  for (int64_t begin = 0; begin < rows.most; begin += kTileKeys) {
    load_keys(tile, begin, keys);
    load_values(tile, keys);
    if (!look(tile, keys, rows.ends, rows.ranges)) continue;
    weigh(rows.q, tile.count, keys, rows.ranges, {rows.pivot, sum, carry}, w);
    multiply(rows.x, keys.turned_k, dim_, c, tile.count, keys.count);
    for (int64_t r = 0; r < tile.count; ++r) {
      double* p = w.row(r);
      const double share = share_of(rows.sum[r]);
      for (int64_t m = 0; m < rows.ranges[r].end; ++m) {
        p[m] *= share * (1 - (c.row(r)[m] - rows.x_mean[r]));
      }
    }
    multiply(w, keys.v, keys.count, result, tile.count, value_dim_, true);
    for (const Keys::BadValue& bad : keys.bad_values) {
      for (int64_t r = 0; r < tile.count; ++r) {
        if (bad.key < rows.ranges[r].end) {
          result.row(r)[bad.column] += w.row(r)[bad.key] * bad.value;
        }
      }
    }
  }
  store_rows(result, tile, out);
}

}  // namespace heed::local_linear
