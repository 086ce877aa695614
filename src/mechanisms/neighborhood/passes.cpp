#include "mechanisms/neighborhood/passes.h"

#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "mechanisms/neighborhood/grid_rows.h"
#include "mechanisms/row_values.h"

namespace heed::na {

namespace {

using Side = GridRows::Side;

constexpr double kNothing = -std::numeric_limits<double>::infinity();

/// [B,H,rows,1] as [B,H,rows]; undefined stays undefined.
Tensor sums(const Tensor& rows) { return rows.defined() ? rows.select(3, 0) : Tensor(); }

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
      store_row(x, T{1}, to, {pair / heads, pair % heads, r});
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

void forward_part(const GridCall& call, const GridRows& grid, RowMemory& memory,
                  const RunOptions& run) {
  CallRows rows;
  rows.q = grid.read(call.query, Side::queries, memory);
  rows.k = grid.read(call.key, Side::keys, memory);
  rows.v = grid.read(call.value, Side::keys, memory);
  rows.out = grid.to_write(call.out, Side::queries, memory);
  Tensor lse;
  if (call.lse.defined()) lse = grid.to_write(call.lse, Side::queries, memory);
  rows.lse = sums(lse);
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
  grid.store(rows.out, call.out, Side::queries);
  if (lse.defined()) grid.store(lse, call.lse, Side::queries);
}

/// Gradients of the rows of a call.
struct RowGradients {
  Tensor out, lse;  // given
  Tensor q, k, v;   // written
};

void grid_backward(const GridCall& call, const GridRows& grid, const CallRows& rows,
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

// The parts of the keys know nothing of each other: each gets the whole result and its lse.
void backward_with_additional(const GridCall& call, const GridRows& grid, const CallRows& rows,
                              const RowGradients& gradients, const CallGradients& to,
                              const RunOptions& run) {
  const DType type = tiled::statistics_type(call.query.dtype());
  const Array near(type, rows.q.shape()), additional(type, rows.q.shape());
  RowGradients of_grid = gradients;
  of_grid.q = near;
  grid_backward(call, grid, rows, of_grid, run);
  const tiled::Problem problem = additional_problem(call, rows);
  tiled::backward(problem,
                  tiled::batch_gradients(gradients.out, gradients.lse, additional,
                                         to.additional_keys, to.additional_values),
                  nullptr, run);
  const auto both = [](int64_t, int64_t, int64_t) { return std::pair(1, 1); };
  if (type == DType::f64) {
    add_rows<double>(near, additional, gradients.q, run, both);
  } else {
    add_rows<float>(near, additional, gradients.q, run, both);
  }
}

void backward_part(const GridCall& call, const GridRows& grid, const CallGradients& to,
                   RowMemory& memory, const RunOptions& run) {
  CallRows rows;
  rows.q = grid.read(call.query, Side::queries, memory);
  rows.k = grid.read(call.key, Side::keys, memory);
  rows.v = grid.read(call.value, Side::keys, memory);
  rows.out = grid.read(call.out, Side::queries, memory);
  // Rows outside the grid have no weights.
  rows.lse = sums(grid.read(call.lse, Side::queries, memory, kNothing));
  RowGradients gradients;
  gradients.out = grid.read(to.out, Side::queries, memory);
  if (to.lse.defined()) gradients.lse = sums(grid.read(to.lse, Side::queries, memory));
  gradients.q = grid.to_write(to.query, Side::queries, memory);
  gradients.k = grid.to_write(to.key, Side::keys, memory);
  gradients.v = grid.to_write(to.value, Side::keys, memory);
  if (call.has_additional()) {
    backward_with_additional(call, grid, rows, gradients, to, run);
  } else {
    grid_backward(call, grid, rows, gradients, run);
  }
  grid.store(gradients.q, to.query, Side::queries);
  grid.store(gradients.k, to.key, Side::keys);
  grid.store(gradients.v, to.value, Side::keys);
}

}  // namespace

void forward(const GridCall& call, const RunOptions& run) {
  if (call.empty()) return;
  GridRows grid(call, run);
  const std::vector<CallPart> parts = grid.parts();
  RowMemory memory(grid.part_bytes(parts[0]));
  for (const CallPart& part : parts) {
    memory.reset();
    grid.set_first_head(part.kv_heads.begin * call.group());
    forward_part(call.part(part), grid, memory, run);
  }
}

Array backward(const GridCall& call, const CallGradients& gradients, const RunOptions& run) {
  if (call.empty()) return {};
  GridRows grid(call, run);
  const std::vector<CallPart> parts = grid.parts();
  RowMemory memory(2 * grid.part_bytes(parts[0]));  // every tensor and its gradient
  for (const CallPart& part : parts) {
    memory.reset();
    const auto queries = [&](const Tensor& t) { return part_of(t, part, call.group()); };
    const auto keys = [&](const Tensor& t) { return part_of(t, part, 1); };
    const auto additional = [&](const Tensor& t) { return part_of_additional(t, part); };
    grid.set_first_head(part.kv_heads.begin * call.group());
    backward_part(call.part(part), grid,
                  {queries(gradients.out), queries(gradients.lse), queries(gradients.query),
                   keys(gradients.key), keys(gradients.value),
                   additional(gradients.additional_keys), additional(gradients.additional_values)},
                  memory, run);
  }
  return grid.bias_gradient();
}

}  // namespace heed::na
