// Attention over small windows of lines of keys, with neighbouring queries of a line in the lanes of a
// vector: query x and key x + shift meet for every shift of a window, so that products are of pairs that are
// seen, but for lanes at borders and behind the line. In sums for keys, keys lie in the lanes and queries are
// shifted. Lines are turned: element e of their point x lies at line[e * stride + x].
#pragma once
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Shifts [first, last) at which each lane sees a key; null: all of them.
template <class T>
struct LaneShifts {
  const T *first = nullptr, *last = nullptr;
};

/// Sums over shifts and lines that `lines` lines of results share, each with weights of its own:
///   out[r * out_line + f * out_step + lane] +=
///       sum over c < count, j < shifts of
///       weights[r][c * weight_line + j * weight_step + lane] *
///       values[c][f * value_stride + j * value_step + lane]
template <class T>
struct WindowSums {
  const T* const* weights = nullptr;
  int64_t lines = 0, weight_line = 0, weight_step = 0;
  const T* const* values = nullptr;
  int64_t count = 0, value_stride = 0, value_step = 1;
  int64_t shifts = 0, width = 0;
  T* out = nullptr;
  int64_t out_line = 0, out_step = 0;
};

template <class T>
struct WindowKernels {
  int64_t lanes = 0;
  int64_t lines = 0;  // that the products take at once, at most

  /// to[e * stride + r] = factor * element e of row r. False if one of them is not finite.
  bool (*turn)(const Rows& x, T factor, T* to, int64_t stride) = nullptr;
  /// Lanes of `lines` lines of queries, `query_line` apart, with the points of one line of keys at `shifts`
  /// shifts: s[line][shift * step + lane].
  void (*scores)(const T* queries, int64_t query_stride, int64_t query_line, int64_t lines,
                 const T* keys, int64_t key_stride, int64_t width, int64_t shifts, T* const* s,
                 int64_t step) = nullptr;
  /// Scores of `count` lines of keys, [count][shifts][lanes] in units of log2, become weights
  /// 2^(score - pivot), 0 where a lane does not see its key, with the largest of a lane as its pivot. Writes
  /// pivots and sums of weights. False if a sum is not finite.
  bool (*weights)(T* s, int64_t count, int64_t shifts, const LaneShifts<T>& seen, T* pivot,
                  T* sum) = nullptr;
  void (*sums)(const WindowSums<T>& x) = nullptr;
  /// out[f * lanes + lane] *= 1 / sum[lane]
  void (*divide)(T* out, int64_t width, const T* sum) = nullptr;
  /// Backward, of one line of keys: scores at s[shift * step + lane] become weights
  /// p = 2^(score - pivot), at most 1, and dp = dO . V at the same places becomes p (dp + offset), the
  /// gradient of the score in natural units. Both are 0 where a lane does not see its key.
  void (*gradients)(T* s, T* dp, int64_t shifts, int64_t step, const LaneShifts<T>& seen,
                    const T* pivot, const T* offset) = nullptr;
};

template <class T>
const WindowKernels<T>& window_kernels(Isa isa);

}  // namespace heed::kernels
