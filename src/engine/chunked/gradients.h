// The backward is two sweeps. The first runs with the tokens, as the forward does, and gives the gradients
// of queries and slopes from the states; the second runs against them, with the gradients of the states,
// and gives those of keys and values. No state is kept between them, only three numbers per query.
#pragma once
#include "engine/chunked/problem.h"

namespace heed::chunked {

/// Per query [B,H,Lq], where the policy has a read-out: num_scale, the gradient of the denominator, and
/// minus sum_scale. A few elements longer, for kernels that read whole vectors.
/// Where gradients are made in the centred form (problem.h), also the row m that states before a chunk had,
/// [B,H,chunks,padded Dv] (a total: one), with a value_sum the means of the keys' features, [B,H,padded F],
/// and of causal calls, per query, what the gradient's products G . v_j with values of the same chunk lack.
template <class T>
struct RowStatistics {
  std::vector<T> num_scale, denominator, sum_scale;
  std::vector<T> centres, key_means, value_shares;
};

template <class T>
void query_gradients(const Problem<T>& problem, const Tensor& out_gradient,
                     const State& last_gradient, const Gradients& gradients,
                     RowStatistics<T>& statistics, const RunOptions& run);
template <class T>
void key_gradients(const Problem<T>& problem, const Tensor& out_gradient,
                   const State& last_gradient, const Gradients& gradients,
                   const RowStatistics<T>& statistics, const RunOptions& run);

}  // namespace heed::chunked
