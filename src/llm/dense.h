// Products of many activation rows with unpacked weights, on libtorch.
#pragma once
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// Whether there is libtorch, which the first question loads.
bool has_dense_products();

/// Whether this processor multiplies bfloat16 matrices faster than float32 ones.
bool bf16_products_are_fast();

/// y[m,n] = sum_k x[m,k] w[n,k]; x [M,K], w [N,K], y [M,N] with a unit stride in columns, all float32 or all
/// bfloat16. Needs has_dense_products().
void dense_product(const Tensor& x, const Tensor& w, const Tensor& y, const RunOptions& run);

}  // namespace heed
