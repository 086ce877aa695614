#include <string>

#include "engine/tiled/problem.h"
#include "mechanisms/neighborhood/passes.h"

namespace heed {

namespace {

NeighborhoodGradients zero_gradients(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const NeighborhoodOptions& options) {
  const auto like = [](const Tensor& t) {
    return t.defined() ? Array::zeros(t.dtype(), t.shape()) : Array();
  };
  return {like(query),
          like(key),
          like(value),
          like(options.additional_keys),
          like(options.additional_values),
          like(options.rpb)};
}

void run_forward(const char* op, int rank, const Tensor& query, const Tensor& key,
                 const Tensor& value, const Tensor& out, const Tensor& lse,
                 const NeighborhoodOptions& options, const RunOptions& run) {
  const na::GridCall call(op, rank, query, key, value, out, lse, options);
  if (!out.defined()) {
    fail(op, "out is missing", "a tensor shaped like query is needed, with the head dim of value");
  }
  na::forward(call, run);
}

AttentionResult run_allocating(const char* op, int rank, const Tensor& query, const Tensor& key,
                               const Tensor& value, const NeighborhoodOptions& options,
                               const RunOptions& run) {
  // Shapes are right once this is checked.
  const na::GridCall call(op, rank, query, key, value, {}, {}, options);
  Dims shape = query.shape();
  const Dims rows(shape.span().first(static_cast<size_t>(rank + 2)));
  shape[rank + 2] = value.size(rank + 2);
  AttentionResult result{Array(query.dtype(), shape), Array(wide_type(query.dtype()), rows)};
  run_forward(op, rank, query, key, value, result.out, result.lse, options, run);
  return result;
}

NeighborhoodGradients run_backward(const char* op, int rank, const Tensor& grad_out,
                                   const Tensor& grad_lse, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const Tensor& out, const Tensor& lse,
                                   const NeighborhoodOptions& options, const RunOptions& run) {
  const na::GridCall call(op, rank, query, key, value, out, lse, options);
  if (!out.defined() || !lse.defined()) {
    fail(op, std::string(out.defined() ? "lse" : "out") + " is missing",
         "what the forward returned is needed");
  }
  check_parameter_gradient(op, "grad_out", grad_out, out);
  check_result(op, "grad_lse", grad_lse, lse.shape(), lse.dtype());
  NeighborhoodGradients result = zero_gradients(query, key, value, options);
  const auto six = [rank](const Tensor& t) { return na::six_axes(t, rank); };
  na::CallGradients gradients{six(grad_out),
                              na::six_axes_of_sums(grad_lse, rank),
                              six(result.query),
                              six(result.key),
                              six(result.value),
                              {},
                              {}};
  if (call.has_additional()) {
    gradients.additional_keys = na::heads_first(result.additional_keys);
    gradients.additional_values = na::heads_first(result.additional_values);
  }
  Array rpb = na::backward(call, gradients, run);
  if (rpb.view().defined()) result.rpb = std::move(rpb);
  return result;
}

}  // namespace

AttentionResult na1d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na1d", 1, query, key, value, options, run);
}

AttentionResult na2d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na2d", 2, query, key, value, options, run);
}

AttentionResult na3d(const Tensor& query, const Tensor& key, const Tensor& value,
                     const NeighborhoodOptions& options, const RunOptions& run) {
  return run_allocating("na3d", 3, query, key, value, options, run);
}

void na1d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na1d", 1, query, key, value, out, lse, options, run);
}

void na2d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na2d", 2, query, key, value, out, lse, options, run);
}

void na3d(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
          const Tensor& lse, const NeighborhoodOptions& options, const RunOptions& run) {
  run_forward("na3d", 3, query, key, value, out, lse, options, run);
}

NeighborhoodGradients na1d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na1d_backward", 1, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

NeighborhoodGradients na2d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na2d_backward", 2, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

NeighborhoodGradients na3d_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& out, const Tensor& lse,
                                    const NeighborhoodOptions& options, const RunOptions& run) {
  return run_backward("na3d_backward", 3, grad_out, grad_lse, query, key, value, out, lse, options,
                      run);
}

}  // namespace heed
