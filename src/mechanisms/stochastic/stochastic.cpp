#include <algorithm>
#include <limits>
#include <string>

#include "base/parallel.h"
#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/stochastic_attention.h"
#include "mechanisms/results.h"
#include "mechanisms/row_memory.h"
#include "mechanisms/stochastic/slot_order.h"

namespace heed {

namespace {

constexpr const char* kOp = "stochastic_attention";
// Copies of a part for each thread: they come back from the caches where a head is small enough.
constexpr int64_t kPartBytes = int64_t{4} << 20;
constexpr int64_t kRowsPerMove = 512;

/// Hides keys whose token is later than the query's.
class CausalTokens final : public tiled::ScoreTerms {
 public:
  /// `tokens` of each query head, by slot.
  CausalTokens(std::vector<const int32_t*> tokens, int64_t reach)
      : tokens_(std::move(tokens)), reach_(reach) {}

  tiled::Visit visit(const tiled::TileAt& /*at*/) const override { return tiled::Visit::masked; }
  bool adds() const override { return false; }
  void shape(const tiled::TileAt& at, kernels::Block<float> s) const override { hide(at, s); }
  void shape(const tiled::TileAt& at, kernels::Block<double> s) const override { hide(at, s); }

 private:
  template <class T>
  void hide(const tiled::TileAt& at, kernels::Block<T> s) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    const int32_t* tokens = tokens_[static_cast<size_t>(at.head)];
    for (int64_t r = 0; r < at.rows; ++r) {
      const int64_t slot = at.row + r;
      const int64_t begin = std::max(at.key, slot - reach_);
      const int64_t end = std::min(at.key + at.keys, slot + reach_ + 1);
      const int32_t own = tokens[slot];
      const int32_t* key_token = tokens + begin;
      T* row = s.row(r) + begin - at.key;
      for (int64_t m = 0; m < end - begin; ++m) row[m] = key_token[m] <= own ? row[m] : kHidden;
    }
  }

  std::vector<const int32_t*> tokens_;
  int64_t reach_;
};

struct Call {
  Call(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const Tensor& permutation, const Tensor& out_in, const Tensor& lse_in,
       const StochasticOptions& options, const RunOptions& run_in)
      : q(q_in),
        k(k_in),
        v(v_in),
        out(out_in),
        lse(lse_in),
        order(checked_order(op, q, k, v, permutation, out, lse, options)),
        scale(tiled::resolve_scale(op, options.scale, q.size(3))),
        reach(std::min(options.window / 2, q.size(2))),
        causal(options.causal),
        run(run_in) {}

  static SlotOrder checked_order(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& permutation, const Tensor& out, const Tensor& lse,
                                 const StochasticOptions& options) {
    tiled::check_operands(op, q, k, v, out, lse);
    if (q.size(2) != k.size(2)) {
      fail(op,
           "k has " + std::to_string(k.size(2)) + " tokens but q has " + std::to_string(q.size(2)),
           "queries, keys and values of the same tokens are needed");
    }
    if (options.window < 1) {
      fail(op, "window is " + std::to_string(options.window), "a number of slots >= 1 is needed");
    }
    return {op, permutation, q.size(0), q.size(1), q.size(2)};
  }

  bool empty() const { return q.count() == 0; }
  int64_t group() const { return q.size(1) / k.size(1); }
  /// Copies of the keys for each key head: as many as there are orders.
  int64_t key_copies() const { return order.per_head() ? group() : 1; }
  /// Gradients of several copies are summed in the type of sums.
  DType key_gradient_type() const { return key_copies() > 1 ? wide_type(q.dtype()) : q.dtype(); }

  Tensor q, k, v, out, lse;
  SlotOrder order;
  double scale;
  int64_t reach;
  bool causal;
  RunOptions run;
};

/// Key heads [begin, end) of one batch entry with their query heads.
struct Part {
  int64_t batch, begin, end;
};

std::vector<Part> parts_of(const Call& call) {
  const int64_t heads = call.k.size(1);
  const int64_t copies = call.group() + call.key_copies();
  const int64_t head_bytes = copies * call.q.size(2) * (call.q.size(3) + call.v.size(3)) *
                             static_cast<int64_t>(size_of(call.q.dtype()));
  const int64_t threads = call.run.threads.value_or(default_threads());
  const int64_t step = std::clamp<int64_t>(kPartBytes * threads / head_bytes, 1, heads);
  std::vector<Part> parts;
  for (int64_t b = 0; b < call.q.size(0); ++b) {
    for (int64_t h = 0; h < heads; h += step) parts.push_back({b, h, std::min(h + step, heads)});
  }
  return parts;
}

/// Moves rows between tokens and slots, all heads of a part at once.
class Mover {
 public:
  Mover(const Call& call, const Part& part) : call_(call), part_(part) {}

  int64_t query_heads() const { return (part_.end - part_.begin) * call_.group(); }
  int64_t key_heads() const { return (part_.end - part_.begin) * call_.key_copies(); }

  /// Heads of [B,H,L,...] as [heads,L,...]; undefined stays undefined.
  Tensor queries(const Tensor& t) const {
    if (!t.defined()) return t;
    return t.select(0, part_.batch)
        .slice(0, part_.begin * call_.group(), part_.end * call_.group());
  }
  Tensor keys(const Tensor& t) const {
    return t.select(0, part_.batch).slice(0, part_.begin, part_.end);
  }
  /// Whose order the n-th head of copied rows has.
  int64_t order_head(int64_t n) const {
    return call_.order.per_head() ? part_.begin * call_.group() + n : 0;
  }
  const int32_t* tokens(int64_t query_head) const {
    return call_.order.tokens(part_.batch, order_head(query_head));
  }

  /// Tokens [heads,L(,width)] to slots; several copies of a head lie behind one another.
  void to_slots(const Tensor& from, const Tensor& slots) const { move(from, slots, true); }
  void to_tokens(const Tensor& slots, const Tensor& to) const { move(slots, to, false); }

  /// Sums the copies of each key head.
  template <class T>
  void sum_to_tokens(const Tensor& slots, const Tensor& to) const;

 private:
  static Tensor as_rows(const Tensor& t, int64_t head) {
    const Tensor one = t.select(0, head);
    if (one.rank() == 2) return one;
    return {one.data(), one.dtype(), {one.size(0), 1}, {one.stride(0), 1}};
  }
  template <class Each>
  void for_each_run(int64_t heads, const Each& each) const {
    const int64_t tokens = call_.q.size(2), runs = (tokens + kRowsPerMove - 1) / kRowsPerMove;
    const int64_t elements = heads * tokens * call_.q.size(3);
    parallel_for(heads * runs, threads_for_rows(call_.run, heads * runs, elements),
                 [&](int64_t item, int) {
                   const int64_t begin = item % runs * kRowsPerMove;
                   each(item / runs, begin, std::min(begin + kRowsPerMove, tokens));
                 });
  }
  void move(const Tensor& from, const Tensor& to, bool to_slots) const {
    const int64_t heads = std::max(from.size(0), to.size(0));
    for_each_run(heads, [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t head = order_head(n);
      const int32_t* index =
          to_slots ? call_.order.tokens(part_.batch, head) : call_.order.slots(part_.batch, head);
      gather_rows(as_rows(from, n * from.size(0) / heads), index,
                  as_rows(to, n * to.size(0) / heads), begin, end);
    });
  }

  const Call& call_;
  const Part part_;
};

template <class T>
void Mover::sum_to_tokens(const Tensor& slots, const Tensor& to) const {
  const int64_t copies = call_.key_copies(), width = to.size(2);
  for_each_run(to.size(0), [&](int64_t n, int64_t begin, int64_t end) {
    std::vector<T> sum(static_cast<size_t>(width));
    const Tensor rows(sum.data(), slots.dtype(), {1, width});
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), T{0});
      for (int64_t c = n * copies; c < (n + 1) * copies; ++c) {
        const int32_t* slot = call_.order.slots(part_.batch, order_head(c));
        const T* row = reinterpret_cast<const T*>(slots.at({c, slot[i]}));
        for (int64_t f = 0; f < width; ++f) sum[static_cast<size_t>(f)] += row[f];
      }
      copy(rows, to.select(0, n).slice(0, i, i + 1));
    }
  });
}

/// Rows of a part in the order of slots.
struct SlotRows {
  Tensor q, k, v, out, lse;
};

int64_t part_bytes(const Call& call, const Part& part) {
  const int64_t tokens = call.q.size(2), heads = part.end - part.begin;
  const int64_t queries = heads * call.group() * tokens, keys = heads * call.key_copies() * tokens;
  const auto bytes = [](DType dtype, int64_t rows, int64_t width) {
    return RowMemory::bytes_of(dtype, rows * width);
  };
  const DType wide = wide_type(call.q.dtype());
  return bytes(call.q.dtype(), queries, call.q.size(3)) +
         bytes(call.q.dtype(), queries, call.v.size(3)) + bytes(wide, queries, 1) +
         bytes(call.key_gradient_type(), keys, call.q.size(3)) +
         bytes(call.key_gradient_type(), keys, call.v.size(3));
}

SlotRows read_part(const Call& call, const Mover& mover, RowMemory& memory) {
  const DType dtype = call.q.dtype();
  const int64_t tokens = call.q.size(2), dim = call.q.size(3), value_dim = call.v.size(3);
  SlotRows rows;
  rows.q = memory.take(dtype, {mover.query_heads(), tokens, dim});
  rows.k = memory.take(dtype, {mover.key_heads(), tokens, dim});
  rows.v = memory.take(dtype, {mover.key_heads(), tokens, value_dim});
  rows.out = memory.take(dtype, {mover.query_heads(), tokens, value_dim});
  rows.lse = memory.take(wide_type(dtype), {mover.query_heads(), tokens});
  mover.to_slots(mover.queries(call.q), rows.q);
  mover.to_slots(mover.keys(call.k), rows.k);
  mover.to_slots(mover.keys(call.v), rows.v);
  return rows;
}

CausalTokens causal_terms(const Call& call, const Mover& mover) {
  std::vector<const int32_t*> tokens;
  for (int64_t h = 0; h < mover.query_heads(); ++h) tokens.push_back(mover.tokens(h));
  return {std::move(tokens), call.reach};
}

tiled::Problem slot_problem(const Call& call, const SlotRows& rows,
                            const tiled::ScoreTerms& causal) {
  Masks window;
  window.window = {call.reach, call.reach};
  tiled::Problem problem;
  problem.scale = call.scale;
  tiled::Sequence s;
  s.q = rows.q;
  s.k = rows.k;
  s.v = rows.v;
  s.out = rows.out;
  s.lse = rows.lse;
  s.plan = tiled::TilePlan::from_masks(kOp, window, 1, rows.q.size(1), rows.k.size(1))[0];
  problem.sequences.push_back(std::move(s));
  if (call.causal) problem.terms = &causal;
  return problem;
}

}  // namespace

void stochastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& permutation, const Tensor& out, const Tensor& lse,
                          const StochasticOptions& options, const RunOptions& run) {
  const Call call(kOp, q, k, v, permutation, out, lse, options, run);
  if (call.empty()) return;
  const std::vector<Part> parts = parts_of(call);
  RowMemory memory(part_bytes(call, parts[0]));
  for (const Part& part : parts) {
    memory.reset();
    const Mover mover(call, part);
    const SlotRows rows = read_part(call, mover, memory);
    const CausalTokens causal = causal_terms(call, mover);
    tiled::forward(slot_problem(call, rows, causal), run);
    mover.to_tokens(rows.out, mover.queries(out));
    if (lse.defined()) mover.to_tokens(rows.lse, mover.queries(lse));
  }
}

AttentionResult stochastic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& permutation, const StochasticOptions& options,
                                     const RunOptions& run) {
  AttentionResult result{empty_result(q, v), empty_statistic(q)};
  stochastic_attention(q, k, v, permutation, result.out, result.lse, options, run);
  return result;
}

StochasticGradients stochastic_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& permutation, const Tensor& out,
                                                  const Tensor& lse,
                                                  const StochasticOptions& options,
                                                  const RunOptions& run) {
  constexpr const char* kBackward = "stochastic_attention_backward";
  const Call call(kBackward, q, k, v, permutation, out, lse, options, run);
  tiled::check_backward(kBackward, grad_out, grad_lse, out, lse);
  StochasticGradients gradients{Array::zeros(q.dtype(), q.shape()),
                                Array::zeros(k.dtype(), k.shape()),
                                Array::zeros(v.dtype(), v.shape())};
  if (call.empty()) return gradients;
  const std::vector<Part> parts = parts_of(call);
  RowMemory memory(2 * part_bytes(call, parts[0]));  // every tensor and its gradient
  for (const Part& part : parts) {
    memory.reset();
    const Mover mover(call, part);
    const SlotRows rows = read_part(call, mover, memory);
    mover.to_slots(mover.queries(out), rows.out);
    mover.to_slots(mover.queries(lse), rows.lse);
    tiled::SequenceGradient gradient;
    gradient.out = memory.take(q.dtype(), rows.out.shape());
    mover.to_slots(mover.queries(grad_out), gradient.out);
    if (grad_lse.defined()) {
      gradient.lse = memory.take(rows.lse.dtype(), rows.lse.shape());
      mover.to_slots(mover.queries(grad_lse), gradient.lse);
    }
    gradient.q = memory.take(q.dtype(), rows.q.shape());
    gradient.k = memory.take(call.key_gradient_type(), rows.k.shape());
    gradient.v = memory.take(call.key_gradient_type(), rows.v.shape());
    const CausalTokens causal = causal_terms(call, mover);
    tiled::backward(slot_problem(call, rows, causal), {gradient}, nullptr, run);
    mover.to_tokens(gradient.q, mover.queries(gradients.q));
    const std::pair<Tensor, Tensor> key_gradients[] = {{gradient.k, mover.keys(gradients.k)},
                                                       {gradient.v, mover.keys(gradients.v)}};
    for (const auto& [slots, tokens] : key_gradients) {
      if (call.key_copies() == 1) {
        mover.to_tokens(slots, tokens);
      } else {
        with_wide_type(q.dtype(), [&]<class T>(T) { mover.sum_to_tokens<T>(slots, tokens); });
      }
    }
  }
  return gradients;
}

}  // namespace heed
