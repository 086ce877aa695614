// Products of float or double matrices in scratch memory, and the way of rows into them and out.
// For parts of a mechanism that are no score tiles: projections, states, sums over tokens.
//
// T is float (float32, bfloat16 and float16 calls) or double. Every element of a product is summed in
// the same order whatever block it falls into, so results do not depend on how rows are shared out.
#pragma once
#include <cstdint>

#include "base/round_up.h"
#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/tile.h"

namespace heed::kernels {

/// Element (i, k) lies at data[i * row + k * depth]: a matrix, or with the strides swapped its transpose.
template <class T>
struct Factor {
  const T* data = nullptr;
  int64_t row = 0;
  int64_t depth = 1;
};

template <class T>
struct MatrixKernels {
  /// Elements of a vector. Rows of scratch matrices have strides that are multiples of it.
  int64_t lanes = 1;

  /// Widened; columns from `width` up to the next multiple of lanes become 0.
  void (*load_rows)(const Rows& from, Block<T> to) = nullptr;
  /// Rounded to the type of `to`.
  void (*store_rows)(Block<const T> from, const RowsOut& to) = nullptr;
  /// to[c][r] = from[r][c]; columns of `to` from `rows` up to the next multiple of lanes become 0.
  void (*transpose)(Block<const T> from, int64_t rows, int64_t columns, Block<T> to) = nullptr;

  /// c[i][j] = sum_k a(i,k) b[k][j], or added to c. Columns are computed in whole vectors: rows of b
  /// and c hold round_up(columns, lanes) elements; what lies behind `columns` in b ends up in c.
  void (*multiply)(Factor<T> a, Block<const T> b, int64_t depth, Block<T> c, int64_t rows,
                   int64_t columns, bool add) = nullptr;

  /// x[i] *= y[i];  x[i] += y[i];  x[i] += y[i] * z[i]
  void (*scale)(T* x, const T* y, int64_t n) = nullptr;
  void (*add)(T* x, const T* y, int64_t n) = nullptr;
  void (*add_products)(T* x, const T* y, const T* z, int64_t n) = nullptr;
  /// sum_i x[i] y[i], in an order that depends on n only.
  T (*dot)(const T* x, const T* y, int64_t n) = nullptr;
};

template <class T>
const MatrixKernels<T>& matrix_kernels(Isa isa);

/// Whether rows are what scratch matrices are: T in whole vectors.
template <class T>
bool are_whole(const MatrixKernels<T>& kernels, DType dtype, int64_t width) {
  return dtype == dtype_of<T> && width % kernels.lanes == 0;
}

/// Rows where they lie if they are whole, else loaded into the block.
template <class T>
Block<const T> whole_rows(const MatrixKernels<T>& kernels, const Rows& from, Block<T> block) {
  if (are_whole(kernels, from.dtype, from.width)) {
    return {static_cast<const T*>(from.data), from.stride};
  }
  kernels.load_rows(from, block);
  return {block.data, block.stride};
}

/// The rows of a result themselves if they are whole, else the block; `make` fills what it is given.
template <class T, class Make>
void make_rows(const MatrixKernels<T>& kernels, const RowsOut& to, Block<T> block, Make&& make) {
  if (are_whole(kernels, to.dtype, to.width)) {
    return make(Block<T>{static_cast<T*>(to.data), to.stride});
  }
  make(block);
  kernels.store_rows({block.data, block.stride}, to);
}

/// Elements from one row of a scratch matrix to the next: columns up to a multiple, and never a multiple
/// of 4 KiB (rows would then share cache sets).
template <class T>
int64_t row_stride(int64_t columns, int64_t multiple) {
  const int64_t stride = round_up(columns, multiple);
  return stride * static_cast<int64_t>(sizeof(T)) % 4096 == 0 ? stride + multiple : stride;
}
/// Of whole vectors, one more than `columns` needs where `slack` is set.
template <class T>
int64_t row_stride(const MatrixKernels<T>& kernels, int64_t columns, bool slack = false) {
  return row_stride<T>(columns + (slack ? kernels.lanes : 0), kernels.lanes);
}

}  // namespace heed::kernels
