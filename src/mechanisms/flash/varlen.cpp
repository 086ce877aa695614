#include <string>

#include "heed/flash_attention.h"
#include "mechanisms/flash/policy.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "flash_attention_varlen";

// [T,H,D] as [1,H,T,D].
Tensor heads_first(const char* name, const Tensor& t) {
  if (t.rank() != 3) fail(kOp, describe(name, t), "[tokens, heads, head dim] is needed");
  return Tensor(t.data(), t.dtype(), {1, t.size(1), t.size(0), t.size(2)},
                {0, t.stride(1), t.stride(0), t.stride(2)});
}

// Boundaries of the sequences, checked.
std::vector<int64_t> boundaries(const char* name, const Tensor& cu, int64_t tokens) {
  if (cu.rank() != 1 || cu.size(0) < 1 || (cu.dtype() != DType::i32 && cu.dtype() != DType::i64)) {
    fail(kOp, describe(name, cu), "[sequences + 1] int32 or int64 is needed");
  }
  std::vector<int64_t> values;
  for (int64_t i = 0; i < cu.size(0); ++i) {
    const std::byte* p = cu.at({i});
    values.push_back(cu.dtype() == DType::i32 ? *reinterpret_cast<const int32_t*>(p)
                                              : *reinterpret_cast<const int64_t*>(p));
    const int64_t before = i == 0 ? 0 : values[static_cast<size_t>(i) - 1];
    if (values.back() < before || (i == 0 && values.back() != 0)) {
      fail(kOp,
           std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values.back()),
           (i == 0 ? std::string("0") : "at least " + std::to_string(before)) + " is needed");
    }
  }
  if (values.back() != tokens) {
    fail(kOp,
         std::string(name) + " ends at " + std::to_string(values.back()) + " but there are " +
             std::to_string(tokens) + " tokens",
         "the last boundary must be their number");
  }
  return values;
}

struct Packed {
  Tensor q, k, v, out, lse;  // [1,H,T,D], lse [1,H,T]
  std::vector<int64_t> queries, keys;

  size_t count() const { return queries.size() - 1; }
  // Rows of sequence b.
  Tensor query_rows(const Tensor& t, size_t b) const {
    return t.defined() ? t.select(0, 0).slice(1, queries[b], queries[b + 1]) : Tensor();
  }
  Tensor key_rows(const Tensor& t, size_t b) const {
    return t.select(0, 0).slice(1, keys[b], keys[b + 1]);
  }
};

Packed pack(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  Packed p;
  p.q = heads_first("q", q);
  p.k = heads_first("k", k);
  p.v = heads_first("v", v);
  p.out = heads_first("out", out);
  if (lse.defined()) {
    if (lse.rank() != 2) fail(kOp, describe("lse", lse), "[heads, tokens] is needed");
    p.lse = Tensor(lse.data(), lse.dtype(), {1, lse.size(0), lse.size(1)},
                   {0, lse.stride(0), lse.stride(1)});
  }
  tiled::check_operands(kOp, p.q, p.k, p.v, p.out, p.lse, kAnyHeadDim);
  p.queries = boundaries("cu_seqlens_q", cu_seqlens_q, q.size(0));
  p.keys = boundaries("cu_seqlens_k", cu_seqlens_k, k.size(0));
  if (p.queries.size() != p.keys.size()) {
    fail(kOp,
         "cu_seqlens_q holds " + std::to_string(p.queries.size() - 1) +
             " sequences but cu_seqlens_k " + std::to_string(p.keys.size() - 1),
         "one number of sequences is needed");
  }
  return p;
}

tiled::Problem make_problem(const Packed& p, const VarlenOptions& options) {
  tiled::Problem problem;
  const Masks masks{options.causal, options.window, {}};
  for (size_t b = 0; b < p.count(); ++b) {
    tiled::Sequence s;
    s.q = p.query_rows(p.q, b);
    s.k = p.key_rows(p.k, b);
    s.v = p.key_rows(p.v, b);
    s.out = p.query_rows(p.out, b);
    s.lse = p.query_rows(p.lse, b);
    s.plan = tiled::TilePlan::from_masks(kOp, masks, 1, s.q.size(1), s.k.size(1))[0];
    s.batch = static_cast<int64_t>(b);
    problem.sequences.push_back(std::move(s));
  }
  problem.scale = tiled::resolve_scale(kOp, options.scale, p.q.size(3));
  problem.policy =
      softmax_policy(kOp, static_cast<int64_t>(p.count()), p.q.size(1), options.softcap,
                     options.alibi_slopes, options.sink, options.dropout_p, options.seed);
  return problem;
}

}  // namespace

AttentionResult flash_attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       const VarlenOptions& options, const RunOptions& run) {
  AttentionResult result;
  if (q.rank() == 3 && v.rank() == 3) {
    result.out = Array(q.dtype(), {q.size(0), q.size(1), v.size(2)});
    result.lse = Array(wide_type(q.dtype()), {q.size(1), q.size(0)});
  }
  const Packed p = pack(q, k, v, result.out, result.lse, cu_seqlens_q, cu_seqlens_k);
  tiled::forward(make_problem(p, options), run);
  return result;
}

FlashGradients flash_attention_varlen_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& out, const Tensor& lse,
                                               const Tensor& cu_seqlens_q,
                                               const Tensor& cu_seqlens_k,
                                               const VarlenOptions& options, const RunOptions& run,
                                               const FlashWanted& wanted) {
  const Packed p = pack(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k);
  // Gradients are checked as results are.
  const Packed g = pack(q, k, v, grad_out, grad_lse, cu_seqlens_q, cu_seqlens_k);
  tiled::Problem problem = make_problem(p, options);
  problem.head_gradients = wanted.alibi_slopes && options.alibi_slopes.defined();
  FlashGradients to;
  to.q = Array(q.dtype(), q.shape());
  to.k = Array::zeros(k.dtype(), k.shape());
  to.v = Array::zeros(v.dtype(), v.shape());
  const Tensor to_q = heads_first("q", to.q), to_k = heads_first("k", to.k),
               to_v = heads_first("v", to.v);
  std::vector<tiled::SequenceGradient> gradients;
  for (size_t b = 0; b < p.count(); ++b) {
    gradients.push_back({p.query_rows(g.out, b), p.query_rows(g.lse, b), p.query_rows(to_q, b),
                         p.key_rows(to_k, b), p.key_rows(to_v, b), Tensor()});
  }
  const tiled::HeadGradients heads = tiled::backward(problem, gradients, nullptr, run);
  if (problem.head_gradients) {
    to.alibi_slopes = head_gradient(heads.alibi_slope, options.alibi_slopes);
  }
  to.sink = head_gradient(heads.sink, options.sink);
  return to;
}

}  // namespace heed
