// Depthwise causal convolution along the tokens, every channel on its own: the convolution behind the
// projections of Primer (arXiv 2109.08668) and RCMHA (arXiv 2308.03429).
//
//   out[b,h,t,e] = bias[h,e] + sum_{a < W} weight[h,e,a] x[b,h,t - (W-1) + a,e]      x is 0 before t = 0
//
// x, out [B,H,L,D]; weight [D,W] (shared by the heads) or [H,D,W], W >= 1; bias [D] or [H,D].
// float64, float32, bfloat16, float16, any strides; weight and bias have x's type or float32 (float64
// beside float64). Products and sums in float32 (float64 for float64); out has x's type.
#pragma once
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// `bias` may be an undefined Tensor: zero.
Array depthwise_causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias = {},
                            const RunOptions& run = {});
void depthwise_causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                           const Tensor& out, const RunOptions& run = {});

/// In the shapes and types of the inputs; bias is empty where there is none.
struct DepthwiseConvGradients {
  Array x, weight, bias;
};
/// grad_out has the shape and type of out. The same bits for any number of threads.
DepthwiseConvGradients depthwise_causal_conv_backward(const Tensor& grad_out, const Tensor& x,
                                                      const Tensor& weight, const Tensor& bias = {},
                                                      const RunOptions& run = {});

}  // namespace heed
