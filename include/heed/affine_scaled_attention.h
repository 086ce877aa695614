// Affine-scaled attention: softmax weights, scaled and shifted for each query and head.  arXiv 2602.23057
//
//   A[b,h,p,m] = alpha[b,h,p] * P[b,h,p,m] + (alpha_mean[h] - alpha[b,h,p]) / N[b,p]    P: softmax weights
//   out        = sum over the visible m of A[b,h,p,m] v[b,g(h),m,f]
//              = alpha * (softmax attention - u) + alpha_mean * u
//
// N is the number of keys that query p sees and u the plain mean of their values, so every row of A sums
// to alpha_mean. alpha comes from the input (a sigmoid of a projection, one per query and head);
// alpha_mean is the moving average of alpha over training steps, a parameter as far as this call goes.
//
// alpha [B,H,Lq], alpha_mean [H] of q's type or float32 (float64 beside float64), any strides; q, k, v,
// out, types and masks as in flash_attention.h. A row that sees no key: out = 0. Memory beyond the
// results: O(threads x tile), beside 16-bit types the softmax result in float32; in the backward
// O(threads x L), an array like grad_out (in float32 beside float16), a float32 [B,Hkv,Lq,Dv] and beside
// 16-bit types one like v.
#pragma once
#include <optional>

#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct AffineScaledOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
};

Array affine_scaled_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& alpha, const Tensor& alpha_mean,
                              const AffineScaledOptions& options = {}, const RunOptions& run = {});
/// The same into caller memory. softmax_out [B,H,Lq,Dv] and lse [B,H,Lq] (float32, float64 for float64)
/// receive the plain softmax attention that the backward needs; either may be undefined.
void affine_scaled_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
                             const Tensor& alpha_mean, const Tensor& out, const Tensor& softmax_out,
                             const Tensor& lse, const AffineScaledOptions& options = {},
                             const RunOptions& run = {});

/// In the shapes and types of the inputs.
struct AffineScaledGradients {
  Array q, k, v, alpha, alpha_mean;
};
/// softmax_out and lse are what the forward wrote. The same bits for the same number of threads.
AffineScaledGradients affine_scaled_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
    const Tensor& alpha_mean, const Tensor& softmax_out, const Tensor& lse,
    const AffineScaledOptions& options = {}, const RunOptions& run = {});

}  // namespace heed
