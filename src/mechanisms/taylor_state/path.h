// Which products a call takes: those of all pairs of tokens, or those with the state.
#pragma once
#include "heed/taylor_state_attention.h"

namespace heed {

/// Of a call that starts from no state; its backward takes the same where nobody uses the last state.
bool taylor_by_pairs(const Tensor& q, const Tensor& k, const Tensor& v,
                     const TaylorOptions& options);

}  // namespace heed
