// Stochastic attention: sliding-window attention after a random permutation of the tokens, undone
// afterwards, so that every token meets others from everywhere at the cost of a window.
// arXiv 2604.00754
//
//   S[b,h,i,j] = scale * sum_e q[b,h,i,e] k[b,g(h),j,e]                         g(h) = h / (H/Hkv)
//   out        = softmax of S over the visible j, times v[b,g(h),j,f]
//   lse[b,h,i] = log sum over the visible j of exp S                            natural logarithm
//
// With permutation[i] the slot of token i, token i sees token j if
//   |permutation[i] - permutation[j]| <= window / 2 (rounded down, no wrap), and j <= i if causal.
// Positions (rotary and others) are those of the tokens: apply them before the call.
//
// q [B,H,L,D]  k [B,Hkv,L,D]  v [B,Hkv,L,Dv]  out [B,H,L,Dv]  lse [B,H,L]
// permutation [L], [H,L] or [B,H,L] int64. Strides and types as in flash_attention.h. Every row sees
// its own token. Time and memory beyond the results: O(L * window), copies of a few heads at a time.
#pragma once
#include <cstdint>
#include <optional>

#include "heed/attention_result.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct StochasticOptions {
  int64_t window = 0;  // slots: window / 2 to each side; at least 1
  bool causal = true;
  std::optional<double> scale = {};  // none: 1/sqrt(D)
};

AttentionResult stochastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& permutation, const StochasticOptions& options,
                                     const RunOptions& run = {});
/// The same into caller memory. `lse` may be an undefined Tensor: it is then not written.
void stochastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& permutation, const Tensor& out, const Tensor& lse,
                          const StochasticOptions& options, const RunOptions& run = {});

struct StochasticGradients {
  Array q, k, v;
};

/// out and lse are what the forward returned; grad_lse may be undefined (zero).
StochasticGradients stochastic_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& permutation, const Tensor& out,
                                                  const Tensor& lse,
                                                  const StochasticOptions& options,
                                                  const RunOptions& run = {});

/// Uniformly random permutations along the last axis of `shape` ([L], [H,L], ...), int64: a function of
/// seed and shape alone. Independent ones for every layer are what mixes; one shared by all layers
/// does not.
Array random_permutation(uint64_t seed, const Dims& shape);

}  // namespace heed
