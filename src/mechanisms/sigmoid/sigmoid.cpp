#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/tiled/problem.h"
#include "heed/sigmoid_attention.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "sigmoid_attention";

std::vector<double> resolve_bias(const SigmoidOptions& options, int64_t heads, int64_t keys) {
  if (const auto* tensor = std::get_if<Tensor>(&options.bias)) {
    return tiled::per_head(kOp, "bias", *tensor, heads);
  }
  const auto* number = std::get_if<double>(&options.bias);
  const double bias = number != nullptr ? *number
                      : keys > 0        ? -std::log(static_cast<double>(keys))
                                        : 0;
  return std::vector<double>(static_cast<size_t>(heads), bias);
}

tiled::Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const SigmoidOptions& options) {
  tiled::check_operands(kOp, q, k, v, out, {});
  tiled::Problem problem;
  problem.sequences = tiled::batch_sequences(
      q, k, v, out, {},
      tiled::TilePlan::from_masks(kOp, options.masks, q.size(0), q.size(2), k.size(2)));
  problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  problem.policy.weight = kernels::WeightKind::sigmoid;
  problem.policy.head_bias = resolve_bias(options, q.size(1), k.size(2));
  // An infinite one means weights of 1, and would make NaN of scores that are hidden.
  for (double& bias : problem.policy.head_bias) {
    bias = std::min(bias, std::numeric_limits<double>::max());
  }
  tiled::set_alibi_slopes(problem.policy, kOp, options.alibi_slopes, q.size(0), q.size(1));
  return problem;
}

}  // namespace

void sigmoid_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const SigmoidOptions& options, const RunOptions& run) {
  tiled::forward(make_problem(q, k, v, out, options), run);
}

Array sigmoid_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                        const SigmoidOptions& options, const RunOptions& run) {
  Array out = empty_result(q, v);
  sigmoid_attention(q, k, v, out, options, run);
  return out;
}

SigmoidGradients sigmoid_attention_backward(const Tensor& grad_out, const Tensor& q,
                                            const Tensor& k, const Tensor& v,
                                            const SigmoidOptions& options, const RunOptions& run,
                                            const SigmoidWanted& wanted) {
  // The gradient of the result looks like the result, and is checked as it.
  tiled::Problem problem = make_problem(q, k, v, grad_out, options);
  const auto* bias = std::get_if<Tensor>(&options.bias);
  const bool bias_wanted = wanted.bias && bias != nullptr;
  const bool slopes_wanted = wanted.alibi_slopes && options.alibi_slopes.defined();
  problem.head_gradients = bias_wanted || slopes_wanted;
  SigmoidGradients to;
  to.q = Array(q.dtype(), q.shape());
  to.k = Array::zeros(k.dtype(), k.shape());
  to.v = Array::zeros(v.dtype(), v.shape());
  const tiled::HeadGradients heads = tiled::backward(
      problem, tiled::batch_gradients(grad_out, {}, to.q, to.k, to.v), nullptr, run);
  if (bias_wanted) to.bias = head_gradient(heads.bias, *bias);
  if (slopes_wanted) to.alibi_slopes = head_gradient(heads.alibi_slope, options.alibi_slopes);
  return to;
}

}  // namespace heed
