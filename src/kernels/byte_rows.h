// Few activation rows times quantised weights in products of bytes (AVX512-VNNI, AVX2), which
// quantized_rows.cpp takes where the processor has them. Each activation is three bytes, so that their sums
// are those of float32:
//
//   x[k] = step[k/32] (65536 high[k] + 256 middle[k] + low[k]),  step = max |x| / (127 * 65536)
//
// or the upper two of them, which round it to 16 bits: low[k] is -128 to 127.
#pragma once
#include <cstdint>

#include "kernels/quantized_rows.h"

namespace heed::kernels {

inline constexpr int64_t kSplitColumns = 256;

/// Columns of one row of activations. Column 32 g + 8 v + i is byte 64 v + 8 g + i.
struct alignas(64) SplitColumns {
  int8_t high[kSplitColumns], middle[kSplitColumns], low[kSplitColumns];
  float steps[8];  // of 32 columns, of the last byte that counts; NaN where one is NaN or infinite
  float sums[8];   // of 32 columns: what an offset of their weights multiplies
  float centres[16];  // of 16 columns: -32 times their sum, for weights code - 32
};

/// `count` rows of activations, `stride` elements each: their columns, repeated until they fill whole ones.
struct SplitRows {
  const SplitColumns* data = nullptr;
  int64_t count = 0, stride = 0;
  int digits = 3;  // bytes of an activation: 2 or 3
};

/// Products of bytes for formats of codes.
struct ByteRowKernels {
  /// Columns, a multiple of 32, as often as needed for `chunks` elements.
  void (*split)(const float* x, int64_t columns, int64_t chunks, int digits, SplitColumns* to);
  /// y[m,n] = sum_k W[n,k] x[m,k]. The bits of y depend on n modulo 8.
  void (*multiply)(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride);
};
/// Null where the instruction set has none.
const ByteRowKernels* byte_row_kernels(Isa isa);

// Of the files that are compiled for one instruction set: AVX512-VNNI, AVX2.
void split_columns_avx512(const float* x, int64_t columns, int64_t chunks, int digits,
                          SplitColumns* to);
void byte_rows_avx512(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride);
void split_columns_avx2(const float* x, int64_t columns, int64_t chunks, int digits,
                        SplitColumns* to);
void byte_rows_avx2(const BlockMatrix& w, const SplitRows& x, float* y, int64_t y_stride);

}  // namespace heed::kernels
