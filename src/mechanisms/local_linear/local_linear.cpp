#include <cmath>
#include <string>

#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/local_linear_attention.h"
#include "mechanisms/local_linear/estimator.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "local_linear_attention";

local_linear::Call checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                           const LocalLinearOptions& options, const RunOptions& run) {
  tiled::check_operands(kOp, q, k, v, out, {});
  if (!std::isfinite(options.ridge) || options.ridge <= 0) {
    fail(kOp, "ridge is " + std::to_string(options.ridge), "a finite number > 0 is needed");
  }
  Masks masks;
  masks.causal = options.causal;
  local_linear::Call call{
      q, k, v, tiled::resolve_scale(kOp, options.scale, q.size(3)), options.ridge, {}, run};
  call.plan = tiled::TilePlan::from_masks(kOp, masks, 1, q.size(2), k.size(2))[0];
  return call;
}

bool nothing_to_do(const Tensor& q) { return q.size(0) == 0 || q.size(1) == 0; }

}  // namespace

void local_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const LocalLinearOptions& options, const RunOptions& run) {
  const local_linear::Call call = checked(q, k, v, out, options, run);
  if (nothing_to_do(q)) return;
  local_linear::Estimator(call).forward(out);
}

Array local_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                             const LocalLinearOptions& options, const RunOptions& run) {
  Array out = empty_result(q, v);
  local_linear_attention(q, k, v, out, options, run);
  return out;
}

LocalLinearGradients local_linear_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                     const Tensor& k, const Tensor& v,
                                                     const LocalLinearOptions& options,
                                                     const RunOptions& run) {
  check_grad_out(kOp, grad_out, q, v);
  const local_linear::Call call = checked(q, k, v, grad_out, options, run);
  LocalLinearGradients gradients{empty_like(q), empty_like(k), empty_like(v)};
  if (nothing_to_do(q)) {
    gradients.k = Array::zeros(k.dtype(), k.shape());
    gradients.v = Array::zeros(v.dtype(), v.shape());
    return gradients;
  }
  local_linear::backward(call, grad_out, {gradients.q, gradients.k, gradients.v});
  return gradients;
}

}  // namespace heed
