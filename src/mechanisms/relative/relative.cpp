#include <string>
#include <tuple>
#include <utility>

#include "engine/operands.h"
#include "heed/relative_attention.h"
#include "mechanisms/parameter.h"
#include "mechanisms/relative/terms.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "relative_attention";
// Twice the engine's own: the rows of a tile share the rows of the table that are packed for it.
constexpr int64_t kQueryTile = 96;

void check_tables(const RelativeInputs& in) {
  const Tensor& table = in.rel_key;
  const int64_t queries = in.q.size(2), keys = in.k.size(2);
  const Dims heads{in.q.size(1), in.q.size(3)};
  const std::string shape =
      "[2P," + std::to_string(heads[0]) + "," + std::to_string(heads[1]) + "]";
  if (!table.defined()) fail(kOp, "rel_key is missing", shape + " is needed");
  if (table.rank() != 3 || table.size(1) != heads[0] || table.size(2) != heads[1] ||
      table.size(0) % 2 != 0) {
    fail(kOp, describe("rel_key", table), shape + " is needed: P distances to each side");
  }
  check_parameter(kOp, "rel_key", table, table.shape(), in.q.dtype());
  const int64_t left = keys - 1, right = in.causal ? 1 : queries;
  if (queries > 0 && keys > 0 && in.centre() < std::max(left, right)) {
    fail(kOp, describe("rel_key", table) + " has P = " + std::to_string(in.centre()),
         "P >= " + std::to_string(std::max(left, right)) + " is needed for " +
             std::to_string(queries) + " queries and " + std::to_string(keys) + " keys" +
             (in.causal ? "" : " without the causal mask"));
  }
  for (const auto& [name, t, wanted] :
       {std::tuple("rel_bias", &in.rel_bias, Dims{table.size(0), heads[0]}),
        std::tuple("content_bias", &in.content_bias, heads)}) {
    if (!t->defined())
      fail(kOp, std::string(name) + " is missing", to_string(wanted) + " is needed");
    check_parameter(kOp, name, *t, wanted, in.q.dtype());
  }
}

/// A checked call.
struct Call {
  RelativeInputs in;
  tiled::Problem problem;
};

Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rel_key,
               const Tensor& rel_bias, const Tensor& content_bias, const Tensor& out,
               const Tensor& lse, const RelativeOptions& options) {
  tiled::check_operands(kOp, q, k, v, out, lse);
  Call call;
  call.in = {q,
             k,
             rel_key,
             rel_bias,
             content_bias,
             options.causal,
             tiled::resolve_scale(kOp, options.scale, q.size(3))};
  check_tables(call.in);
  call.problem.scale = call.in.scale;
  call.problem.query_tile = kQueryTile;
  call.problem.sequences =
      tiled::batch_sequences(q, k, v, out, lse,
                             tiled::TilePlan::from_masks(kOp, {.causal = options.causal}, q.size(0),
                                                         q.size(2), k.size(2)));
  return call;
}

template <class T>
void run_forward(Call call, const RunOptions& run) {
  const RelativeTerms<T> terms(call.in, run);
  call.problem.terms = &terms;
  tiled::forward(call.problem, run);
}

template <class T>
Array rounded(const Array& from, DType type, const RunOptions& run) {
  Array to(type, from.shape());
  const int64_t width = from.shape().back();
  kernels::tile_kernels<T>(chosen_isa(run))
      .finish({from.as<T>(), width}, from.count() / width, width, nullptr, to.view().data(), type,
              width);
  return to;
}

template <class T>
RelativeGradients run_backward(Call call, const Tensor& v, const Tensor& grad_out,
                               const Tensor& grad_lse, const RunOptions& run) {
  RelativeTerms<T> terms(call.in, run);
  call.problem.terms = &terms;
  const DType type = call.in.q.dtype();
  RelativeGradients to;
  to.q = Array(type, call.in.q.shape());
  to.k = Array(wide_type(type), call.in.k.shape());  // the content bias adds to it
  to.v = Array(type, v.shape());
  tiled::backward(call.problem, tiled::batch_gradients(grad_out, grad_lse, to.q, to.k, to.v),
                  &terms, run);
  to.rel_key = terms.rel_key_gradient();
  to.rel_bias = terms.rel_bias_gradient();
  to.content_bias = terms.content_bias_gradient(to.k);
  if (is_half(type)) to.k = rounded<T>(to.k, type, run);
  return to;
}

}  // namespace

void relative_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rel_key,
                        const Tensor& rel_bias, const Tensor& content_bias, const Tensor& out,
                        const Tensor& lse, const RelativeOptions& options, const RunOptions& run) {
  Call call = make_call(q, k, v, rel_key, rel_bias, content_bias, out, lse, options);
  with_wide_type(q.dtype(), [&]<class T>(T) { run_forward<T>(std::move(call), run); });
}

RelativeResult relative_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& rel_key, const Tensor& rel_bias,
                                  const Tensor& content_bias, const RelativeOptions& options,
                                  const RunOptions& run) {
  RelativeResult result{empty_result(q, v), empty_statistic(q)};
  relative_attention(q, k, v, rel_key, rel_bias, content_bias, result.out, result.lse, options,
                     run);
  return result;
}

RelativeGradients relative_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                              const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& rel_key, const Tensor& rel_bias,
                                              const Tensor& content_bias, const Tensor& out,
                                              const Tensor& lse, const RelativeOptions& options,
                                              const RunOptions& run) {
  Call call = make_call(q, k, v, rel_key, rel_bias, content_bias, out, lse, options);
  tiled::check_backward(kOp, grad_out, grad_lse, out, lse);
  return with_wide_type(q.dtype(), [&]<class T>(T) {
    return run_backward<T>(std::move(call), v, grad_out, grad_lse, run);
  });
}

}  // namespace heed
