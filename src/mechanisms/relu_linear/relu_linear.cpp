#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "engine/operands.h"
#include "heed/relu_linear_attention.h"
#include "mechanisms/element_map.h"
#include "mechanisms/parameter.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "relu_linear_attention";

/// A checked call with what its policy points to.
template <class T>
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
       const ReluLinearOptions& options, const RunOptions& run)
      : map(FeatureKind::relu, chosen_isa(run)) {
    problem.q = q;
    problem.k = k;
    problem.v = v;
    problem.causal = false;
    problem.total = {.sums = options.forward_state.s, .keys = options.forward_state.z};
    chunked::Policy<T>& policy = problem.policy;
    policy.maps = {&map, &map};
    policy.features = q.size(3);
    policy.key_sum = true;
    policy.scales = contiguous_values<double>(temperature);
    const double least =
        std::max(options.clamp, static_cast<double>(std::numeric_limits<T>::min()));
    policy.read_out = chunked::each_row<T>([least](int64_t, int64_t, double denominator) {
      chunked::ReadOut row;
      row.num_scale = 1 / (denominator < least ? least : denominator);  // NaN stays NaN
      row.num_slope = denominator < least ? 0 : -row.num_scale * row.num_scale;
      return row;
    });
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  ElementMap<T> map;
  chunked::Problem<T> problem;
};

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                 const Tensor& out, const ReluLinearState& state, const ReluLinearOptions& options,
                 const RunOptions& run) {
  const Call<T> call(q, k, v, temperature, options, run);
  chunked::forward(call.problem, out, {.sums = state.s, .keys = state.z}, run);
}

template <class T>
void run_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& temperature, const ReluLinearOptions& options,
                  const ReluLinearGradientViews& into, const RunOptions& run) {
  const Call<T> call(q, k, v, temperature, options, run);
  std::vector<double> scales(static_cast<size_t>(q.size(1)));
  chunked::Gradients gradients{into.q, into.k, into.v, {}, nullptr, &scales};
  chunked::backward(call.problem, grad_out, {}, gradients, run);
  copy_values(scales.data(), into.temperature);
}

void check_state(const std::string& of, const ReluLinearState& state, const Tensor& q,
                 const Tensor& v) {
  chunked::check_sums(kOp, of, state.s, state.z, q, v, q.size(3));
}

AttentionSizes checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                       const ReluLinearOptions& options) {
  const AttentionSizes sizes = check_attention(kOp, q, k, v);
  check_parameter(kOp, "temperature", temperature, {sizes.heads}, q.dtype());
  if (!(options.clamp > 0) || !std::isfinite(options.clamp)) {
    fail(kOp, "clamp is " + std::to_string(options.clamp), "a positive number is needed");
  }
  check_state("forward_state", options.forward_state, q, v);
  return sizes;
}

}  // namespace

void relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& temperature, const Tensor& out,
                           const ReluLinearState& state, const ReluLinearOptions& options,
                           const RunOptions& run) {
  const AttentionSizes sizes = checked(q, k, v, temperature, options);
  check_rows_like(kOp, "out", out, sizes.out_shape(), q.dtype());
  check_state("state", state, q, v);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_forward<T>(q, k, v, temperature, out, state, options, run);
  });
}

Array relu_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& temperature, const ReluLinearOptions& options,
                            const RunOptions& run) {
  Array out(q.dtype(), checked(q, k, v, temperature, options).out_shape());
  relu_linear_attention(q, k, v, temperature, out, {}, options, run);
  return out;
}

void relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& temperature,
                                    const ReluLinearOptions& options,
                                    const ReluLinearGradientViews& gradients,
                                    const RunOptions& run) {
  const AttentionSizes sizes = checked(q, k, v, temperature, options);
  check_rows_like(kOp, "grad_out", grad_out, sizes.out_shape(), q.dtype());
  check_rows_like(kOp, "gradient of q", gradients.q, q.shape(), q.dtype());
  check_rows_like(kOp, "gradient of k", gradients.k, k.shape(), q.dtype());
  check_rows_like(kOp, "gradient of v", gradients.v, v.shape(), q.dtype());
  check_parameter_gradient(kOp, "gradient of temperature", gradients.temperature, temperature);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_backward<T>(grad_out, q, k, v, temperature, options, gradients, run);
  });
}

ReluLinearGradients relu_linear_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                   const Tensor& k, const Tensor& v,
                                                   const Tensor& temperature,
                                                   const ReluLinearOptions& options,
                                                   const RunOptions& run) {
  checked(q, k, v, temperature, options);
  ReluLinearGradients result{empty_like(q), empty_like(k), empty_like(v), empty_like(temperature)};
  relu_linear_attention_backward(grad_out, q, k, v, temperature, options,
                                 {result.q, result.k, result.v, result.temperature}, run);
  return result;
}

}  // namespace heed
