#include "mechanisms/neighborhood/passes.h"

#include <algorithm>

#include "engine/tiled/tile_call.h"
#include "kernels/row_maps.h"
#include "mechanisms/neighborhood/grid_rows.h"
#include "mechanisms/neighborhood/small_windows.h"
#include "mechanisms/row_blocks.h"

namespace heed::na {

namespace {

using Side = GridRows::Side;
using Outside = GridRows::Outside;

/// Rows of a call; lse has a width of 1.
struct CallRows {
  GridTensor q, k, v, out, lse;
};

tiled::Problem empty_problem(const GridCall& call) {
  tiled::Problem problem;
  problem.scale = call.scale;
  return problem;
}

tiled::Problem grid_problem(const GridCall& call, const GridRows& grid, const CallRows& rows) {
  tiled::Problem problem = empty_problem(call);
  for (int64_t b = 0; b < call.batch(); ++b) {
    for (int64_t g = 0; g < grid.groups(); ++g) {
      tiled::Sequence s;
      s.q = grid.group(rows.q, b, g, Side::queries);
      s.k = grid.group(rows.k, b, g, Side::keys);
      s.v = grid.group(rows.v, b, g, Side::keys);
      s.out = grid.group(rows.out, b, g, Side::queries);
      s.lse = grid.group(rows.lse, b, g, Side::queries);
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
  tiled::Problem problem = empty_problem(call);
  for (int64_t b = 0; b < call.batch(); ++b) {
    tiled::Sequence s;
    s.q = rows.q.entry(b);
    s.k = call.additional_keys.select(0, b);
    s.v = call.additional_values.select(0, b);
    s.out = rows.out.entry(b);
    s.lse = rows.lse.entry(b);
    s.plan = tiled::TilePlan(rows.q.rows.size(2), call.additional_keys.size(2));
    s.batch = b;
    problem.sequences.push_back(std::move(s));
  }
  return problem;
}

constexpr int64_t kBlockRows = 64;

/// to = of_a a + of_b b row by row, with factors from shares(kernels, block, of_a, of_b). a and b are
/// contiguous [B,H,rows,width] of T.
template <class T, class Shares>
void combine_rows(const Array& a, const Array& b, const GridTensor& to, const RunOptions& run,
                  const Shares& shares) {
  const Tensor first = a, second = b;
  const auto& maps = kernels::row_map_kernels<T>(chosen_isa(run));
  for_row_blocks(first, kBlockRows, run, [&](const RowBlock& block) {
    T of_a[kBlockRows], of_b[kBlockRows];
    shares(maps, block, of_a, of_b);
    const tiled::HeadRows result = to.entry(block.batch);
    const auto combine = [&](int64_t row, int64_t count, int64_t stride) {
      const RowBlock some{block.batch, block.head, row, count};
      const kernels::Rows y = rows_of(second, some);
      const int64_t at = row - block.begin;
      maps.combine(rows_of(first, some), of_a + at, &y, of_b + at, nullptr,
                   {result.row(block.head, row), result.dtype(), stride, count, y.width});
    };
    tiled::for_each_run(result, block.begin, block.begin + block.count, combine);
  });
}

/// Results of one part of the keys in the type of sums, so that a merge rounds only once.
struct Part {
  Part(const GridCall& call, int64_t rows, DType type)
      : out(type, {call.batch(), call.heads(), rows, call.value.size(kWidth)}),
        lse(type, {call.batch(), call.heads(), rows, 1}) {}
  Array out, lse;
};

template <class T>
void merge(const Part& a, const Part& b, const CallRows& to, const RunOptions& run) {
  const auto shares = [&](const auto& maps, const RowBlock& block, T* of_a, T* of_b) {
    const auto lse_of = [&](const Part& part) {
      return reinterpret_cast<const T*>(part.lse.view().at({block.batch, block.head, block.begin}));
    };
    T lse[kBlockRows];
    maps.shares(lse_of(a), lse_of(b), block.count, of_a, of_b, lse);
    if (!to.lse.defined()) return;
    const tiled::HeadRows rows = to.lse.entry(block.batch);
    for (int64_t r = 0; r < block.count; ++r) {
      std::byte* row = rows.row(block.head, block.begin + r);
      if (row != nullptr) *reinterpret_cast<T*>(row) = lse[r];
    }
  };
  combine_rows<T>(a.out, b.out, to.out, run, shares);
}

CallRows rows_of(const GridCall& call, const GridRows& grid) {
  return {grid.tokens(call.query, Side::queries, Outside::nearest),
          grid.tokens(call.key, Side::keys, Outside::nearest),
          grid.tokens(call.value, Side::keys, Outside::nearest),
          grid.tokens(call.out, Side::queries, Outside::no_row),
          grid.tokens(call.lse, Side::queries, Outside::no_row)};
}

/// Gradients of the rows of a call.
struct RowGradients {
  GridTensor out, lse;  // given
  GridTensor q, k, v;   // written
};

void grid_backward(const GridCall& call, const GridRows& grid, const CallRows& rows,
                   const RowGradients& gradients, const RunOptions& run) {
  const tiled::Problem problem = grid_problem(call, grid, rows);
  std::vector<tiled::SequenceGradient> parts;
  for (int64_t b = 0; b < call.batch(); ++b) {
    for (int64_t g = 0; g < grid.groups(); ++g) {
      tiled::SequenceGradient gradient;
      gradient.out = grid.group(gradients.out, b, g, Side::queries);
      gradient.lse = grid.group(gradients.lse, b, g, Side::queries);
      gradient.q = grid.group(gradients.q, b, g, Side::queries);
      gradient.k = grid.group(gradients.k, b, g, Side::keys);
      gradient.v = grid.group(gradients.v, b, g, Side::keys);
      parts.push_back(std::move(gradient));
    }
  }
  tiled::backward(problem, parts, grid.terms(), run);
}

// The parts of the keys know nothing of each other: each gets the whole result and its lse.
void backward_with_additional(const GridCall& call, const GridRows& grid, const CallRows& rows,
                              const RowGradients& gradients, const CallGradients& to,
                              const RunOptions& run) {
  const DType type = wide_type(call.query.dtype());
  const Array near(type, rows.q.rows.shape()), additional(type, rows.q.rows.shape());
  RowGradients of_grid = gradients;
  of_grid.q = {near, nullptr};
  grid_backward(call, grid, rows, of_grid, run);
  std::vector<tiled::SequenceGradient> parts;
  for (int64_t b = 0; b < call.batch(); ++b) {
    tiled::SequenceGradient gradient;
    gradient.out = gradients.out.entry(b);
    gradient.lse = gradients.lse.entry(b);
    gradient.q = additional.view().select(0, b);
    gradient.k = to.additional_keys.select(0, b);
    gradient.v = to.additional_values.select(0, b);
    parts.push_back(std::move(gradient));
  }
  tiled::backward(additional_problem(call, rows), parts, nullptr, run);
  const auto whole = [](const auto&, const RowBlock&, auto* of_near, auto* of_additional) {
    for (auto* factors : {of_near, of_additional}) std::fill_n(factors, kBlockRows, 1);
  };
  with_wide_type(type,
                 [&]<class T>(T) { combine_rows<T>(near, additional, gradients.q, run, whole); });
}

}  // namespace

void forward(const GridCall& call, const RunOptions& run) {
  if (call.empty()) return;
  const TileShapes shapes = shapes_for(call, run);
  if (takes_small_windows(call, shapes, run) && small_windows_forward(call, run)) return;
  const GridRows grid(call, shapes);
  const CallRows rows = rows_of(call, grid);
  if (!call.has_additional()) return tiled::forward(grid_problem(call, grid, rows), run);
  const DType type = wide_type(call.query.dtype());
  const int64_t count = grid.rows(Side::queries);
  const Part near(call, count, type), additional(call, count, type);
  const auto to = [&](const Part& part) {
    return CallRows{rows.q, rows.k, rows.v, {part.out, nullptr}, {part.lse, nullptr}};
  };
  tiled::forward(grid_problem(call, grid, to(near)), run);
  tiled::forward(additional_problem(call, to(additional)), run);
  with_wide_type(type, [&]<class T>(T) { merge<T>(near, additional, rows, run); });
}

Array backward(const GridCall& call, const CallGradients& to, const RunOptions& run) {
  if (call.empty()) return {};
  const TileShapes shapes = shapes_for(call, run);
  if (takes_small_windows_backward(call, shapes, run) && small_windows_backward(call, to, run)) {
    return {};
  }
  const GridRows grid(call, shapes);
  CallRows rows = rows_of(call, grid);
  rows.out = grid.tokens(call.out, Side::queries, Outside::nearest);  // read here
  const RowGradients gradients{grid.tokens(to.out, Side::queries, Outside::nearest),
                               grid.tokens(to.lse, Side::queries, Outside::nearest),
                               grid.tokens(to.query, Side::queries, Outside::no_row),
                               grid.tokens(to.key, Side::keys, Outside::no_row),
                               grid.tokens(to.value, Side::keys, Outside::no_row)};
  if (call.has_additional()) {
    backward_with_additional(call, grid, rows, gradients, to, run);
  } else {
    grid_backward(call, grid, rows, gradients, run);
  }
  return grid.bias_gradient();
}

}  // namespace heed::na
