#include "kernels/float_rows.h"

#include <string>

#include "heed/error.h"
#include "kernels/matrix.h"
#include "kernels/panels.h"

namespace heed {

namespace {

using kernels::Block;
using kernels::MatrixKernels;
using kernels::PanelPlace;

constexpr int64_t kPanelRows = 64, kReadRows = 16, kSumRows = 64;

bool is_matrix(const Tensor& t) {
  return t.rank() == 2 && t.dtype() == DType::f32 && (t.size(1) < 2 || t.stride(1) == 1);
}

void check(const Tensor& x, std::span<const BlockMatrix> weights, const Tensor& y) {
  const int64_t rows = kernels::total_rows(weights);
  if (!is_matrix(x) || !is_matrix(y) || x.size(0) != y.size(0) || y.size(1) != rows) {
    throw Error("float_product: " + describe("x", x) + " and " + describe("y", y) +
                " are given, float32 [M,K] and [M," + std::to_string(rows) +
                "] with unit strides in their columns are needed");
  }
  kernels::check_columns("float_product", weights, x.size(1));
}

// Memory of one panel: rows as they are read, the panel with them side by side, and rows of y that end within
// a vector.
struct PanelMemory {
  int64_t depth, stride;
  Scratch scratch;
  Block<float> rows, panel, sums;

  PanelMemory(const MatrixKernels<float>& kernels, int64_t k)
      : depth(k),
        stride(kernels::row_stride(kernels, kPanelRows)),
        scratch(static_cast<size_t>(kReadRows * depth + (depth + kSumRows) * stride) *
                    sizeof(float) +
                128),
        rows{scratch.take<float>(kReadRows * depth), depth},
        panel{scratch.take<float>(depth * stride), stride},
        sums{scratch.take<float>(kSumRows * stride), stride} {}
};

void unpack(const MatrixKernels<float>& kernels, const PanelPlace& place, const PanelMemory& to,
            const RunOptions& run) {
  const BlockMatrix& w = *place.weights;
  for (int64_t r = 0; r < place.rows; r += kReadRows) {
    const int64_t count = std::min(kReadRows, place.rows - r);
    read_rows({w.format, w.data + (place.first + r) * w.row_bytes(), count, w.columns},
              Tensor(to.rows.data, DType::f32, {count, w.columns}), run);
    kernels.transpose({to.rows.data, to.rows.stride}, count, w.columns,
                      {to.panel.data + r, to.panel.stride});
  }
}

void multiply(const MatrixKernels<float>& kernels, const Tensor& x, const PanelMemory& memory,
              const Tensor& y, bool add) {
  const Block<const float> panel{memory.panel.data, memory.panel.stride};
  const auto product = [&](int64_t first, int64_t count, Block<float> to, bool keep) {
    const kernels::Factor<float> rows{x.as<float>() + first * x.stride(0), x.stride(0), 1};
    kernels.multiply(rows, panel, memory.depth, to, count, y.size(1), keep);
  };
  if (y.size(1) % kernels.lanes == 0) {
    return product(0, y.size(0), {y.as<float>(), y.stride(0)}, add);
  }
  for (int64_t first = 0; first < y.size(0); first += kSumRows) {
    const int64_t count = std::min(kSumRows, y.size(0) - first);
    product(first, count, memory.sums, false);
    for (int64_t m = 0; m < count; ++m) {
      const float* sum = memory.sums.row(m);
      float* to = y.as<float>() + (first + m) * y.stride(0);
      for (int64_t n = 0; n < y.size(1); ++n) to[n] = add ? to[n] + sum[n] : sum[n];
    }
  }
}

}  // namespace

void float_product(const Tensor& x, std::span<const BlockMatrix> w, const Tensor& y, bool add,
                   const RunOptions& run) {
  check(x, w, y);
  const MatrixKernels<float>& kernels = kernels::matrix_kernels<float>(chosen_isa(run));
  RunOptions alone = run;
  alone.threads = 1;
  kernels::for_panels(
      w, kPanelRows, x.size(0), 1, run, [&](const PanelPlace& at, int64_t begin, int64_t end) {
        const PanelMemory memory(kernels, x.size(1));
        unpack(kernels, at, memory, alone);
        multiply(kernels, x.slice(0, begin, end), memory,
                 y.slice(0, begin, end).slice(1, at.column, at.column + at.rows), add);
      });
}

}  // namespace heed
