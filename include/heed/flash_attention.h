// Exact softmax attention in one pass over the keys.  arXiv 2205.14135, 2307.08691
//
//   S[b,h,p,m] = scale * sum_e q[b,h,p,e] k[b,g(h),m,e]        g(h) = h / (H/Hkv)
//   out        = softmax over the visible m of S, times v[b,g(h),m,f]
//   lse[b,h,p] = log sum over the visible m of exp S           natural logarithm
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]  lse [B,H,Lq]
// H % Hkv == 0; D and Dv from 1 to 256; any strides with a unit stride in the last dimension.
// float64, float32, bfloat16, float16; out has q's type. Scores, statistics and sums are float32
// (float64 for float64, where everything is float64); lse is float32 or float64 accordingly.
// A row that sees no key: out = 0, lse = -inf. Memory beyond the results: O(threads x tile).
#pragma once
#include <optional>

#include "heed/masks.h"
#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

struct FlashOptions {
  Masks masks = {};
  std::optional<double> scale = {};  // none: 1/sqrt(D)
};

struct AttentionResult {
  Array out;
  Array lse;
};

/// Allocates and returns out and lse.
AttentionResult flash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                const FlashOptions& options = {}, const RunOptions& run = {});
/// The same into caller memory. `lse` may be an undefined Tensor: it is then not written.
void flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     const Tensor& lse, const FlashOptions& options = {},
                     const RunOptions& run = {});

struct DecodeOptions {
  std::optional<double> scale = {};    // none: 1/sqrt(D)
  std::optional<int64_t> window = {};  // keys to the left that a query sees besides its own
  int64_t splits = 0;                  // parts the keys are cut into; 0 chooses
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

}  // namespace heed
