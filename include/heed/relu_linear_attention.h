// Linear attention with rectified features and a clamped denominator (L2ViT).  arXiv 2501.16182
//
//   Q = max(q, 0), K = max(k, 0)
//   den[b,h,p] = max(sum_m Q[b,h,p] . K[b,g(h),m], clamp)                g(h) = h / (H/Hkv)
//   out        = temperature[h] / den * sum_m (Q . K[m]) v[b,g(h),m,f]
//
// Not causal, no scale, no epsilon: a query without a positive element gives 0. Rows of the implied
// weights sum to temperature[h] where the clamp is not reached, and to less where it is.
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  temperature [H]  out [B,H,Lq,Dv]
// H % Hkv == 0; D and Dv from 1 to 256; any strides with a unit stride in the last dimension. float64,
// float32, bfloat16, float16; out has q's type; temperature has q's type or float32 (float64 beside
// float64). Sums are float32 (float64 for float64).
// Work is O(L D Dv), memory beyond the results a few matrices [D,Dv+1] a head in flight.
// Gradients: q, k, v, temperature; at den = clamp through the sum, at q = 0 and k = 0 none.
#pragma once
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// Over all keys: s [B,H,D,Dv] = K^T v, z [B,H,D] = sum_m K[m]; float32 (float64 for float64).
struct ReluLinearState {
  Tensor s = {}, z = {};
};

struct ReluLinearOptions {
  double clamp = 100;  // the published models' constant; positive
  /// Of the backward: the state that its forward gave. Undefined: it is computed again.
  ReluLinearState forward_state = {};
};

Array relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& temperature, const ReluLinearOptions& options = {},
                            const RunOptions& run = {});
/// Into caller memory. Undefined tensors of the state are not written.
void relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& temperature, const Tensor& out,
                           const ReluLinearState& state = {}, const ReluLinearOptions& options = {},
                           const RunOptions& run = {});

/// Each in the shape and type of what it belongs to.
struct ReluLinearGradients {
  Array q, k, v, temperature;
};
ReluLinearGradients relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                   const Tensor& k, const Tensor& v,
                                                   const Tensor& temperature,
                                                   const ReluLinearOptions& options = {},
                                                   const RunOptions& run = {});
/// Into caller memory.
struct ReluLinearGradientViews {
  Tensor q = {}, k = {}, v = {}, temperature = {};
};
void relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& temperature,
                                    const ReluLinearOptions& options,
                                    const ReluLinearGradientViews& gradients,
                                    const RunOptions& run = {});

}  // namespace heed
