// Softmax attention whose heads are gated token by token, as in mixture-of-head attention; what a gate
// of zero switches off is not computed.  arXiv 2410.11842
//
//   S[b,h,p,m]         = scale * sum_e q[b,h,p,e] k[b,g(h),m,e]                 g(h) = h / (H/Hkv)
//   attention[b,h,p,f] = softmax over the visible m of S, times v[b,g(h),m,f]
//   out[b,h,p,f]       = gates[b,h,p] * attention[b,h,p,f]                 0 where the gate is 0
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  gates [B,H,Lq]  out, attention [B,H,Lq,Dv]
// lse [B,H,Lq]. Strides, types and masks as in flash_attention.h; gates have q's type or float32
// (float64 beside float64). The gradient of a gate that is 0 is 0. Heads of a group with gates in the same
// rows read keys and values once for all. Memory beyond the results: about 16 MB, and at the least what
// the heads of one key head need that have gates in the same rows: copies of those rows and, backward,
// unless all heads of the group are alike, two float32 [Lk,D+Dv].
#pragma once
#include <optional>

#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct HeadGatedOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
};

struct HeadGatedResult {
  Array out;
  Array attention;  // before the gate, for the backward; 0 where the gate is 0
  Array lse;        // likewise; -inf where the gate is 0
};

HeadGatedResult head_gated_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& gates, const HeadGatedOptions& options = {},
                                     const RunOptions& run = {});
/// The same into caller memory. `attention` and `lse` may be undefined: they are then not written.
void head_gated_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gates,
                          const Tensor& out, const Tensor& attention, const Tensor& lse,
                          const HeadGatedOptions& options = {}, const RunOptions& run = {});

struct HeadGatedGradients {
  Array q, k, v, gates;
};

/// attention and lse are what the forward returned.
HeadGatedGradients head_gated_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& gates, const Tensor& attention,
                                                 const Tensor& lse,
                                                 const HeadGatedOptions& options = {},
                                                 const RunOptions& run = {});

}  // namespace heed
