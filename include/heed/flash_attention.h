// Exact softmax attention in one pass over the keys.  arXiv 2205.14135, 2307.08691
//
//   S[b,h,p,m] = softcap(scale * sum_e q[b,h,p,e] k[b,g(h),m,e])         g(h) = h / (H/Hkv)
//                - alibi_slopes[b,h] |p + Lk - Lq - m| + bias[b,h,p,m]
//   out        = softmax over the visible m (and the sink) of S, times v[b,g(h),m,f]
//   lse[b,h,p] = log sum over the visible m (and the sink) of exp S      natural logarithm
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]  lse [B,H,Lq]
// H % Hkv == 0; D and Dv from 1; any strides with a unit stride in the last dimension.
// float64, float32, bfloat16, float16; out has q's type. Scores, statistics and sums are float32
// (float64 for float64, where everything is float64); lse is float32 or float64 accordingly.
// A row that sees no key: out = 0, lse = -inf (its sink, if there is one), gradients 0.
// Memory beyond the results: O(threads x tile), in the backward O(threads x L).
#pragma once
#include <array>
#include <optional>

#include "heed/attention_result.h"
#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct FlashOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
  double softcap = 0;                // c > 0: scores become c * tanh(score / c)
  /// [H] or [B,H]. Finite slopes that would make scores infinite count as large ones that do not.
  Tensor alibi_slopes = {};
  Tensor mask = {};  // boolean, broadcastable to [B,H,Lq,Lk]; true = attend
  /// Floating, broadcastable to [B,H,Lq,Lk]. -inf hides a key; finite numbers beyond 2/3 of the largest
  /// float32 (float64 for float64), such as the least one, count as that.
  Tensor bias = {};
  Tensor sink = {};  // [H], a logit per head that only enters the row's sum; bounded as bias is
  /// Boolean [H or 1, ceil(Lq/rows), ceil(Lk/keys)] over blocks of block_size = {rows, keys}; a false
  /// block is not computed.
  Tensor block_mask = {};
  std::array<int64_t, 2> block_size = {64, 64};
  double dropout_p = 0;  // each weight is dropped with this probability, 0 <= p < 1
  uint64_t seed = 0;     // of the dropout: which weights are dropped is a function of it alone
};

/// Allocates and returns out and lse.
AttentionResult flash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                const FlashOptions& options = {}, const RunOptions& run = {});
/// The same into caller memory. `lse` may be an undefined Tensor: it is then not written.
void flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     const Tensor& lse, const FlashOptions& options = {},
                     const RunOptions& run = {});

/// Gradients of options that are computed; each costs a pass over the scores.
struct FlashWanted {
  bool bias = true, alibi_slopes = true;
};

/// Gradients of q, k, v in their type; of the options' tensors in theirs, empty where there is none or
/// it is not wanted.
struct FlashGradients {
  Array q, k, v;
  Array bias;          // the shape of bias: summed where it was broadcast
  Array alibi_slopes;  // the shape of alibi_slopes
  Array sink;          // [H]
};

/// out and lse are what the forward returned for the same options; grad_lse may be undefined (zero).
FlashGradients flash_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                        const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& out, const Tensor& lse,
                                        const FlashOptions& options = {},
                                        const RunOptions& run = {}, const FlashWanted& wanted = {});

/// Sequences packed one behind the other: sequence b has rows [cu[b], cu[b+1]) and its own causal
/// alignment. cu_seqlens_* [B+1] int32 or int64, from 0 to the number of tokens.
struct VarlenOptions {
  bool causal = false;
  Window window = {};
  std::optional<double> scale = {};
  double softcap = 0;
  Tensor alibi_slopes = {};  // [H], or [B,H]: one row a sequence
  Tensor sink = {};          // [H]
  double dropout_p = 0;      // drops of sequence b what flash_attention drops of batch entry b
  uint64_t seed = 0;
};

/// q [Tq,H,D]  k [Tk,Hkv,D]  v [Tk,Hkv,Dv]  out [Tq,H,Dv]  lse [H,Tq]
AttentionResult flash_attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       const VarlenOptions& options = {},
                                       const RunOptions& run = {});
FlashGradients flash_attention_varlen_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, const VarlenOptions& options = {}, const RunOptions& run = {},
    const FlashWanted& wanted = {});

struct DecodeOptions {
  std::optional<double> scale = {};    // none: 1/sqrt(D)
  std::optional<int64_t> window = {};  // keys to the left that a query sees besides its own
  int64_t splits = 0;                  // parts the keys are cut into; 0 chooses
  Tensor sink = {};                    // [H]
  double softcap = 0;
  Tensor alibi_slopes =
      {};  // [H] or [B,H], the distance of query i counted from lengths[b] - Lq + i
};

/// Attention of the last Lq <= 16 tokens of each sequence over its cache, causal among themselves.
/// q [B,H,Lq,D]  k_cache, v_cache [B,Hkv,capacity,D(v)]  lengths [B] int32 or int64, keys that exist
/// (the Lq newest included). Query i of sequence b sees keys j <= lengths[b] - Lq + i. The keys are
/// split so that one sequence uses all threads; the split does not depend on the thread count.
AttentionResult decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& lengths, const DecodeOptions& options = {},
                                 const RunOptions& run = {});
void decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, const Tensor& out, const Tensor& lse,
                      const DecodeOptions& options = {}, const RunOptions& run = {});

/// Exact merge of two results over disjoint keys (sheets 01, 13, 22):
///   lse = log(exp lse_a + exp lse_b),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
/// out_* [B,H,L,Dv] of one type, lse_* [B,H,L] float32 (float64 for float64). Both rows empty: 0, -inf.
AttentionResult merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                const Tensor& lse_b, const RunOptions& run = {});
void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse,
                     const RunOptions& run = {});

struct MergeGradients {
  Array out_a, lse_a, out_b, lse_b;
};
/// grad_lse may be undefined (zero).
MergeGradients merge_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                        const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b,
                                        const RunOptions& run = {});

}  // namespace heed
