// Softmax attention whose scores depend on relative positions through learned tables: the scores of
// RCMHA (arXiv 2308.03429) and, with tables made for it, of Transformer-XL (arXiv 1901.02860).
//
//   S[b,h,i,j] = scale * ( sum_e (q[b,h,i,e] + content_bias[h,e]) k[b,g(h),j,e]
//                        + sum_e q[b,h,i,e] rel_key[P + n,h,e] + rel_bias[P + n,h] )
//   n          = j - (i + Lk - Lq)                  distance from the query to the key, g(h) = h / (H/Hkv)
//   out        = softmax over the visible j of S, times v[b,g(h),j,f]
//   lse[b,h,i] = log sum over the visible j of exp S
//
// rel_key [2P,H,D], rel_bias [2P,H]: row P is distance 0, rows before it are keys to the left. content_bias
// [H,D]. P >= Lk - 1; without the causal mask P >= Lq besides, with it P >= 1. Memory of earlier segments
// is Lk > Lq. Transformer-XL: rel_key[P - n] = W_R r_n, rel_bias[P - n] = v . W_R r_n.
// The tables have q's type, or float32 beside 16-bit q, and any strides. Shapes, types and strides of q,
// k, v, out and lse as in flash_attention.h. A row that sees no key: out = 0, lse = -inf, gradients 0.
// Memory beyond the results: O(threads x tile + H (Lk + P)), in the backward O(threads x L); the scores
// against the table exist only tile by tile.
#pragma once
#include <optional>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct RelativeOptions {
  bool causal = true;                // aligned to the end of the keys
  std::optional<double> scale = {};  // of all terms; none: 1/sqrt(D)
};

struct RelativeResult {
  Array out;
  Array lse;
};

/// Allocates and returns out and lse.
RelativeResult relative_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& rel_key, const Tensor& rel_bias,
                                  const Tensor& content_bias, const RelativeOptions& options = {},
                                  const RunOptions& run = {});
/// The same into caller memory. `lse` may be an undefined Tensor: it is then not written.
void relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rel_key,
                        const Tensor& rel_bias, const Tensor& content_bias, const Tensor& out,
                        const Tensor& lse, const RelativeOptions& options = {},
                        const RunOptions& run = {});

/// Each in the type of its input. Rows of the tables that no score reads have gradient 0.
struct RelativeGradients {
  Array q, k, v;
  Array rel_key, rel_bias, content_bias;
};

/// out and lse are what the forward returned for the same options; grad_lse may be undefined (zero).
RelativeGradients relative_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                              const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& rel_key, const Tensor& rel_bias,
                                              const Tensor& content_bias, const Tensor& out,
                                              const Tensor& lse,
                                              const RelativeOptions& options = {},
                                              const RunOptions& run = {});

}  // namespace heed
