// Many activation rows times a weight matrix as it lies in a GGUF file, in products of bytes.
//
//   y[m,n] = sum_k W[n,k] x[m,k]
//
// The codes of W multiply activations rounded to 8 bits with step = max |x| / 127 over 128 columns, or in twice
// the time to 16 bits with max |x| / 32767. The largest activations of a row, one of 384 up to four, are not
// rounded (arXiv 2208.07339): they are multiplied in float32, and zeros stand in their place where steps are
// found. Products of codes are summed exactly where they have one scale (16 or 32 columns), then in float32.
// Blocks are unpacked to bytes for 32 rows of W at a time, which takes as long as about 10 rows of x.
//
// In formats with minima, what is left of a minimum beside multiples of its scale meets the sum of its 32
// activations; both are rounded like activations.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/quantized_rows.h"

namespace heed {

/// Whether this instruction set has products of bytes (AVX512-VNNI).
bool has_int8_products(const RunOptions& run = {});

/// Activations [rows, columns] rounded to integers, in memory of int8_rows_bytes() that the caller keeps,
/// aligned to 64 bytes.
struct Int8Rows {
  std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int bytes = 1;  // of an activation: 1 or 2
};
int64_t int8_rows_bytes(int64_t rows, int64_t columns, int bytes);

/// Calls make(first, x) for some rows at a time, in parallel: x is float32 [n, columns], with a unit stride
/// in its columns, to be filled with rows [first, first + n), which are then rounded. A NaN or an infinity makes
/// its whole row NaN or infinite in a product.
void fill_int8_rows(const Int8Rows& to, const RunOptions& run,
                    const std::function<void(int64_t first, const Tensor& x)>& make);

/// y = x W^T, or y += x W^T where `add` is set, for the rows of all of `w` one below the other. y [M,N] has a
/// unit stride in its columns and is float32, or bfloat16 (rounded to nearest even) where nothing is added. A
/// row of y depends on its row of x only, whatever the thread count. Throws Error for shapes, types or formats
/// that do not fit (has_codes()) and without has_int8_products().
void int8_product(const Int8Rows& x, std::span<const BlockMatrix> w, const Tensor& y,
                  bool add = false, const RunOptions& run = {});

}  // namespace heed
