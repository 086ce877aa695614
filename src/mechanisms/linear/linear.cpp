#include <cmath>
#include <string>

#include "engine/chunked/problem.h"
#include "heed/linear_attention.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "linear_attention";
constexpr const char* kBackward = "linear_attention_backward";

Dims s_shape(const Tensor& q, const Tensor& v) { return chunked::sums_shape(q, v, q.size(3)); }
Dims z_shape(const Tensor& q) { return chunked::key_sums_shape(q, q.size(3)); }

void check_state(const char* op, const std::string& of, const LinearState& state, const Tensor& q,
                 const Tensor& v, bool normalize) {
  chunked::check_sums(op, of, state.s, state.z, q, v, q.size(3));
  if (!normalize && state.z.defined()) {
    fail(op, describe((of + " z").c_str(), state.z) + " without normalize",
         "only s belongs to that state");
  }
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const LinearOptions& options) {
  check_attention(kOp, q, k, v, {}, kAnyHeadDim);
  const LinearState& state = options.initial_state;
  check_state(kOp, "initial_state", state, q, v, options.normalize);
  if (options.normalize && state.s.defined() != state.z.defined()) {
    fail(kOp, std::string("initial_state has ") + (state.s.defined() ? "s" : "z") + " alone",
         "normalize needs both s and z");
  }
  check_state(kOp, "forward_state", options.forward_state, q, v, options.normalize);
  chunked::check_alignment(kOp, options.causal, state.s.defined(), q.size(2), k.size(2));
  if (!std::isfinite(options.eps) || options.eps < 0) {
    fail(kOp, "eps is " + std::to_string(options.eps),
         "a finite number that is not negative is needed");
  }
}

template <class T>
chunked::Problem<T> make_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const LinearOptions& options) {
  chunked::Problem<T> problem;
  problem.q = q;
  problem.k = k;
  problem.v = v;
  problem.causal = options.causal;
  if (options.lengths.defined()) {
    problem.lengths = read_lengths(kOp, options.lengths, q.size(0), k.size(2));
  }
  problem.initial = {.sums = options.initial_state.s, .keys = options.initial_state.z};
  problem.total = {.sums = options.forward_state.s, .keys = options.forward_state.z};
  problem.policy.features = q.size(3);
  if (!options.normalize) return problem;
  problem.policy.key_sum = true;
  problem.policy.read_out =
      chunked::each_row<T>([eps = options.eps](int64_t, int64_t, double denominator) {
        const double inverse = 1 / (denominator + eps);
        // Infinite in T: of the products that the denominator is made of, hardly a bit was left.
        const bool vanishes = std::isinf(static_cast<T>(inverse));
        chunked::ReadOut row;
        row.num_scale = vanishes ? 0 : inverse;
        row.num_slope = -row.num_scale * row.num_scale;
        return row;
      });
  return problem;
}

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const LinearState& state, const LinearOptions& options, const RunOptions& run) {
  chunked::forward(make_problem<T>(q, k, v, options), out, {.sums = state.s, .keys = state.z}, run);
}

template <class T>
void run_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
                  const LinearState& state_gradient, const LinearGradientViews& into,
                  const LinearOptions& options, const RunOptions& run) {
  chunked::backward(make_problem<T>(q, k, v, options), out_gradient,
                    {.sums = state_gradient.s, .keys = state_gradient.z},
                    {into.q, into.k, into.v, {.sums = into.s, .keys = into.z}, nullptr}, run);
}

}  // namespace

void linear_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                      const LinearState& state, const LinearOptions& options,
                      const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_out(kOp, out, q, v);
  check_state(kOp, "state", state, q, v, options.normalize);
  with_wide_type(q.dtype(), [&]<class T>(T) { run_forward<T>(q, k, v, out, state, options, run); });
}

LinearResult linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const LinearOptions& options, const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  LinearResult result{Array(q.dtype(), out_shape(q, v)), Array(type, s_shape(q, v)), {}};
  if (options.normalize) result.z = Array(type, z_shape(q));
  linear_attention(q, k, v, result.out, {result.s, result.z}, options, run);
  return result;
}

void linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out_gradient, const LinearState& state_gradient,
                               const LinearGradientViews& gradients, const LinearOptions& options,
                               const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_gradients(kBackward, q, k, v, out_gradient,
                           {gradients.q, gradients.k, gradients.v});
  check_state(kBackward, "state_gradient", state_gradient, q, v, options.normalize);
  check_state(kBackward, "gradient of initial_state", {gradients.s, gradients.z}, q, v,
              options.normalize);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_backward<T>(q, k, v, out_gradient, state_gradient, gradients, options, run);
  });
}

LinearGradients linear_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out_gradient,
                                          const LinearState& state_gradient,
                                          const LinearOptions& options, const RunOptions& run) {
  check(q, k, v, options);
  const DType type = wide_type(q.dtype());
  LinearGradients result{empty_like(q), empty_like(k), empty_like(v), {}, {}};
  if (options.initial_state.s.defined()) result.s = Array(type, s_shape(q, v));
  if (options.initial_state.z.defined()) result.z = Array(type, z_shape(q));
  linear_attention_backward(q, k, v, out_gradient, state_gradient,
                            {result.q, result.k, result.v, result.s, result.z}, options, run);
  return result;
}

}  // namespace heed
