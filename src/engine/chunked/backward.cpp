#include "engine/chunked/chunk_call.h"
#include "engine/chunked/gradients.h"

namespace heed::chunked {

namespace {

// Gradients that a caller does not want are still computed, into memory of our own.
Tensor or_own(const Tensor& wanted, const Tensor& like, Array& own) {
  if (wanted.defined()) return wanted;
  own = Array(like.dtype(), like.shape());
  return own;
}

}  // namespace

template <class T>
void backward(const Problem<T>& problem, const Tensor& out_gradient, const State& last_gradient,
              const Gradients& gradients, const RunOptions& given) {
  const RunOptions run = worth_waking(problem, given);
  const bool queries =
      gradients.q.defined() || gradients.slopes != nullptr || gradients.scales != nullptr;
  const State& initial = gradients.initial;
  const bool keys = gradients.k.defined() || gradients.v.defined() || initial.sums.defined() ||
                    initial.keys.defined() || initial.values.defined();
  Array own_q, own_k, own_v;
  RowStatistics<T> statistics;
  Gradients all = gradients;
  // The second sweep needs the row numbers of the first.
  if (queries || problem.policy.read_out) {
    all.q = or_own(gradients.q, problem.q, own_q);
    query_gradients(problem, out_gradient, last_gradient, all, statistics, run);
  }
  if (!keys) return;
  all.k = or_own(gradients.k, problem.k, own_k);
  all.v = or_own(gradients.v, problem.v, own_v);
  key_gradients(problem, out_gradient, last_gradient, all, statistics, run);
}

template void backward(const Problem<float>&, const Tensor&, const State&, const Gradients&,
                       const RunOptions&);
template void backward(const Problem<double>&, const Tensor&, const State&, const Gradients&,
                       const RunOptions&);

}  // namespace heed::chunked
