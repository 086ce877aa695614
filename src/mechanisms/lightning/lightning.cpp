#include "engine/chunked/problem.h"
#include "heed/error.h"
#include "heed/lightning_attention.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "lightning_attention";

Dims state_shape(const Tensor& q, const Tensor& v) {
  return {q.size(0), q.size(1), q.size(3), v.size(3)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const LightningOptions& options) {
  check_attention(kOp, q, k, v, {}, kAnyHeadDim);
  check_result(kOp, "initial_state", options.initial_state, state_shape(q, v),
               wide_type(q.dtype()));
  chunked::check_alignment(kOp, true, options.initial_state.defined(), q.size(2), k.size(2));
}

template <class T>
chunked::Problem<T> make_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const LightningOptions& options) {
  chunked::Problem<T> problem;
  problem.q = q;
  problem.k = k;
  problem.v = v;
  problem.initial.sums = options.initial_state;
  problem.policy.features = q.size(3);
  if (options.slopes.defined()) {
    problem.policy.slopes = chunked::check_slopes(kOp, options.slopes, q.size(1));
  }
  return problem;
}

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const Tensor& state, const LightningOptions& options, const RunOptions& run) {
  chunked::forward(make_problem<T>(q, k, v, options), out, {.sums = state}, run);
}

template <class T>
void run_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_gradient,
                  const Tensor& state_gradient, const LightningGradientViews& into,
                  const LightningOptions& options, const RunOptions& run) {
  std::vector<double> slopes(static_cast<size_t>(q.size(1)), 0);
  chunked::Gradients gradients{into.q, into.k, into.v, {.sums = into.initial_state}, nullptr};
  if (into.slopes.defined()) gradients.slopes = &slopes;
  chunked::backward(make_problem<T>(q, k, v, options), out_gradient, {.sums = state_gradient},
                    gradients, run);
  if (!into.slopes.defined()) return;
  copy(Tensor(slopes.data(), DType::f64, {q.size(1)}), into.slopes);
}

}  // namespace

void lightning_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                         const Tensor& state, const LightningOptions& options,
                         const RunOptions& run) {
  check(q, k, v, options);
  chunked::check_out(kOp, out, q, v);
  check_result(kOp, "state", state, state_shape(q, v), wide_type(q.dtype()));
  with_wide_type(q.dtype(), [&]<class T>(T) { run_forward<T>(q, k, v, out, state, options, run); });
}

LightningResult lightning_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const LightningOptions& options, const RunOptions& run) {
  check(q, k, v, options);
  LightningResult result{Array(q.dtype(), out_shape(q, v)),
                         Array(wide_type(q.dtype()), state_shape(q, v))};
  lightning_attention(q, k, v, result.out, result.state, options, run);
  return result;
}

void lightning_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out_gradient, const Tensor& state_gradient,
                                  const LightningGradientViews& gradients,
                                  const LightningOptions& options, const RunOptions& run) {
  constexpr const char* kBackward = "lightning_attention_backward";
  check(q, k, v, options);
  const DType state = wide_type(q.dtype());
  chunked::check_gradients(kBackward, q, k, v, out_gradient,
                           {gradients.q, gradients.k, gradients.v});
  check_result(kBackward, "state_gradient", state_gradient, state_shape(q, v), state);
  check_result(kBackward, "gradient of slopes", gradients.slopes, {q.size(1)}, state);
  check_result(kBackward, "gradient of initial_state", gradients.initial_state, state_shape(q, v),
               state);
  with_wide_type(q.dtype(), [&]<class T>(T) {
    run_backward<T>(q, k, v, out_gradient, state_gradient, gradients, options, run);
  });
}

LightningGradients lightning_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out_gradient,
                                                const Tensor& state_gradient,
                                                const LightningOptions& options,
                                                const RunOptions& run) {
  check(q, k, v, options);
  const DType state = wide_type(q.dtype());
  LightningGradients result{empty_like(q), empty_like(k), empty_like(v), {}, {}};
  if (options.slopes.defined()) result.slopes = Array(state, {q.size(1)});
  if (options.initial_state.defined()) result.initial_state = Array(state, state_shape(q, v));
  lightning_attention_backward(q, k, v, out_gradient, state_gradient,
                               {result.q, result.k, result.v, result.slopes, result.initial_state},
                               options, run);
  return result;
}

}  // namespace heed
