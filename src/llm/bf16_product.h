// Products of many activation rows with weights in bfloat16, on libtorch.
#pragma once
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// Whether bfloat16 matrices are multiplied faster than float32 ones: this processor does it, and the
/// instruction set that is used is of those.
bool bf16_products_are_fast(const RunOptions& run);

/// Whether there is libtorch, which the first question loads.
bool has_bf16_products();

/// y[m,n] = sum_k x[m,k] w[n,k]; x [M,K], w [N,K], y [M,N] bfloat16 with a unit stride in columns. Needs
/// has_bf16_products().
void bf16_product(const Tensor& x, const Tensor& w, const Tensor& y, const RunOptions& run);

}  // namespace heed
