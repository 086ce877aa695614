// With g the gradient of a row's result, a_m = g . v_m, abar its mean, c_m as in estimator.h and
//
//   u   = (S + ridge * 1)^-1 d(loss)/dx       d(loss)/dx = -sum_m p_m a_m (k_m - kbar)
//   y_m = (k_m - kbar) . u
//   e_m = a_m - (a_m - abar) c_m + y_m (1 - c_m)         d(loss)/dp_m up to a constant of the row
//
// the gradients are, with ds_m = p_m (e_m - ebar) that of the scaled score,
//
//   dq   = scale sum_m ds_m k_m - u
//   dk_m = scale ds_m q + p_m (1 - c_m) u - p_m (a_m - abar + y_m) x
//   dv_m = p_m (1 - c_m) g
//
// First tiles of rows: everything that belongs to a row, and dq. Then tiles of keys.
#include <cmath>
#include <limits>

#include "mechanisms/local_linear/estimator.h"

namespace heed::local_linear {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// What the tiles of keys need of a row besides q and g.
struct Statistics {
  double pivot = 0, share = 0;  // weights are 2^(score - pivot) * share
  double x_mean = 0, u_mean = 0, a_mean = 0, e_mean = 0;
  bool finite = true;  // all of these, q, x, u and g
};

bool all_finite(const double* x, int64_t n) {
  double bad = 0;
  for (int64_t i = 0; i < n; ++i) bad += x[i] - x[i];
  return bad == 0;
}

class Backward : private Estimator {
 public:
  Backward(const Call& call, const Tensor& grad_out, const Gradients& to)
      : Estimator(call),
        grad_out_(grad_out),
        to_(to),
        statistics_(static_cast<size_t>(call.q.size(0) * kv_heads_ * rows())),
        x_(DType::f64, {static_cast<int64_t>(statistics_.size()), dim_stride_}),
        u_(DType::f64, {static_cast<int64_t>(statistics_.size()), dim_stride_}) {}

  void run() {
    for_row_tiles([&](const Tile& tile) { run_rows(tile); });
    const int64_t tiles = (call_.k.size(2) + kTileKeys - 1) / kTileKeys;
    const int64_t items = call_.q.size(0) * kv_heads_ * tiles;
    // Under a causal mask the first keys are seen by most rows.
    parallel_for(items, threads_for(call_.run, items), [&](int64_t item, int) {
      const int64_t heads = call_.q.size(0) * kv_heads_, head = item % heads;
      run_keys(head / kv_heads_, head % kv_heads_, item / heads * kTileKeys);
    });
  }

 private:
  struct RowMemory {
    Rows rows;
    Block g, u, sums;  // [rows, Dv], [rows, D], [rows, D]
    Block w, a, t, y;  // scores
    double *a_mean, *u_mean, *e_mean, *sum, *carry;
  };

  struct KeyMemory {
    Keys keys;
    Block dk, dv;      // [keys, D], [keys, Dv]
    Block q, x, u, g;  // [rows, D], g [rows, Dv]
    Block w, a, t, y;  // scores
    double *pivot, *sum, *carry;
    kernels::KeyRange* ranges;
    int64_t* ends;
  };

  int64_t index(const Tile& tile, int64_t r) const {
    return (tile.batch * kv_heads_ + tile.kv_head) * rows() + tile.begin + r;
  }

  void run_rows(const Tile& tile);
  void collect(const Tile& tile, Keys& keys, const RowMemory& m) const;
  void solve_rows(const Tile& tile, const RowMemory& m) const;
  void score_gradients(const Tile& tile, Keys& keys, const RowMemory& m) const;
  void keep(const Tile& tile, const RowMemory& m);
  KeyMemory take_key_memory(Scratch& scratch) const;
  void run_keys(int64_t batch, int64_t kv_head, int64_t begin) const;
  void load_row_tile(const Tile& tile, const KeyMemory& m) const;
  void key_coefficients(const Tile& tile, int64_t r, const KeyMemory& m) const;

  const Tensor grad_out_;
  const Gradients to_;
  std::vector<Statistics> statistics_;
  Array x_, u_;  // [rows of all key heads, D]
};

void Backward::run_rows(const Tile& tile) {
  const int64_t elements = keys_elements() + rows_elements() +
                           tile_rows_ * (value_stride_ + 2 * dim_stride_ + 4 * kScoreStride + 5) +
                           12 * 8;
  Scratch scratch(static_cast<size_t>(elements) * sizeof(double));
  Keys keys = take_keys(scratch);
  RowMemory m{};
  m.rows = take_rows(scratch);
  m.g = take_block(scratch, value_stride_);
  m.u = take_block(scratch, dim_stride_);
  m.sums = take_block(scratch, dim_stride_);
  for (Block* scores : {&m.w, &m.a, &m.t, &m.y}) *scores = take_scores(scratch, tile_rows_);
  for (double** each : {&m.a_mean, &m.u_mean, &m.e_mean, &m.sum, &m.carry}) {
    *each = scratch.take<double>(tile_rows_);
    std::fill_n(*each, tile_rows_, 0.0);
  }
  begin_rows(tile, m.rows);
  load_rows(grad_out_, tile, m.g);
  std::fill_n(m.sums.data, tile.count * dim_stride_, 0.0);
  for (int64_t begin = 0; begin < m.rows.most; begin += kTileKeys) {
    load_keys(tile, begin, keys);
    load_values(tile, keys);
    if (look(tile, keys, m.rows.ends, m.rows.ranges)) collect(tile, keys, m);
  }
  solve_rows(tile, m);
  std::fill_n(m.sums.data, tile.count * dim_stride_, 0.0);
  for (int64_t begin = 0; begin < m.rows.most; begin += kTileKeys) {
    load_keys(tile, begin, keys);
    load_values(tile, keys);
    if (look(tile, keys, m.rows.ends, m.rows.ranges)) score_gradients(tile, keys, m);
  }
  keep(tile, m);
}

// Beside the statistics of the forward: sums of w a and of w a k.
void Backward::collect(const Tile& tile, Keys& keys, const RowMemory& m) const {
  add_statistics(tile, keys, m.rows, m.w);
  multiply(m.g, keys.turned_v, value_dim_, m.a, tile.count, keys.count);
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t end = m.rows.ranges[r].end;
    const double *w = m.w.row(r), carry = m.rows.carry[r];
    double *a = m.a.row(r), sum = 0;
    for (int64_t j = 0; j < end; ++j) {
      a[j] *= w[j];
      sum += a[j];
    }
    std::fill(a + end, a + keys.count, 0.0);
    m.a_mean[r] = m.a_mean[r] * carry + sum;
    for (int64_t e = 0; e < dim_; ++e) m.sums.row(r)[e] *= carry;
  }
  multiply(m.a, keys.k, keys.count, m.sums, tile.count, dim_, true);
}

void Backward::solve_rows(const Tile& tile, const RowMemory& m) const {
  for (int64_t r = 0; r < tile.count; ++r) {
    solve_row(r, m.rows);
    double* u = m.u.row(r);
    std::fill_n(u, dim_stride_, 0.0);
    if (m.rows.sum[r] == 0) continue;
    const double share = 1 / m.rows.sum[r];
    m.a_mean[r] *= share;
    for (int64_t e = 0; e < dim_; ++e) {
      u[e] = m.a_mean[r] * m.rows.mean.row(r)[e] - share * m.sums.row(r)[e];
    }
    const Block factor = factor_of(r, m.rows);
    moments_.solve({factor.data, factor.stride}, dim_, u);
    m.u_mean[r] = matrix_.dot(u, m.rows.mean.row(r), dim_);
  }
}

// Sums of p e and of p e k.
void Backward::score_gradients(const Tile& tile, Keys& keys, const RowMemory& m) const {
  weigh(m.rows.q, tile.count, keys, m.rows.ranges, {m.rows.pivot, m.sum, m.carry}, m.w);
  multiply(m.g, keys.turned_v, value_dim_, m.a, tile.count, keys.count);
  multiply(m.rows.x, keys.turned_k, dim_, m.t, tile.count, keys.count);
  multiply(m.u, keys.turned_k, dim_, m.y, tile.count, keys.count);
  for (int64_t r = 0; r < tile.count; ++r) {
    const double share = share_of(m.rows.sum[r]), a_mean = m.a_mean[r];
    const double *a = m.a.row(r), *t = m.t.row(r), *y = m.y.row(r);
    double *w = m.w.row(r), sum = 0;
    for (int64_t j = 0; j < m.rows.ranges[r].end; ++j) {
      const double c = t[j] - m.rows.x_mean[r];
      w[j] *= share * (a[j] - (a[j] - a_mean) * c + (y[j] - m.u_mean[r]) * (1 - c));
      sum += w[j];
    }
    m.e_mean[r] += sum;
  }
  multiply(m.w, keys.k, keys.count, m.sums, tile.count, dim_, true);
}

// dq, and what the tiles of keys need.
void Backward::keep(const Tile& tile, const RowMemory& m) {
  for (int64_t r = 0; r < tile.count; ++r) {
    const double *q = m.rows.q.row(r), *x = m.rows.x.row(r), *u = m.u.row(r);
    double* dq = m.sums.row(r);
    const bool sees = m.rows.sum[r] != 0;
    for (int64_t e = 0; e < dim_; ++e) {
      dq[e] = sees ? call_.scale * (dq[e] - m.e_mean[r] * m.rows.mean.row(r)[e]) - u[e] : 0;
    }
    const int64_t at = index(tile, r);
    std::copy_n(x, dim_stride_, x_.as<double>() + at * dim_stride_);
    std::copy_n(u, dim_stride_, u_.as<double>() + at * dim_stride_);
    Statistics& s = statistics_[static_cast<size_t>(at)];
    s = {m.rows.pivot[r], share_of(m.rows.sum[r]), m.rows.x_mean[r], m.u_mean[r], m.a_mean[r],
         m.e_mean[r]};
    const double rest[] = {sees ? s.pivot : 0, s.share, s.x_mean, s.u_mean, s.a_mean, s.e_mean};
    s.finite = all_finite(rest, 6) && all_finite(q, dim_) && all_finite(x, dim_) &&
               all_finite(u, dim_) && all_finite(m.g.row(r), value_dim_);
  }
  store_rows(m.sums, tile, to_.q);
}

Backward::KeyMemory Backward::take_key_memory(Scratch& scratch) const {
  const auto matrix = [&](int64_t rows, int64_t stride) {
    return Block{scratch.take<double>(rows * stride), stride};
  };
  KeyMemory m{};
  m.keys = take_keys(scratch);
  m.dk = matrix(kTileKeys, dim_stride_);
  m.dv = matrix(kTileKeys, value_stride_);
  for (Block* rows : {&m.q, &m.x, &m.u}) *rows = matrix(kTileRows, dim_stride_);
  m.g = matrix(kTileRows, value_stride_);
  for (Block* scores : {&m.w, &m.a, &m.t, &m.y}) *scores = take_scores(scratch, kTileRows);
  for (double** each : {&m.pivot, &m.sum, &m.carry}) *each = scratch.take<double>(kTileRows);
  m.ranges = scratch.take<kernels::KeyRange>(kTileRows);
  m.ends = scratch.take<int64_t>(kTileRows);
  return m;
}

void Backward::run_keys(int64_t batch, int64_t kv_head, int64_t begin) const {
  const int64_t elements = keys_elements() + kTileKeys * (dim_stride_ + value_stride_) +
                           kTileRows * (3 * dim_stride_ + value_stride_ + 4 * kScoreStride + 5) +
                           20 * 8;
  Scratch scratch(static_cast<size_t>(elements) * sizeof(double));
  KeyMemory m = take_key_memory(scratch);
  std::fill_n(m.dk.data, kTileKeys * dim_stride_, 0.0);
  std::fill_n(m.dv.data, kTileKeys * value_stride_, 0.0);
  load_keys({batch, kv_head, 0, 0}, begin, m.keys);
  load_values({batch, kv_head, 0, 0}, m.keys);
  const int64_t count = m.keys.count;
  for (int64_t first = 0; first < rows(); first += kTileRows) {
    const Tile tile{batch, kv_head, first, std::min(kTileRows, rows() - first)};
    for (int64_t r = 0; r < tile.count; ++r) m.ends[r] = end_of(first + r);
    if (!look(tile, m.keys, m.ends, m.ranges)) continue;
    load_row_tile(tile, m);
    for (int64_t r = 0; r < tile.count; ++r) key_coefficients(tile, r, m);
    add_turned(m.w, m.q, tile.count, m.dk, count, dim_);
    add_turned(m.t, m.u, tile.count, m.dk, count, dim_);
    add_turned(m.a, m.x, tile.count, m.dk, count, dim_);
    add_turned(m.t, m.g, tile.count, m.dv, count, value_dim_);
  }
  const auto store = [&](Block from, const Tensor& to) {
    matrix_.store_rows({from.data, from.stride}, out_rows(to, {batch, kv_head, begin, count}));
  };
  store(m.dk, to_.k);
  store(m.dv, to_.v);
}

// A tile of rows as the first pass left it, and its scores against the keys.
void Backward::load_row_tile(const Tile& tile, const KeyMemory& m) const {
  load_rows(call_.q, tile, m.q);
  load_rows(grad_out_, tile, m.g);
  const int64_t at = index(tile, 0);
  std::copy_n(x_.as<double>() + at * dim_stride_, tile.count * dim_stride_, m.x.data);
  std::copy_n(u_.as<double>() + at * dim_stride_, tile.count * dim_stride_, m.u.data);
  for (int64_t r = 0; r < tile.count; ++r) {
    m.pivot[r] = statistics_[static_cast<size_t>(at + r)].pivot;
    m.sum[r] = 0;
  }
  weigh(m.q, tile.count, m.keys, m.ranges, {m.pivot, m.sum, m.carry}, m.w);
  multiply(m.g, m.keys.turned_v, value_dim_, m.a, tile.count, m.keys.count);
  multiply(m.x, m.keys.turned_k, dim_, m.t, tile.count, m.keys.count);
  multiply(m.u, m.keys.turned_k, dim_, m.y, tile.count, m.keys.count);
}

// Of one row: w, t and a become what q, u (and g) and x are multiplied with. What is not finite makes NaN
// of the keys that the row sees and of no other.
void Backward::key_coefficients(const Tile& tile, int64_t r, const KeyMemory& m) const {
  const Statistics& s = statistics_[static_cast<size_t>(index(tile, r))];
  const int64_t end = m.ranges[r].end;
  double *to_q = m.w.row(r), *to_u = m.t.row(r), *to_x = m.a.row(r);
  const double* y = m.y.row(r);
  for (int64_t j = 0; j < end; ++j) {
    const double p = to_q[j] * s.share, c = to_u[j] - s.x_mean;
    const double a = to_x[j], yj = y[j] - s.u_mean;
    const double e = a - (a - s.a_mean) * c + yj * (1 - c);
    to_q[j] = s.finite ? call_.scale * p * (e - s.e_mean) : kNaN;
    to_u[j] = s.finite ? p * (1 - c) : kNaN;
    to_x[j] = s.finite ? -p * (a - s.a_mean + yj) : kNaN;
  }
  for (double* row : {to_q, to_u, to_x}) std::fill(row + end, row + m.keys.count, 0.0);
  if (s.finite) return;
  for (const Block& rows : {m.q, m.x, m.u}) std::fill_n(rows.row(r), dim_, 0.0);
  std::fill_n(m.g.row(r), value_dim_, 0.0);
}

}  // namespace

void backward(const Call& call, const Tensor& grad_out, const Gradients& to) {
  Backward(call, grad_out, to).run();
}

}  // namespace heed::local_linear
