// Weighted second moments of keys, one matrix per query row, and the solution of its system of equations.
// Float64 only: a matrix whose condition is that of the data is inverted.
//
//   add_moments   A_r = carry[r] A_r + sum_j w[r][j] k_j k_j^T      upper triangles
//   factorize     A_r = U^T U (Cholesky), U in the upper triangle
//   solve         x = A_r^-1 x
//
// A matrix of n rows lies row by row with a stride that is a multiple of kMomentPad elements. Its lower
// triangle holds anything finite.
#pragma once
#include "heed/run.h"
#include "kernels/tile.h"

namespace heed::kernels {

inline constexpr int64_t kMomentPad = 8;

struct SecondMomentKernels {
  /// keys [key_count][stride of a matrix], columns behind `width` are 0; matrix r starts at
  /// moments + r * width * stride. carry may be null: 1.
  void (*add_moments)(Block<const double> weights, int64_t rows, Block<const double> keys,
                      int64_t key_count, int64_t width, const double* carry,
                      double* moments) = nullptr;
  /// Pivots below `least` become it: for a sum of a positive semidefinite matrix and least * 1 that only
  /// undoes rounding.
  void (*factorize)(Block<double> a, int64_t n, double least) = nullptr;
  /// x has as many elements as a row of the factor.
  void (*solve)(Block<const double> factor, int64_t n, double* x) = nullptr;
};

const SecondMomentKernels& second_moment_kernels(Isa isa);

}  // namespace heed::kernels
