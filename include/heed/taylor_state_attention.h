// Softmax attention with the exponential cut off at its Taylor polynomial, as a recurrence.  arXiv 2507.23632
//
//   T(x) = sum over n <= order of x^n / n!        x[p,m] = scale * q_p . k_m
//   out_p = sum_m T(x[p,m]) v_m / d_p             d_p = sum_m T(x[p,m])       over m <= p
//
// computed with a state, whose size does not depend on the number of tokens (or, for an even order without
// initial state, from all pairs while these are fewer products):
//   s = sum_m mono(k_m)^T v_m  [n,Dv]     z = sum_m mono(k_m)  [n]
// mono(k) are the products of up to `order` elements of k, each unordered choice once (the symmetric
// storage of Kronecker powers): 1, then k_a, then k_a k_b, then k_a k_b k_c, by degree and in lexical
// order of a <= b <= c; n = (D + order choose order). The scale belongs to the queries: the state is the
// same for every scale.
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]  state s [B,H,n,Dv], z [B,H,n]
// D from 1 to 256, order from 0 to 3, any Dv from 1. Causal, aligned to the end of the keys (no key: out = 0).
// Strides, types, grouped heads and states as in linear_attention.h.
// An even order has d > 0; an odd one can cancel: d counts as at least 1e-12 in size, with its sign, and
// its relative error is about u sum_m |T(x[p,m])| / |d|, u = 6e-8 (float64: 1e-16).
// The same as recurrent_softmax_attention with that order and normalizer softmax.
#pragma once
#include <optional>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct TaylorState {
  Tensor s = {}, z = {};
};

struct TaylorOptions {
  int64_t order = 2;
  std::optional<double> scale = {};  // none: 1/sqrt(D)
  TaylorState initial_state = {};    // both or neither; undefined: zero. Needs Lq <= Lk
};

/// n: the number of monomials of D elements up to a degree. Throws Error for an order outside 0..3.
int64_t taylor_state_size(int64_t head_dim, int64_t order);

struct TaylorResult {
  Array out;
  Array s, z;
};

/// Allocates and returns out and the state after the last token.
TaylorResult taylor_state_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const TaylorOptions& options = {}, const RunOptions& run = {});
/// The same into caller memory. Undefined tensors of the state are not written; they may be the initial
/// state itself.
void taylor_state_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const TaylorState& state, const TaylorOptions& options = {},
                            const RunOptions& run = {});

/// Gradients by input, s and z those of the initial state; in the caller's memory, undefined ones are not
/// wanted.
struct TaylorGradients {
  Array q, k, v, s, z;
};
struct TaylorGradientViews {
  Tensor q = {}, k = {}, v = {}, s = {}, z = {};
};

/// Given the gradients of out and of the state after the last token (undefined: zero). Nothing of the
/// forward is needed. The same bits for the same number of threads.
TaylorGradients taylor_state_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out_gradient,
                                                const TaylorState& state_gradient,
                                                const TaylorOptions& options = {},
                                                const RunOptions& run = {});
void taylor_state_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& out_gradient, const TaylorState& state_gradient,
                                     const TaylorGradientViews& gradients,
                                     const TaylorOptions& options = {}, const RunOptions& run = {});

}  // namespace heed
