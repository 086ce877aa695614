// Linear attention whose weights follow the magnitude of the query (MALA).  arXiv 2507.00698
//
//   phi(x) = elu(x) + 1      S = sum_m rot(phi(k_m))^T v_m   k_sum = sum_m phi(k_m)   v_sum = sum_m v_m
//   out_p = (1 + 1/(z_p + eps)) c rot(phi(q_p)) S - z_p v_sum / N
//   form code   z_p = (scale / N) phi(q_p) . k_sum   c = scale / N       the published weights
//   form paper  z_p = phi(q_p) . k_sum               c = 1
//   form consistent: code, but with rope phi is turned in z and k_sum as well
//
// over N keys: all of them, or the N = 1, 2, ... up to a query's own (causal, aligned to the end of the
// keys; none: out = 0). Without rope, and in the form consistent, a row's weights sum to 1: out is plain
// linear attention moved away from the mean of the values by z_p.
// rope: tokens lie row-major on a grid; after phi, and but for `consistent` not in z, the first half of the
// features turns by the token's row, the second by its column, pair (2t, 2t+1) by the angle
// 10000^(-t/(D/4-1)) a step. Turned features may cancel: z may be near 0 or negative then.
//
// q [B,H,Lq,D]  k [B,Hkv,Lk,D]  v [B,Hkv,Lk,Dv]  out [B,H,Lq,Dv]; D from 1 to 256, with rope a multiple
// of 4; any Dv from 1. Strides, types and grouped heads as in linear_attention.h. phi, z and the final
// difference are float32 (float64 for float64): its terms cancel, so errors grow with z.
#pragma once
#include <optional>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

enum class MagnitudeAwareForm { code, paper, consistent };
MagnitudeAwareForm parse_magnitude_aware_form(std::string_view name);  // throws Error

/// After the last token: s [B,H,D,Dv], k_sum [B,H,D], v_sum [B,H,Dv] float32 (float64),
/// count [B], the tokens so far: of the same type, int32 or int64 where it is given, of the same type
/// where it is returned; float32 counts to 2^24, a longer sequence has no state.
struct MagnitudeAwareState {
  Tensor s = {}, k_sum = {}, v_sum = {}, count = {};
};

struct Grid {
  int64_t height = 1, width = 1;
};

struct MagnitudeAwareOptions {
  bool causal = false;
  MagnitudeAwareForm form = MagnitudeAwareForm::code;
  /// Not causal: height * width tokens. Causal: positions go on from the count.
  std::optional<Grid> rope = {};
  std::optional<double> scale = {};  // not paper; none: 1/sqrt(D)
  double eps = 1e-6;                 // not negative
  /// All four or none; causal only, needs Lq <= Lk.
  MagnitudeAwareState initial_state = {};
  /// Of the backward of a call that is not causal: the state that its forward gave, whose count is not read.
  /// Undefined: it is computed again.
  MagnitudeAwareState forward_state = {};
};

struct MagnitudeAwareResult {
  Array out;
  Array s, k_sum, v_sum, count;  // empty unless causal
};

/// Allocates and returns out and, if causal, the state after the last token.
MagnitudeAwareResult magnitude_aware_linear_attention(const Tensor& q, const Tensor& k,
                                                      const Tensor& v,
                                                      const MagnitudeAwareOptions& options = {},
                                                      const RunOptions& run = {});
/// The same into caller memory. Undefined tensors of the state are not written; they may be the initial
/// state itself.
void magnitude_aware_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& out, const MagnitudeAwareState& state,
                                      const MagnitudeAwareOptions& options = {},
                                      const RunOptions& run = {});

/// Gradients by input, the last three those of the initial state; in the caller's memory, undefined ones
/// are not wanted. A count has none.
struct MagnitudeAwareGradients {
  Array q, k, v, s, k_sum, v_sum;
};
struct MagnitudeAwareGradientViews {
  Tensor q = {}, k = {}, v = {}, s = {}, k_sum = {}, v_sum = {};
};

/// Given the gradients of out and of the state after the last token (undefined: zero; count is ignored).
/// Nothing of the forward is needed. The same bits for the same number of threads.
MagnitudeAwareGradients magnitude_aware_linear_attention_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
    const MagnitudeAwareState& state_gradient, const MagnitudeAwareOptions& options = {},
    const RunOptions& run = {});
void magnitude_aware_linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& out_gradient,
                                               const MagnitudeAwareState& state_gradient,
                                               const MagnitudeAwareGradientViews& gradients,
                                               const MagnitudeAwareOptions& options = {},
                                               const RunOptions& run = {});

}  // namespace heed
