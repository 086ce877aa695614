// Many activation rows times a weight matrix as it lies in a GGUF file, in float32.
//
//   y[m,n] = sum_k W[n,k] x[m,k]
//
// 64 rows of W at a time are widened to float32, which takes as long as about 15 rows of x.
#pragma once
#include <span>

#include "heed/run.h"
#include "heed/tensor.h"
#include "kernels/quantized_rows.h"

namespace heed {

/// y = x W^T, or y += x W^T where `add` is set, for the rows of all of `w` one below the other. x [M,K] and
/// y [M,N] are float32 with a unit stride in their columns. A row of y depends on its row of x only, whatever
/// the thread count. Throws Error for shapes or types that do not fit.
void float_product(const Tensor& x, std::span<const BlockMatrix> w, const Tensor& y,
                   bool add = false, const RunOptions& run = {});

}  // namespace heed
