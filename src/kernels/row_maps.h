// What happens to rows of results before and behind the score tiles: sums over windows of rows, linear
// combinations, dot products. Rows of any floating type; T is float (float32, bfloat16, float16) or
// double (float64).
#pragma once
#include "heed/run.h"
#include "kernels/matrix.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Rows [begin, end).
struct RowWindow {
  int64_t begin = 0, end = 0;
};

template <class T>
struct RowMapKernels {
  /// out[r] = factors[r] * sum of the rows [windows[r].begin, windows[r].end) of x. Neither end of the
  /// windows decreases. `sums` holds the sum over the window `at` before the call (a window that begins
  /// and ends at one place has the sum 0) and over the last one after it, and what tells when to sum anew:
  /// 24 bytes for each column, padded to whole vectors; float64, float32 for 16-bit x. What is not finite,
  /// or far larger than the rest, leaves with its row.
  void (*window_sums)(const Rows& x, RowWindow& at, const RowWindow* windows, int64_t rows,
                      const T* factors, void* sums, Block<T> out) = nullptr;
  /// x[r] = a[r] x[r] + b[r] y[r] in place; columns of y are padded to whole vectors.
  void (*mix)(const RowsOut& x, const T* a, Block<const T> y, const T* b) = nullptr;
  /// out[r] = a[r] x[r] + b[r] y[r] + c[r]; without y or c (null) their terms are left out.
  void (*combine)(const Rows& x, const T* a, const Rows* y, const T* b, const T* c,
                  const RowsOut& out) = nullptr;
  /// dots[r] = x[r] . y[r] in float64: squares of any float32 are finite, and sums hardly cancel.
  void (*dots)(const Rows& x, const Rows& y, double* dots) = nullptr;
  /// sums[r] = sum of the elements of x[r] in float64
  void (*sums)(const Rows& x, double* sums) = nullptr;
  /// to[r] += x[r], where finite numbers beyond `most` count as that; what is not finite is added as it is.
  void (*add_bounded)(const Rows& x, T most, Block<T> to) = nullptr;
  /// Whether no element is infinite or NaN.
  bool (*all_finite)(const Rows& x) = nullptr;
  /// Shares of two sums, given by their logarithms, in the sum of both: of_a = e^a / (e^a + e^b), of_b,
  /// and lse = log(e^a + e^b). A side of -inf has the share 0.
  void (*shares)(const T* a, const T* b, int64_t n, T* of_a, T* of_b, T* lse) = nullptr;
};

template <class T>
const RowMapKernels<T>& row_map_kernels(Isa isa);

}  // namespace heed::kernels
