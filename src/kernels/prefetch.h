// Asking for rows of keys and values ahead of their use, one cache line for each that is used, so that
// requests come as evenly as their lines. Always inlined: GCC takes a function that does nothing else for
// one without effect, and leaves out its calls.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/round_up.h"
#include "heed/tensor.h"
#include "kernels/read_ahead.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Keys that all query rows pass over before the next ones: few enough for the first-level cache.
inline constexpr int64_t kKeyBlock = 16;

/// The way in bytes to the row that is asked for: far enough to cover the latency of memory at full
/// bandwidth.
inline int64_t bytes_ahead(const Rows& rows) {
  constexpr int64_t kAheadBytes = 8192;
  const auto element = static_cast<int64_t>(size_of(rows.dtype));
  const int64_t row = rows.width * element;
  return row == 0 ? 0 : round_up(kAheadBytes, row) / row * rows.stride * element;
}

inline const std::byte* row_at(const Rows& rows, int64_t r) {
  return static_cast<const std::byte*>(rows.data) +
         rows.offset(r) * static_cast<int64_t>(size_of(rows.dtype));
}

/// For loops over blocks of `count` rows that read `step` columns [column, column + step) of all of them
/// after the others, which looks like no stream: asks for a share of the rows from `first` on, in the
/// order of memory. Evenly spaced, they may lie behind the last row, where the next call goes on.
__attribute__((always_inline)) inline void prefetch_share(const Rows& rows, int64_t first,
                                                          int64_t count, int64_t column,
                                                          int64_t step) {
  const int64_t bytes = rows.width * static_cast<int64_t>(size_of(rows.dtype));
  const int64_t steps = (rows.width + step - 1) / step, share = (count + steps - 1) / steps;
  const int64_t begin = column / step * share;
  if (rows.offsets != nullptr) count = std::min(count, rows.count - first);
  for (int64_t r = begin; r < std::min(begin + share, count); ++r) {
    const auto row = reinterpret_cast<uintptr_t>(row_at(rows, first + r));
    for (int64_t i = 0; i < bytes; i += LinesDue::kLine) {
      __builtin_prefetch(  // NOLINTNEXTLINE(performance-no-int-to-ptr): no pointer into an object
          reinterpret_cast<const void*>(row + static_cast<uintptr_t>(i)));
    }
  }
}

/// Into the second-level cache: the first level has too few requests under way for full bandwidth. May
/// lie behind the last row, as the next call goes on there; asking for memory that does not exist does
/// nothing.
__attribute__((always_inline)) inline void prefetch_far(const void* p, int64_t ahead) {
  __builtin_prefetch(  // NOLINTNEXTLINE(performance-no-int-to-ptr): no pointer into an object
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead)),
      0, 2);
}

/// The next `count` of these lines, as far as there are so many.
__attribute__((always_inline)) inline void prefetch_lines(LinesDue& due, int64_t count) {
  count = std::min(count, due.count);
  due.count -= count;
  for (; count > 0; --count) {
    prefetch_far(due.row, due.at * LinesDue::kLine);
    if (++due.at < due.row_lines) continue;
    due.at = 0;
    due.row += due.stride;
  }
}

/// All that is left of these lines, and those behind them.
__attribute__((always_inline)) inline void prefetch_rest(LinesDue* due) {
  for (int64_t i = 0; i <= due->behind; ++i) prefetch_lines(due[i], due[i].count);
}

}  // namespace heed::kernels
