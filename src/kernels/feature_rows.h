// Feature maps row by row (include/heed/feature_map.h has the formulas), forward and backward, on rows
// that a weight has already been applied to. T is float or double.
#pragma once
#include <cstdint>

#include "heed/feature_map.h"
#include "heed/run.h"
#include "kernels/element_maps.h"
#include "kernels/matrix.h"

namespace heed::kernels {

template <class T>
struct FeatureRows {
  FeatureKind kind = FeatureKind::elu1;
  /// [rows, width]; performer: the exponents w_r . y. The backward reads it for hedgehog_exp_max only.
  Block<const T> z;
  int64_t rows = 0, width = 0;
  const T* shift = nullptr;  // performer: |y|^2 / 2 of each row, subtracted from its exponents
  T factor = 1;              // performer: 1/sqrt(M); taylor2: y = factor * z
  T floor = 0;               // smallest feature of the kinds that are normalised
};

template <class T>
struct FeatureKernels {
  /// phi [rows, F]
  void (*forward)(const FeatureRows<T>& in, Block<T> phi) = nullptr;
  /// dz [rows, width] from the features and their gradients, which count where a feature is above the
  /// floor. performer: also the sum of each row of dz.
  void (*backward)(const FeatureRows<T>& in, Block<const T> phi, Block<const T> dphi, Block<T> dz,
                   T* row_sums) = nullptr;
};

template <class T>
const FeatureKernels<T>& feature_kernels(Isa isa);

}  // namespace heed::kernels
