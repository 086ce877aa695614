// Many activation rows times a quantised weight matrix, in 8-bit integers.
//
//   y[m,n] = sum_b  scale[n,b] step[m,b] sum_{k in b} code[n,k] q[m,k]
//
// over groups b of 64 columns. Both factors are rounded to 8 bits: weights with the scale of least squared
// error in a group among 16 from max |w| / 127 to max |w| / 82, activations with step = max |x| / 127. The
// four largest activations of a row are not rounded (arXiv 2208.07339): they are multiplied in float32,
// and zeros stand in their place where steps are found. Sums of products are exact integers within a
// group and float32 across groups.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/quantized_rows.h"

namespace heed {

/// Whether this instruction set has products of bytes (AVX512-VNNI) and nothing faster (AMX).
bool has_int8_products(const RunOptions& run = {});

/// Activations [rows, columns] rounded to int8, in memory of int8_rows_bytes() that the caller keeps,
/// aligned to 64 bytes.
struct Int8Rows {
  std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
};
int64_t int8_rows_bytes(int64_t rows, int64_t columns);

/// Calls make(first, x) for some rows at a time, in parallel: x is float32 [n, columns], with a unit stride
/// in its columns, to be filled with rows [first, first + n), which are then rounded. A NaN or an infinity makes its whole row NaN or infinite
/// in a product.
void fill_int8_rows(const Int8Rows& to, const RunOptions& run,
                    const std::function<void(int64_t first, const Tensor& x)>& make);

/// Weights [rows, columns] of an int8_product in memory that the caller keeps, aligned to 64 bytes.
struct Int8Matrix {
  std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;

  int64_t bytes() const;
};

/// The matrix of these parts stacked, without memory. Throws Error for no parts, parts without codes or of
/// different columns.
Int8Matrix int8_matrix(std::span<const BlockMatrix> parts);
/// Fills to.data, of to.bytes(), where `to` is int8_matrix(parts).
void pack_int8(std::span<const BlockMatrix> parts, const Int8Matrix& to,
               const RunOptions& run = {});

/// y[m,n] = sum_k x[m,k] w[n,k], or += where `add` is set. y [M,N] has a unit stride in its columns and is
/// float32, or bfloat16 (rounded to nearest even) where nothing is added. A row of y depends on its row
/// of x only, whatever the thread count. Throws Error for shapes or types that do not fit and without
/// has_int8_products().
void int8_product(const Int8Rows& x, const Int8Matrix& w, const Tensor& y, bool add = false,
                  const RunOptions& run = {});

}  // namespace heed
