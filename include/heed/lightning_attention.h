// Linear attention with exponential decay, in chunks.  arXiv 2401.04658, 2405.17381, 2307.14995
//
//   S_t = exp(-slopes[h]) S_{t-1} + k_t^T v_t        [D,Dv], from initial_state
//   out_t = q_t S_t                                  = sum over s <= t of exp(-slopes[h] (t-s)) (q_t . k_s) v_s
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]  slopes [H]  state [B,H,D,Dv]
// No scale, no denominator. Query head h reads key head h / (H/Hkv); a state belongs to a query head.
// Causal, aligned to the end of the keys: query i sees keys j <= i + Lk - Lq (none: out = 0). Any head
// dims from 1, any strides with a unit stride in the last dimension. float64, float32, bfloat16,
// float16; out has q's type. States and sums are float32 (float64 for float64, where everything is). Where a
// processor has bfloat16 products, bfloat16 calls of 32 keys and more round the state, and what keys and
// queries of a chunk make of each other, where products read them: about 2e-3 |q| . |S| of a result.
// The state is the one after the last token: it is the initial_state of the tokens that follow, and
// cutting a sequence into calls changes results only by rounding. One token is one pass over the state.
// Decays are exponentials of distances: slopes from 0 to any size, no overflow at any length.
// Memory beyond the results: O(threads x states of a few chunks).
#pragma once
#include <optional>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct LightningOptions {
  Tensor slopes = {};         // [H], not negative, any floating type; undefined: no decay
  Tensor initial_state = {};  // [B,H,D,Dv] float32 (float64); undefined: zero. Needs Lq <= Lk
};

struct LightningResult {
  Array out;
  Array state;
};

/// Allocates and returns out and the state after the last token.
LightningResult lightning_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const LightningOptions& options = {},
                                    const RunOptions& run = {});
/// The same into caller memory. `state` may be undefined: it is then not written. It may be the
/// initial state itself.
void lightning_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& state, const LightningOptions& options = {},
                         const RunOptions& run = {});

/// Gradients by input; in the caller's memory, undefined ones are not wanted. slopes [H] is of the
/// state's type, that of initial_state has its shape.
struct LightningGradients {
  Array q, k, v, slopes, initial_state;
};
struct LightningGradientViews {
  Tensor q = {}, k = {}, v = {}, slopes = {}, initial_state = {};
};

/// Given the gradients of out and of the state after the last token (undefined: zero). Nothing of the
/// forward is needed. The same bits for the same number of threads.
LightningGradients lightning_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out_gradient,
                                                const Tensor& state_gradient,
                                                const LightningOptions& options = {},
                                                const RunOptions& run = {});
void lightning_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out_gradient, const Tensor& state_gradient,
                                  const LightningGradientViews& gradients,
                                  const LightningOptions& options = {}, const RunOptions& run = {});

/// How slopes are made for the heads of a model.
enum class LightningSlopes {
  code,   // ALiBi slopes, times 1 - l/(L-1) + 1e-5 in layer l = 0..L-1: published models; L >= 2
  paper,  // (8 h / H) (1 - l/L) with h = 1..H, l = 1..L (arXiv 2405.17381, eq. 10)
  fla     // (8 h / H) (1 - l/L) with h = 0..H-1, l = 0..L-1 (flash-linear-attention)
};
LightningSlopes parse_lightning_slopes(std::string_view name);  // throws Error listing the names

/// float32 [heads]. Without a layer the factor of layers is 1. Throws Error for layers outside the
/// range of the form, and unless both layer and num_layers are given or neither.
Array lightning_slopes(int64_t heads, std::optional<int64_t> layer = {},
                       std::optional<int64_t> num_layers = {},
                       LightningSlopes form = LightningSlopes::code);

}  // namespace heed
