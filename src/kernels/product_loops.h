// Which register blocks the two products of a tile consist of, for any block size and instruction set.
// Everything here is local to the including file: files differ in the instructions they may use.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/tile.h"

namespace heed::kernels {
namespace {

// What rows [r, r + count) see together.
inline KeyRange joint_range(const KeyRange* ranges, int64_t r, int64_t count, int64_t keys) {
  if (ranges == nullptr) return {0, static_cast<int32_t>(keys)};
  KeyRange joint{static_cast<int32_t>(keys), 0};
  for (int64_t i = r; i < r + count; ++i) {
    if (ranges[i].empty()) continue;
    joint.begin = std::min(joint.begin, ranges[i].begin);
    joint.end = std::max(joint.end, ranges[i].end);
  }
  return joint;
}

// Calls body(row, panel start, panel width, first column, columns) for every block of `block_rows`
// rows and one panel of keys that holds something visible; columns are multiples of `step`, counted
// from the panel's start.
template <class Body>
void for_score_blocks(int64_t rows, int64_t keys, const KeyRange* ranges, int64_t block_rows,
                      int64_t panel, int64_t step, Body&& body) {
  const int64_t padded = (keys + step - 1) / step * step;
  for (int64_t start = 0; start < padded; start += panel) {
    const int64_t width = std::min(panel, padded - start);
    for (int64_t r = 0; r < rows; r += block_rows) {
      const KeyRange range = joint_range(ranges, r, std::min(block_rows, rows - r), keys);
      const int64_t first = std::max<int64_t>(range.begin - start, 0) / step * step;
      const int64_t last = std::min((range.end - start + step - 1) / step * step, width);
      if (first < last) body(r, start, width, first, last - first);
    }
  }
}

// Calls body(row, from, to) for every block of rows and the keys that it sees, which may be none; from is a
// multiple of `step`.
template <class Body>
void for_sum_blocks(int64_t rows, int64_t keys, const KeyRange* ranges, int64_t block_rows,
                    int64_t step, Body&& body) {
  for (int64_t r = 0; r < rows; r += block_rows) {
    const KeyRange range = joint_range(ranges, r, std::min(block_rows, rows - r), keys);
    const int64_t from = range.begin / step * step, to = std::min<int64_t>(keys, range.end);
    body(r, std::min(from, to), to);
  }
}

// Calls body(panel start, panel width, from, to) for every panel of keys, with the run of rows that
// holds all rows which see some of it; panels that no row sees are left out.
template <class Body>
void for_column_panels(int64_t rows, int64_t keys, const KeyRange* ranges, int64_t panel,
                       Body&& body) {
  for (int64_t start = 0; start < keys; start += panel) {
    const int64_t width = std::min(panel, keys - start);
    int64_t from = 0, to = rows;
    if (ranges != nullptr) {
      const auto blind = [&](int64_t r) {
        return ranges[r].empty() || ranges[r].begin >= start + width || ranges[r].end <= start;
      };
      while (from < to && blind(from)) ++from;
      while (from < to && blind(to - 1)) --to;
    }
    if (from < to) body(start, width, from, to);
  }
}

// Tells who reads ahead, if anybody does, of a product to come.
inline void advance(ReadAhead* ahead, int64_t rows, int64_t columns, int64_t depth) {
  if (ahead != nullptr) ahead->advance(rows * columns * depth);
}

// What it leaves to that product to ask for.
inline LinesDue* lines_due(ReadAhead* ahead, int64_t rows, int64_t columns, int64_t depth) {
  return ahead == nullptr ? nullptr : ahead->due(rows * columns * depth);
}

// Calls body(height as a constant) for the next of `rows` rows: kMost, or 4 or 2 at the end.
template <int kMost, class Body>
__attribute__((always_inline)) inline void with_height(int64_t rows, Body&& body) {
  if (rows > 4) return body(std::integral_constant<int, kMost>());
  if (rows > 2) return body(std::integral_constant<int, 4>());
  body(std::integral_constant<int, 2>());
}

// Cuts `count` into the fewest shares of at most `most`, as even as they come: body(first, size).
template <class Body>
void for_even_shares(int64_t count, int64_t most, Body&& body) {
  const int64_t shares = (count + most - 1) / most;
  for (int64_t share = 0, done = 0; share < shares; ++share) {
    const int64_t take = (count - done + shares - share - 1) / (shares - share);
    body(done, take);
    done += take;
  }
}

}  // namespace
}  // namespace heed::kernels
