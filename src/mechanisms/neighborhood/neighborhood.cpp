#include <cmath>
#include <limits>
#include <string>

#include "base/parallel.h"
#include "heed/error.h"
#include "mechanisms/neighborhood/grid_rows.h"

namespace heed {

namespace na {

namespace {

using Side = GridRows::Side;

constexpr double kNothing = -std::numeric_limits<double>::infinity();

/// [B,H,rows,1] as [B,H,rows]; undefined stays undefined.
Tensor sums(const Tensor& rows) { return rows.defined() ? rows.select(3, 0) : Tensor(); }

Tensor batch_entry(const Tensor& t, int64_t b) { return t.defined() ? t.select(0, b) : Tensor(); }

/// Rows of a call: [B,H,rows,width], lse [B,H,rows].
struct CallRows {
  Tensor q, k, v, out, lse;
};

tiled::Problem grid_problem(const GridCall& call, const GridRows& grid, const CallRows& rows) {
  tiled::Problem problem;
  problem.op = call.op;
  problem.scale = call.scale;
  for (int64_t b = 0; b < call.batch(); ++b) {
    for (int64_t g = 0; g < grid.groups(); ++g) {
      tiled::Sequence s;
      s.q = grid.group(rows.q.select(0, b), g, Side::queries);
      s.k = grid.group(rows.k.select(0, b), g, Side::keys);
      s.v = grid.group(rows.v.select(0, b), g, Side::keys);
      s.out = grid.group(rows.out.select(0, b), g, Side::queries);
      if (rows.lse.defined()) s.lse = grid.group(rows.lse.select(0, b), g, Side::queries);
      s.plan = grid.plan(g);
      s.batch = b;
      problem.sequences.push_back(std::move(s));
    }
  }
  grid.set_tiles(problem);
  return problem;
}

/// Every query against the additional keys.
tiled::Problem additional_problem(const GridCall& call, const CallRows& rows) {
  tiled::Problem problem;
  problem.op = call.op;
  problem.scale = call.scale;
  problem.sequences = tiled::batch_sequences(
      rows.q, call.additional_keys, call.additional_values, rows.out, rows.lse,
      std::vector<tiled::TilePlan>(static_cast<size_t>(call.batch()),
                                   {rows.q.size(2), call.additional_keys.size(2)}));
  return problem;
}

template <class T>
void store_row(const T* from, int64_t count, const Tensor& to,
               std::initializer_list<int64_t> index) {
  std::byte* row = to.at(index);
  const auto each = [&](auto* typed, const auto& rounded) {
    for (int64_t i = 0; i < count; ++i) typed[i] = rounded(from[i]);
  };
  const auto as_it_is = [](T x) { return x; };
  switch (to.dtype()) {
    case DType::bf16:
      return each(reinterpret_cast<bfloat16*>(row),
                  [](T x) { return to_bfloat16(static_cast<float>(x)); });
    case DType::f16:
      return each(reinterpret_cast<float16*>(row),
                  [](T x) { return to_float16(static_cast<float>(x)); });
    default:
      return each(reinterpret_cast<T*>(row), as_it_is);
  }
}

/// to = weight_a a + weight_b b row by row, with weights(b, h, row) -> {weight_a, weight_b}. a and b
/// are contiguous [B,H,rows,width] of T and a is lost.
template <class T, class Weights>
void add_rows(const Tensor& a, const Tensor& b, const Tensor& to, const RunOptions& run,
              const Weights& weights) {
  const int64_t heads = a.size(1), pairs = a.size(0) * heads, width = a.size(3);
  parallel_for(pairs, threads_for(run, pairs), [&](int64_t pair, int) {
    for (int64_t r = 0; r < a.size(2); ++r) {
      const auto [weight_a, weight_b] = weights(pair / heads, pair % heads, r);
      T* x = reinterpret_cast<T*>(a.at({pair / heads, pair % heads, r}));
      const T* y = reinterpret_cast<const T*>(b.at({pair / heads, pair % heads, r}));
      for (int64_t i = 0; i < width; ++i) x[i] = weight_a * x[i] + weight_b * y[i];
      store_row(x, width, to, {pair / heads, pair % heads, r});
    }
  });
}

/// Results of one part of the keys in the type of sums, so that a merge rounds only once.
struct Part {
  Part(const CallRows& rows, DType type)
      : out(type, rows.out.shape()), lse(type, {rows.q.size(0), rows.q.size(1), rows.q.size(2)}) {}
  Array out, lse;
};

template <class T>
void merge(const Part& a, const Part& b, const CallRows& to, const RunOptions& run) {
  add_rows<T>(a.out, b.out, to.out, run, [&](int64_t batch, int64_t head, int64_t r) {
    const std::initializer_list<int64_t> at = {batch, head, r};
    const double x = *reinterpret_cast<const T*>(a.lse.view().at(at));
    const double y = *reinterpret_cast<const T*>(b.lse.view().at(at));
    const double most = std::max(x, y), pivot = most == kNothing ? 0 : most;
    const double total = pivot + std::log(std::exp(x - pivot) + std::exp(y - pivot));
    if (to.lse.defined()) *reinterpret_cast<T*>(to.lse.at(at)) = static_cast<T>(total);
    const auto weight = [total](double lse) {
      return static_cast<T>(lse == kNothing ? 0 : std::exp(lse - total));
    };
    return std::pair(weight(x), weight(y));
  });
}

void forward(const GridCall& call, const RunOptions& run) {
  if (call.empty()) return;
  const GridRows grid(call, run);
  const RowsOf q = grid.read(call.query, Side::queries), k = grid.read(call.key, Side::keys);
  const RowsOf v = grid.read(call.value, Side::keys);
  const RowsOf out = grid.to_write(call.out, Side::queries);
  RowsOf lse;
  if (call.lse.defined()) lse = grid.to_write(call.lse, Side::queries);
  CallRows rows{q.rows, k.rows, v.rows, out.rows, sums(lse.rows)};
  if (!call.has_additional()) {
    tiled::forward(grid_problem(call, grid, rows), run);
  } else {
    const DType type = tiled::statistics_type(call.query.dtype());
    const Part near(rows, type), additional(rows, type);
    const CallRows near_rows{rows.q, rows.k, rows.v, near.out, near.lse};
    const CallRows additional_rows{rows.q, {}, {}, additional.out, additional.lse};
    tiled::forward(grid_problem(call, grid, near_rows), run);
    tiled::forward(additional_problem(call, additional_rows), run);
    if (type == DType::f64) {
      merge<double>(near, additional, rows, run);
    } else {
      merge<float>(near, additional, rows, run);
    }
  }
  grid.store(out, call.out, Side::queries);
  if (lse.rows.defined()) grid.store(lse, call.lse, Side::queries);
}

/// Gradients of the rows of a call.
struct RowGradients {
  Tensor out, lse;  // given
  Tensor q, k, v;   // written
};

void grid_backward(const GridCall& call, GridRows& grid, const CallRows& rows,
                   const RowGradients& gradients, const RunOptions& run) {
  const tiled::Problem problem = grid_problem(call, grid, rows);
  std::vector<tiled::SequenceGradient> parts;
  for (int64_t b = 0; b < call.batch(); ++b) {
    for (int64_t g = 0; g < grid.groups(); ++g) {
      const auto part = [&](const Tensor& t, Side side) {
        return t.defined() ? grid.group(t.select(0, b), g, side) : Tensor();
      };
      tiled::SequenceGradient gradient;
      gradient.out = part(gradients.out, Side::queries);
      gradient.lse = part(gradients.lse, Side::queries);
      gradient.q = part(gradients.q, Side::queries);
      gradient.k = part(gradients.k, Side::keys);
      gradient.v = part(gradients.v, Side::keys);
      parts.push_back(std::move(gradient));
    }
  }
  tiled::backward(problem, parts, grid.terms(), run);
}

/// The parts of the keys know nothing of each other: each gets the whole result and its lse.
void backward_with_additional(const GridCall& call, GridRows& grid, const CallRows& rows,
                              const RowGradients& gradients, NeighborhoodGradients& result,
                              const RunOptions& run) {
  const DType type = tiled::statistics_type(call.query.dtype());
  const Array near(type, rows.q.shape()), additional(type, rows.q.shape());
  RowGradients of_grid = gradients;
  of_grid.q = near;
  grid_backward(call, grid, rows, of_grid, run);
  const tiled::Problem problem = additional_problem(call, rows);
  const Tensor k = heads_first(result.additional_keys), v = heads_first(result.additional_values);
  std::vector<tiled::SequenceGradient> parts;
  for (int64_t b = 0; b < call.batch(); ++b) {
    parts.push_back({gradients.out.select(0, b),
                     batch_entry(gradients.lse, b),
                     additional.view().select(0, b),
                     k.select(0, b),
                     v.select(0, b),
                     {}});
  }
  tiled::backward(problem, parts, nullptr, run);
  const auto both = [](int64_t, int64_t, int64_t) { return std::pair(1, 1); };
  if (type == DType::f64) {
    add_rows<double>(near, additional, gradients.q, run, both);
  } else {
    add_rows<float>(near, additional, gradients.q, run, both);
  }
}

NeighborhoodGradients zero_gradients(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const NeighborhoodOptions& options) {
  const auto like = [](const Tensor& t) {
    return t.defined() ? Array::zeros(t.dtype(), t.shape()) : Array();
  };
  return {like(query),
          like(key),
          like(value),
          like(options.additional_keys),
          like(options.additional_values),
          like(options.rpb)};
}

void backward(const GridCall& call, const Tensor& grad_out, const Tensor& grad_lse,
              NeighborhoodGradients& result, const RunOptions& run) {
  GridRows grid(call, run);
  const RowsOf q = grid.read(call.query, Side::queries), k = grid.read(call.key, Side::keys);
  const RowsOf v = grid.read(call.value, Side::keys), out = grid.read(call.out, Side::queries);
  // Rows outside the grid have no weights.
  const RowsOf lse = grid.read(call.lse, Side::queries, kNothing);
  const RowsOf dout = grid.read(six_axes(grad_out, call.rank), Side::queries);
  RowsOf dlse;
  if (grad_lse.defined()) {
    dlse = grid.read(six_axes_of_sums(grad_lse, call.rank), Side::queries);
  }
  const Tensor to_q = six_axes(result.query, call.rank), to_k = six_axes(result.key, call.rank);
  const Tensor to_v = six_axes(result.value, call.rank);
  const RowsOf dq = grid.to_write(to_q, Side::queries), dk = grid.to_write(to_k, Side::keys);
  const RowsOf dv = grid.to_write(to_v, Side::keys);
  const CallRows rows{q.rows, k.rows, v.rows, out.rows, sums(lse.rows)};
  const RowGradients gradients{dout.rows, sums(dlse.rows), dq.rows, dk.rows, dv.rows};
  if (call.has_additional()) {
    backward_with_additional(call, grid, rows, gradients, result, run);
  } else {
    grid_backward(call, grid, rows, gradients, run);
  }
  grid.store(dq, to_q, Side::queries);
  grid.store(dk, to_k, Side::keys);
  grid.store(dv, to_v, Side::keys);
  if (grid.bias() != nullptr) result.rpb = grid.bias()->gradient();
}

void check_gradient(const char* op, const char* name, const Tensor& gradient, const char* like_name,
                    const Tensor& like, bool unit_stride) {
  const bool fits = gradient.shape() == like.shape() && gradient.dtype() == like.dtype() &&
                    (!unit_stride || like.shape().back() == 1 || gradient.strides().back() == 1);
  if (fits) return;
  throw Error(std::string(op) + ": " + describe(name, gradient) + "; " + to_string(like.shape()) +
              " " + name_of(like.dtype()) +
              (unit_stride ? " with a unit stride in the last dimension" : "") +
              " is needed, like " + like_name);
}

}  // namespace

}  // namespace na

namespace {

void run_forward(const char* op, int rank, const Tensor& query, const Tensor& key,
                 const Tensor& value, const Tensor& out, const Tensor& lse,
                 const NeighborhoodOptions& options, const RunOptions& run) {
  const na::GridCall call(op, rank, query, key, value, out, lse, options);
  if (!out.defined()) {
    throw Error(std::string(op) +
                ": out is missing; a tensor shaped like query is needed, with the "
                "head dim of value");
  }
  na::forward(call, run);
}

AttentionResult run_allocating(const char* op, int rank, const Tensor& query, const Tensor& key,
                               const Tensor& value, const NeighborhoodOptions& options,
                               const RunOptions& run) {
  // Shapes are right once this is checked.
  const na::GridCall call(op, rank, query, key, value, {}, {}, options);
  Dims shape = query.shape();
  const Dims rows(shape.span().first(static_cast<size_t>(rank + 2)));
  shape[rank + 2] = value.size(rank + 2);
  AttentionResult result{Array(query.dtype(), shape),
                         Array(tiled::statistics_type(query.dtype()), rows)};
  run_forward(op, rank, query, key, value, result.out, result.lse, options, run);
  return result;
}

NeighborhoodGradients run_backward(const char* op, int rank, const Tensor& grad_out,
                                   const Tensor& grad_lse, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const Tensor& out, const Tensor& lse,
                                   const NeighborhoodOptions& options, const RunOptions& run) {
  const na::GridCall call(op, rank, query, key, value, out, lse, options);
  if (!out.defined() || !lse.defined()) {
    throw Error(std::string(op) + ": " + (out.defined() ? "lse" : "out") +
                " is missing; what the forward returned is needed");
  }
  na::check_gradient(op, "grad_out", grad_out, "out", out, true);
  if (grad_lse.defined()) na::check_gradient(op, "grad_lse", grad_lse, "lse", lse, false);
  NeighborhoodGradients result = na::zero_gradients(query, key, value, options);
  if (!call.empty()) na::backward(call, grad_out, grad_lse, result, run);
  return result;
}

}  // namespace

AttentionResult na1d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na1d", 1, query, key, value, options, run);
}

AttentionResult na2d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na2d", 2, query, key, value, options, run);
}

AttentionResult na3d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na3d", 3, query, key, value, options, run);
}

void na1d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na1d", 1, query, key, value, out, lse, options, run);
}

void na2d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na2d", 2, query, key, value, out, lse, options, run);
}

void na3d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na3d", 3, query, key, value, out, lse, options, run);
}

NeighborhoodGradients na1d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na1d_backward", 1, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

NeighborhoodGradients na2d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na2d_backward", 2, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

NeighborhoodGradients na3d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na3d_backward", 3, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

}  // namespace heed
