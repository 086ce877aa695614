// Attention over small windows of lines of keys, with neighbouring queries of a line in the lanes of a
// vector: query x and key x + shift meet for every shift of a window, so that products are of pairs that are
// seen, but for lanes at borders and behind the line. Lines are turned: element e of their point x lies at line[e * stride + x].
#pragma once
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Shifts [first, last) at which each lane sees a key; null: all of them.
template <class T>
struct LaneShifts {
  const T *first = nullptr, *last = nullptr;
};

template <class T>
struct WindowKernels {
  int64_t lanes = 0;
  int64_t lines = 0;  // of queries that the products take at once, at most

  /// to[e * stride + r] = factor * element e of row r. False if one of them is not finite.
  bool (*turn)(const Rows& x, T factor, T* to, int64_t stride) = nullptr;
  /// Lanes of `lines` lines of queries, `query_line` apart, with the points of one line of keys at `shifts`
  /// shifts: s[line][shift * lanes + lane].
  void (*scores)(const T* queries, int64_t query_stride, int64_t query_line, int64_t lines,
                 const T* keys, int64_t key_stride, int64_t width, int64_t shifts,
                 T* const* s) = nullptr;
  /// Scores of `count` lines of keys, in units of log2, become weights 2^(score - pivot), 0 where a lane
  /// does not see its key, with the largest of a lane as its pivot. Writes pivots and sums of weights.
  /// False if a sum is not finite.
  bool (*weights)(T* s, int64_t count, int64_t shifts, const LaneShifts<T>& seen, T* pivot,
                  T* sum) = nullptr;
  /// out[line * out_line + f * lanes + lane] += weights[line] times the points of `count` lines of values.
  void (*sums)(const T* const* weights, int64_t lines, const T* const* values, int64_t count,
               int64_t value_stride, int64_t width, int64_t shifts, T* out,
               int64_t out_line) = nullptr;
  /// out[f * lanes + lane] *= 1 / sum[lane]
  void (*divide)(T* out, int64_t width, const T* sum) = nullptr;
};

template <class T>
const WindowKernels<T>& window_kernels(Isa isa);

}  // namespace heed::kernels
