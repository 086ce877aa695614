#include "engine/tiled/fold.h"

#include <algorithm>

namespace heed::tiled {

namespace {

bool has_one_query(const Sequence& s) {
  const auto even = [](const HeadRows& t) { return t.offsets == nullptr; };
  return s.plan.queries() == 1 && even(s.q) && even(s.k) && even(s.r) && even(s.out) && even(s.lse);
}

// Terms, dropout and numbers per head go with the index of a head.
bool heads_are_alike(const Problem& problem) {
  const Policy& policy = problem.policy;
  return problem.terms == nullptr && policy.dropout == 0 && policy.head_bias.empty() &&
         policy.alibi_slope.empty() && policy.sink.empty();
}

// [H,1,...] as [Hkv,H/Hkv,...].
Tensor fold(const Tensor& t, int64_t kv_heads) {
  if (!t.defined()) return t;
  Dims shape = t.shape(), strides = t.strides();
  shape[0] = kv_heads;
  shape[1] = t.size(0) / kv_heads;
  strides[1] = t.stride(0);
  strides[0] = t.stride(0) * shape[1];
  return {t.data(), t.dtype(), shape, strides};
}

}  // namespace

std::optional<Problem> heads_as_rows(const Problem& problem) {
  const Sequence& first = problem.sequences[0];
  const int64_t kv_heads = first.k.size(0);
  const bool grouped = first.q.size(0) > kv_heads;
  if (!grouped || !heads_are_alike(problem) ||
      !std::all_of(problem.sequences.begin(), problem.sequences.end(), has_one_query)) {
    return std::nullopt;
  }
  Problem folded = problem;
  for (Sequence& s : folded.sequences) {
    for (HeadRows* t : {&s.q, &s.r, &s.out, &s.lse}) *t = fold(*t, kv_heads);
    for (Tensor* t : {&s.v_mean, &s.t_mean}) *t = fold(*t, kv_heads);
    const int64_t rows = s.q.size(1);
    s.plan = TilePlan::of_intervals({s.plan.row(0)}, rows, rows, s.plan.keys());
  }
  return folded;
}

}  // namespace heed::tiled
