#include "engine/operands.h"
#include "engine/tiled/problem.h"
#include "heed/affine_scaled_attention.h"
#include "mechanisms/affine_scaled/mean_mix.h"
#include "mechanisms/parameter.h"
#include "mechanisms/results.h"

namespace heed {

namespace {

constexpr const char* kOp = "affine_scaled_attention";

struct Call {
  affine_scaled::Inputs inputs;
  tiled::Problem problem;
};

// `out` is the result or its gradient; `softmax` (undefined: `out`) and `lse` are where the engine writes,
// or wrote.
Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
               const Tensor& alpha_mean, const Tensor& out, const Tensor& softmax,
               const Tensor& lse, const AffineScaledOptions& options, const RunOptions& run) {
  tiled::check_operands(kOp, q, k, v, out, lse);
  if (softmax.defined()) {
    check_rows_like(kOp, "softmax_out", softmax, out.shape(), wide_type(q.dtype()));
  }
  check_parameter(kOp, "alpha", alpha, {q.size(0), q.size(1), q.size(2)}, q.dtype());
  check_parameter(kOp, "alpha_mean", alpha_mean, {q.size(1)}, q.dtype());
  Call call{{q, k, v, alpha, alpha_mean, {}, run}, {}};
  call.inputs.plans =
      tiled::TilePlan::from_masks(kOp, options.masks, q.size(0), q.size(2), k.size(2));
  call.problem.sequences =
      tiled::batch_sequences(q, k, v, softmax.defined() ? softmax : out, lse, call.inputs.plans);
  call.problem.scale = tiled::resolve_scale(kOp, options.scale, q.size(3));
  return call;
}

template <class T>
AffineScaledGradients gradients(const Tensor& grad_out, const Call& call, const Tensor& softmax_out,
                                const RunOptions& run) {
  const affine_scaled::Inputs& in = call.inputs;
  AffineScaledGradients to;
  to.q = Array(in.q.dtype(), in.q.shape());
  to.k = Array(in.k.dtype(), in.k.shape());
  to.v = Array(in.v.dtype(), in.v.shape());
  affine_scaled::MeanMix<T> mix(in);
  const DType wide = dtype_of<T>;
  // The engine multiplies bfloat16 rows with bfloat16 rows; float16 might overflow where float32 does not.
  Array scaled(in.q.dtype() == DType::bf16 ? DType::bf16 : wide, grad_out.shape());
  mix.scale_gradients(grad_out, softmax_out, scaled);
  // The two parts of v's gradient may cancel: they meet before they are rounded.
  Array wide_v;
  if (is_half(in.v.dtype())) wide_v = Array(wide, in.v.shape());
  const Tensor through_softmax = is_half(in.v.dtype()) ? wide_v.view() : to.v.view();
  tiled::backward(call.problem, tiled::batch_gradients(scaled, {}, to.q, to.k, through_softmax),
                  nullptr, run);
  mix.add_mean_gradients(through_softmax, to.v);
  to.alpha = mix.alpha_gradient();
  to.alpha_mean = mix.alpha_mean_gradient();
  return to;
}

}  // namespace

void affine_scaled_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
                             const Tensor& alpha_mean, const Tensor& out, const Tensor& softmax_out,
                             const Tensor& lse, const AffineScaledOptions& options,
                             const RunOptions& run) {
  // Near the mean of the values their difference has few bits left: it meets the mean before it is rounded.
  Array own;
  if (!softmax_out.defined() && is_half(out.dtype())) own = Array(DType::f32, out.shape());
  const Tensor softmax = softmax_out.defined() ? softmax_out : own.view();
  const Call call = make_call(q, k, v, alpha, alpha_mean, out, softmax, lse, options, run);
  tiled::forward(call.problem, run);
  const Tensor& mixed = softmax.defined() ? softmax : out;
  with_wide_type(q.dtype(),
                 [&]<class T>(T) { affine_scaled::MeanMix<T>(call.inputs).mix(mixed, out); });
}

Array affine_scaled_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& alpha, const Tensor& alpha_mean,
                              const AffineScaledOptions& options, const RunOptions& run) {
  Array out = empty_result(q, v);
  affine_scaled_attention(q, k, v, alpha, alpha_mean, out, {}, {}, options, run);
  return out;
}

AffineScaledGradients affine_scaled_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
    const Tensor& alpha_mean, const Tensor& softmax_out, const Tensor& lse,
    const AffineScaledOptions& options, const RunOptions& run) {
  if (!softmax_out.defined() || !lse.defined()) {
    fail(kOp, "softmax_out or lse is missing", "the backward needs what the forward returned");
  }
  check_grad_out(kOp, grad_out, q, v);
  const Call call = make_call(q, k, v, alpha, alpha_mean, grad_out, softmax_out, lse, options, run);
  return with_wide_type(q.dtype(),
                        [&]<class T>(T) { return gradients<T>(grad_out, call, softmax_out, run); });
}

}  // namespace heed
