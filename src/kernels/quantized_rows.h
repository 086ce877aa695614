// Few activation rows times a weight matrix as it lies in a GGUF file, without unpacking it to memory.
//
//   y[m,n] = sum_k W[n,k] x[m,k]
//
// At one activation row the bound is reading W once, so W stays in its blocks. Blocks are widened to float32
// in registers, or, with AVX2 and AVX512-VNNI, codes multiply activations as they are in byte_rows.h.
// Activations and sums are float32 in both, or activations of 16 bits where that is asked for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/block_format.h"

namespace heed {

/// W [rows, columns] in memory that the caller keeps alive; no alignment is needed.
struct BlockMatrix {
  BlockFormat format = BlockFormat::f32;
  const std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;  // a multiple of weights_per_block(format)

  int64_t row_bytes() const;
};

/// One product of a call: y[m,n] lies at y + m * y_stride + n.
struct RowProduct {
  BlockMatrix weights;
  float* y = nullptr;
  int64_t y_stride = 0;  // elements; at least weights.rows
};

/// What codes multiply where they multiply bytes: activations, or those rounded to 16 bits of the largest
/// of 32 (a third less work). Elsewhere both are float32.
enum class RowActivations : uint8_t { f32, int16 };

/// All products of the same activations in one parallel region. x[m,k] lies at x + m * x_stride + k,
/// 0 <= m < count. A row of y depends on its row of x only: the same bits however rows are grouped into
/// calls and whatever the thread count.
/// Throws Error when columns differ between products, are no whole number of blocks, or a stride is
/// too short.
void quantized_rows(std::span<const RowProduct> products, const float* x, int64_t x_stride,
                    int64_t count, const RunOptions& run = {},
                    RowActivations activations = RowActivations::f32);

/// to[n,k] = W[n,k]: float32, or rounded to bfloat16. Throws Error for other types, another shape and columns
/// that are no whole number of blocks or not side by side.
void read_rows(const BlockMatrix& weights, const Tensor& to, const RunOptions& run = {});

}  // namespace heed
