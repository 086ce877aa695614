// The cross-entropy that fits feature maps of linear attention to softmax weights.  arXiv 2402.04347
//
//   P[b,h,p,m] = softmax over the visible m of scale * q[b,h,p] . k[b,g(h),m]        the teacher
//   R[b,h,p,m] = feature_q[b,h,p] . feature_k[b,g'(h),m]
//   A          = R / sum over the visible m of R                                      the student
//   loss       = mean over b, h, p of - sum_m P log max(A, 1e-12)
//
// g(h) = h / (H/Hk), g'(h) = h / (H/Hf): k and feature_k may each have fewer heads than q.
// causal: query p sees m <= p + Lk - Lq. A query that sees no key adds 0; 0 / 0 is 0.
//
// q [B,H,Lq,D]  k [B,Hk,Lk,D]  feature_q [B,H,Lq,F]  feature_k [B,Hf,Lk,F]
// D from 1 to 256, F any; any strides with a unit stride in the last dimension. float64, float32,
// bfloat16, float16; features have q's type or, beside 16 bits, float32. The loss is float32 (float64
// for float64), a tensor without dimensions, and so are all sums.
// Computed in tiles of rows: no [Lq,Lk] buffer. Gradients: feature_q and feature_k; the teacher is
// detached, q and k have none. Where A is below 1e-12 no gradient passes through that weight.
#pragma once
#include <optional>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct DistillationOptions {
  bool causal = false;
  std::optional<double> scale = {};  // of the teacher; none: 1/sqrt(D)
};

Array attention_distillation_loss(const Tensor& q, const Tensor& k, const Tensor& feature_q,
                                  const Tensor& feature_k, const DistillationOptions& options = {},
                                  const RunOptions& run = {});
void attention_distillation_loss(const Tensor& q, const Tensor& k, const Tensor& feature_q,
                                 const Tensor& feature_k, const Tensor& loss,
                                 const DistillationOptions& options = {},
                                 const RunOptions& run = {});

struct DistillationGradients {
  Array feature_q, feature_k;
};
/// `grad_loss` has the shape and type of the loss.
DistillationGradients attention_distillation_loss_backward(const Tensor& grad_loss, const Tensor& q,
                                                           const Tensor& k, const Tensor& feature_q,
                                                           const Tensor& feature_k,
                                                           const DistillationOptions& options = {},
                                                           const RunOptions& run = {});
/// Into caller memory.
struct DistillationGradientViews {
  Tensor feature_q = {}, feature_k = {};
};
void attention_distillation_loss_backward(const Tensor& grad_loss, const Tensor& q, const Tensor& k,
                                          const Tensor& feature_q, const Tensor& feature_k,
                                          const DistillationOptions& options,
                                          const DistillationGradientViews& gradients,
                                          const RunOptions& run = {});

/// The loss and, for a grad_loss of 1, its gradients, from one pass over the products of all pairs.
/// `gradients` have the loss's type.
void attention_distillation_loss_with_gradients(const Tensor& q, const Tensor& k,
                                                const Tensor& feature_q, const Tensor& feature_k,
                                                const Tensor& loss,
                                                const DistillationGradientViews& gradients,
                                                const DistillationOptions& options = {},
                                                const RunOptions& run = {});

}  // namespace heed
