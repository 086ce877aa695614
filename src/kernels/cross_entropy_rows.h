// Row operations of the cross-entropy between softmax weights and linear weights (sheet 08): P is the
// softmax of scale * s, A = r / sum r, and a row's loss is -sum P log max(A, floor). Rows come in
// pieces; T is float or double.
#pragma once
#include <cstdint>

#include "heed/run.h"

namespace heed::kernels {

/// What the pieces of a row add up to.
template <class T>
struct EntropyRow {
  T maximum;  // of scale * s; -inf before anything was seen
  T sum;      // sum exp(scale * s - maximum)
  T total;    // sum r
};

/// What a row's weights are made with, once all of it was seen.
template <class T>
struct EntropyFactors {
  T maximum;
  T inverse_sum;  // 1 / sum exp(scale * s - maximum)
  T total;        // sum r, inf where it is 0: A is then 0
  T active;       // sum of the P whose A is not below the floor
};

template <class T>
struct EntropyKernels {
  /// Adds n more scores and products to a row's statistics.
  void (*statistics)(const T* s, const T* r, int64_t n, T scale, EntropyRow<T>& row) = nullptr;
  /// Returns sum P log max(A, floor) over n elements and adds their active P to the row's.
  T (*loss)(const T* s, const T* r, int64_t n, T scale, T floor, EntropyFactors<T>& row) = nullptr;
  /// r[i] becomes weight * dloss/dr[i] = weight * (active / total - P / r where A is not below the
  /// floor).
  void (*gradient)(const T* s, T* r, int64_t n, T scale, T floor, T weight,
                   const EntropyFactors<T>& row) = nullptr;
};

template <class T>
const EntropyKernels<T>& entropy_kernels(Isa isa);

}  // namespace heed::kernels
