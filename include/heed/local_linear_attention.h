// Local linear attention: attention as regression. Softmax attention answers each query with the weighted
// mean of the values; this answers with the intercept of a weighted linear fit of the values to the keys
// around the query.  arXiv 2510.01450; the exact member of the family of Parallax
//
//   w_m   = exp(scale q . k_m)          z_m = k_m - q          over the visible keys m
//   omega = sum_m w_m                    mu = sum_m w_m z_m      Sigma = sum_m w_m z_m z_m^T
//   rho   = (Sigma + ridge * omega * 1)^-1 mu
//   out   = sum_m w_m (1 - z_m . rho) v_m / (omega - mu . rho)
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]; H % Hkv == 0; D, Dv from 1 to 256.
// float64, float32, bfloat16, float16 with a unit stride in the last dimension; all arithmetic is
// float64 (a system of D equations is solved for every query), out has q's type. As ridge grows the
// result becomes softmax attention. A row that sees no key: out = 0. A key that is not finite makes NaN
// of every row that sees it.
// Time: Lq Lk D^2 / 2 multiply-adds a head. Memory: O(threads x tile), tiles of about 2 MiB; the
// backward keeps 2 D + 6 numbers a query besides.
#pragma once
#include <optional>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct LocalLinearOptions {
  double ridge = 0.1;                // > 0
  bool causal = false;               // aligned to the end of the keys
  std::optional<double> scale = {};  // none: 1/sqrt(D)
};

Array local_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                             const LocalLinearOptions& options = {}, const RunOptions& run = {});
void local_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const LocalLinearOptions& options = {}, const RunOptions& run = {});

struct LocalLinearGradients {
  Array q, k, v;
};
/// Exact, through the system and its ridge. The same bits for any number of threads.
LocalLinearGradients local_linear_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                     const Tensor& k, const Tensor& v,
                                                     const LocalLinearOptions& options = {},
                                                     const RunOptions& run = {});

}  // namespace heed
