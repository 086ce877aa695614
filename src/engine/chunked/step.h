// One token: the state is read and written once.
#pragma once
#include "engine/chunked/problem.h"

namespace heed::chunked {

/// A causal call of one query and one key, with states whose rows are contiguous.
template <class T>
bool can_step(const Problem<T>& problem, const State& last);
/// The last state may be the memory of the initial one.
template <class T>
void step(const Problem<T>& problem, const Tensor& out, const State& last, const RunOptions& run);

}  // namespace heed::chunked
