// Sigmoid attention: every score becomes a weight on its own, no row sum.  arXiv 2409.04431
//
//   P[b,h,p,m] = sigmoid(scale * sum_e q[b,h,p,e] k[b,g(h),m,e] + bias[h]
//                        - alibi_slopes[b,h] |p + Lk - Lq - m|)               0 where masked
//   out        = sum_m P[b,h,p,m] v[b,g(h),m,f]
//
// Shapes, types, strides and masks as in flash_attention.h. A row that sees no key: out = 0.
#pragma once
#include <optional>
#include <variant>

#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct SigmoidOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
  /// One number for all heads, or a tensor [H] of any floating type; none: -log(Lk).
  std::variant<std::monostate, double, Tensor> bias = {};
  Tensor alibi_slopes = {};  // [H] or [B,H] of any floating type
};

Array sigmoid_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                        const SigmoidOptions& options = {}, const RunOptions& run = {});
void sigmoid_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const SigmoidOptions& options = {}, const RunOptions& run = {});

/// Gradients of options that are computed; the two together cost a pass over the scores.
struct SigmoidWanted {
  bool bias = true, alibi_slopes = true;
};

/// Gradients of q, k, v in their type, of the options' tensors in theirs, empty where there is none or
/// it is not wanted.
struct SigmoidGradients {
  Array q, k, v;
  Array bias, alibi_slopes;  // in the shapes of theirs
};
SigmoidGradients sigmoid_attention_backward(const Tensor& grad_out, const Tensor& q,
                                            const Tensor& k, const Tensor& v,
                                            const SigmoidOptions& options = {},
                                            const RunOptions& run = {},
                                            const SigmoidWanted& wanted = {});

}  // namespace heed
