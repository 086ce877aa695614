// Parallax: softmax attention minus the covariance of values and keys times a learned probe.
// arXiv 2605.29157
//
//   p[b,h,i,j] = softmax over the visible j of scale * sum_e q[b,h,i,e] k[b,g(h),j,e]
//   t[b,h,i,j] = sum_e r[b,h,i,e] k[b,g(h),j,e]                          never scaled
//   v_mean     = sum_j p v[b,g(h),j,f]        t_mean = sum_j p t
//   out        = v_mean - sum_j p (v - v_mean) (t - t_mean)
//              = v_mean (1 + t_mean) - sum_j p t v
//
// r [B,H,Lq,D] is a second query; positions (RoPE) rotate it like q. r = 0 is softmax attention.
// Shapes, types, strides and masks as in flash_attention.h. The weights p (1 + t_mean - t) of a row sum
// to 1 but may be negative. A row that sees no key: out = 0, v_mean = 0, t_mean = 0, lse = -inf,
// gradients 0.
// Keys and values are read once for both streams. Memory beyond the results: O(threads x tile), in the
// backward O(threads x L).
#pragma once
#include <optional>

#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct ParallaxOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // of q . k; none: 1/sqrt(D)
};

/// All of them float32 (float64 for float64).
struct ParallaxStatistics {
  Tensor v_mean = {};  // [B,H,Lq,Dv], unit stride in the last one: what softmax attention returns
  Tensor t_mean = {};  // [B,H,Lq]
  Tensor lse = {};     // [B,H,Lq], as in flash_attention.h
};

struct ParallaxResult {
  Array out;  // [B,H,Lq,Dv] in q's type
  Array v_mean, t_mean, lse;
  ParallaxStatistics statistics() const { return {v_mean, t_mean, lse}; }
};

/// Allocates and returns everything.
ParallaxResult parallax_attention(const Tensor& q, const Tensor& r, const Tensor& k,
                                  const Tensor& v, const ParallaxOptions& options = {},
                                  const RunOptions& run = {});
/// The same into caller memory. Undefined statistics are not written.
void parallax_attention(const Tensor& q, const Tensor& r, const Tensor& k, const Tensor& v,
                        const Tensor& out, const ParallaxStatistics& statistics,
                        const ParallaxOptions& options = {}, const RunOptions& run = {});

/// In the type of the inputs.
struct ParallaxGradients {
  Array q, r, k, v;
};

/// out and statistics are what the forward returned for the same options. grad_lse may be undefined
/// (zero); v_mean and t_mean take no gradient.
ParallaxGradients parallax_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                              const Tensor& q, const Tensor& r, const Tensor& k,
                                              const Tensor& v, const Tensor& out,
                                              const ParallaxStatistics& statistics,
                                              const ParallaxOptions& options = {},
                                              const RunOptions& run = {});

}  // namespace heed
