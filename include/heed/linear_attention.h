// Linear attention over features: a sum over keys in place of a softmax.  arXiv 2402.04347, 2006.16236
//
//   S = sum_m k_m^T v_m  [F,Dv]     z = sum_m k_m  [F]       over the keys m that query p sees
//   out_p = q_p S / (q_p . z + eps)                          without normalize: q_p S
//
// q [B,H,Lq,F]  k [B,Hkv,Lk,F]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]  state s [B,H,F,Dv], z [B,H,F]
// q and k are features already (heed/feature_map.h makes them); no scale. Query head h reads key head
// h / (H/Hkv); a state belongs to a query head. causal: query i sees keys j <= i + Lk - Lq, else all.
// lengths [B]: keys of sequence b at and after lengths[b] do not exist. A row that sees no key and no
// state gives 0, and so does a denominator of 0 or one so small that its inverse is infinite (float32:
// below 2.9e-39). Any F and Dv from 1, any strides with a unit stride in the last dimension. float64,
// float32, bfloat16, float16; out has q's type. States, sums and denominators are float32 (float64 for
// float64, where everything is). Where a processor has bfloat16 products, bfloat16 calls of 32 keys and more
// round the state, and what keys and queries of a chunk make of each other, where products read them: about
// 2e-3 |q| . |S| of a numerator.
// A denominator d near 0, where features of both signs cancel, divides what it is: its relative error is
// about u |q| . |z| / |d|, u = 6e-8 (float64: 1e-16).
// The state is the one after the last token: it is the initial_state of the tokens that follow.
#pragma once
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

/// z belongs to normalized attention only.
struct LinearState {
  Tensor s = {}, z = {};
};

struct LinearOptions {
  bool causal = false;
  bool normalize = true;
  double eps = 1e-12;              // not negative
  Tensor lengths = {};             // [B] int32 or int64, 0..Lk; undefined: Lk
  LinearState initial_state = {};  // undefined: zero. Causal: needs Lq <= Lk
  /// Of the backward of a call that is not causal: the state that its forward gave. Undefined: it is
  /// computed again.
  LinearState forward_state = {};
};

struct LinearResult {
  Array out;
  Array s, z;  // z is empty without normalize
};

/// Allocates and returns out and the state after the last token.
LinearResult linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const LinearOptions& options = {}, const RunOptions& run = {});
/// The same into caller memory. Undefined tensors of the state are not written; they may be the initial
/// state itself.
void linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                      const LinearState& state, const LinearOptions& options = {},
                      const RunOptions& run = {});

/// Gradients by input, s and z those of the initial state; in the caller's memory, undefined ones are not
/// wanted.
struct LinearGradients {
  Array q, k, v, s, z;
};
struct LinearGradientViews {
  Tensor q = {}, k = {}, v = {}, s = {}, z = {};
};

/// Given the gradients of out and of the state after the last token (undefined: zero). Nothing of the
/// forward is needed. The same bits for the same number of threads.
LinearGradients linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out_gradient,
                                          const LinearState& state_gradient,
                                          const LinearOptions& options = {},
                                          const RunOptions& run = {});
void linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out_gradient, const LinearState& state_gradient,
                               const LinearGradientViews& gradients,
                               const LinearOptions& options = {}, const RunOptions& run = {});

}  // namespace heed
