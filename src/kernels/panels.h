// How a product of many activation rows with weights in blocks is shared out: panels of some rows of the
// weights are unpacked, and rows of x pass over each.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/round_up.h"
#include "heed/error.h"
#include "kernels/quantized_rows.h"

namespace heed::kernels {

/// Rows [first, first + rows) of a matrix, and the column of y that the first of them makes.
struct PanelPlace {
  const BlockMatrix* weights;
  int64_t first, rows, column;
};

inline int64_t total_rows(std::span<const BlockMatrix> weights) {
  return std::accumulate(weights.begin(), weights.end(), int64_t{0},
                         [](int64_t sum, const BlockMatrix& w) { return sum + w.rows; });
}

/// Throws Error where weights have other columns than x.
inline void check_columns(const char* op, std::span<const BlockMatrix> weights, int64_t columns) {
  for (const BlockMatrix& w : weights) {
    if (w.columns == columns) continue;
    throw Error(std::string(op) + ": weights have " + std::to_string(w.columns) +
                " columns, those of x are needed: " + std::to_string(columns));
  }
}

/// Panels of up to `rows` rows of matrices that stand one below the other.
inline std::vector<PanelPlace> panels_of(std::span<const BlockMatrix> weights, int64_t rows) {
  std::vector<PanelPlace> panels;
  int64_t column = 0;
  for (const BlockMatrix& w : weights) {
    for (int64_t first = 0; first < w.rows; first += rows) {
      panels.push_back({&w, first, std::min(rows, w.rows - first), column + first});
    }
    column += w.rows;
  }
  return panels;
}

/// Calls body(panel, begin, end) for all panels and rows [begin, end) of x that together are all of `x_rows`,
/// begin a multiple of `step`: all rows for an unpacked panel, unless that is too little for all threads.
template <class Body>
void for_panels(std::span<const BlockMatrix> weights, int64_t panel_rows, int64_t x_rows,
                int64_t step, const RunOptions& run, const Body& body) {
  const std::vector<PanelPlace> panels = panels_of(weights, panel_rows);
  const auto count = static_cast<int64_t>(panels.size());
  if (count == 0) return;
  constexpr int64_t kLeastRows = 128, kItemsPerThread = 8;
  const int threads = threads_for(run, count * ceil_div(x_rows, kLeastRows));
  const int64_t wanted = ceil_div(kItemsPerThread * threads, count);
  const int64_t item_rows = round_up(std::max(kLeastRows, ceil_div(x_rows, wanted)), step);
  const int64_t parts = ceil_div(x_rows, item_rows);
  parallel_for_shares(count * parts, threads, [&](int64_t item, int) {
    const int64_t begin = item % parts * item_rows;
    body(panels[static_cast<size_t>(item / parts)], begin, std::min(x_rows, begin + item_rows));
  });
}

}  // namespace heed::kernels
