// The router of Mixture-of-Head attention: which heads a token uses, and how much.  arXiv 2410.11842
//
// Heads are hs shared ones, always on, then E routed ones of which each token t uses the top_k with the
// largest logits z = wg x_t (ties go to the lower head); A_t is that set. H = hs + E.
//
//   code    gates[t, shared i]   = w_0 * hs * softmax(wg_shared x_t)_i       w = 2 softmax(wg_group x_t)
//           gates[t, routed e]   = w_1 * top_k * p_e / sum_{A_t} p           p = softmax(wg x_t)
//           load_balance_loss    = E * sum_e mean_t(p_e) mean_t(e in A_t)
//   paper   the same without the factors 2, hs, top_k and E and without the division
//
// Routed heads outside A_t have gate 0. One group alone has weight w = 1; one shared head alone has
// softmax 1 and needs no wg_shared:
//   shared heads   wg          wg_shared   wg_group   top_k
//   none           [E,C]       -           -          1..E
//   one            [E,C]       - or [1,C]  [2,C]      1..E
//   hs             [E,C]       [hs,C]      [2,C]      1..E
//   only shared    [0,C]       [hs,C]      -          0
//
// x [B,L,C], gates [B,H,L] of x's type, load_balance_loss [] float32 (float64 for float64; 0 without
// tokens or routed heads). float64, float32, bfloat16, float16, any strides; weights have x's type or
// float32 (float64 beside float64). All arithmetic is float64.
#pragma once
#include <cstdint>
#include <string_view>

#include "heed/run.h"
#include "heed/tensor.h"

namespace heed {

enum class MohForm { code, paper };
MohForm parse_moh_form(std::string_view name);  // throws Error listing the names

struct MohRouterOptions {
  int64_t top_k = 1;
  MohForm form = MohForm::code;
};

struct MohRouting {
  Array gates;
  Array load_balance_loss;
};

/// wg_shared and wg_group may be undefined Tensors, as in the table above.
MohRouting moh_router(const Tensor& x, const Tensor& wg, const Tensor& wg_shared,
                      const Tensor& wg_group, const MohRouterOptions& options,
                      const RunOptions& run = {});

/// In the shapes and types of the inputs; empty where an input is undefined.
struct MohRouterGradients {
  Array x, wg, wg_shared, wg_group;
};
/// The chosen heads count as constants. grad_gates [B,H,L] (x's type or float32) and grad_loss []
/// (float32 or float64) may be undefined: zero. The same bits for any number of threads.
MohRouterGradients moh_router_backward(const Tensor& grad_gates, const Tensor& grad_loss,
                                       const Tensor& x, const Tensor& wg, const Tensor& wg_shared,
                                       const Tensor& wg_group, const MohRouterOptions& options,
                                       const RunOptions& run = {});

}  // namespace heed
