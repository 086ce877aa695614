// Feature maps that take one element to one feature, of rows as they lie: elu1, relu, exp
// (include/heed/feature_map.h). T is float or double.
#pragma once
#include "heed/feature_map.h"
#include "heed/run.h"
#include "kernels/matrix.h"

namespace heed::kernels {

template <class T>
struct ElementMapKernels {
  /// phi, and dz from phi and dphi: all rows of one type, T or (of float) one of 16 bits.
  void (*map_rows)(FeatureKind kind, const Rows& z, const RowsOut& phi) = nullptr;
  void (*pull_rows)(FeatureKind kind, const Rows& phi, const Rows& dphi,
                    const RowsOut& dz) = nullptr;
  /// phi in T.
  void (*map_to_block)(FeatureKind kind, const Rows& z, Block<T> phi) = nullptr;
  /// phi of bfloat16 rows as operands of bfloat16 products (elu1, relu; null for double): less the row
  /// `less` (or null), then rounded. Whole vectors of a row are written, for which phi.stride has room.
  void (*map_to_halves)(FeatureKind kind, const Rows& z, const T* less,
                        const RowsOut& phi) = nullptr;
  /// dz = what dphi becomes by `ends`, times the derivative at z; added to dz if `add`. dz is of T, or of the
  /// type of z, and may be dphi where nothing is added.
  void (*pull_block)(FeatureKind kind, const Rows& z, Block<const T> dphi, const RowEnds<T>& ends,
                     bool add, const RowsOut& dz) = nullptr;
};

inline bool element_by_element(FeatureKind kind) {
  return kind == FeatureKind::elu1 || kind == FeatureKind::relu || kind == FeatureKind::exp;
}

template <class T>
const ElementMapKernels<T>& element_map_kernels(Isa isa);

}  // namespace heed::kernels
