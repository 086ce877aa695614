// What attention of batches, of packed sequences and over a cache shares: options that are numbers.
#pragma once
#include <vector>

#include "engine/tiled/problem.h"

namespace heed {

/// alibi_slopes [heads] or [batch,heads] and sink [heads] may be undefined. Throws Error naming the option that does not fit.
tiled::Policy softmax_policy(const char* op, int64_t batch, int64_t heads, double softcap,
                             const Tensor& alibi_slopes, const Tensor& sink, double dropout_p = 0,
                             uint64_t seed = 0);

}  // namespace heed
